"""Ways to compute softmax attention. All give what `reference` gives; they differ in memory, speed and device.

A program can add attentions of other kinds: `add_attention`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.config_model import SOFTMAX, add_attention_name
from transformer_jax.model.gradients import masked_softmax

Array = jax.Array


class Sight(struct.PyTreeNode):
    """What queries look at.

    Attributes:
        mask_BTS: bool[B, T, S], which keys a query sees.
        bias_BHTS: what order adds to the logits, [B, H, T, S]; None for nothing.
        segments: int32 [B, T] of queries and [B, S] of keys, where they and the places in the row make the mask, 0 for
            padding; None where the mask follows from something else, too.
        causal: with `segments`, no key after a query's place in the row is seen.
        window: with `segments`, only keys at less than this distance are; 0 for any.
    """

    mask_BTS: Array
    bias_BHTS: Array | None = None
    segments: tuple[Array, Array] | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    window: int = struct.field(pytree_node=False, default=0)


def soft_cap(x: Array, cap: float | None) -> Array:
    """x bent smoothly into (-cap, cap) (Gemma 2, section 2); the same x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention_logits(q_BTHK: Array, k_BSGK: Array, sight: Sight, cap: float | None) -> Array:
    """How well each key answers a query, at least float32[B, H, T, S], whether the query sees it or not.

    Each of the G key heads serves H / G query heads. The bias of order is added, then the soft cap is put on.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    kind = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    # heads first, and the heads of a group below each other: one product of two matrices for each key/value head
    q_BGRK, k_BGSK = jnp.swapaxes(q_BTHK, 1, 2).reshape(B, G, -1, K), jnp.swapaxes(k_BSGK, 1, 2)
    logits_BGRS = jnp.einsum("BGRK,BGSK->BGRS", q_BGRK, k_BGSK, preferred_element_type=kind)
    logits_BHTS = logits_BGRS.reshape(B, H, T, S)
    if sight.bias_BHTS is not None:
        logits_BHTS += sight.bias_BHTS
    return soft_cap(logits_BHTS, cap)


def attention_weights(q_BTHK: Array, k_BSGK: Array, sight: Sight, cap: float | None) -> Array:
    """How much of each key a query takes, [B, H, T, S]: the softmax over the keys that it sees."""
    return masked_softmax(attention_logits(q_BTHK, k_BSGK, sight, cap), sight.mask_BTS[:, None])


Weights = Callable[[Array, Array, Sight, float | None], Array]


def reference(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    sight: Sight,
    cap: float | None,
    keep_BHTS: Array | None,
    weights: Weights = attention_weights,
) -> Array:
    """Softmax attention (Vaswani et al. 2017, equation 1) of queries that are scaled already, [B, T, H, K].

    Each of the G key/value heads serves H / G query heads. Logits and softmax are at least float32. A query that sees
    no key gets zeros. `keep_BHTS` multiplies the weights, which other `weights` than softmax can be.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    weights_BHTS = weights(q_BTHK, k_BSGK, sight, cap)
    if keep_BHTS is not None:
        weights_BHTS *= keep_BHTS
    weights_BGRS = weights_BHTS.astype(q_BTHK.dtype).reshape(B, G, -1, S)
    out_BGRK = jnp.einsum("BGRS,BGSK->BGRK", weights_BGRS, jnp.swapaxes(v_BSGK, 1, 2))
    return jnp.swapaxes(out_BGRK.reshape(B, H, T, K), 1, 2)


def blocks(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, sight: Sight, cap: float | None, keep_BHTS: Array | None
) -> Array:
    """`reference` for a block of queries at a time, in the backward pass again (Rabe and Staats 2021, section 3).

    Logits of one block are held at a time, so memory grows with S instead of T * S; what is small is kept for the
    backward pass, which is quicker. Keys that no query of a part can see by its place are left out, which is nearly
    half of the work where attention is causal.
    """
    (B, T, H, _), S = q_BTHK.shape, k_BSGK.shape[1]
    size = BLOCK * -(-T // (PARTS * BLOCK)) if T > PARTS * BLOCK and T % BLOCK == 0 else -(-T // PARTS)

    def seen(start: int, end: int) -> slice:
        """The keys that queries at these places can see."""
        if sight.segments is None:
            return slice(0, S)
        reach = sight.window - 1 if sight.window else S
        return slice(max(0, start - reach), end if sight.causal else min(S, end + reach))

    def part(start: int) -> Array:
        end = min(start + size, T)
        rows, keys = slice(start, end), seen(start, end)
        k, v = k_BSGK[:, keys], v_BSGK[:, keys]

        def block(cut: Any) -> Array:
            q, mask, bias, keep = cut
            return reference(q, k, v, Sight(mask, bias), cap, keep)

        if B * H * T * S * 4 > KEPT_BYTES:
            block = jax.checkpoint(block)
        cut = q_BTHK[:, rows], sight.mask_BTS[:, rows, keys]
        cut += tuple(None if x is None else x[:, :, rows, keys] for x in (sight.bias_BHTS, keep_BHTS))
        if end - start <= BLOCK or (end - start) % BLOCK:
            return block(cut)
        several = [_first(x, axis) for x, axis in zip(cut, (1, 1, 2, 2), strict=True)]
        return jnp.moveaxis(jax.lax.map(block, tuple(several)), 0, 1).reshape(cut[0].shape)

    return jnp.concatenate([part(start) for start in range(0, T, size)], 1)


def _first(x: Array | None, axis: int) -> Array | None:
    """The axis of queries as a first axis of blocks."""
    if x is None:
        return None
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]), axis, 0)


