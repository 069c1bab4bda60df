"""Products in 8-bit floating point, which GPUs from Hopper on and some TPUs have units for.

All operands are e4m3 (Micikevicius et al. 2022), which is precise enough for gradients too where scales are fine
(DeepSeek-AI 2024, section 3.3.2): one for each token and one for each weight, or expert, made when it is used. So what
a token becomes depends on no other token, and packing, padding and batches change nothing. The gradient of a weight,
which adds up over tokens, is made in the dtype of the activations.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.model.gradients import weight_gradient

Array = jax.Array
KIND = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(KIND).max)


def scaled(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """x in 8 bits, and the float32 scales to multiply it by: its largest along `axes` becomes the largest of KIND."""
    top = jnp.max(jnp.abs(x), axes, keepdims=True).astype(jnp.float32)
    scale = jnp.where(top == 0, 1, top / LARGEST)
    return (x.astype(jnp.float32) / scale).astype(KIND), scale


def _product(einsum: str, x: Array, w: Array, dtype: Any) -> Array:
    inputs, y_axes = einsum.split("->")
    x_axes, w_axes = inputs.split(",")
    summed = tuple(place for place, axis in enumerate(x_axes) if axis not in y_axes)
    one_weight = tuple(place for place, axis in enumerate(w_axes) if axis not in x_axes or axis not in y_axes)
    x8, x_scale = scaled(x, summed)
    w8, w_scale = scaled(w, one_weight)
    y = jnp.einsum(einsum, x8, w8, preferred_element_type=jnp.float32)
    return (y * jnp.einsum(einsum, x_scale, w_scale)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def matmul8(einsum: str, x: Array, w: Array, dtype: Any) -> Array:
    """An einsum of x and a weight with 8-bit operands, in `dtype`, None for x's own."""
    return _product(einsum, x, w, dtype or x.dtype)


def _backward(einsum: str, dtype: Any, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    inputs, y_axes = einsum.split("->")
    x_axes, w_axes = inputs.split(",")
    dx = _product(f"{y_axes},{w_axes}->{x_axes}", dy, w, x.dtype)
    return dx, weight_gradient(einsum, x, w, dy.astype(x.dtype))


matmul8.defvjp(lambda einsum, x, w, dtype: (matmul8(einsum, x, w, dtype), (x, w)), _backward)
