"""Does every way to train give the same numbers here? Trains a few steps in each and compares it with the plain way.

In comes a run's settings, of which a small model is made; out go rows: a check, its errors, its tolerance. The plain
way is one device that reads each batch at once, one example a row. What is compared is

    loss         of each step, the largest difference relative to the plain one
    parameters   after the steps, the largest difference relative to the plain run's largest change of a parameter
    logits       the largest difference relative to the largest logit

The optimizer is SGD without momentum: Adam divides a gradient by its size, which hides a wrong scale. Batches are
random tokens, and devices hold unequal numbers of them, some none. Matrix products have all of float32's bits.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import optax

from transformer_jax import host
from transformer_jax.config import (
    DataConfig,
    LossConfig,
    Mode,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    StrategyName,
)
from transformer_jax.data.batches import PackedRows
from transformer_jax.data.examples import FixedExamples, generator
from transformer_jax.data.objectives import ARRANGEMENTS, room_of
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import SPECIAL, make_tokenizer
from transformer_jax.model.cache import Cache, Room
from transformer_jax.model.transformer import Transformer
from transformer_jax.objective import make_loss
from transformer_jax.partition import Partitioner, mesh_shape
from transformer_jax.run import example_inputs
from transformer_jax.step import TrainState, train_step
from transformer_jax.tokens import Batch

Tree = Any
Errors = dict[str, float]

ONE_DEVICE = ParallelConfig(strategy="jit")
STEPS = 3
FIRST_CHANGE = 0.03  # the largest of a parameter: far above float32's rounding of it, and far from divergence
LEAST_ROWS = 16
TOLERANCES = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 5e-2}
# Where a value crosses a kink at 0 by rounding, its gradient jumps, and float32 tells nothing of devices.
SMOOTH = {"relu": "gelu"}
# What a check changes of the model, in the plain way and in its own.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropless": dict(num_experts=4, experts_per_token=2),
    "capacity": dict(num_experts=4, experts_per_token=2, expert_capacity=1.0),
    "dropout": dict(dropout_rate=0.1, attention_dropout_rate=0.1),
}


def small(config: ModelConfig) -> ModelConfig:
    """The same kind of model at a size that compiles in seconds: every choice stays, numbers become small ones."""
    heads = min(config.num_heads, 8)
    grouped = max(heads * config.num_kv_heads // config.num_heads, min(2, config.num_kv_heads))
    return config.replace(
        vocab_size=96,
        d_model=min(config.d_model, 128),
        num_layers=2 * len(config.windows),
        num_encoder_layers=len(config.encoder_windows),
        num_heads=heads,
        num_kv_heads=math.gcd(heads, grouped),
        head_dim=min(config.head_dim, 32),
        d_ff=min(config.d_ff, 256),
        max_length=64,
        windows=tuple(min(window, 8) for window in config.windows),
        encoder_windows=tuple(min(window, 8) for window in config.encoder_windows),
        activation=SMOOTH.get(config.activation, config.activation),
        query_scale=None,  # T5's 1 makes attention so sharp that float32's own errors are beyond 1e-5
        num_experts=0,
        experts_per_token=None,
        num_shared_experts=0,
        expert_capacity=0.0,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        scan_layers=False,
        remat="none",
    )


def stacked(params: Tree, config: ModelConfig) -> Tree:
    """Parameters of a model whose layers are one after the other as those of one that scans over them."""

    def stack(name: str) -> Tree:
        part, rounds = params[name], len(config.of_stack(name).windows)
        count = sum(name.startswith("block_") for name in part)
        rest = {name: leaf for name, leaf in part.items() if not name.startswith("block_")}
        blocks = {
            f"block_{first}": jax.tree.map(
                lambda *each: np.stack(each), *(part[f"block_{layer}"] for layer in range(first, count, rounds))
            )
            for first in range(rounds)
        }
        return rest | {"layers": blocks}

    return params | {name: stack(name) for name in ("encoder", "decoder") if name in params}


class Trained(NamedTuple):
    """What training left: the loss of each step, the parameters after the last, and the learning rate."""

    losses: np.ndarray
    params: Tree
    rate: float


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is verified: a model of one mode, its loss, and the rows of a batch."""

    config: ModelConfig
    loss: LossConfig
    rows: int

    def model(self, name: str) -> ModelConfig:
        """The model that a check changes as the row of MODELS says."""
        return self.config.replace(**MODELS[name])