def _library(implementation: Any, full_rows: bool = False) -> Callable[..., Array]:
    """`jax.nn.dot_product_attention`, whose softmax of a query that sees no key is set to zero.

    With `full_rows` a batch in which every row is one document without padding is attended to without a mask, which a
    flash kernel would read whole; whether it is one is found out as it runs.
    """
    library = functools.partial(jax.nn.dot_product_attention, scale=1.0, implementation=implementation)

    def attend(
        q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, sight: Sight, cap: float | None, keep_BHTS: Array | None
    ) -> Array:
        def masked(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array) -> Array:
            bias = None if sight.bias_BHTS is None else sight.bias_BHTS.astype(q_BTHK.dtype)
            out_BTHK = library(q_BTHK, k_BSGK, v_BSGK, bias, sight.mask_BTS[:, None])
            return jnp.where(sight.mask_BTS.any(-1)[..., None, None], out_BTHK, 0)

        def full(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array) -> Array:
            return library(q_BTHK, k_BSGK, v_BSGK, is_causal=sight.causal)

        if not full_rows or sight.segments is None or sight.window or sight.bias_BHTS is not None:
            return masked(q_BTHK, k_BSGK, v_BSGK)
        alone = jnp.all(sight.segments[0] == 1) & jnp.all(sight.segments[1] == 1)
        return jax.lax.cond(alone, full, masked, q_BTHK, k_BSGK, v_BSGK)

    return attend


def splash(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    sight: Sight,
    cap: float | None,
    keep_BHTS: Array | None,
    interpret: bool = False,
) -> Array:
    """JAX's flash attention for TPU, written in Pallas, which skips blocks of keys that nobody sees."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (T, H), S = q_BTHK.shape[1:3], k_BSGK.shape[1]
    assert sight.segments is not None
    if sight.window:
        one: Any = masks.LocalMask((T, S), (sight.window - 1, 0 if sight.causal else sight.window - 1), 0)
    else:
        one = masks.CausalMask((T, S)) if sight.causal else masks.FullMask((T, S))
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * H),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    k_BSHK, v_BSHK = (jnp.repeat(x, H // x.shape[2], 2) for x in (k_BSGK, v_BSGK))
    first = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    out_BHTK: Any = jax.vmap(attend)(*first, kernel.SegmentIds(*sight.segments))
    seen_BT = (sight.segments[0] > 0) & sight.mask_BTS.any(-1)  # the kernel lets padding see padding
    return jnp.where(seen_BT[..., None, None], jnp.swapaxes(out_BHTK, 1, 2).astype(q_BTHK.dtype), 0)


class Shape(NamedTuple):
    """What decides which ways can compute an attention."""

    platform: str
    dtype: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    cap: bool = False
    bias: bool = False
    dropout: bool = False
    segments: bool = False
    causal: bool = False


PARTS = 4  # of a row's queries, each with the keys that it can see
BLOCK = 512  # queries of a part that are taken at once
KEPT_BYTES = 2**26  # of one layer's logits, above which blocks compute them again in the backward pass
LOGIT_BYTES = 2**29  # of one layer's logits, above which `auto` takes blocks of queries
CAUSAL_QUERIES = 256  # from which on `auto` takes them on a CPU where keys can be left out


def _why_not_blocks(shape: Shape) -> str | None:
    return f"{shape.queries} queries are not several blocks" if shape.queries < 2 * PARTS else None


def _why_not_library(shape: Shape) -> str | None:
    if shape.dtype == "float64":
        return "its softmax is float32, and this is float64"
    return "it has no soft cap" if shape.cap else "it has no dropout" if shape.dropout else None


def _why_not_cudnn(shape: Shape) -> str | None:
    if shape.platform != "gpu":
        return f"it needs a GPU, and this is {shape.platform}"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"it needs bfloat16, and this is {shape.dtype}"
    if shape.head_dim > 128 or shape.head_dim % 8:
        return f"head_dim {shape.head_dim} is not a multiple of 8 up to 128"
    if shape.bias:
        return "the gradient of a bias for each head would be held whole"
    return "one query at a time gains nothing" if shape.queries == 1 else _why_not_library(shape)


def _why_not_splash(shape: Shape) -> str | None:
    if shape.platform != "tpu":
        return f"it needs a TPU, and this is {shape.platform}"
    if shape.bias or shape.dropout:
        return f"it has no {'bias' if shape.bias else 'dropout'}"
    if not shape.segments:
        return "what is seen does not follow from segments and places alone"
    if shape.queries % 128 or shape.keys % 128 or shape.queries < 128:
        return f"{shape.queries} queries and {shape.keys} keys are not multiples of 128"
    return f"head_dim {shape.head_dim} is not a multiple of 128" if shape.head_dim % 128 else None


class Backend(NamedTuple):
    """A way to compute attention, why it can't be used for a shape, None where it can, and how it weighs keys."""

    attend: Callable[..., Array]
    why_not: Callable[[Shape], str | None]
    weights: Weights = attention_weights


