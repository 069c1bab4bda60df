"""A model as a table, before anything is compiled: each part, its output's shape, parameters, FLOPs and memory."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from transformer_jax.accelerators import Accelerator
from transformer_jax.axes import path_names, sizes
from transformer_jax.config import ModelConfig, RunConfig
from transformer_jax.data.objectives import ARRANGEMENTS, Room, room_of, with_batch_size
from transformer_jax.model.attention import Attention
from transformer_jax.model.layers import Einsum
from transformer_jax.model.transformer import Block, Transformer
from transformer_jax.roofline import Plan
from transformer_jax.tokens import Tokens


@dataclasses.dataclass
class Part:
    """One row of the table. FLOPs are of the forward pass, two for each multiply-add of a matrix product."""

    name: str
    shape: str = ""
    parameters: int = 0
    flops: float = 0.0
    bytes: int = 0


ORDER = ("embedding", "source_embedding", "encoder", "decoder", "output", "logits (tied)")


def _depth(path: Sequence[str]) -> tuple[str, ...]:
    """The row that a module belongs to: top-level parts, and the sublayers of a stack's blocks, all blocks together."""
    if len(path) > 1 and path[1].startswith("block_"):
        return (path[0], *path[2:3])
    return tuple(path[:2] if path[0] in ("encoder", "decoder") else path[:1])


def _einsum_flops(module: Einsum, shape: Any) -> float:
    inputs, y_axes = str(module.spec).split("->")
    x_axes, w_axes = inputs.split(",")
    lengths = sizes(module.config) | dict(zip(y_axes, shape, strict=True))
    return 2.0 * np.prod([lengths[letter] for letter in set(x_axes + w_axes)])


def _attention_flops(module: Attention, q: Any, kv: Any) -> float:
    """Scores and weighted values over all pairs of positions; a causal mask leaves half of them, which is not taken."""
    B, T = q.shape[:2]
    return 4.0 * B * T * kv.k_BSGK.shape[1] * module.config.num_heads * module.config.head_dim


def measure(run: RunConfig, batch_size: int) -> list[Part]:
    """The rows of the table, for a batch of full rows, from shapes alone."""
    return measure_model(run.model, batch_size, room_of(run.model, run.data))


def measure_model(model_config: ModelConfig, batch_size: int, room: Room) -> list[Part]:
    """The parts of a model that reads so many rows of so many tokens."""
    config = model_config.replace(scan_layers=False, remat="none")  # each block is met once, whatever is looped over
    model = Transformer(config)
    parts: dict[tuple[str, ...], Part] = {}

    def part(path: Sequence[str]) -> Part:
        return parts.setdefault(_depth(path), Part(".".join(_depth(path))))

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, result = context.module, call(*args, **kwargs)
        path: Sequence[str] = module.path
        if isinstance(module, Transformer) and context.method_name == "features":
            logits = jax.ShapeDtypeStruct((*result[0].shape[:2], config.vocab_size), jnp.float32)
            row = part(("logits (tied)",) if config.tie_embeddings else ("output",))
            row.shape, row.bytes = str(list(logits.shape)), logits.size * logits.dtype.itemsize
            row.flops += 2.0 * result[0].size * logits.shape[-1]
        if not path or context.method_name not in ("__call__", "finished"):
            return result
        if isinstance(module, Einsum) and context.method_name == "finished":
            part(path).flops += _einsum_flops(module, args[0].shape)
            part(path).bytes += result.size * result.dtype.itemsize
        if isinstance(module, Attention):
            part(path).flops += _attention_flops(module, args[0], args[1])
        if len(_depth(path)) == len([p for p in path if not p.startswith("block_")]) and not isinstance(module, Block):
            first = result[0] if isinstance(result, tuple) else result
            if hasattr(first, "shape"):
                part(path).shape = str(list(first.shape))
        return result

    def forward(key: jax.Array) -> Any:
        def tokens(length: int) -> Tokens:
            return Tokens.from_ids(jnp.ones((batch_size, length), jnp.int32))

        source = tokens(room.source) if ARRANGEMENTS[config.mode].has_source else None
        return model.init(key, tokens(room.target), source)["params"]

    with nn.intercept_methods(watch):
        params = jax.eval_shape(forward, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = path_names(path)
        part(names).parameters += int(np.prod(leaf.shape, dtype=object))
    return list(parts.values())


CAPTION = "FLOPs: forward pass of one (micro)batch, 2 for a multiply-add. Bytes: outputs of matrix products."
OPTIMIZER_COPIES = defaultdict(lambda: 2, sgd=1, lion=1, adafactor=0, muon=2)


def _size(count: float, unit: str = "") -> str:
    if not count:
        return ""
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.2f} {letter}{unit}"
    return f"{count:.0f} {unit}".strip()


def with_vocabulary(run: RunConfig) -> RunConfig:
    """Where the vocabulary is the tokenizer's to decide and there is none yet, data.tokenizer_size stands for it."""
    run = with_batch_size(run)
    if run.model.vocab_size is not None:
        return run
    return dataclasses.replace(run, model=run.model.replace(vocab_size=run.data.tokenizer_size))


