"""What the examples learn: a few digits -> the same backwards. Batches are drawn on the device, in both modes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import transformer_jax as tj

ROWS, LENGTH = 32, 8
PAD, START, END = 0, 10, 11  # between them the digits 1 to 9
TINY = tj.ModelConfig(
    vocab_size=12, d_model=32, num_layers=1, num_encoder_layers=1, num_heads=4, d_ff=64, max_length=32
)


def draw(key: jax.Array, mode: tj.Mode) -> tj.Batch:
    """Rows of 3 to 8 digits. Without an encoder they stand in front of what is to be said, and carry no loss."""
    numbers, lengths = jax.random.split(key)
    kept = jnp.arange(LENGTH) >= jax.random.randint(lengths, (ROWS, 1), 0, LENGTH - 2)
    digits = jnp.where(kept, jax.random.randint(numbers, (ROWS, LENGTH), 1, 10), PAD)  # padding comes first
    backwards = jnp.pad(digits[:, ::-1], ((0, 0), (0, 1)))
    read = jnp.pad(backwards[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    weights = jnp.where(read == PAD, 0.0, 1.0)
    labels = jnp.where((read != PAD) & (backwards == PAD), END, backwards)
    if mode == "encoder-decoder":
        return tj.Batch(tj.Tokens.from_ids(read, PAD), labels, weights, tj.Tokens.from_ids(digits, PAD))
    labels, weights = (jnp.pad(x, ((0, 0), (LENGTH, 0))) for x in (labels, weights))
    return tj.Batch(tj.Tokens.from_ids(jnp.concatenate([digits, read], 1), PAD), labels, weights)


@functools.partial(jax.jit, static_argnums=0)
def init(model: tj.Transformer, seed: Any = 0) -> Any:
    """Its parameters before the first step."""
    batch = draw(jax.random.key(seed), model.config.mode)
    return model.init(jax.random.key(seed), batch.target, batch.source)["params"]


@functools.partial(jax.jit, static_argnames=("steps", "mode", "loss", "optimizer"))
def train(
    params: Any, steps: int, mode: tj.Mode, loss: tj.Loss, optimizer: optax.GradientTransformation, seed: Any = 0
) -> tuple[Any, jax.Array]:
    """Parameters after so many steps, and the loss of each: one compiled program."""

    def step(state: tj.TrainState, key: jax.Array) -> tuple[tj.TrainState, jax.Array]:
        state, metrics = tj.train_step(state, draw(key, mode), loss=loss, optimizer=optimizer)
        return state, metrics["loss"]

    state = tj.TrainState.create(params, optimizer, seed)
    state, losses = jax.lax.scan(step, state, jax.random.split(jax.random.key(seed + 1), steps))
    return state.params, losses
