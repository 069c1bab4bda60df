"""One sequence for each row, token by token: the likeliest, or one drawn at random."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.decoding.choice import choose
from transformer_jax.decoding.model import Generated, Plan, Request, follow, is_stop, read
from transformer_jax.model.cache import Cache, Room
from transformer_jax.model.transformer import Memory, Transformer

Array = jax.Array


class Sequences(struct.PyTreeNode):
    """Sequences on their way.

    Attributes:
        step: int32, new tokens so far.
        cache: holds all tokens but the last one.
        open_B: bool, the sequences that go on.
        seen_BV: bool, the tokens that each has; None where nobody asks.
    """

    step: Array
    cache: Cache
    memory: Memory | None
    open_B: Array
    seen_BV: Array | None
    result: Generated


def first(model: Transformer, params: Any, request: Request, plan: Plan) -> Sequences:
    """Reads the prompts and chooses the first token after each."""
    B, P = request.prompt.ids.shape
    logits_BV, cache, memory = read(model, params, request, Room(P + plan.max_new_tokens - 1, int8=plan.int8))
    seen_BV = None
    if request.choice.repetition_penalty is not None:
        real_BT, V = request.prompt.segments > 0, logits_BV.shape[-1]
        seen_BV = jnp.zeros((B, V + 1), bool)
        seen_BV = seen_BV.at[jnp.arange(B)[:, None], jnp.where(real_BT, request.prompt.ids, V)].set(True)[:, :V]
    nothing = Generated(
        jnp.full((B, plan.max_new_tokens), request.pad_id, jnp.int32),
        jnp.zeros(B, logits_BV.dtype),
        jnp.zeros(B, jnp.int32),
    )
    state = Sequences(jnp.zeros((), jnp.int32), cache, memory, jnp.ones(B, bool), seen_BV, nothing)
    return _extended(state, logits_BV, request, request.limit(model, plan))


def _extended(state: Sequences, logits_BV: Array, request: Request, limit_B: Array) -> Sequences:
    """The next token chosen."""
    step, open_B, result, rows = state.step, state.open_B, state.result, jnp.arange(len(limit_B))
    id_B = choose(request.choice, logits_BV, state.seen_BV, step, request.row)
    score_B = logits_BV[rows, id_B] - jax.nn.logsumexp(logits_BV, -1)
    id_B = jnp.where(open_B, id_B, request.pad_id)
    seen_BV = None if state.seen_BV is None else state.seen_BV.at[rows, id_B].set(True)
    result = Generated(
        result.ids.at[:, step].set(id_B), result.scores + jnp.where(open_B, score_B, 0), result.lengths + open_B
    )
    open_B &= ~is_stop(id_B, request.stops) & (step + 1 < limit_B)
    return state.replace(step=step + 1, open_B=open_B, seen_BV=seen_BV, result=result)


def more(model: Transformer, params: Any, request: Request, plan: Plan, state: Sequences, until: Any) -> Sequences:
    """The sequences with so many new tokens, or all that there are to be."""
    limit_B = request.limit(model, plan)

    def extended(state: Sequences) -> Sequences:
        id_B1 = jax.lax.dynamic_slice_in_dim(state.result.ids, state.step - 1, 1, axis=1)
        places_B = request.prompt.lengths + state.step - 1
        logits_B1V, cache = follow(model, params, state.memory, state.cache, id_B1, places_B, beams=False)
        return _extended(state.replace(cache=cache), logits_B1V[:, 0], request, limit_B)

    return jax.lax.while_loop(lambda state: (state.step < until) & state.open_B.any(), extended, state)


def results(state: Sequences, request: Request, plan: Plan) -> Generated:
    """The tokens so far."""
    return state.result
