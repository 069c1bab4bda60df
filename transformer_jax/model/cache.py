"""The cache of keys and values that makes decoding linear: an ordinary pytree, in and out of `decode`."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.config import ModelConfig
from transformer_jax.model.attention import KeyValue
from transformer_jax.tokens import Tokens

Array = jax.Array
Tree = TypeVar("Tree")
INT8 = 127.0  # the largest int8 that has a negative


class Room(NamedTuple):
    """How large a cache is.

    Attributes:
        slots: tokens that it holds where attention has no window.
        width: sequences that are decoded side by side in one row, which each take a slot a place.
        chunk: most tokens that are written at once, those of all sequences of a row together.
        int8: keys and values are held in 8 bits with a scale for each token and head (Dettmers et al. 2022, 2.1).
    """

    slots: int
    width: int = 1
    chunk: int = 1
    int8: bool = False

    def of(self, window: int) -> int:
        """Slots of a layer with this window: as many as its queries can see, used as a ring."""
        return min(self.slots, (window - 1) * self.width + self.chunk) if window else self.slots


class Packed(struct.PyTreeNode):
    """An array in 8 bits: `values` times `scale`, which has length 1 along the last axis."""

    values: Array
    scale: Array

    @classmethod
    def of(cls, x: Array) -> "Packed":
        """Rounds each vector along the last axis to 255 steps."""
        scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32) / INT8, jnp.finfo(jnp.float32).tiny)
        return cls(jnp.round(x / scale).astype(jnp.int8), scale)

    def unpacked(self, kind: jnp.dtype) -> Array:
        return (self.values * self.scale).astype(kind)


class Slots(struct.PyTreeNode):
    """Slots of one layer, or what they remember of their tokens: arrays [B, count, ...], a ring if there is a window.

    Attributes:
        held: what they hold; None before the first tokens, which then fill them from the start.
        index: int32, or int32[B] where rows differ: the tokens so far; the next one goes into slot `index % count`.
    """

    held: Any
    index: Array | None
    count: int = struct.field(pytree_node=False)
    ring: bool = struct.field(pytree_node=False)
    int8: bool = struct.field(pytree_node=False, default=False)

    def add(self, new: Tree) -> tuple[Tree, Tree]:
        """(all that queries of `new`, [B, T, ...], may look at, what the slots hold now)."""
        if self.held is None:
            kept = jax.tree.map(self._first, _packed(new) if self.int8 else new)
            return new, kept
        packed = isinstance(self.held, KeyValue) and isinstance(self.held.k_BSGK, Packed)
        held = jax.tree.map(self._put, self.held, _packed(new) if packed else new)
        return (_unpacked(held, jax.tree.leaves(new)[0].dtype) if packed else held), held

    def _first(self, x: Array) -> Array:
        """The first tokens in their slots: all of them, or the last ones of a ring."""
        T, S = x.shape[1], self.count
        if T <= S:
            return jnp.pad(x, [(0, 0), (0, S - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.roll(x[:, T - S :], T % S, 1)

    def _put(self, old: Array, x: Array) -> Array:
        x, index = x.astype(old.dtype), self.index
        assert index is not None
        if index.ndim == 0 and (x.shape[1] == 1 or not self.ring):
            return jax.lax.dynamic_update_slice_in_dim(old, x, index % self.count if self.ring else index, axis=1)
        slot_BT = jnp.broadcast_to(index, x.shape[:1])[:, None] + jnp.arange(x.shape[1])
        return old.at[jnp.arange(len(x))[:, None], slot_BT % self.count].set(x)


def _packed(kv: Tree) -> Tree:
    return jax.tree.map(Packed.of, kv)


def _unpacked(kv: Tree, kind: jnp.dtype) -> Tree:
    return jax.tree.map(lambda x: x.unpacked(kind), kv, is_leaf=lambda x: isinstance(x, Packed))


class Cache(struct.PyTreeNode):
    """What a decoder has seen so far. The slots remember their tokens, so the mask rule needs no mode for decoding.

    Attributes:
        tokens: by window, of each slot, [B, S]; segment 0 where it is empty.
        index: int32, the number of tokens so far; int32[B] where rows differ. Tokens after it are hidden by time, so a
            smaller index takes back the last tokens.
        layers: keys and values of each layer, S slots each; where layers are scanned over, stacked.
    """

    tokens: dict[int, Tokens]
    index: Array
    layers: tuple[KeyValue, ...]

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, room: Room) -> "Cache":
        """A cache with nothing in it. That of a prompt is made by `decode` with `room`, at less cost."""
        period = config.blocks_in_a_round(config.num_layers)
        stacked = (config.num_layers // period,) if config.scan_layers else ()

        def tokens(window: int) -> Tokens:
            nothing = jnp.zeros((batch_size, room.of(window)), jnp.int32)
            prefix = nothing > 0 if config.prefix_attention == "bidirectional" else None
            return Tokens(nothing, nothing, nothing, prefix)

        def layer(window: int) -> KeyValue:
            shape = (*stacked, batch_size, room.of(window), config.num_kv_heads, config.head_dim)
            x = jnp.zeros(shape, config.dtype)
            kv = KeyValue(x, x)
            return _packed(kv) if room.int8 else kv

        windows = config.windows
        layers = tuple(layer(windows[number % len(windows)]) for number in range(period))
        return cls({window: tokens(window) for window in windows}, jnp.zeros((), jnp.int32), layers)

    def slots(self, window: int) -> Slots:
        """What the layers of this window remember of their tokens."""
        return Slots(self.tokens[window], self.index, self.tokens[window].ids.shape[1], window > 0)

    def add(self, tokens: Tokens) -> dict[int, Tokens]:
        """The slots' tokens with these written in; of a cache with a prefix, tokens that do not say are not of it."""
        if next(iter(self.tokens.values())).prefix is not None and tokens.prefix is None:
            tokens = tokens.replace(prefix=tokens.segments < 0)
        return {window: self.slots(window).add(tokens)[1] for window in self.tokens}

    def descended(self, parent_BW: Array) -> "Cache":
        """The cache after sequence w of each row was replaced by `parent_BW[b, w]`: no key moves, only descent."""

        def moved(tokens: Tokens) -> Tokens:
            return tokens.replace(lineage=jnp.take_along_axis(tokens.lineage, parent_BW[:, None], -1))

        return self.replace(tokens={window: moved(tokens) for window, tokens in self.tokens.items()})
