"""A model as a table, before anything is compiled: each part, its output's shape, parameters, FLOPs and memory."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from transformer_jax.axes import path_names, sizes
from transformer_jax.config import RunConfig
from transformer_jax.data.objectives import ARRANGEMENTS, room_of
from transformer_jax.model.attention import Attention
from transformer_jax.model.layers import Einsum, Embedding
from transformer_jax.model.transformer import Block, Transformer
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
    model, room = Transformer(run.model), room_of(run.model, run.data)
    parts: dict[tuple[str, ...], Part] = {}

    def part(path: Sequence[str]) -> Part:
        return parts.setdefault(_depth(path), Part(".".join(_depth(path))))

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, result = context.module, call(*args, **kwargs)
        path: Sequence[str] = module.path
        if not path or context.method_name not in ("__call__", "attend", "finished"):
            return result
        if isinstance(module, Einsum) and context.method_name == "finished":
            part(path).flops += _einsum_flops(module, args[0].shape)
            part(path).bytes += result.size * result.dtype.itemsize
        if isinstance(module, Attention):
            part(path).flops += _attention_flops(module, args[0], args[1])
        if isinstance(module, Embedding) and context.method_name == "attend":
            row = parts.setdefault(("logits (tied)",), Part("logits (tied)"))
            row.flops += 2.0 * args[0].size * run.model.vocab_size
            row.shape, row.bytes = str(list(result.shape)), result.size * result.dtype.itemsize
        elif len(_depth(path)) == len([p for p in path if not p.startswith("block_")]) and not isinstance(
            module, Block
        ):
            first = result[0] if isinstance(result, tuple) else result
            if hasattr(first, "shape"):
                part(path).shape = str(list(first.shape))
        return result

    def forward(key: jax.Array) -> Any:
        def tokens(length: int) -> Tokens:
            return Tokens.from_ids(jnp.ones((batch_size, length), jnp.int32))

        source = tokens(room.source) if ARRANGEMENTS[run.model.mode].has_source else None
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
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.2f} {letter}{unit}"
    return f"{count:.0f} {unit}".strip()


def describe(run: RunConfig) -> None:
    """Prints the table for one batch of full rows, on stdout.

    Where the vocabulary is the tokenizer's to decide and there is none yet, data.tokenizer_size stands for it.
    """
    from rich.console import Console
    from rich.table import Table

    if run.model.vocab_size is None:
        run = dataclasses.replace(run, model=run.model.replace(vocab_size=run.data.tokenizer_size))
    batch, model = run.batch_size // run.optimizer.accumulate, run.model
    parts, room = measure(run, batch), room_of(run.model, run.data)
    width = f"{room.source} + {room.target}" if room.source else str(room.target)
    shape = f"{model.num_layers} layers, vocabulary {model.vocab_size:,}, batch {batch} x {width}"
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
