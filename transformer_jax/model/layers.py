"""The layers that own parameters: linear maps, norms, embeddings, feed-forward and the residual around a sublayer."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from transformer_jax.axes import axes_of, constrain, gathered, mesh_in_use, sizes, spec, split, varying
from transformer_jax.config import ModelConfig
from transformer_jax.model.float8 import matmul8
from transformer_jax.model.gradients import gelu, layer_norm, matmul, rms_norm, rows_of, scaled
from transformer_jax.model.int8 import Packed

Array = jax.Array
Multiply = Callable[[str, Array, Array, Any], Any]
MULTIPLY: dict[str, Multiply] = {"same": matmul, "float8": matmul8}


def dtype_of(config: ModelConfig) -> Any:
    return jnp.dtype(config.dtype)


def at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


PARTS = 4  # of the contraction of a vector and a matrix


Weight = Array | Packed


BLOCK = 2**20  # numbers of a weight in 8 bits of which XLA's CPU backend makes float32 at once: its caches hold them
FEW_ROWS = 64  # for which that is worth while; more share what it costs


def _packed_product(einsum: str, x: Array, w: Packed, dtype: Any, multiply: Multiply) -> Array:
    """The product with whole numbers, then the scale of each output."""
    w_axes, y_axes = einsum.partition(",")[2].split("->")
    kind = jnp.promote_types(x.dtype, jnp.float32)
    y = _block_by_block(einsum, x, w.values, kind, multiply)
    if y is None:
        y = product(einsum, x, w.values.astype(x.dtype), kind, multiply)
    scale = jnp.einsum(f"{w_axes}->{''.join(each for each in y_axes if each in w_axes)}", w.scale)  # 1 along the summed
    shape = [length if letter in w_axes else 1 for letter, length in zip(y_axes, y.shape, strict=True)]
    return (y * scale.reshape(shape)).astype(dtype or x.dtype)


def _block_by_block(einsum: str, x: Array, values: Array, kind: Any, multiply: Multiply) -> Array | None:
    """The product, a block of the weight's first axis at a time; None where that is no gain.

    Otherwise XLA would make the whole weight float32, and even keep it for all rounds of a loop over tokens.
    """
    (x_axes, w_axes), y_axes = einsum.partition("->")[0].split(","), einsum.partition("->")[2]
    first, length = w_axes[0], len(values)
    blocks = max(2, -(-values.size // BLOCK))
    if first in x_axes:  # it is summed, so blocks may not overlap
        blocks = next((n for n in range(blocks, 4 * blocks) if length % n == 0), 0)
    rows = x.size // math.prod(x.shape[x_axes.index(letter)] for letter in w_axes if letter not in y_axes)
    if jax.default_backend() != "cpu" or rows > FEW_ROWS or not blocks or (first in x_axes and first in y_axes):
        return None
    size = -(-length // blocks)
    shape = [x.shape[x_axes.index(each)] if each in x_axes else values.shape[w_axes.index(each)] for each in y_axes]

    def add(number: Array, y: Array) -> Array:
        start = jnp.minimum(number * size, length - size)
        part = jax.lax.dynamic_slice_in_dim(values, start, size).astype(x.dtype)
        if first in y_axes:
            found = product(einsum, x, part, kind, multiply)
            return jax.lax.dynamic_update_slice_in_dim(y, found, start, y_axes.index(first))
        part_of_x = jax.lax.dynamic_slice_in_dim(x, start, size, x_axes.index(first))
        return y + product(einsum, part_of_x, part, kind, multiply)

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros(shape, kind))


def product(einsum: str, x: Array, w: Weight, dtype: Any, multiply: Multiply = matmul) -> Array:
    """An einsum of x and a weight in `dtype`, None for x's own.

    A vector times a matrix, which is what decoding one row does, is limited by memory. XLA's CPU backend reads the
    matrix faster as a sum of products with parts of it, each of which lies in one piece.
    """
    (x_axes, w_axes), y_axes = einsum.partition("->")[0].split(","), einsum.partition("->")[2]
    summed = [letter for letter in w_axes if letter not in y_axes]
    if isinstance(w, Packed):
        return _packed_product(einsum, x, w, dtype, multiply)
    length = math.prod(w.shape[: len(summed)])
    vector = x.size == length and list(w_axes[: len(summed)]) == summed == [each for each in x_axes if each in w_axes]
    if not vector or length % PARTS or jax.default_backend() != "cpu" or multiply is not matmul:
        return multiply(einsum, x, w, dtype)
    rows, kind = length // PARTS, jnp.promote_types(x.dtype, jnp.float32)
    parts = jnp.einsum("PR,PRY->PY", x.reshape(PARTS, rows), w.reshape(PARTS, rows, -1), preferred_element_type=kind)
    shape = [w.shape[w_axes.index(letter)] if letter in w_axes else 1 for letter in y_axes]
    return parts.sum(0).reshape(shape).astype(dtype or x.dtype)


MANY_ROWS = 256  # for which making one weight of several costs less than several products


def products(x: Array, maps: tuple[tuple[str, Weight], ...], dtype: Any, multiply: Multiply) -> list[Array]:
    """The `product` of x with each weight. On CPU, several weights that contract x's last axis are taken as one."""
    x_axes = maps[0][0].partition(",")[0]
    rows, summed = x_axes[:-1], x_axes[-1]
    kept = [spec.partition("->")[2].removeprefix(rows) for spec, _ in maps]
    alike = all(spec == f"{x_axes},{summed}{y}->{rows}{y}" for (spec, _), y in zip(maps, kept, strict=True))
    arrays = [w for _, w in maps if not isinstance(w, Packed)]
    few = len(arrays) < max(len(maps), 2) or x.size < MANY_ROWS * x.shape[-1]
    if few or not alike or jax.default_backend() != "cpu":
        return [product(spec, x, w, dtype, multiply) for spec, w in maps]
    w = jnp.concatenate([w.reshape(x.shape[-1], -1) for w in arrays], 1)
    ends = np.cumsum([w.size // x.shape[-1] for w in arrays])[:-1]
    parts = jnp.split(product(f"{x_axes},{summed}Y->{rows}Y", x, w, dtype, multiply), ends, -1)
    return [y.reshape(*x.shape[:-1], *w.shape[1:]) for y, (_, w) in zip(parts, maps, strict=True)]


def linear(
    x: Array, *maps: tuple[str, Weight], dtype: Any = None, regather: bool = True, multiply: Multiply = matmul
) -> list[Array]:
    """Einsums of one x, such as `BTD,DHK->BTHK`, with several weights; the results in `dtype`, None for x's own.

    On a mesh each device works on its own parts. Weights are made whole over the devices that share x's batch, and
    their gradients are summed and split again (Rajbhandari et al. 2020, section 5.3). Where the contraction runs over
    an axis that is split, results are summed; the gradients of all maps with respect to x are summed once (Shoeybi
    et al. 2019, section 3).
    """

    mesh = mesh_in_use()
    if not mesh:
        cast = tuple((spec, w if isinstance(w, Packed) else w.astype(x.dtype)) for spec, w in maps)
        return products(x, cast, dtype, multiply)
    x_axes = maps[0][0].partition(",")[0]
    x_split = split(dict(zip(x_axes, x.shape, strict=True)), mesh)
    x_over = axes_of(x_split, x_axes)
    letters, stored, used = [], [], []
    for einsum, w in maps:
        w_axes, y_axes = einsum.partition(",")[2].split("->")
        lengths = dict(zip(w_axes, w.shape, strict=True))
        letters.append((w_axes, y_axes))
        stored.append(split(lengths, mesh))
        used.append(split(lengths, mesh, x_split))

    def local(x: Array, *weights: Array) -> list[Array]:
        copies: dict[tuple[str, ...], Array] = {}
        results = []
        for (einsum, _), w, (w_axes, y_axes), have, want in zip(maps, weights, letters, stored, used, strict=True):
            w = gathered(varying(w, x_over, axes_of(have, w_axes)), w_axes, have, want)
            new = axes_of(want, w_axes)
            x_new = copies.setdefault(new, varying(x, new, x_over))
            y = product(einsum, x_new, w, dtype, multiply)
            over = axes_of(want, [letter for letter in x_axes if letter in w_axes and letter not in y_axes])
            results.append(jax.lax.psum(y, over) if over else y)
        return results

    weights = [w.astype(x.dtype) for _, w in maps]
    inputs = (spec(x_axes, x_split), *(spec(w_axes, have) for (w_axes, _), have in zip(letters, stored, strict=True)))
    outputs = [spec(y_axes, want) for (_, y_axes), want in zip(letters, used, strict=True)]
    if stored != used and regather:  # the backward pass gathers weights again instead of keeping all of them whole
        local = jax.checkpoint(local, policy=lambda primitive, *_, **__: primitive.name != "all_gather")
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs)(x, *weights)


def lookup(table: Weight, axes: str, ids_BT: Array, kind: Any) -> tuple[Array, Weight]:
    """Rows of a table with two axes, [B, T, columns], and the table for its next use; see `rows_of`.

    Devices that hold some of the rows look up those and add.
    """
    mesh, (rows, columns) = mesh_in_use(), axes
    if isinstance(table, Packed) and not mesh:
        return table.rows(ids_BT).astype(kind), table
    if not mesh:
        rows_BTD, table = rows_of(table, ids_BT)
        return rows_BTD.astype(kind), table
    lengths = dict(zip(axes, table.shape, strict=True))
    ids_split = split(dict(zip("BT", ids_BT.shape, strict=True)), mesh)
    have, want = split(lengths, mesh), split(lengths, mesh, ids_split)
    over = want.get(rows, ())

    def local(table: Array, ids_BT: Array) -> Array:
        table = gathered(varying(table, axes_of(ids_split, "BT"), axes_of(have, axes)), axes, have, want)
        if not over:
            return table[ids_BT]
        ids_BT = ids_BT - jax.lax.axis_index(over) * table.shape[0]
        here_BT = (ids_BT >= 0) & (ids_BT < table.shape[0])
        return jax.lax.psum(jnp.where(here_BT[..., None], table[jnp.where(here_BT, ids_BT, 0)], 0), over)

    inputs = (spec(axes, have), spec("BT", ids_split))
    look_up = jax.shard_map(local, in_specs=inputs, out_specs=spec(f"BT{columns}", want))
    return look_up(table.astype(kind), ids_BT), table


class Initializer(NamedTuple):
    """How weights start: what a variance of 1 is divided by, the distribution, and queries', keys' and values' gain.

    As one matrix the three, each square, have the fan-in of one, and twice its mean of fan-in and fan-out.
    """

    mode: Literal["fan_in", "fan_avg"]
    distribution: Literal["truncated_normal", "uniform"]
    joint_gain: float


INITIALIZERS = {
    "lecun": Initializer("fan_in", "truncated_normal", 1.0),
    "xavier": Initializer("fan_avg", "uniform", 0.5**0.5),
}


class Einsum(nn.Module):
    """A linear map written as an einsum, such as `BTD,DHK->BTHK`: its letters shape, initialise and shard the weight.

    Parameters: `w_...` with the weight's letters, drawn as `config.initializer` says, times `gain`; and with `bias` a
    zero `b_...` with the letters that the output has from the weight.
    """

    spec: str
    config: ModelConfig
    bias: bool = False
    gain: float = 1.0

    def setup(self) -> None:
        inputs, y_axes = self.spec.split("->")
        x_axes, w_axes = inputs.split(",")
        length, param_dtype = sizes(self.config), jnp.dtype(self.config.param_dtype)
        start = INITIALIZERS[self.config.initializer]

        def places(wanted: Callable[[str], bool]) -> tuple[int, ...]:
            return tuple(place for place, letter in enumerate(w_axes) if wanted(letter))

        init = nn.initializers.variance_scaling(
            self.gain**2,
            start.mode,
            start.distribution,
            in_axis=places(lambda letter: letter not in y_axes),
            out_axis=places(lambda letter: letter not in x_axes),
            batch_axis=places(lambda letter: letter in x_axes and letter in y_axes),
        )
        self.w = self.param(f"w_{w_axes}", init, tuple(length[letter] for letter in w_axes), param_dtype)
        if self.bias:
            b_axes = "".join(letter for letter in y_axes if letter in w_axes)
            shape = tuple(length[letter] for letter in b_axes)
            self.b = self.param(f"b_{b_axes}", nn.initializers.zeros, shape, param_dtype)

    def __call__(self, x: Array) -> Array:
        return project(x, self)[0]

    def finished(self, y: Array) -> Array:
        """A product with the weight, with the bias added."""
        if not self.bias:
            return y
        inputs, y_axes = self.spec.split("->")
        shape = [
            size if letter in inputs.partition(",")[2] else 1 for letter, size in zip(y_axes, y.shape, strict=True)
        ]
        return y + self.b.astype(y.dtype).reshape(shape)


def project(x: Array, *maps: Einsum) -> list[Array]:
    """Several linear maps of one x, with their biases."""
    again = maps[0].config.remat == "none"  # else the block is computed again as a whole, gathering included
    multiply = MULTIPLY[maps[0].config.linear_dtype]
    results = linear(x, *((each.spec, each.w) for each in maps), regather=again, multiply=multiply)
    return [each.finished(y) for each, y in zip(maps, results, strict=True)]


# name: (function, whether it can have a bias, what is added to the learned scale)
NORMS: dict[str, tuple[Callable[[Array, float], Any], bool, int]] = {
    "layernorm": (layer_norm, True, 0),
    "rmsnorm": (rms_norm, False, 0),
    "rmsnorm1p": (rms_norm, False, 1),
}


class Norm(nn.Module):
    """The config's norm over the last axis, whose letter is `axis`, in at least float32, with its learned scale."""

    config: ModelConfig
    axis: str = "D"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        function, biased, added = NORMS[self.config.norm]
        width, param_dtype = (x.shape[-1],), jnp.dtype(self.config.param_dtype)
        y, bias = function(at_least_float32(x), self.config.norm_eps), None
        scale = self.param(f"scale_{self.axis}", nn.initializers.constant(1 - added), width, param_dtype) + added
        if biased and self.config.use_bias:
            bias = self.param(f"bias_{self.axis}", nn.initializers.zeros, width, param_dtype)
        return scaled(y, scale, bias).astype(x.dtype)


TIED = "BTD,VD->BTV"  # the output layer that is the embedding's table


class Embedding(nn.Module):
    """The table that turns ids into vectors and, where it is tied, vectors into logits (Vaswani et al. 2017, 3.4).

    Its entries have the variance 1 / d_model: scaled embeddings and tied logits both start near unit variance.
    """

    config: ModelConfig

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.d_model)
        init = nn.initializers.normal(self.config.d_model**-0.5)
        self.table_VD = self.param("table_VD", init, shape, jnp.dtype(self.config.param_dtype))

    def __call__(self, ids_BT: Array) -> tuple[Array, Weight]:
        """The vectors, [B, T, D], and the table as a tied output layer takes it."""
        x_BTD, table_VD = lookup(self.table_VD, "VD", ids_BT, dtype_of(self.config))
        if self.config.scale_embeddings:
            x_BTD *= jnp.asarray(self.config.d_model**0.5, x_BTD.dtype)
        return x_BTD, table_VD


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021 (Primer)
    "tanh": jnp.tanh,
}


