"""Speculative decoding (Leviathan et al. 2023): a small model proposes tokens, the large one checks several at once.

What comes out is the large model's own: greedily the same tokens, and drawn ones from the same distribution.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.axes import constrain
from transformer_jax.decoding.choice import Choice, choose, drawn_from, permitted
from transformer_jax.decoding.model import Generated, Plan, Request, follow, is_stop, read
from transformer_jax.model.cache import Cache, Room
from transformer_jax.model.transformer import Memory, Transformer
from transformer_jax.tokens import check_tokens

Array = jax.Array
PROPOSE, ACCEPT, REPLACE = 0, 1, 2  # what is drawn for a place


class Draft(NamedTuple):
    """The model that proposes, and how many tokens at once."""

    model: Transformer
    params: Any
    tokens: int


class Speculated(struct.PyTreeNode):
    """Sequences on their way; both caches hold all tokens but the last.

    Attributes:
        rounds: int32[B], how often the large model was asked after the prompt.
    """

    cache: Cache
    memory: Memory | None
    draft_cache: Cache
    draft_memory: Memory | None
    open_B: Array
    rounds: Array
    result: Generated


def _drawing(choice: Choice, row_B: Array, place_B: Array, what: int) -> Array:
    """A key for each row at its place."""
    each = jax.vmap(lambda row, place: jax.random.fold_in(jax.random.fold_in(choice.key, row), place))(row_B, place_B)
    return jax.vmap(lambda key: jax.random.fold_in(key, what))(each)


def _propose(draft: Draft, request: Request, state: Speculated, places_B: Array) -> tuple[Array, Array, Cache]:
    """Tokens [B, n] that the draft would say, their distributions as logits [B, n, V], and its cache with all."""
    choice, rows = request.choice, jnp.arange(len(places_B))

    def step(carry: tuple[Array, Cache], number: Array) -> tuple[tuple[Array, Cache], tuple[Array, Array]]:
        id_B, cache = carry
        logits_BTV, cache = follow(
            draft.model, draft.params, state.draft_memory, cache, id_B[:, None], places_B + number, beams=False
        )
        logits_BV = drawn_from(choice, permitted(choice, logits_BTV[:, 0], number))
        if choice.key is None:
            id_B = logits_BV.argmax(-1).astype(jnp.int32)
        else:
            key_B = _drawing(choice, request.row, state.result.lengths + number, PROPOSE)
            id_B = jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)
        return (id_B, cache), (id_B, logits_BV)

    last_B = state.result.ids[rows, state.result.lengths - 1]
    # once more than there are proposals, so that the last of them is in the cache as well
    (_, cache), (ids_TB, logits_TBV) = jax.lax.scan(step, (last_B, state.draft_cache), jnp.arange(draft.tokens + 1))
    return ids_TB[:-1].T, jnp.swapaxes(logits_TBV[:-1], 0, 1), cache


def _judge(
    choice: Choice, row_B: Array, place_B: Array, ids_BT: Array, draft_BTV: Array, logits_BTV: Array
) -> tuple[Array, Array]:
    """How many proposals of each row hold, [B], and the large model's own token after them, [B].

    `logits_BTV` has one place more than there are proposals. A drawn token holds with probability p / q; the one that
    replaces it is drawn from what p has above q (algorithm 1).
    """
    n = ids_BT.shape[1]
    flat = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    if choice.key is None:
        own_BT = flat.argmax(-1).astype(jnp.int32).reshape(logits_BTV.shape[:2])
        held_B = jnp.cumprod(own_BT[:, :n] == ids_BT, 1).sum(1)
        return held_B, jnp.take_along_axis(own_BT, held_B[:, None], 1)[:, 0]
    p_BTV = jax.nn.softmax(drawn_from(choice, flat), -1).reshape(logits_BTV.shape)
    q_BTV = jax.nn.softmax(draft_BTV, -1)

    def uniform(place: Array) -> Array:
        return jax.vmap(jax.random.uniform)(_drawing(choice, row_B, place_B + place, ACCEPT))

    chance_BT = jax.vmap(uniform, out_axes=1)(jnp.arange(n))
    p_BT, q_BT = (jnp.take_along_axis(x[:, :n], ids_BT[..., None], -1)[..., 0] for x in (p_BTV, q_BTV))
    held_B = jnp.cumprod(chance_BT * q_BT < p_BT, 1).sum(1)
    rows = jnp.arange(len(held_B))
    q_BTV = jnp.pad(q_BTV, [(0, 0), (0, 1), (0, 0)])  # after all proposals there is nothing to take away
    p_BV = p_BTV[rows, held_B]
    rest_BV = jnp.maximum(p_BV - q_BTV[rows, held_B], 0)
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
    key_B = _drawing(choice, row_B, place_B + held_B, REPLACE)
    return held_B, jax.vmap(jax.random.categorical)(key_B, jnp.log(rest_BV)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "draft_model", "plan", "tokens"))
def _decode(
    model: Transformer,
    params: Any,
    draft_model: Transformer,
    draft_params: Any,
    request: Request,
    plan: Plan,
    tokens: int,
) -> tuple[Generated, Array]:
    (B, P), N, n = request.prompt.ids.shape, plan.max_new_tokens, tokens
    draft, choice, rows = Draft(draft_model, draft_params, n), request.choice, jnp.arange(B)
    limit_B = request.limit(model, plan)
    room = Room(P + N + n, chunk=n + 1, int8=plan.int8)
    logits_BV, cache, memory = read(model, params, request, room)
    _, draft_cache, draft_memory = read(draft_model, draft_params, request, room)
    id_B = choose(choice, logits_BV, None, jnp.zeros((), jnp.int32), request.row)
    state = Speculated(
        cache=cache,
        memory=memory,
        draft_cache=draft_cache,
        draft_memory=draft_memory,
        open_B=~is_stop(id_B, request.stops) & (limit_B > 1),
        rounds=jnp.zeros(B, jnp.int32),
        result=Generated(
            jnp.full((B, N), request.pad_id, jnp.int32).at[:, 0].set(id_B),
            logits_BV[rows, id_B] - jax.nn.logsumexp(logits_BV, -1),
            jnp.ones(B, jnp.int32),
        ),
    )

    def extended(state: Speculated) -> Speculated:
        result, length_B = state.result, state.result.lengths
        index_B, places_B = P + length_B - 1, request.prompt.lengths + length_B - 1
        state = state.replace(
            cache=state.cache.replace(index=index_B), draft_cache=state.draft_cache.replace(index=index_B)
        )
        ids_BT, draft_BTV, draft_cache = _propose(draft, request, state, places_B)
        asked_BT = jnp.concatenate([result.ids[rows, length_B - 1][:, None], ids_BT], 1)
        logits_BTV, cache = follow(model, params, memory, state.cache, asked_BT, places_B, beams=False)
        log_BTV = logits_BTV - jax.nn.logsumexp(logits_BTV, -1, keepdims=True)
        may_BTV = jax.vmap(lambda x_BV: permitted(choice, x_BV, jnp.zeros((), jnp.int32)), 1, 1)(logits_BTV)
        held_B, own_B = _judge(choice, request.row, length_B, ids_BT, draft_BTV, may_BTV)

        said_BT = jnp.pad(ids_BT, [(0, 0), (0, 1)]).at[rows, held_B].set(own_B)
        stops_BT = is_stop(said_BT, request.stops)
        before_BT = jnp.cumsum(stops_BT, 1) - stops_BT  # end tokens before each
        place_T = jnp.arange(n + 1)
        counts_BT = (place_T <= held_B[:, None]) & (before_BT == 0) & state.open_B[:, None]
        counts_BT &= length_B[:, None] + place_T < limit_B[:, None]
        slot_BT = jnp.where(counts_BT, length_B[:, None] + place_T, N)
        score_BT = jnp.take_along_axis(log_BTV, said_BT[..., None], -1)[..., 0]
        lengths = length_B + counts_BT.sum(1, dtype=jnp.int32)
        return state.replace(
            cache=cache,
            draft_cache=draft_cache,
            open_B=state.open_B & ~(stops_BT & counts_BT).any(1) & (lengths < limit_B),
            rounds=state.rounds + state.open_B,
            result=Generated(
                result.ids.at[rows[:, None], slot_BT].set(said_BT, mode="drop"),
                result.scores + jnp.where(counts_BT, score_BT, 0).sum(1),
                lengths,
            ),
        )

    start = state.replace(
        cache=cache.replace(index=jnp.full(B, P)), draft_cache=draft_cache.replace(index=jnp.full(B, P))
    )
    # in the loop an index is one for each row
    end = jax.lax.while_loop(lambda state: state.open_B.any(), extended, start)
    return jax.tree.map(lambda x: constrain(x, "." * x.ndim), (end.result, end.rounds))


def check_draft(model: Transformer, draft: Draft, request: Request, plan: Plan) -> None:
    """Raises ValueError where a draft cannot propose for the model, or the request is not for one."""
    ours, its = model.config, draft.model.config
    if (ours.mode, ours.vocab_size) != (its.mode, its.vocab_size):
        raise ValueError(
            f"draft: a model of mode {its.mode!r} with vocab_size={its.vocab_size} cannot propose tokens for one of "
            f"mode {ours.mode!r} with vocab_size={ours.vocab_size}."
        )
    if draft.tokens < 1:
        raise ValueError(f"draft_tokens={draft.tokens} must be at least 1.")
    if plan.beam_size > 1 or request.choice.repetition_penalty is not None or request.choice.forced is not None:
        raise ValueError("draft: not with a beam_size above 1, a repetition_penalty or forced tokens.")
    for name, tokens in (("prompt", request.prompt), ("source", request.source)):
        if tokens is not None:
            check_tokens(tokens, its.vocab_size, its.max_length, f"draft: {name}")


def decode_with(model: Transformer, params: Any, request: Request, plan: Plan, draft: Draft) -> tuple[Generated, Array]:
    """As `decode`, and int32[B], how often the model was asked after the prompt.

    Raises:
        ValueError: the draft or the request is not for this.
    """
    check_draft(model, draft, request, plan)
    return _decode(model, params, draft.model, draft.params, request, plan, draft.tokens)
