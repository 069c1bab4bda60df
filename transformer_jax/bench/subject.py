"""What the benchmarks of training measure: a model, a batch of random tokens in full rows, and the step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from transformer_jax.config import LossConfig, ModelConfig, OptimizerConfig
from transformer_jax.data.objectives import ARRANGEMENTS, Room
from transformer_jax.describe import measure_model
from transformer_jax.model.transformer import Transformer
from transformer_jax.objective import Loss, make_loss
from transformer_jax.optimizer import make_optimizer
from transformer_jax.recipes import find_recipe
from transformer_jax.run import ONE_DEVICE, example_inputs
from transformer_jax.step import TrainState, train_step
from transformer_jax.tokens import Batch, Tokens

TINY = find_recipe("shakespeare-char").model.replace(vocab_size=65)  # nanoGPT's model of characters on a CPU
ADAMW = OptimizerConfig(learning_rate=1e-3, b2=0.95, weight_decay=0.1, schedule="constant", warmup_steps=0, clip_norm=0)


class Subject(NamedTuple):
    """A model and its batches: rows of `length` tokens, on either side where there are two."""

    config: ModelConfig
    batch: int
    length: int

    def draw(self, seed: int = 0) -> Batch:
        """A batch of random tokens, all of which count."""
        draw, shape = np.random.default_rng(seed), (self.batch, self.length)

        def tokens() -> Tokens:
            places = np.broadcast_to(np.arange(self.length, dtype=np.int32), shape).copy()
            return Tokens(ids(), np.ones(shape, np.int32), places)

        def ids() -> np.ndarray:
            return draw.integers(0, self.config.vocab_size, shape, dtype=np.int32)

        source = tokens() if ARRANGEMENTS[self.config.mode].has_source else None
        return Batch(tokens(), ids(), np.ones(shape, np.float32), source)

    def first(self, key: jax.Array) -> TrainState:
        """The state before the first step, a pure function of the key."""
        params = Transformer(self.config).init(key, *example_inputs(self.config))["params"]
        return TrainState.create(params, make_optimizer(ADAMW, 1000), 0)

    def parts(self, config: LossConfig | None = None) -> tuple[Loss, optax.GradientTransformation]:
        """The loss and the optimizer."""
        return make_loss(Transformer(self.config), config or LossConfig()), make_optimizer(ADAMW, 1000)

    def step(self) -> tuple[TrainState, Callable[..., Any]]:
        """The state before the first step, and `train_step(state, batch)`."""
        loss, optimizer = self.parts()
        return self.state(), functools.partial(train_step, loss=loss, optimizer=optimizer)

    def state(self) -> TrainState:
        """The state before the first step, on the device."""
        return ONE_DEVICE.init(self.first, jax.random.key(0))

    @property
    def flops(self) -> float:
        """FLOPs of a step's matrix products: three times the forward pass, nothing of it computed again."""
        room = Room(self.length if ARRANGEMENTS[self.config.mode].has_source else 0, self.length)
        return 3 * sum(part.flops for part in measure_model(self.config, self.batch, room))

    @property
    def tokens(self) -> int:
        """Tokens that a step reads, on both sides."""
        return self.batch * self.length * (2 if ARRANGEMENTS[self.config.mode].has_source else 1)