def _width(run: RunConfig) -> str:
    room = room_of(run.model, run.data)
    return f"{room.source} + {room.target}" if room.source else str(room.target)


def describe(run: RunConfig) -> None:
    """Prints the table for one batch of full rows, on stdout."""
    from rich.console import Console
    from rich.table import Table

    run = with_vocabulary(run)
    batch, model = run.batch_size // run.optimizer.accumulate, run.model
    parts = measure(run, batch)
    shape = f"{model.num_layers} layers, vocabulary {model.vocab_size:,}, batch {batch} x {_width(run)}"
    title = f"{run.recipe}: {model.mode}, {shape}"
    table = Table(title=title, caption=CAPTION)
    for column in ("part", "output", "parameters", "FLOPs", "bytes"):
        table.add_column(column, justify="left" if column in ("part", "output") else "right")
    parts = [row for row in parts if row.parameters or row.flops]
    for row in sorted(parts, key=lambda row: ORDER.index(row.name.split(".")[0])):
        parameters = f"{row.parameters:,}" if row.parameters else ""
        table.add_row(row.name, row.shape, parameters, _size(row.flops), _size(row.bytes, "B"))
    total = Part(
        "total", "", *(sum(getattr(row, field) for row in parts) for field in ("parameters", "flops", "bytes"))
    )
    table.add_section()
    table.add_row(total.name, "", f"{total.parameters:,}", _size(total.flops), _size(total.bytes, "B"))
    console = Console(soft_wrap=False)
    console.print(table)
    item = jnp.dtype(model.param_dtype).itemsize
    copies = OPTIMIZER_COPIES[run.optimizer.name]
    console.print(
        f"parameters {_size(total.parameters * item, 'B')}, gradients as many, optimizer "
        f"({run.optimizer.name}) {_size(total.parameters * item * copies, 'B')}; a training step takes about "
        f"{_size(3 * total.flops, 'FLOP')} a microbatch, three times the forward pass",
        highlight=False,
    )


def _seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{1000 * time:.3g} ms"


ROWS = {
    "optimizer": "optimizer ({run.optimizer.name})",
    "activations": "activations, gathered weights",
}
WIDTH = 112  # letters, of the tables of a plan in a file
PLANNED = (
    "Memory is at the peak of a step; that of activations is an estimate, XLA's for CPU with as many bytes a number. "
    "FLOPs count what is computed again for lack of memory or alike on several devices. Traffic, between a device and "
    "its memory, is the least: every matrix product reads its operands and writes its result once, the update the "
    "state. Bytes of collectives are sent, and as many received, by ring algorithms. A step takes at least the longest "
    "of its three times."
)


def describe_plan(run: RunConfig, plan: Plan, accelerators: Sequence[Accelerator]) -> None:
    """Prints what each device holds and does in a step, and what accelerators make of it, on stdout."""
    from rich.console import Console
    from rich.table import Table

    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "no mesh"
    parts = f"batch {run.batch_size:,} x {_width(run)} in {run.optimizer.accumulate} microbatches"
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(f"{run.recipe} on {plan.devices:,} devices ({mesh}), {parts}", highlight=False)
    table = Table("each device")
    table.add_column("a step", justify="right")
    for name, size in plan.memory.items():
        table.add_row(ROWS.get(name, name).format(run=run), _size(size, "B"))
    table.add_row("memory", _size(plan.total, "B"))
    table.add_section()
    again = plan.flops * plan.devices / plan.model_flops
    table.add_row(f"FLOPs, {again:.2f} times those of the model", _size(plan.flops))
    table.add_row("memory traffic", _size(plan.traffic, "B"))
    table.add_section()
    for each in plan.exchanges:
        table.add_row(f"{each.kind} over {', '.join(each.axes)} ({len(each.devices):,})", _size(each.moved(), "B"))
    console.print(table)

    table = Table("accelerator")
    for column in ("memory", "fits", "compute", "traffic", "exchange", "step"):
        table.add_column(column, justify="left" if column == "fits" else "right")
    for each in accelerators:
        left = each.memory_bytes - plan.total
        fits = f"yes, {_size(left, 'B')} left" if left >= 0 else f"no, {_size(-left, 'B')} missing"
        times = plan.seconds(each)
        cells = [_seconds(time) if time else "" for time in times.values()]
        binds = max(times, key=lambda name: times[name])
        table.add_row(each.name, _size(each.memory_bytes, "B"), fits, *cells, f"{_seconds(times[binds])} {binds}")
    console.print(table)
    console.print(PLANNED, highlight=False)
    if run.model.dtype != "bfloat16":
        console.print(f"The peaks are those of bfloat16; {run.model.dtype} computes slower.", highlight=False)
    if plan.simulated != plan.devices:
        console.print(
            f"Compiled for {plan.simulated:,} of the {plan.devices:,} devices: along data all of them run the same "
            "program on as much of the batch each, and only the groups that add up gradients are larger.",
            highlight=False,
        )
    if len(accelerators) == 1:
        console.print(f"{accelerators[0].name}: {accelerators[0].source}.", highlight=False)