class FeedForward(nn.Module):
    """Two linear maps with an activation between them (Vaswani et al. 2017, 3.3), gated if asked (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, real_BT: Array | None = None, apart: bool = False) -> Array:
        config, activation = self.config, ACTIVATIONS[self.config.activation]
        names = ("up", "gate") if config.gated else ("up",)
        maps = [Einsum("BTD,DF->BTF", config, config.use_bias, name=name) for name in names]
        h_BTF, *gate = project(x_BTD, *maps)
        h_BTF = h_BTF * activation(gate[0]) if gate else activation(h_BTF)
        return Einsum("BTF,FD->BTD", config, config.use_bias, name="down")(h_BTF)


# Where a sublayer has norms: before it, on what it adds (inside), after the sum.
PLACEMENTS: dict[str, tuple[str, ...]] = {"pre": ("before",), "post": ("after",), "sandwich": ("before", "inside")}


class Dropout(nn.Module):
    """Dropout where there is a key for it: training has one, evaluation has none."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


class Residual(nn.Module):
    """total + f(x), with norms where the placement has them and dropout on what is added."""

    config: ModelConfig

    @nn.compact
    def __call__(self, total_BTD: Array, x_BTD: Array, f: Callable[[Array], Array]) -> Array:
        places = PLACEMENTS[self.config.norm_placement]

        def norm(place: str, x: Array) -> Array:
            return Norm(self.config, name=place)(x) if place in places else x

        y_BTD = norm("inside", f(norm("before", x_BTD)))
        total_BTD = total_BTD + Dropout(self.config.dropout_rate)(y_BTD)
        return constrain(norm("after", total_BTD), "BTD")
