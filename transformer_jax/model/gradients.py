"""Functions whose derivatives are written here, as those that JAX works out are slow.

The values are those of the plain formulas, and the derivatives theirs to rounding. On CPU, where XLA fuses whatever
comes before a product into the loops of that product, operands are made first (`whole`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def whole(*arrays: Array) -> tuple[Array, ...]:
    """The same arrays; on CPU each is made once, before anything that reads it."""
    return jax.lax.optimization_barrier(arrays) if jax.default_backend() == "cpu" else arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def matmul(einsum: str, x: Array, w: Array, dtype: Any) -> Array:
    """An einsum of x and a weight in `dtype`, None for x's own.

    The gradient of the weight is one product whose result lies as the weight does; JAX's own is transposed.
    """
    return jnp.einsum(einsum, x, w, preferred_element_type=dtype)


def _matmul_forward(einsum: str, x: Array, w: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    (x,) = whole(x)
    return matmul(einsum, x, w, dtype), (x, w)


def _matmul_backward(einsum: str, dtype: Any, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    inputs, y_axes = einsum.split("->")
    x_axes, w_axes = inputs.split(",")
    x, dy = whole(x, dy.astype(x.dtype))
    dw = weight_gradient(einsum, x, w, dy)
    return jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, w, preferred_element_type=x.dtype), dw


def weight_gradient(einsum: str, x: Array, w: Array, dy: Array) -> Array:
    """The gradient of the weight of `matmul`, from that of its result.

    For a sum over several axes XLA's CPU backend transposes the first operand, for one over a single axis it does not;
    where the second is the smaller one, making all axes one pays.
    """
    inputs, y_axes = einsum.split("->")
    x_axes, w_axes = inputs.split(",")
    first, second = ((x_axes, x), (y_axes, dy)) if w_axes[0] in x_axes else ((y_axes, dy), (x_axes, x))
    rows = "".join(letter for letter in x_axes if letter in y_axes and letter not in w_axes)
    pays = jax.default_backend() == "cpu" and len(rows) > 1 and first[1].size > second[1].size
    if pays and x_axes.startswith(rows) and y_axes.startswith(rows):
        cut = len(rows)
        first, second = ((f"n{axes[cut:]}", a.reshape(-1, *a.shape[cut:])) for axes, a in (first, second))
    return jnp.einsum(f"{first[0]},{second[0]}->{w_axes}", first[1], second[1], preferred_element_type=w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def rows_of(table: Array, ids: Array) -> tuple[Array, Array]:
    """Rows of a table, and the table for its next use.

    Where the next use is of what comes back, the gradients of rows are added into that use's gradient of the table. As
    two uses of one array they would be added into zeros of the table's size, and those to the other's.
    """
    return table[ids], table


def _rows_of_backward(ids: Array, d: tuple[Array, Array]) -> tuple[Array, None]:
    d_rows, d_table = d
    return d_table.at[ids].add(d_rows), None


rows_of.defvjp(lambda table, ids: ((table[ids], table), ids), _rows_of_backward)


@jax.custom_vjp
def picked(x: Array, index: Array) -> Array:
    """x[..., index], and 0 where that is outside of the last axis.

    Its gradient is a mask, which XLA makes with what else is passed back to x; JAX's own is a scatter into zeros.
    """
    last = x.shape[-1]
    found = jnp.take_along_axis(x, jnp.clip(index, 0, last - 1)[..., None], -1)[..., 0]
    return jnp.where((index >= 0) & (index < last), found, 0)


def _picked_backward(saved: tuple[Array, Array], d: Array) -> tuple[Array, None]:
    columns, index = saved
    return jnp.where(columns == index[..., None], d[..., None], 0), None


picked.defvjp(lambda x, index: (picked(x, index), (jnp.arange(x.shape[-1]), index)), _picked_backward)


def sum_of_products(x: Array, y: Array, axis: int = -1) -> Array:
    """The sum of x * y over the last axis, or with 0 over all axes but the last.

    On CPU as an einsum: of a sum of x * y over the last axis XLA makes a batch of products, 8 times as slow.
    """
    if jax.default_backend() == "cpu":
        rows = "abcdefgh"[: x.ndim - 1]
        return jnp.einsum(f"{rows}z,{rows}z->{rows if axis else 'z'}", x, y)
    return jnp.sum(x * y, -1 if axis else tuple(range(x.ndim - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_norm(x: Array, eps: float) -> Array:
    """Unit root mean square over the last axis (Zhang and Sennrich 2019, equation 4), without scale."""
    return _rms_norm_forward(x, eps)[0]


def _rms_norm_forward(x: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    inverse = jax.lax.rsqrt(sum_of_products(x, x)[..., None] / x.shape[-1] + eps)
    y = x * inverse
    return y, (y, inverse)


def _rms_norm_backward(eps: float, saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    y, inverse = saved
    return ((dy - y * (sum_of_products(dy, y)[..., None] / y.shape[-1])) * inverse,)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def layer_norm(x: Array, eps: float) -> Array:
    """Zero mean and unit variance over the last axis (Ba et al. 2016, equation 4), without scale and bias."""
    return _layer_norm_forward(x, eps)[0]


def _layer_norm_forward(x: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return _rms_norm_forward(x - jnp.mean(x, -1, keepdims=True), eps)


def _layer_norm_backward(eps: float, saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    return _rms_norm_backward(eps, saved, dy - jnp.mean(dy, -1, keepdims=True))


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def scaled(x: Array, scale: Array, bias: Array | None) -> Array:
    """x times a scale, with a bias added where there is one, both along the last axis."""
    return x * scale if bias is None else x * scale + bias


def _scaled_backward(saved: Any, dy: Array) -> tuple[Array, Array, Array | None]:
    x, scale, bias = saved
    dscale = sum_of_products(dy, x, 0).astype(scale.dtype)
    dbias = None if bias is None else jnp.sum(dy, tuple(range(dy.ndim - 1))).astype(bias.dtype)
    return dy * scale, dscale, dbias


scaled.defvjp(lambda x, scale, bias: (scaled(x, scale, bias), (x, scale, bias)), _scaled_backward)


def _normal_distribution(x: Array) -> Array:
    """Written with erf: `jax.nn.gelu(approximate=False)` goes through erfc, several times slower on CPU."""
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x times the normal distribution function (Hendrycks and Gimpel 2016)."""
    return x * _normal_distribution(x)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return (dy * (_normal_distribution(x) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def masked_softmax(logits: Array, mask: Array) -> Array:
    """The softmax over the last axis of the logits whose mask is True; zeros elsewhere, and where the mask is nowhere.

    The gradient with respect to a logit that is masked is zero.
    """
    least = jnp.finfo(logits.dtype).min
    logits = jnp.where(mask, logits, least)
    powers = jnp.where(mask, jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
    total = powers.sum(-1, keepdims=True)
    return powers / jnp.where(total > 0, total, 1)


def _masked_softmax_backward(p: Array, dp: Array) -> tuple[Array, None]:
    return p * (dp - sum_of_products(p, dp)[..., None]), None


masked_softmax.defvjp(lambda logits, mask: (masked_softmax(logits, mask),) * 2, _masked_softmax_backward)


Parted = Callable[[Array, Any, Any], tuple[Array, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_of_parts(f: Parted, parts: int, x: Array, w: Any, rest: Any) -> tuple[Array, Any]:
    """The sums (what is differentiated, others) that `f(x, w, rest)` gives, taken over one part after the other.

    Parts are of the first axis of `x` and of all of `rest`, a multiple of `parts`. The gradients are made with the
    value of a part, so nothing that a part needs on the way outlives it, and nothing is computed twice. They are those
    of the first sum with respect to x and w, a tree of arrays; w's are added up in at least float32.
    """
    return _over_parts(lambda x, rest: (f(x, w, rest), ()), parts, x, rest)[0]


def _over_parts(f: Callable[[Array, Any], tuple[Any, Any]], parts: int, x: Array, rest: Any) -> tuple[Any, Any]:
    """(what f gives first, added up; what it gives second, put together) over the parts of x and rest."""
    if parts == 1:
        return f(x, rest)
    cut = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (x, rest))
    # the first part is apart, as its sums say in which mesh axes sums differ
    total, first = f(*jax.tree.map(lambda a: a[0], cut))
    total, others = jax.lax.scan(lambda sums, part: _add(sums, f(*part)), total, jax.tree.map(lambda a: a[1:], cut))
    return total, jax.tree.map(lambda a, b: jnp.concatenate([a, b.reshape(-1, *b.shape[2:])]), first, others)


def _add(sums: Any, found: tuple[Any, Any]) -> tuple[Any, Any]:
    return jax.tree.map(jnp.add, sums, found[0]), found[1]


def _sum_of_parts_forward(f: Parted, parts: int, x: Array, w: Any, rest: Any) -> tuple[Any, Any]:
    def with_gradients(x: Array, rest: Any) -> tuple[Any, Any]:
        sums, (dx, dw) = jax.value_and_grad(f, (0, 1), has_aux=True)(x, w, rest)
        return (sums, jax.tree.map(lambda d: d.astype(jnp.promote_types(d.dtype, jnp.float32)), dw)), dx

    (sums, dw), dx = _over_parts(with_gradients, parts, x, rest)
    return sums, (dx, jax.tree.map(lambda d, w: d.astype(w.dtype), dw, w))


def _sum_of_parts_backward(f: Parted, parts: int, saved: tuple[Array, Any], d: tuple[Array, Any]) -> Any:
    return *jax.tree.map(lambda each: each * d[0].astype(each.dtype), saved), None


sum_of_parts.defvjp(_sum_of_parts_forward, _sum_of_parts_backward)
