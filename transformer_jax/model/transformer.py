"""Block, Stack and Transformer. Encoder and decoder are the same stack; the mode decides which of them there are."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from transformer_jax.axes import sizes
from transformer_jax.config import ModelConfig
from transformer_jax.model.attention import CROSS_POSITIONS, Attention, KeyValue, sees
from transformer_jax.model.backends import Sight, soft_cap
from transformer_jax.model.cache import Cache, Held, LayerSlots, Room, Slots
from transformer_jax.model.experts import Experts
from transformer_jax.model.layers import TIED, Dropout, Einsum, Embedding, FeedForward, Norm, Residual, linear
from transformer_jax.model.positions import POSITIONS
from transformer_jax.tokens import Tokens

Array = jax.Array


class Memory(struct.PyTreeNode):
    """An encoder's output as the decoder's cross-attention sees it: keys and values of each layer, computed once.

    As in the cache, those of layers that are scanned over are stacked along a first axis.
    """

    tokens: Tokens
    layers: tuple[KeyValue, ...]


class View(struct.PyTreeNode):
    """What all blocks of a stack work with: tokens, what they see by window and across, and where to keep keys.

    Attributes:
        slots: of a layer's cache by window; None where nothing is kept.
        int8: keys and values are held in 8 bits.
    """

    tokens: Tokens
    own: dict[int, Sight]
    across: Sight | None
    slots: dict[int, Slots] | None
    int8: bool = struct.field(pytree_node=False)


class Block(nn.Module):
    """Self-attention, cross-attention where the stack has it, feed-forward; each with its residual and norms."""

    config: ModelConfig
    cross: bool

    def setup(self) -> None:
        config = self.config
        self.self_attention = Attention(config, POSITIONS[config.position])
        self.self_attention_residual = Residual(config)
        if self.cross:
            self.cross_attention = Attention(config, CROSS_POSITIONS[config.cross_position](config))
            self.cross_attention_residual = Residual(config)
        self.feed_forward = (Experts if config.num_experts else FeedForward)(config)
        self.feed_forward_residual = Residual(config)

    def project(self, x_BSD: Array, tokens: Tokens) -> KeyValue:
        """Keys and values of a memory for this block's cross-attention."""
        return self.cross_attention.keys(x_BSD, tokens)

    def __call__(
        self,
        x_BTD: Array,
        tokens: Tokens,
        own: Sight,
        slots: LayerSlots | None,
        memory: tuple[KeyValue, Sight] | None,
    ) -> tuple[Array, Held | None]:
        """The next activations, and what the slots hold with these tokens' keys and values."""
        written = None

        def attend_self(x_BTD: Array) -> Array:
            nonlocal written
            q_BTHK, kv = self.self_attention.queries_and_keys(x_BTD, tokens)
            if slots is not None:
                kv, written = slots.add(kv)
            return self.self_attention(q_BTHK, kv, own)

        def attend_across(x_BTD: Array) -> Array:
            assert memory is not None
            return self.cross_attention(self.cross_attention.queries(x_BTD, tokens), *memory)

        def read(total_BTD: Array) -> tuple[Array, Array]:
            """What a sublayer adds to, and what it reads."""
            return total_BTD, x_BTD if self.config.parallel_residual else total_BTD

        real_BT, apart = tokens.segments > 0, slots is not None and slots.held is not None
        total_BTD = self.self_attention_residual(*read(x_BTD), attend_self)
        if memory is not None:
            total_BTD = self.cross_attention_residual(*read(total_BTD), attend_across)
        feed_forward = functools.partial(self.feed_forward, real_BT=real_BT, apart=apart)
        return self.feed_forward_residual(*read(total_BTD), feed_forward), written


# What the backward pass keeps of a block; everything else it computes again.
KEPT: dict[str, Callable[..., bool]] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Round(nn.Module):
    """`count` blocks one after the other: all of a stack, or those that a scan repeats."""

    config: ModelConfig
    count: int
    cross: bool

    def setup(self) -> None:
        config, kind = self.config, Block
        if config.remat != "none":
            kind = nn.remat(Block, policy=KEPT[config.remat], prevent_cse=not config.scan_layers)
        self.blocks = [
            kind(config.of_window(config.windows[number % len(config.windows)]), self.cross, name=f"block_{number}")
            for number in range(self.count)
        ]

    def remember(self, _: None, x_BSD: Array, tokens: Tokens) -> tuple[None, tuple[KeyValue, ...]]:
        """Keys and values of a memory for each block."""
        return None, tuple(block.project(x_BSD, tokens) for block in self.blocks)

    def __call__(
        self, x_BTD: Array, held: Sequence[Held | None], memory: Sequence[KeyValue | None], view: View
    ) -> tuple[Array, tuple[Held | None, ...]]:
        windows, written = self.config.windows, []
        for number, block in enumerate(self.blocks):
            window, remembered = windows[number % len(windows)], memory[number]
            across = None if remembered is None or view.across is None else (remembered, view.across)
            slots = None if view.slots is None else LayerSlots(view.slots[window], held[number], view.int8)
            x_BTD, kept = block(x_BTD, view.tokens, view.own[window], slots, across)
            written.append(kept)
        return x_BTD, tuple(written)


