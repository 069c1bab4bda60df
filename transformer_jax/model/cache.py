"""The cache of keys and values that makes decoding linear: an ordinary pytree, in and out of `decode`."""

import functools
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.config import ModelConfig
from transformer_jax.model.attention import KeyValue
from transformer_jax.model.int8 import Packed
from transformer_jax.tokens import Tokens

Array = jax.Array
Tree = TypeVar("Tree")


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


class Held(struct.PyTreeNode):
    """Keys and values of one layer in the order in which a product reads them, so that none is copied for it.

    An axis of length 1 is left out: XLA leaves it out of the product, and of what it reads there it would write a copy
    at each step.

    Attributes:
        keys: [B, G, S, K], or without B or G if there is one, an array or Packed.
        values: [B, G, K, S], or without B or G if there is one, an array or Packed.
    """

    keys: Any
    values: Any

    AXES: ClassVar = {"keys": -2, "values": -1}  # of the slots

    @classmethod
    def of(cls, kv: KeyValue, int8: bool) -> "Held":
        keys, values = jnp.swapaxes(kv.k_BSGK, 1, 2), jnp.moveaxis(kv.v_BSGK, 1, 3)
        if 1 in keys.shape[:2]:
            keys, values = (x.reshape(-1, *x.shape[2:]) for x in (keys, values))
        return cls(Packed.of(keys, -1), Packed.of(values, -2)) if int8 else cls(keys, values)

    def read(self, like: KeyValue) -> KeyValue:
        """As attention takes them; `like` has as many rows and heads."""
        B, _, G, _ = like.k_BSGK.shape
        arrays = (x.astype(like.k_BSGK.dtype) if isinstance(x, Packed) else x for x in (self.keys, self.values))
        keys, values = (x.reshape(B, G, *x.shape[-2:]) for x in arrays)
        return KeyValue(jnp.swapaxes(keys, 1, 2), jnp.moveaxis(values, 3, 1))


class Slots(struct.PyTreeNode):
    """Where the tokens so far are found, or the keys and values of one layer: `count` slots, a ring if so.

    Attributes:
        index: int32, or int32[B] where rows differ: the tokens so far; the next one goes into slot `index % count`.
            None before the first tokens, which then fill the slots from the start.
    """

    index: Array | None
    count: int = struct.field(pytree_node=False)
    ring: bool = struct.field(pytree_node=False)

    def write(self, held: Any, new: Tree, axis: int = 1) -> Tree:
        """`held` with `new` in the next slots, which lie along an axis of every array; without an index just `new`."""
        if self.index is None:
            return jax.tree.map(functools.partial(self._first, axis=axis), new)
        return jax.tree.map(functools.partial(self._put, axis=axis), held, new)

    def _first(self, x: Array, axis: int) -> Array:
        """The first tokens in their slots: all of them, or the last ones of a ring."""
        T, S = x.shape[axis], self.count
        if T <= S:
            rest = jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))
            return jnp.concatenate([x, jnp.repeat(rest, S - T, axis)], axis)
        return jnp.roll(jax.lax.slice_in_dim(x, T - S, T, axis=axis), T % S, axis)

    def _put(self, old: Array, x: Array, axis: int) -> Array:
        x, index = x.astype(old.dtype), self.index
        assert index is not None
        if index.ndim == 0 and (x.shape[axis] == 1 or not self.ring):
            return jax.lax.dynamic_update_slice_in_dim(old, x, index % self.count if self.ring else index, axis)
        index_B = jnp.repeat(index.reshape(-1), len(x) // index.size)
        slot_BT = (index_B[:, None] + jnp.arange(x.shape[axis])) % self.count
        put = jnp.moveaxis(old, axis, 1).at[jnp.arange(len(x))[:, None], slot_BT].set(jnp.moveaxis(x, axis, 1))
        return jnp.moveaxis(put, 1, axis)


class LayerSlots(struct.PyTreeNode):
    """The slots of one layer and what they hold, None before the first tokens."""

    slots: Slots
    held: Held | None
    int8: bool = struct.field(pytree_node=False)

    def add(self, new: KeyValue) -> tuple[KeyValue, Held]:
        """(all keys and values that queries of the new tokens may look at, what the slots hold now)."""
        held, fresh = self.held, Held.of(new, self.int8)
        parts = {
            name: self.slots.write(None if held is None else getattr(held, name), getattr(fresh, name), axis)
            for name, axis in Held.AXES.items()
        }
        written = Held(**parts)
        return (new if held is None else written.read(new)), written


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
    layers: tuple[Held, ...]

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, room: Room) -> "Cache":
        """A cache with nothing in it. That of a prompt is made by `decode` with `room`, at less cost."""
        period = config.blocks_in_a_round()
        stacked = (config.num_layers // period,) if config.scan_layers else ()

        def tokens(window: int) -> Tokens:
            nothing = jnp.zeros((batch_size, room.of(window)), jnp.int32)
            prefix = nothing > 0 if config.prefix_attention == "bidirectional" else None
            return Tokens(nothing, nothing, nothing, prefix)

        def layer(window: int) -> Held:
            shape = (batch_size, room.of(window), config.num_kv_heads, config.head_dim)
            x = jnp.zeros(shape, config.dtype)
            held = Held.of(KeyValue(x, x), room.int8)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (*stacked, *x.shape)), held)

        windows = config.windows
        layers = tuple(layer(windows[number % len(windows)]) for number in range(period))
        return cls({window: tokens(window) for window in windows}, jnp.zeros((), jnp.int32), layers)

    def slots(self, window: int) -> Slots:
        """Those of the layers with this window."""
        return Slots(self.index, self.tokens[window].ids.shape[1], window > 0)

    @property
    def int8(self) -> bool:
        return isinstance(self.layers[0].keys, Packed)

    def add(self, tokens: Tokens) -> dict[int, Tokens]:
        """The slots' tokens with these written in; of a cache with a prefix, tokens that do not say are not of it."""
        if next(iter(self.tokens.values())).prefix is not None and tokens.prefix is None:
            tokens = tokens.replace(prefix=tokens.segments < 0)
        return {window: self.slots(window).write(held, tokens) for window, held in self.tokens.items()}

    def descended(self, parent_BW: Array) -> "Cache":
        """The cache after sequence w of each row was replaced by `parent_BW[b, w]`: no key moves, only descent."""

        def moved(tokens: Tokens) -> Tokens:
            return tokens.replace(lineage=jnp.take_along_axis(tokens.lineage, parent_BW[:, None], -1))

        return self.replace(tokens={window: moved(tokens) for window, tokens in self.tokens.items()})
