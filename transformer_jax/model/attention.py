"""Attention: which keys a query sees, the softmax over them, and the projections around it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from transformer_jax.config import ModelConfig
from transformer_jax.model.layers import Dropout, Einsum, Norm, constrain
from transformer_jax.model.positions import POSITIONS, Position, distance
from transformer_jax.tokens import Tokens

Array = jax.Array


class KeyValue(struct.PyTreeNode):
    """Keys and values of one layer, [B, S, G, K] each."""

    k_BSGK: Array
    v_BSGK: Array


class Sight(struct.PyTreeNode):
    """What queries look at: bool[B, T, S], which keys they see, and what order adds to the logits, [B, H, T, S]."""

    mask_BTS: Array
    bias_BHTS: Array | None = None


def sees(q: Tokens, kv: Tokens, causal: bool, window: int = 0) -> Array:
    """bool[B, T, S], which keys a query may look at: the one rule for padding, packing, time, prefixes and windows.

    A key is seen within the query's own document (segment 0 is padding, which nobody sees); with `causal` only at the
    query's position or before it, unless it is of the prefix; with a window only at less than that distance.
    """
    mask_BTS = (q.segments[:, :, None] == kv.segments[:, None, :]) & (kv.segments[:, None, :] > 0)
    if causal:
        before_BTS = distance(q, kv) >= 0
        mask_BTS &= before_BTS if kv.prefix is None else before_BTS | kv.prefix[:, None, :]
    return mask_BTS & (jnp.abs(distance(q, kv)) < window) if window else mask_BTS


def soft_cap(x: Array, cap: float | None) -> Array:
    """x bent smoothly into (-cap, cap) (Gemma 2, section 2); the same x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(q_BTHK: Array, kv: KeyValue, sight: Sight, cap: float | None, drop: Callable[[Array], Array]) -> Array:
    """Softmax attention (Vaswani et al. 2017, equation 1) of queries that are scaled already, [B, T, H, K].

    Each of the G key/value heads serves H / G query heads. Logits and softmax are at least float32. A query that sees
    no key gets zeros.
    """
    B, T, H, K = q_BTHK.shape
    G = kv.k_BSGK.shape[2]
    q_BTGHK = q_BTHK.reshape(B, T, G, H // G, K)
    kind = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    logits_BGHTS = jnp.einsum("BTGHK,BSGK->BGHTS", q_BTGHK, kv.k_BSGK, preferred_element_type=kind)
    if sight.bias_BHTS is not None:
        logits_BGHTS += sight.bias_BHTS.reshape(-1, G, H // G, *sight.bias_BHTS.shape[-2:])
    mask = sight.mask_BTS[:, None, None]
    weights_BGHTS = jax.nn.softmax(jnp.where(mask, soft_cap(logits_BGHTS, cap), jnp.finfo(kind).min), -1)
    weights_BGHTS = drop(jnp.where(mask, weights_BGHTS, 0)).astype(q_BTHK.dtype)
    return jnp.einsum("BGHTS,BSGK->BTGHK", weights_BGHTS, kv.v_BSGK).reshape(B, T, H, K)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, of tokens to themselves or to a memory.

    `position` says how order enters its queries and keys; `Position()` is not at all.
    """

    config: ModelConfig
    position: Position = Position()

    def setup(self) -> None:
        config, bias = self.config, self.config.use_bias
        self.query = Einsum("BTD,DHK->BTHK", config, bias)
        self.key = Einsum("BSD,DGK->BSGK", config, bias)
        self.value = Einsum("BSD,DGK->BSGK", config, bias)
        self.out = Einsum("BTHK,HKD->BTD", config, bias)
        if config.qk_norm:
            self.query_norm, self.key_norm = Norm(config, "K"), Norm(config, "K")
        self.dropout = Dropout(config.attention_dropout_rate)

    def project(self, x_BSD: Array, tokens: Tokens) -> KeyValue:
        """Keys and values that any query can be matched with, now or later."""
        k_BSGK = self.key(x_BSD)
        if self.config.qk_norm:
            k_BSGK = self.key_norm(k_BSGK)
        return KeyValue(self.position.rotate(k_BSGK, tokens.positions, self.config), self.value(x_BSD))

    def __call__(self, x_BTD: Array, tokens: Tokens, kv: KeyValue, sight: Sight) -> Array:
        config = self.config
        q_BTHK = self.query(x_BTD)
        if config.qk_norm:
            q_BTHK = self.query_norm(q_BTHK)
        q_BTHK = self.position.rotate(q_BTHK, tokens.positions, config)
        q_BTHK *= jnp.asarray(config.query_scale or config.head_dim**-0.5, q_BTHK.dtype)
        y_BTHK = attend(q_BTHK, kv, sight, config.attention_softcap, self.dropout)
        return self.out(constrain(y_BTHK, "BTHK"))


CROSS_POSITIONS = {"none": lambda config: Position(), "same": lambda config: POSITIONS[config.position]}
