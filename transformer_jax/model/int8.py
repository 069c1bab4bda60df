"""Arrays in 8 bits with a scale for each vector along an axis: keys and values of a cache, and weights for inference.

A weight has a scale for each of its outputs (Dettmers et al. 2022, section 2.1, of weights alone), which is multiplied
into the product. So a product reads a quarter of float32's bytes, and activations stay as they are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.axes import letters_of, map_named

Array = jax.Array
LARGEST = 127.0  # the largest int8 that has a negative


class Packed(struct.PyTreeNode):
    """An array in 8 bits: `values` times `scale`, which has length 1 along the axes that share one."""

    values: Array
    scale: Array

    @classmethod
    def of(cls, x: Array, axes: int | Sequence[int]) -> "Packed":
        """Rounds each vector along axes to 255 steps."""
        top = jnp.abs(x).max(axes if isinstance(axes, int) else tuple(axes), keepdims=True)
        scale = jnp.maximum(top.astype(jnp.float32) / LARGEST, jnp.finfo(jnp.float32).tiny)
        return cls(jnp.round(x / scale).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, kind: Any) -> Array:
        """The array that it stands for."""
        return (self.values * self.scale).astype(kind)

    def rows(self, index: Array) -> "Packed":
        """Those of the first axis with these numbers."""
        return Packed(self.values[index], self.scale[index])


def _inputs(letters: str) -> list[int]:
    """The places of the letters over which a weight's products sum: a weight's inputs come before its outputs."""
    first = next(place for place, letter in enumerate(letters) if letter not in "NE")
    last = first if letters[first] == "D" else len(letters) - 2
    return list(range(first, last + 1))


def int8_weights(params: Any) -> Any:
    """Parameters for inference, whose weights and embedding tables are Packed: a quarter of float32's memory.

    A table's rows have a scale each, as they are outputs where it is tied. Norms, biases, tables of positions and
    routers, which are small and precise, stay as they are. `Transformer.apply` and `generate` take such a tree as
    `params`; it cannot be trained.
    """

    def packed(names: list[str], leaf: Any) -> Any:
        letters = letters_of(names, leaf.ndim)
        if letters.replace("N", "") == "VD":
            return Packed.of(leaf, -1)
        if not names[-1].startswith("w_") or letters.endswith("E"):
            return leaf
        return Packed.of(leaf, _inputs(letters))

    return map_named(packed, params)
