"""Logits -> the next token: what may be said, and how one of it is chosen."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


class Choice(struct.PyTreeNode):
    """How tokens are chosen. What is None takes no part, and costs nothing.

    Attributes:
        key: of the drawing; None takes the likeliest token.
        temperature: divides the logits before a token is drawn.
        top_p, min_p: as in `filter_logits`.
        repetition_penalty: tokens that a row has already have their logits divided by it where they are positive and
            multiplied where they are negative (Keskar et al. 2019, section 4.1).
        allowed: bool[V] or bool[B, V], the tokens that may be said.
        forced: int32[B, F], what the first new tokens have to be, -1 where they are free.
        top_k: as in `filter_logits`.
    """

    key: Any = None
    temperature: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    allowed: Any = None
    forced: Any = None
    top_k: int = struct.field(pytree_node=False, default=0)


def filter_logits(
    logits_BV: Array, top_k: int = 0, top_p: Array | float | None = None, min_p: Array | float | None = None
) -> Array:
    """Logits with all but the best at minus infinity.

    `top_k` keeps so many tokens (Fan et al. 2018), 0 all; `top_p` keeps the fewest whose probability reaches it
    (Holtzman et al. 2020), None all; `min_p` keeps those that are at least so likely as this share of the likeliest
    (Nguyen et al. 2024), None all. They are applied in this order.
    """
    if top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p is not None:
        sorted_BV = jnp.sort(logits_BV, -1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, -1), -1) - jax.nn.softmax(sorted_BV, -1)
        least_B1 = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if min_p is not None:
        least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(min_p)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def permitted(choice: Choice, logits_BV: Array, step: Array) -> Array:
    """Logits with what may not be said in this step at minus infinity."""
    allowed_BV = choice.allowed
    if choice.forced is not None:
        F = choice.forced.shape[1]
        forced_B = jnp.where(step < F, choice.forced[:, jnp.minimum(step, F - 1)], -1)[:, None]
        rest_BV = True if allowed_BV is None else allowed_BV
        allowed_BV = jnp.where(forced_B >= 0, jnp.arange(logits_BV.shape[-1]) == forced_B, rest_BV)
    return logits_BV if allowed_BV is None else jnp.where(allowed_BV, logits_BV, -jnp.inf)


def drawn_from(choice: Choice, logits_BV: Array) -> Array:
    """Logits of the distribution that tokens are drawn from."""
    if choice.temperature is not None:
        logits_BV = logits_BV / choice.temperature
    return filter_logits(logits_BV, choice.top_k, choice.top_p, choice.min_p)


def keys(key: Array, row_B: Array, step: Array) -> Array:
    """A key for each row and step, whatever the rows beside it."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(row_B)


def choose(choice: Choice, logits_BV: Array, seen_BV: Any, step: Array, row_B: Array) -> Array:
    """int32[B], the next token of each row; `seen_BV` are those it has already, `row_B` tells its drawing apart."""
    logits_BV = permitted(choice, logits_BV, step)
    if choice.repetition_penalty is not None:
        penalty = choice.repetition_penalty
        again_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, again_BV, logits_BV)
    if choice.key is None:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = drawn_from(choice, logits_BV)
    return jax.vmap(jax.random.categorical)(keys(choice.key, row_B, step), logits_BV).astype(jnp.int32)
