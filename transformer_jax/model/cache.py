"""The cache of keys and values that makes decoding linear: an ordinary pytree, in and out of `decode`."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.config import ModelConfig
from transformer_jax.model.attention import KeyValue
from transformer_jax.tokens import Tokens

Array = jax.Array
Slots = TypeVar("Slots")


class Cache(struct.PyTreeNode):
    """What a decoder has seen so far. The slots remember their tokens, so the mask rule needs no mode for decoding.

    Attributes:
        tokens: of each slot, [B, S]; segment 0 where it is empty.
        index: int32, the next slot to write.
        layers: keys and values of each layer, S slots each; where layers are scanned over, stacked.
    """

    tokens: Tokens
    index: Array
    layers: tuple[KeyValue, ...]

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, slots: int) -> "Cache":
        """A cache of `slots` tokens for each of `batch_size` sequences."""
        nothing = jnp.zeros((batch_size, slots), jnp.int32)
        prefix = nothing > 0 if config.prefix_attention == "bidirectional" else None
        period = config.blocks_in_a_round(config.num_layers)
        stacked = (config.num_layers // period,) if config.scan_layers else ()
        kv = jnp.zeros((*stacked, batch_size, slots, config.num_kv_heads, config.head_dim), config.dtype)
        layers = tuple(KeyValue(kv, kv) for _ in range(period))
        return cls(Tokens(nothing, nothing, nothing, prefix), jnp.zeros((), jnp.int32), layers)

    def add(self, tokens: Tokens) -> Tokens:
        """The slots' tokens with these written in; of a cache with a prefix, tokens that do not say are not of it."""
        if self.tokens.prefix is not None and tokens.prefix is None:
            tokens = tokens.replace(prefix=tokens.segments < 0)
        return write(self.tokens, tokens, self.index)


def write(slots: Slots, new: Slots, index: Array) -> Slots:
    """Every leaf of `new`, [B, T, ...], written into that of `slots`, [B, S, ...], from slot `index` on."""

    def put(old: Array, x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), index, axis=1)

    return jax.tree.map(put, slots, new)
