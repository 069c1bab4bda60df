"""A run's settings -> its first state and its step; and a trained run, as users hold it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer_jax.checkpoint import Checkpoints, restore_params, sound_unit
from transformer_jax.config import ModelConfig, RunConfig
from transformer_jax.config_file import read_config, to_json
from transformer_jax.data.load import check_vocabulary
from transformer_jax.data.objectives import ARRANGEMENTS
from transformer_jax.data.tokenizer import TOKENIZER, Tokenizer, papers_of, read_tokenizer
from transformer_jax.errors import InputError, StorageError
from transformer_jax.model.int8 import int8_weights
from transformer_jax.model.transformer import Transformer
from transformer_jax.objective import make_loss
from transformer_jax.optimizer import make_optimizer
from transformer_jax.partition import Partitioner
from transformer_jax.step import Metrics, TrainState, train_step
from transformer_jax.tokens import Tokens
from transformer_jax.tuning import join, split

ADAPTERS = 0x10AA  # what is folded into the key of the parameters for those of adapters
ONE_DEVICE = Partitioner("jit", None)
CONFIG, CHECKPOINTS = "config.json", "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """What `load_run` returns.

    Attributes:
        config: all settings of the run.
        model: the Transformer.
        params: its parameters, those that evaluation uses.
        tokenizer: text <-> ids; None where an imported model has none.
        step: the number of updates that made the parameters.
        adapters: LoRA's, which `params` have in them; None where there are none.
    """

    config: RunConfig
    model: Transformer
    params: Any
    tokenizer: Tokenizer | Any
    step: int
    adapters: Any = None


def example_inputs(config: ModelConfig, batch_size: int = 1, length: int = 2) -> tuple[Tokens, Tokens | None]:
    """Inputs of the right form for `init`, all ones: (target, source or None)."""
    tokens = Tokens.from_ids(jnp.ones((batch_size, length), jnp.int32))
    return tokens, tokens if ARRANGEMENTS[config.mode].has_source else None


def abstract_params(config: ModelConfig, partitioner: Partitioner = ONE_DEVICE) -> Any:
    """The parameters' shapes, types and places, without memory."""
    target, source = example_inputs(config)
    return partitioner.abstract(Transformer(config).init, jax.random.key(0), target, source)["params"]


def first_state(config: RunConfig, key: jax.Array, params: Any = None) -> TrainState:
    """The state before the first step, a pure function of the key and of the model's parameters, where there are any
    to start from."""
    if params is None:
        params = Transformer(config.model).init(key, *example_inputs(config.model))["params"]
    params, frozen = split(params, config.tuning, jax.random.fold_in(key, ADAPTERS))
    optimizer = make_optimizer(config.optimizer, config.steps)
    keeps = dict(ema=config.optimizer.ema_decay > 0, norms=config.optimizer.spike_factor > 0)
    return TrainState.create(params, optimizer, config.seed, frozen=frozen, **keeps)


def join_of(config: RunConfig) -> Callable[[Any, Any], Any]:
    """(what is trained, what stays) -> the model's parameters."""
    return functools.partial(join, config=config.tuning)


def step_of(config: RunConfig) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics) of a run."""
    return functools.partial(
        train_step,
        loss=make_loss(Transformer(config.model), config.loss),
        optimizer=make_optimizer(config.optimizer, config.steps),
        accumulate=config.optimizer.accumulate,
        ema_decay=config.optimizer.ema_decay,
        spike_factor=config.optimizer.spike_factor,
        join=join_of(config),
    )


def load_run(folder: str | Path, checkpoint: str = "newest", partitioner: Partitioner = ONE_DEVICE) -> Run:
    """A run's checkpoint, ready to use: the `newest` sound one, the `best` by validation, or that of a step.

    Whatever strategy it was trained with, its parameters come to be where `partitioner` has them. It writes nothing, so
    it can be called while the run goes on. A damaged checkpoint is passed over with a warning.

    Raises:
        InputError: the folder is no run's, or has no such checkpoint.
        CheckpointError: no checkpoint can be used.
    """
    folder = Path(folder)
    for name in (CONFIG, TOKENIZER, CHECKPOINTS):
        if not (folder / name).exists():
            raise InputError(f"{folder}: not a run's folder, or one without a checkpoint yet: it has no {name}.")
    unit = sound_unit(folder / CHECKPOINTS, checkpoint, read_config(folder / CONFIG).checkpoint.best)
    config = read_config(unit / CONFIG)
    tokenizer = read_tokenizer(unit, config.data.special.ids)
    check_vocabulary(config.model, tokenizer, config.data.special)
    shapes = partitioner.abstract(functools.partial(first_state, config), jax.random.key(0))
    trained, stays = restore_params(unit, shapes.params, shapes.frozen)
    params, adapters = join_of(config)(trained, stays), trained if config.tuning.lora else None
    return Run(config, Transformer(config.model), params, tokenizer, int(unit.name), adapters)


def save_run(folder: Path, run: Run, facts: dict[str, Any]) -> None:
    """A run with one checkpoint, of its parameters, that `load_run` reads, in a new folder.

    Raises:
        StorageError: it cannot be written.
    """
    from transformer_jax.resume import write_papers

    papers = papers_of(run.tokenizer) | {CONFIG: to_json(run.config)}
    state = TrainState.create(run.params, optax.identity(), run.config.seed)
    with Checkpoints(folder / CHECKPOINTS, run.config.checkpoint) as checkpoints:
        checkpoints.open()
        checkpoints.save(run.step, state, papers, {"data": {}, "scores": {}} | facts)
        checkpoints.wait()
        if failures := checkpoints.failures():
            raise StorageError(f"{folder}: cannot be written: {' '.join(str(failures[0][1]).split())[:300]}.")
        write_papers(folder, papers)


def in_int8(run: Run, partitioner: Partitioner = ONE_DEVICE) -> Run:
    """The run with its weights in 8 bits, for evaluation and decoding: see `int8_weights`."""
    return dataclasses.replace(run, params=partitioner.made(int8_weights, run.params))