BACKENDS = {
    "reference": Backend(reference, lambda shape: None),
    "blocks": Backend(blocks, _why_not_blocks),
    "xla": Backend(_library("xla"), _why_not_library),
    "cudnn": Backend(_library("cudnn", full_rows=True), _why_not_cudnn),
    "splash": Backend(splash, _why_not_splash),
}


def add_attention(name: str, weights: Weights) -> None:
    """Adds an attention that `ModelConfig(attention=name)` then names, for this process.

    It works wherever softmax attention does: in both modes, with any mask, order, cache, mesh and dropout, and in the
    pictures of `describe --attention`. A name that was added before gets the new weights.

    Args:
        name: as the config and the command line have it. It is saved with a run, so who loads one adds it first.
        weights: (q [B, T, H, K], scaled already; k [B, S, G, K]; sight; soft cap or None) -> how much of each key a
            query takes, float32[B, H, T, S], 0 where `sight.mask_BTS` is False. `attention_logits` takes the same. It
            must not depend on keys that are masked, nor on how many there are: a cache has empty places.

    Raises:
        ValueError: the package has an attention of that name.
    """
    if name in SOFTMAX:
        raise ValueError(f"attention {name!r} is one of the package's own: {', '.join(SOFTMAX)}. Take another name.")
    if name in BACKENDS:
        jax.clear_caches()  # what is compiled has the old weights
    else:
        add_attention_name(name)
    BACKENDS[name] = Backend(functools.partial(reference, weights=weights), lambda shape: None, weights)


def weights_of(name: str) -> Weights:
    """What an attention takes of each key; the ways to compute softmax attention all take the same."""
    return BACKENDS["reference" if name == "auto" else name].weights


def choose(name: str, shape: Shape) -> tuple[str, str]:
    """The backend for a shape, and why: the one of that name, `reference` where it can't be used; `auto` is the best.

    `auto` takes the kernel of the device where it fits, blocks where the logits of a layer would be large or a CPU can
    leave out keys, and else the reference.
    """
    if name != "auto":
        reason = BACKENDS[name].why_not(shape)
        return (name, "as asked for") if reason is None else ("reference", f"{name}: {reason}")
    for kernel in ("splash", "cudnn"):
        if BACKENDS[kernel].why_not(shape) is None:
            return kernel, f"the kernel for {shape.platform}"
    size, reason = math.prod((shape.batch, shape.heads, shape.queries, shape.keys, 4)), _why_not_blocks(shape)
    logits = f"the logits of a layer take {size / 2**20:,.0f} MiB"
    if size > LOGIT_BYTES and reason is None:
        return "blocks", logits
    if shape.platform == "cpu" and shape.causal and shape.segments and shape.queries >= CAUSAL_QUERIES:
        return "blocks", "keys after a block of queries are left out"
    few = f", too many, but {reason}" if size > LOGIT_BYTES else ", which is few"
    return "reference", f"no kernel for {shape.dtype} on {shape.platform} fits; {logits}{few}"


def attend_with(name: str, *inputs: Any) -> Array:
    """`reference(*inputs)` by the backend that `choose` finds."""
    q_BTHK, k_BSGK, _, sight, cap, keep_BHTS = inputs
    B, T, H, K = q_BTHK.shape
    has = dict(cap=cap is not None, bias=sight.bias_BHTS is not None, dropout=keep_BHTS is not None)
    has |= dict(segments=sight.segments is not None, causal=sight.causal)
    shape = Shape(jax.default_backend(), q_BTHK.dtype.name, B, T, k_BSGK.shape[1], H, K, **has)
    return BACKENDS[choose(name, shape)[0]].attend(*inputs)
