"""Beam search: the sequences of a row are queries side by side over one cache, so no key is ever copied or moved.

Each slot of the cache remembers which beams descend from it (`Tokens.lineage`). A beam that is replaced by another
changes those bits and nothing else; the prompt and the source are read once, however many beams there are.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from transformer_jax.decoding.choice import permitted
from transformer_jax.decoding.model import Generated, Plan, Request, follow, read
from transformer_jax.model.cache import Cache, Room
from transformer_jax.model.transformer import Memory, Transformer

Array = jax.Array


class Beams(struct.PyTreeNode):
    """Beams on their way, W for each row.

    Attributes:
        step: int32, new tokens so far.
        cache: holds all tokens but the last ones.
        ids_BWN: int32, the new tokens of those that go on, the likeliest first.
        sum_BW: float32, their log-probabilities; minus infinity where there is none.
        ended: the W best sequences that have ended, with their scores.
        done_B: bool, the rows in which no beam can become one of the best any more, or by `early_stopping` need not.
    """

    step: Array
    cache: Cache
    memory: Memory | None
    ids_BWN: Array
    sum_BW: Array
    ended: Generated
    done_B: Array

    @property
    def open_B(self) -> Array:
        return ~self.done_B


def best_of(score_BW: Array, count: int, tree: Any) -> tuple[Array, Any]:
    """The `count` best scores of each row, and the same places of every array, [B, W, ...]; ties go to the first."""
    score_BW, place_BW = jax.lax.top_k(score_BW, count)
    rows = jnp.arange(len(score_BW))[:, None]
    return score_BW, jax.tree.map(lambda x: x[rows, place_BW], tree)


def first(model: Transformer, params: Any, request: Request, plan: Plan) -> Beams:
    """Reads the prompts and begins the beams."""
    (B, P), W, N = request.prompt.ids.shape, plan.beam_size, plan.max_new_tokens
    room = Room(P + W * (N - 1), width=W, chunk=W, int8=plan.int8)
    logits_BV, cache, memory = read(model, params, request, room)
    logits_BWV = jnp.broadcast_to(logits_BV[:, None], (B, W, logits_BV.shape[-1]))
    ids_BWN = jnp.full((B, W, N), request.pad_id, jnp.int32)
    nothing = jnp.full((B, W), -jnp.inf, logits_BV.dtype)
    state = Beams(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        memory=memory,
        ids_BWN=ids_BWN,
        sum_BW=nothing.at[:, 0].set(0),
        ended=Generated(ids_BWN, nothing, jnp.zeros((B, W), jnp.int32)),
        done_B=jnp.zeros(B, bool),
    )
    return _extended(state, logits_BWV, request, plan, request.limit(model, plan))


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """`jax.lax.top_k`, quicker for a long axis: the k best of all are in those k blocks whose maxima are the best."""
    V = x.shape[-1]
    width = math.isqrt(V)
    blocks = -(-V // width)
    if k * width > V // 2:
        return jax.lax.top_k(x, k)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * width - V)], constant_values=-jnp.inf)
    _, block = jax.lax.top_k(padded.reshape(*x.shape[:-1], blocks, width).max(-1), k)
    place = jnp.sort(block, -1)[..., None] * width + jnp.arange(width, dtype=block.dtype)
    place = place.reshape(*x.shape[:-1], -1)
    inside = jnp.where(place < V, jnp.take_along_axis(x, jnp.minimum(place, V - 1), -1), -jnp.inf)
    best, among = jax.lax.top_k(inside, k)
    return best, jnp.minimum(jnp.take_along_axis(place, among, -1), V - 1)


def _extended(state: Beams, logits_BWV: Array, request: Request, plan: Plan, limit_B: Array) -> Beams:
    """Every beam followed by every token, and the best of all that.

    Of the W best, those that end or reach the limit join the ended; the W best that do not end go on. The score of a
    sequence is its log-probability divided by length ** length_penalty (Wu et al. 2016, equation 14, without its
    constants), the end token counted.
    """
    (B, W, V), step, stops = logits_BWV.shape, state.step, request.stops
    length = (step + 1).astype(logits_BWV.dtype)
    before_BW1 = (state.sum_BW - jax.nn.logsumexp(logits_BWV, -1))[..., None]
    logits_BWV = jax.vmap(lambda x_BV: permitted(request.choice, x_BV, step), 1, 1)(logits_BWV)
    ending_BWE = before_BW1 + logits_BWV[..., stops]
    # the W best of a row are among the W best of each beam
    logits_BWW, token_BWW = top_k(logits_BWV.at[..., stops].set(-jnp.inf), min(W, V))
    beams = jnp.arange(W)

    def follows(token: Array) -> tuple[Array, Array]:
        parent = jnp.broadcast_to(beams[:, None], token.shape[1:])
        return jnp.broadcast_to(parent, token.shape).reshape(B, -1), token.reshape(B, -1)

    going = (before_BW1 + logits_BWW).reshape(B, -1)
    sum_BW, (parent_BW, token_BW) = best_of(going, W, follows(token_BWW))

    ends = follows(jnp.broadcast_to(stops, ending_BWE.shape))
    candidates = jnp.concatenate([sum_BW, ending_BWE.reshape(B, -1)], 1)
    either = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), (parent_BW, token_BW), ends)
    ends_BC = jnp.arange(candidates.shape[1]) >= W
    total_BW, ((last_BW, final_BW), ends_BW) = best_of(
        candidates, W, (either, jnp.broadcast_to(ends_BC, candidates.shape))
    )
    at_limit_B = step + 1 >= limit_B
    joins_BW = (ends_BW | at_limit_B[:, None]) & ~state.done_B[:, None]
    score_BW = jnp.where(joins_BW, total_BW / length**request.length_penalty, -jnp.inf)

    def with_token(parent_BW: Array, token_BW: Array) -> Array:
        rows = jnp.arange(B)[:, None]
        return state.ids_BWN[rows, parent_BW].at[:, :, step].set(token_BW)

    new = Generated(with_token(last_BW, final_BW), score_BW, jnp.where(score_BW > -jnp.inf, step + 1, 0))
    pool = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), state.ended, new)
    _, ended = best_of(pool.scores, W, pool)

    # A beam's log-probability only falls, so this is more than it can reach.
    longest_B = jnp.where(request.length_penalty > 0, limit_B.astype(length.dtype), length + 1)
    reach_B = sum_BW[:, 0] / longest_B**request.length_penalty
    settled_B = ended.scores[:, plan.num_return - 1] >= reach_B
    enough_B = request.early_stopping & (ended.scores[:, -1] > -jnp.inf)
    return state.replace(
        step=step + 1,
        cache=state.cache.descended(parent_BW),
        ids_BWN=with_token(parent_BW, token_BW),
        sum_BW=sum_BW,
        ended=ended,
        done_B=state.done_B | at_limit_B | settled_B | enough_B,
    )


def more(model: Transformer, params: Any, request: Request, plan: Plan, state: Beams, until: Any) -> Beams:
    """The beams after so many new tokens, or as far as they go."""
    limit_B = request.limit(model, plan)

    def extended(state: Beams) -> Beams:
        ids_BW = jax.lax.dynamic_index_in_dim(state.ids_BWN, state.step - 1, 2, keepdims=False)
        places_B = request.prompt.lengths + state.step - 1
        logits_BWV, cache = follow(model, params, state.memory, state.cache, ids_BW, places_B, beams=True)
        return _extended(state.replace(cache=cache), logits_BWV, request, plan, limit_B)

    return jax.lax.while_loop(lambda state: (state.step < until) & state.open_B.any(), extended, state)


def results(state: Beams, request: Request, plan: Plan) -> Generated:
    """The best sequences of each row; of those that a row lacks, the score is minus infinity and the length 0."""
    count, ended = plan.num_return, state.ended
    ids = jnp.where(jnp.arange(plan.max_new_tokens) < ended.lengths[..., None], ended.ids, request.pad_id)
    return jax.tree.map(lambda x: x[:, 0] if count == 1 else x[:, :count], ended.replace(ids=ids))
