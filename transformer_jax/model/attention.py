"""Attention: which keys a query sees, the softmax over them, and the projections around it."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from transformer_jax.axes import constrain, gathered, mesh_in_use, spec, split
from transformer_jax.config import ModelConfig
from transformer_jax.model.backends import Shape, Sight, attend_with, choose, weights_of
from transformer_jax.model.layers import INITIALIZERS, Einsum, Norm, project
from transformer_jax.model.positions import POSITIONS, Position, distance
from transformer_jax.tokens import Tokens

Array = jax.Array


class KeyValue(struct.PyTreeNode):
    """Keys and values of one layer, [B, S, G, K] each."""

    k_BSGK: Array
    v_BSGK: Array


def sees(q: Tokens, kv: Tokens, causal: bool, window: int = 0) -> Array:
    """bool[B, T, S], which keys a query may look at: the one rule for padding, packing, time, prefixes, windows, beams.

    A key is seen within the query's own document (segment 0 is padding, which nobody sees); with `causal` only at the
    query's position or before it, unless it is of the prefix; with a window only at less than that distance; and where
    sequences go on side by side, only by those that descend from it.
    """
    mask_BTS = (q.segments[:, :, None] == kv.segments[:, None, :]) & (kv.segments[:, None, :] > 0)
    if causal and kv.lineage is not None:
        mask_BTS &= (q.lineage[:, :, None] & kv.lineage[:, None]).any(-1)
    if causal:
        before_BTS = distance(q, kv) >= 0
        mask_BTS &= before_BTS if kv.prefix is None else before_BTS | kv.prefix[:, None, :]
    return mask_BTS & (jnp.abs(distance(q, kv)) < window) if window else mask_BTS


def attend(
    q_BTHK: Array,
    kv: KeyValue,
    sight: Sight,
    cap: float | None,
    keep_BHTS: Array | None = None,
    backend: str = "reference",
) -> Array:
    """`backends.reference`, by that backend or another one, on the devices where the queries are, [B, T, H, K].

    Where a sequence is split over devices, each has a part of the queries and gathers the keys and values of all
    (Llama Team 2024, section 3.3.2), so every mask is exact.
    """
    mesh = mesh_in_use()
    if not mesh:
        return attend_with(backend, q_BTHK, kv.k_BSGK, kv.v_BSGK, sight, cap, keep_BHTS)
    q_split = split(dict(zip("BTHK", q_BTHK.shape, strict=True)), mesh)
    H, G = q_BTHK.shape[2], kv.k_BSGK.shape[2]
    if 1 < G < H and split({"G": G}, mesh).get("G") != q_split.get("H"):
        kv = jax.tree.map(lambda x: jnp.repeat(x, H // G, 2), kv)  # the heads of a group lie on several devices
    have = split(dict(zip("BSGK", kv.k_BSGK.shape, strict=True)), mesh)
    if "T" not in q_split:
        have.pop("S", None)
    want = {letter: axes for letter, axes in have.items() if letter != "S"}

    def local(q_BTHK: Array, kv: KeyValue, sight: Sight, keep_BHTS: Array | None) -> Array:
        k_BSGK, v_BSGK = (gathered(x, "BSGK", have, want) for x in (kv.k_BSGK, kv.v_BSGK))
        return attend_with(backend, q_BTHK, k_BSGK, v_BSGK, sight, cap, keep_BHTS)

    q_spec, kv_spec = spec("BTHK", q_split), spec("BSGK", have)
    if "T" in q_split:
        sight = sight.replace(segments=None)  # a part of the queries does not begin at the row's first place
    sight_specs = jax.tree.map(lambda x: spec({2: "BT", 3: "BT.", 4: "BHT."}[x.ndim], q_split), sight)
    inputs = (q_spec, kv_spec, sight_specs, spec("BHT.", q_split))
    return jax.shard_map(local, in_specs=inputs, out_specs=q_spec)(q_BTHK, kv, sight, keep_BHTS)


def describe_attention(config: ModelConfig, rows: int, length: int) -> str:
    """One line that says how a decoder attends to so many rows of that length on a device in training, and why."""
    shape = Shape(
        jax.default_backend(),
        config.dtype,
        rows,
        length,
        length,
        config.num_heads,
        config.head_dim,
        cap=config.attention_softcap is not None,
        bias=config.position in ("alibi", "t5"),
        dropout=config.attention_dropout_rate > 0,
        segments=config.prefix_attention == "causal",
        causal=True,
    )
    name, why = choose(config.attention, shape)
    return f"attention {name}: {why}"


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, of tokens to themselves or to a memory.

    `position` says how order enters its queries and keys; `Position()` is not at all.
    """

    config: ModelConfig
    position: Position = Position()

    def setup(self) -> None:
        config, bias = self.config, self.config.qkv_bias
        gain = INITIALIZERS[config.initializer].joint_gain
        # with another scale than 1 / sqrt(K), as T5's, logits start as large all the same (Raffel et al.'s code)
        scale = config.head_dim**-0.5 / config.query_scale if config.query_scale else 1.0
        self.query = Einsum("BTD,DHK->BTHK", config, bias, scale * gain)
        self.key = Einsum("BTD,DGK->BTGK", config, bias, gain)
        self.value = Einsum("BTD,DGK->BTGK", config, bias, gain)
        self.out = Einsum("BTHK,HKD->BTD", config, config.use_bias)
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config, "K"), Norm(config, "K")

    def _queries(self, q_BTHK: Array, tokens: Tokens) -> Array:
        config = self.config
        if config.qk_norm:
            q_BTHK = self.query_norm(q_BTHK)
        q_BTHK = self.position.rotate(q_BTHK, tokens.positions, config)
        return q_BTHK * jnp.asarray(config.query_scale or config.head_dim**-0.5, q_BTHK.dtype)

    def _keys(self, k_BSGK: Array, v_BSGK: Array, tokens: Tokens) -> KeyValue:
        if self.config.qk_norm:
            k_BSGK = self.key_norm(k_BSGK)
        return KeyValue(self.position.rotate(k_BSGK, tokens.positions, self.config), v_BSGK)

    def queries(self, x_BTD: Array, tokens: Tokens) -> Array:
        """What the tokens ask of a memory."""
        return self._queries(project(x_BTD, self.query)[0], tokens)

    def keys(self, x_BSD: Array, tokens: Tokens) -> KeyValue:
        """Keys and values that any query can be matched with, now or later."""
        k_BSGK, v_BSGK = project(x_BSD, self.key, self.value)
        return self._keys(k_BSGK, v_BSGK, tokens)

    def queries_and_keys(self, x_BTD: Array, tokens: Tokens) -> tuple[Array, KeyValue]:
        """Both, of tokens that attend to themselves."""
        q_BTHK, k_BTGK, v_BTGK = project(x_BTD, self.query, self.key, self.value)
        return self._queries(q_BTHK, tokens), self._keys(k_BTGK, v_BTGK, tokens)

    def __call__(self, q_BTHK: Array, kv: KeyValue, sight: Sight) -> Array:
        config, rate = self.config, self.config.attention_dropout_rate
        if self.is_mutable_collection("attention") and not self.is_initializing():  # somebody wants to look at it
            weights_BHTS = weights_of(config.attention)(q_BTHK, kv.k_BSGK, sight, config.attention_softcap)
            self.sow("attention", "weights_BHTS", weights_BHTS)
        keep_BHTS = None
        if rate and self.has_rng("dropout"):
            shape = (*q_BTHK.shape[:1], config.num_heads, *sight.mask_BTS.shape[1:])
            keep_BHTS = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape) / (1 - rate)
            keep_BHTS = constrain(keep_BHTS, "BHT.")
        return self.out(attend(q_BTHK, kv, sight, config.attention_softcap, keep_BHTS, config.attention))


CROSS_POSITIONS = {"none": lambda config: Position(), "same": lambda config: POSITIONS[config.position]}
