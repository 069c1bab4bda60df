"""How order enters a Transformer: added to embeddings, as a rotation of queries and keys, or as a bias on logits.

A scheme fills in one of the three and leaves the others as they are, so the rest of the model has no `if`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer_jax.config import ModelConfig, RopeConfig
from transformer_jax.model.layers import at_least_float32, lookup
from transformer_jax.tokens import Tokens

Array = jax.Array


class Position(NamedTuple):
    """A position scheme.

    Attributes:
        table: letters of the learned table that a stack owns, `""` for none.
        embed: (table, tokens, config) -> what is added to the embeddings, [B, T, D] or a number.
        rotate: (x_BTHK, positions_BT, config) -> x_BTHK, of queries and keys alike.
        bias: (table, q, kv, causal, config) -> what is added to attention logits, [B, H, T, S], or None.
    """

    table: str = ""
    embed: Callable[[Array | None, Tokens, ModelConfig], Array | float] = lambda table, tokens, config: 0.0
    rotate: Callable[[Array, Array, ModelConfig], Array] = lambda x_BTHK, positions_BT, config: x_BTHK
    bias: Callable[[Array | None, Tokens, Tokens, bool, ModelConfig], Array | None] = lambda *_: None


def distance(q: Tokens, kv: Tokens) -> Array:
    """int32[B, T, S], how many places a key lies before a query."""
    return q.positions[:, :, None] - kv.positions[:, None, :]


def sinusoid(positions_BT: Array, width: int, last: bool = False) -> Array:
    """Sines, then cosines, of wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017, 3.5), [B, T, width].

    The paper writes the two interleaved; halves are the same features in another order, which is that of the
    authors' own code and of Marian's weights. With `last` the longest one is among them, as in that code.
    """
    frequencies = 10_000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / max(width // 2 - last, 1))
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def rope_frequencies(rope: RopeConfig, width: int) -> tuple[Array, float]:
    """float32[width / 2], radians a place for each pair of features, and the factor on queries and keys."""
    pairs = jnp.arange(width // 2, dtype=jnp.float32) / (width // 2)
    frequencies = rope.base**-pairs
    if rope.scaling == "none":
        return frequencies, 1.0
    return ROPE_SCALINGS[rope.scaling](frequencies, pairs, rope, width)


def _kept(frequencies: Array, rope: RopeConfig) -> Array:
    """Share of each frequency that is left alone: 0 below `low` turns over the original length, 1 above `high`."""
    turns = rope.original_length * frequencies / (2 * math.pi)
    return jnp.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)


def _ntk(frequencies: Array, pairs: Array, rope: RopeConfig, width: int) -> tuple[Array, float]:
    """A larger base: fast features keep their speed, the slowest is stretched by `factor` (bloc97 2023)."""
    return (rope.base * rope.factor ** (width / max(width - 2, 1))) ** -pairs, 1.0


def _llama3(frequencies: Array, pairs: Array, rope: RopeConfig, width: int) -> tuple[Array, float]:
    """Slow features are stretched, fast ones are not, the ones between are mixed by their turns (Llama 3.1)."""
    kept = _kept(frequencies, rope)
    return frequencies * (kept + (1 - kept) / rope.factor), 1.0


def _yarn(frequencies: Array, pairs: Array, rope: RopeConfig, width: int) -> tuple[Array, float]:
    """As above, mixed by the index of the feature, with a temperature (Peng et al. 2023, sections 3.2 and 3.4)."""

    def index(turns: float) -> float:
        return width * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    first, last = max(math.floor(index(rope.high)), 0), min(math.ceil(index(rope.low)), width - 1)
    kept = 1 - jnp.clip((jnp.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor), 0.1 * math.log(rope.factor) + 1.0


ROPE_SCALINGS: dict[str, Callable[[Array, Array, RopeConfig, int], tuple[Array, float]]] = {
    "linear": lambda frequencies, pairs, rope, width: (frequencies / rope.factor, 1.0),
    "ntk": _ntk,
    "llama3": _llama3,
    "yarn": _yarn,
}


def rotate(x_BTHK: Array, positions_BT: Array, config: ModelConfig) -> Array:
    """Turn pairs of features by an angle that grows with the position (Su et al. 2021, 3.4.2).

    A pair is feature i of the first half and of the second, as in GPT-NeoX and Llama.
    """
    width = round(x_BTHK.shape[-1] * config.rope.fraction)
    turning, still = jnp.split(x_BTHK, [width], -1)
    frequencies, factor = rope_frequencies(config.rope, width)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = (jnp.sin(angles) * factor).astype(x_BTHK.dtype), (jnp.cos(angles) * factor).astype(x_BTHK.dtype)
    a, b = jnp.split(turning, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, still], -1)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head: powers of 2^(-8/n); where n is no power of two, those of the next lower one and then
    every other slope of the next higher one, as in the authors' code (Press et al. 2022, section 3)."""
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / lower) for head in range(lower)]
    between = [2 ** (-4 * (head + 1) / lower) for head in range(0, 2 * lower, 2)]
    return (slopes + between)[:num_heads]


def alibi(table: Array | None, q: Tokens, kv: Tokens, causal: bool, config: ModelConfig) -> Array:
    """A penalty in proportion to the distance; in both directions where the attention looks both ways."""
    slope_H = jnp.asarray(alibi_slopes(config.num_heads), jnp.float32)
    return -slope_H[:, None, None] * jnp.abs(distance(q, kv))[:, None]


def t5_bucket(distance_BTS: Array, causal: bool, buckets: int, max_distance: int) -> Array:
    """int32[B, T, S], the bucket of a distance: one each when near, then ever wider (Raffel et al. 2020, 2.1).

    Half of the buckets are for keys after the query where the attention looks both ways.
    """
    after = jnp.zeros_like(distance_BTS)
    if not causal:
        buckets //= 2
        after = buckets * (distance_BTS < 0)
        distance_BTS = jnp.abs(distance_BTS)
    distance_BTS = jnp.maximum(distance_BTS, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance_BTS, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return after + jnp.where(distance_BTS < exact, distance_BTS, far)


def t5_bias(table_RH: Array | None, q: Tokens, kv: Tokens, causal: bool, config: ModelConfig) -> Array:
    """A learned number for each head and bucket of distance, shared by the layers of a stack."""
    assert table_RH is not None
    bucket_BTS = t5_bucket(distance(q, kv), causal, config.relative_buckets, config.relative_max_distance)
    return jnp.moveaxis(at_least_float32(table_RH)[bucket_BTS], -1, 1)


def _learned(table_LD: Array | None, tokens: Tokens, config: ModelConfig) -> Array:
    assert table_LD is not None
    return lookup(table_LD, "LD", tokens.positions + config.position_offset, table_LD.dtype)[0]


def _sinusoidal(last: bool) -> Callable[[Array | None, Tokens, ModelConfig], Array]:
    return lambda table, tokens, config: sinusoid(tokens.positions + config.position_offset, config.d_model, last)


POSITIONS: dict[str, Position] = {
    "none": Position(),
    "sinusoidal": Position(embed=_sinusoidal(last=False)),
    "sinusoidal_t2t": Position(embed=_sinusoidal(last=True)),
    "learned": Position(table="LD", embed=_learned),
    "rope": Position(rotate=rotate),
    "alibi": Position(bias=alibi),
    "t5": Position(table="RH", bias=t5_bias),
}