def batches(config: ModelConfig, rows: int, packed: bool) -> list[Batch]:
    """Of each step a batch of random examples: one a row, and a fifth of the rows empty; or packed into the first."""
    lengths = DataConfig(source_length=24, target_length=32)
    tokenizer, room = make_tokenizer("char", 0, lambda: [""]), room_of(config, lengths)
    bidirectional = config.prefix_attention == "bidirectional"

    def placed(examples: FixedExamples, count: int) -> Batch:
        found = PackedRows(examples, ARRANGEMENTS[config.mode], tokenizer, room, bidirectional)
        return found.batch(np.pad(np.arange(len(found)), (0, count - len(found)), constant_values=-1), 0)

    def drawn(random: np.random.Generator) -> Batch:
        def texts(least: int, most: int) -> Ragged:
            sizes = random.integers(least, most, rows - rows // 5)
            return Ragged.of(
                [random.integers(len(SPECIAL), config.vocab_size, size).astype(np.int32) for size in sizes]
            )

        pairs = FixedExamples(texts(0, 24), texts(1, 32))
        if packed:
            return placed(pairs, rows)
        alone = [FixedExamples(*pairs.make(np.array([index]), 0)) for index in range(len(pairs.sources))]
        nothing = FixedExamples(*pairs.make(np.zeros(0, np.int64), 0))
        parts = [*(placed(pair, 1) for pair in alone), placed(nothing, rows // 5)]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    return [drawn(generator(step)) for step in range(STEPS)]


@functools.cache
def first_params(config: ModelConfig) -> Tree:
    """The parameters that every way of a check starts from."""
    params = jax.jit(Transformer(config).init)(jax.random.key(0), *example_inputs(config))["params"]
    return jax.tree.map(np.asarray, params)


def train(
    subject: Subject,
    config: ModelConfig,
    params: Tree,
    rate: float | None = None,
    parallel: ParallelConfig = ONE_DEVICE,
    accumulate: int = 1,
    packed: bool = False,
) -> Trained:
    """Trains a few steps in one way, from these parameters; without a rate with one that suits the first gradient."""
    model, sgd, partitioner = Transformer(config), optax.inject_hyperparams(optax.sgd), Partitioner.create(parallel)

    def start(params: Tree, rate: float) -> TrainState:
        return TrainState.create(params, sgd(learning_rate=rate), 0)

    loss = make_loss(model, subject.loss)
    step = functools.partial(train_step, loss=loss, optimizer=sgd(learning_rate=1.0), accumulate=accumulate)
    state = partitioner.init(start, params, np.float32(1.0 if rate is None else rate))
    program, losses = partitioner.step(step, state), []
    drawn = [partitioner.put(batch) for batch in batches(config, subject.rows, packed)]
    if rate is None:
        rate = FIRST_CHANGE / largest(minus(program(state, drawn[0])[0].params, params))
        state = partitioner.init(start, params, np.float32(rate))
    for batch in drawn:
        state, metrics = program(state, batch)
        losses.append(float(metrics["loss"]))
    return Trained(np.array(losses), jax.tree.map(np.asarray, state.params), rate)


@functools.cache
def plainly(subject: Subject, name: str) -> Trained:
    """The plain way: one device that reads each batch at once, one example a row."""
    config = subject.model(name)
    return train(subject, config, first_params(config))


def largest(tree: Tree) -> float:
    """The largest size of a number in a tree; NaN where there is one."""
    return float(np.max([np.abs(np.asarray(leaf, np.float64)).max() for leaf in jax.tree.leaves(tree)]))


def minus(left: Tree, right: Tree) -> Tree:
    return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), left, right)


def trained(
    strategy: StrategyName = "jit",
    mesh: str = "data=1",
    model: str = "plain",
    accumulate: int = 1,
    packed: bool = False,
    **changes: Any,
) -> Callable[[Subject], Errors]:
    """A check of a way to train: `changes` are those fields of the model that must not change its numbers."""

    def errors(subject: Subject) -> Errors:
        plain, config = subject.model(model), subject.model(model).replace(**changes)

        def arranged(params: Tree) -> Tree:
            return stacked(params, config) if config.scan_layers else params

        before, wanted = first_params(plain), plainly(subject, model)
        parallel = ParallelConfig(strategy=strategy, mesh=mesh)
        got = train(subject, config, arranged(before), wanted.rate, parallel, accumulate, packed)
        return {
            "loss": float(np.max(np.abs(got.losses / wanted.losses - 1))),
            "parameters": largest(minus(got.params, arranged(wanted.params))) / largest(minus(wanted.params, before)),
        }

    return errors


def decoded(subject: Subject) -> Errors:
    """A check of the cache: a first part of each row at once, then token by token."""
    model, params = Transformer(subject.config), plainly(subject, "plain").params
    batch = batches(subject.config, subject.rows, packed=False)[0]
    variables, target = {"params": params}, batch.target
    full_BTV = np.asarray(jax.jit(model.apply)(variables, target, batch.source))
    memory = jax.jit(functools.partial(model.apply, method="encode"))(variables, batch.source)
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    # a prefix that sees all of itself must come at once
    first = 8 if target.prefix is None else int(np.flatnonzero(target.prefix.any(0)).max()) + 1
    (B, T), cuts = target.ids.shape, [0, *range(first, target.ids.shape[1] + 1)]
    cache, pieces = Cache.empty(subject.config, B, Room(T, chunk=first)), []
    for part in itertools.starmap(slice, itertools.pairwise(cuts)):
        piece = jax.tree.map(operator.itemgetter(np.s_[:, part]), target)
        logits_BTV, cache = decode(variables, piece, memory, cache)
        pieces.append(np.asarray(logits_BTV))
    real_BT = target.segments > 0
    return {"logits": largest((np.concatenate(pieces, 1) - full_BTV)[real_BT]) / largest(full_BTV[real_BT])}


class Check(NamedTuple):
    """A way that must not change the numbers.

    Attributes:
        name: what is done.
        against: what it is compared with.
        devices: how many it needs.
        errors: measures it.
        mesh: the mesh that it is done on, -1 for the rest of the devices.
    """

    name: str
    against: str
    devices: int
    errors: Callable[[Subject], Errors]
    mesh: str = ""

    def named(self, devices: int) -> str:
        """The name with the sizes of the mesh."""
        if not self.mesh:
            return self.name
        parallel = ParallelConfig(mesh=self.mesh)
        sizes = mesh_shape(parallel, devices) if devices >= self.devices else parallel.axes
        return self.name + ",".join(f"{axis}={sizes[axis]}" for axis in parallel.axes)


def on_mesh(mesh: str, devices: int, name: str = "", **way: Any) -> Check:
    """A check of a mesh against one device."""
    return Check(name, "one device", devices, trained("mesh", mesh, **way), mesh)


CHECKS = (
    Check("pmap", "one device", 2, trained("pmap")),
    on_mesh("data=-1", 2),
    on_mesh("fsdp=-1", 2),
    on_mesh("data=-1,tensor=2", 2),
    on_mesh("data=-1,context=2", 2),
    on_mesh("data=-1,fsdp=2,tensor=2", 4),
    on_mesh("fsdp=-1", 2, "2 microbatches: ", accumulate=2),
    on_mesh("data=-1,fsdp=2,tensor=2", 4, "scan, remat: ", scan_layers=True, remat="dots"),
    on_mesh("data=-1,expert=2", 2, "dropless experts: ", model="dropless"),
    on_mesh("data=-1,expert=2", 2, "capped experts: ", model="capacity"),
    on_mesh("data=-1", 2, "dropout: ", model="dropout"),
    on_mesh("data=-1,fsdp=2,tensor=2", 4, "dropout: ", model="dropout"),
    Check("2 microbatches", "whole batch", 1, trained(accumulate=2)),
    Check("4 microbatches", "whole batch", 1, trained(accumulate=4)),
    Check("remat dots", "no remat", 1, trained(remat="dots")),
    Check("remat full", "no remat", 1, trained(remat="full")),
    Check("scan over layers", "no scan", 1, trained(scan_layers=True)),
    Check("packed rows", "one a row", 1, trained(packed=True)),
    Check("logits of cached decoding", "full pass", 1, decoded),
)


class Row(NamedTuple):
    """A check's outcome in one mode: `skipped` says why it was not made, and is empty where it was."""

    check: str
    mode: str
    against: str
    errors: Errors
    tolerance: float
    skipped: str = ""

    @property
    def result(self) -> str:
        """`ok`, `wrong` or `skipped`. An error that is NaN is wrong."""
        if self.skipped:
            return "skipped"
        return "ok" if all(error <= self.tolerance for error in self.errors.values()) else "wrong"


def verify(run: RunConfig) -> Iterator[Row]:
    """Makes every check that the number of devices allows, in both modes."""
    devices, config = jax.device_count(), small(run.model)
    rows = math.lcm(4, devices)  # so that parts are equal, on all devices and of 4 microbatches
    rows *= -(-LEAST_ROWS // rows)
    tolerance = max(TOLERANCES[kind] for kind in (config.dtype, config.param_dtype))
    for mode in get_args(Mode):
        subject = Subject(config.replace(mode=mode), run.loss, rows)
        for check in CHECKS:
            row = Row(check.named(devices), mode, check.against, {}, tolerance)
            if devices < check.devices:
                yield row._replace(skipped=f"needs {check.devices} devices")
                continue
            with jax.default_matmul_precision("highest"):
                yield row._replace(errors=check.errors(subject))


def simulate(devices: int) -> None:
    """Makes this process's CPU play so many devices, which must not have been used before (InputError)."""
    host.simulate(devices)
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all of the time here goes into compiling


COLOURS = {"ok": "green", "wrong": "bold red", "skipped": "dim"}
ABOUT = f"""\
Each row trains {STEPS} steps of a small model in one way, and in the plain way that it is compared with. Loss: the
largest difference of a step's loss, relative to it. Params: the largest difference after the steps, relative to the
largest change that they made. Logits: the largest difference, relative to the largest logit."""


def _table(mode: str, rows: list[Row]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=mode, box=SIMPLE, padding=(0, 1, 0, 0))  # fits 80 columns
    for column in ("check", "compared with", "loss", "params", "result"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        first, second = [*(f"{error:.1e}" for error in row.errors.values()), "", ""][:2]
        table.add_row(row.check, row.skipped or row.against, first, second, row.result, style=COLOURS[row.result])
    return table


def report(run: RunConfig, rows: Iterator[Row]) -> list[Row]:
    """Prints the rows as tables on stdout and, while they are made, each as a line on stderr; returns them."""
    from rich.console import Console

    console, progress, made = Console(highlight=False), Console(stderr=True, highlight=False), []
    kind = f"{run.recipe} on {jax.device_count()} x {jax.devices()[0].device_kind}"
    with progress.status(kind) as status:
        for row in rows:
            made.append(row)
            status.update(f"{kind}: {row.mode}, {row.check}: {row.result}")
    for mode in get_args(Mode):
        console.print(_table(mode, [row for row in made if row.mode == mode]))
    console.print(ABOUT.replace("\n", " "))
    counts = ", ".join(f"{sum(row.result == result for row in made)} {result}" for result in COLOURS)
    console.print(f"\n{kind}, {run.model.dtype}: {counts}. An error is wrong beyond {made[0].tolerance:.0e}.")
    return made