def scanned(length: int) -> Any:
    """A Round that is repeated so often with parameters of its own each time."""
    each, same = {"params": 0, "sums": 0, "nonfinite": 0, "attention": 0}, nn.broadcast
    keys = {"params": True, "dropout": True}
    over = {"__call__": (0, 0, same), "remember": (same, same)}
    methods = {
        name: dict(variable_axes=each, split_rngs=keys, in_axes=axes, length=length) for name, axes in over.items()
    }
    return nn.scan(Round, methods=methods)


class Stack(nn.Module):
    """`num_layers` blocks. An encoder and a decoder differ in two facts: `causal` and `cross`."""

    config: ModelConfig
    causal: bool
    cross: bool

    def setup(self) -> None:
        config, length = self.config, sizes(self.config)

        def table(position, name):
            init = nn.initializers.normal(0.02)
            shape = tuple(length[letter] for letter in position.table)
            kind = jnp.dtype(config.param_dtype)
            return self.param(f"{name}_{position.table}", init, shape, kind) if position.table else None

        self.position = POSITIONS[config.position]
        self.cross_position = CROSS_POSITIONS[config.cross_position](config)
        self.table = table(self.position, "position")
        self.cross_table = table(self.cross_position, "cross_position") if self.cross else None
        self.dropout = Dropout(config.dropout_rate)
        if config.embedding_norm:
            self.embedding_norm = Norm(config)
        period = config.blocks_in_a_round()
        kind = scanned(config.num_layers // period) if config.scan_layers else Round
        self.layers = kind(config, period, self.cross)
        if not config.scan_layers:
            nn.share_scope(self, self.layers)
        if config.norm_placement != "post":
            self.final_norm = Norm(config)

    def remember(self, x_BSD: Array, tokens: Tokens) -> Memory:
        """An encoder's output as keys and values for the cross-attention of every block of this stack."""
        return Memory(tokens, self.layers.remember(None, x_BSD, tokens)[1])

    def __call__(
        self,
        x_BTD: Array,
        tokens: Tokens,
        memory: Memory | None = None,
        cache: Cache | None = None,
        room: Room | None = None,
    ) -> tuple[Array, Cache | None]:
        config, windows = self.config, sorted(set(self.config.windows))
        keys = dict.fromkeys(windows, tokens) if cache is None else cache.add(tokens)
        plain = cache is None and tokens.prefix is None and tokens.lineage is None

        def sight(window: int) -> Sight:
            bias_BHTS = self.position.bias(self.table, tokens, keys[window], self.causal, config)
            segments = (tokens.segments, tokens.segments) if plain else None
            return Sight(sees(tokens, keys[window], self.causal, window), bias_BHTS, segments, self.causal, window)

        own = {window: sight(window) for window in windows}
        across = None
        if memory is not None:
            bias_BHTS = self.cross_position.bias(self.cross_table, tokens, memory.tokens, False, config)
            across = Sight(sees(tokens, memory.tokens, causal=False), bias_BHTS)

        x_BTD += jnp.asarray(self.position.embed(self.table, tokens, config), x_BTD.dtype)
        if config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        slots = None
        if cache is not None:
            slots = {window: cache.slots(window) for window in windows}
        elif room is not None:
            slots = {window: Slots(None, room.of(window), window > 0) for window in windows}
        int8 = room is not None and room.int8 if cache is None else cache.int8
        nothing = (None,) * config.blocks_in_a_round()
        x_BTD, written = self.layers(
            self.dropout(x_BTD),
            nothing if cache is None else cache.layers,
            nothing if memory is None else memory.layers,
            View(tokens, own, across, slots, int8),
        )
        layers = cast(tuple[Held, ...], written)
        if cache is not None:
            cache = Cache(keys, cache.index + tokens.ids.shape[1], layers)
        elif slots is not None:
            places = {window: each.write(None, tokens) for window, each in slots.items()}
            cache = Cache(places, jnp.full((), tokens.ids.shape[1], jnp.int32), layers)
        return self.final_norm(x_BTD) if config.norm_placement != "post" else x_BTD, cache


class Head(struct.PyTreeNode):
    """The output layer: its einsum, its weight, and its bias where it has one."""

    einsum: str = struct.field(pytree_node=False)
    w: Any  # an array, or Packed for inference
    b_V: Array | None


class Transformer(nn.Module):
    """The Transformer (Vaswani et al. 2017), whole or its decoder alone.

    `init(key, target, source)` and `apply(variables, target, source)` take Tokens, without `source` for a
    decoder-only model, and `apply` gives float32 logits [B, T, V] of the next token at each position. With
    `rngs={"dropout": key}` it drops out. `encode` and `decode` are its halves, for decoding with a cache.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set; a model needs the number of rows of its embedding table.")
        zeros, param_dtype = nn.initializers.zeros, jnp.dtype(config.param_dtype)
        two = config.mode == "encoder-decoder"  # the one switch
        self.embedding = Embedding(config)
        self.encoder = Stack(config.of_stack("encoder"), causal=False, cross=False) if two else None
        self.decoder = Stack(config, causal=True, cross=two)
        if two and not config.share_source_embedding:
            self.source_embedding = Embedding(config.replace(vocab_size=config.vocabulary_of("source")))
        if not config.tie_embeddings:
            self.output = Einsum("BTD,DV->BTV", config)
        bias = config.output_bias
        self.output_bias = self.param("output_bias_V", zeros, (config.vocab_size,), param_dtype) if bias else None

    def encode(self, source: Tokens | None) -> Memory | None:
        """The source as the decoder sees it; None of no source.

        Raises:
            ValueError: there is a source and no encoder, or an encoder and no source.
        """
        if (source is None) != (self.encoder is None):
            missing = "needs a source" if source is None else "takes no source"
            raise ValueError(f"A model of mode {self.config.mode!r} {missing}.")
        return None if source is None else self.remember(self.read(source), source)

    def read(self, source: Tokens) -> Array:
        """The encoder's output, [B, S, D]."""
        assert self.encoder is not None
        embedding = self.embedding if self.config.share_source_embedding else self.source_embedding
        return self.encoder(embedding(source.ids)[0], source)[0]

    def remember(self, x_BSD: Array, source: Tokens) -> Memory:
        """The encoder's output as the decoder sees it."""
        return self.decoder.remember(x_BSD, source)

    def decode(
        self,
        target: Tokens,
        memory: Memory | None = None,
        cache: Cache | None = None,
        room: Room | None = None,
        last: bool = False,
    ) -> tuple[Array, Cache | None]:
        """Logits, float32[B, T, V], after the target tokens, or [B, 1, V] after the `last`, and the cache with them.

        With a cache the target is what comes next, and it sees what the cache holds as well. Without one, `room` makes
        one of that size.
        """
        x_BTD, head, cache = self.features(target, memory, cache, room)
        x_BTD = x_BTD[:, -1:] if last else x_BTD
        kind = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTV = linear(x_BTD, (head.einsum, head.w), dtype=kind)[0]
        if head.b_V is not None:
            logits_BTV += head.b_V.astype(kind)
        return soft_cap(logits_BTV, self.config.logits_softcap), cache

    def features(
        self, target: Tokens, memory: Memory | None, cache: Cache | None = None, room: Room | None = None
    ) -> tuple[Array, Head, Cache | None]:
        """What the output layer reads, [B, T, D], that layer, and the cache; see `decode`."""
        config = self.config
        if (memory is None) == self.decoder.cross:
            raise ValueError(
                f"decode of a model of mode {config.mode!r} takes {'a' if self.decoder.cross else 'no'} memory."
            )
        x_BTD, table_VD = self.embedding(target.ids)
        x_BTD, cache = self.decoder(x_BTD, target, memory, cache, room)
        if config.scale_logits:
            x_BTD *= jnp.asarray(config.d_model**-0.5, x_BTD.dtype)
        einsum, w = (TIED, table_VD) if config.tie_embeddings else (self.output.spec, self.output.w)
        return x_BTD, Head(einsum, w, self.output_bias), cache

    def before_logits(self, target: Tokens, source: Tokens | None = None) -> tuple[Array, Head]:
        """Features and output layer, for a loss that never holds the logits of all tokens."""
        return self.features(target, self.encode(source))[:2]

    def __call__(self, target: Tokens, source: Tokens | None = None) -> Array:
        return self.decode(target, self.encode(source))[0]
