"""Prompts -> new tokens, one compiled loop for each shape: greedily, or by sampling where there is a key."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer_jax.axes import constrain
from transformer_jax.config import ModelConfig
from transformer_jax.model.cache import Cache
from transformer_jax.model.transformer import Transformer
from transformer_jax.tokens import Tokens, check_tokens

Array = jax.Array
LEAST_TEMPERATURE = 1e-6  # logits that are divided by less can be beyond float32


class Generated(struct.PyTreeNode):
    """What `generate` returns.

    Attributes:
        ids: int32[B, max_new_tokens], the new tokens alone, `pad_id` after the end token.
        scores: float32[B], the summed log-probability of the new tokens, the end token included.
        lengths: int32[B], the number of new tokens, the end token included.
    """

    ids: Array
    scores: Array
    lengths: Array


def filter_logits(logits_BV: Array, top_k: int, top_p: float) -> Array:
    """Logits with all but the best at minus infinity.

    `top_k` keeps so many tokens (Fan et al. 2018), 0 all; `top_p` keeps the fewest whose probability reaches it
    (Holtzman et al. 2020), 1 all.
    """
    if top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, -1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, -1), -1) - jax.nn.softmax(sorted_BV, -1)
        least_B1 = jnp.where(before_BV < top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "top_k", "top_p", "sampled"))
def _decode_loop(
    model: Transformer,
    params: Any,
    prompt: Tokens,
    source: Tokens | None,
    key: Array,
    temperature: float,
    eos_id: int,
    pad_id: int,
    *,
    max_new_tokens: int,
    top_k: int,
    top_p: float,
    sampled: bool,
) -> Generated:
    B, P = prompt.ids.shape
    room_B = model.config.max_length - prompt.lengths  # tokens that each row may still have
    variables = {"params": params}
    memory = model.apply(variables, source, method="encode")

    def decode(tokens: Tokens, cache: Cache) -> tuple[Array, Cache]:
        return cast(tuple[Array, Cache], model.apply(variables, tokens, memory, cache, method="decode"))

    def choose(logits_BV: Array, step: Array) -> Array:
        if not sampled:
            return logits_BV.argmax(-1)
        logits_BV = filter_logits(logits_BV / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), logits_BV)

    def goes_on(carry: tuple) -> Array:
        step, _, _, open_B, _ = carry
        return (step < max_new_tokens) & open_B.any()

    def extend(carry: tuple) -> tuple:
        step, logits_BV, cache, open_B, result = carry
        id_B = jnp.where(open_B, choose(logits_BV, step), pad_id).astype(jnp.int32)
        score_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), id_B[:, None], -1)[:, 0]
        result = Generated(
            result.ids.at[:, step].set(id_B),
            result.scores + jnp.where(open_B, score_B, 0),
            result.lengths + open_B,
        )
        token = Tokens(id_B[:, None], jnp.ones((B, 1), jnp.int32), (prompt.lengths + step)[:, None])
        logits_BTV, cache = decode(token, cache)
        return step + 1, logits_BTV[:, 0], cache, open_B & (id_B != eos_id) & (step + 1 < room_B), result

    logits_BTV, cache = decode(prompt, Cache.empty(model.config, B, P + max_new_tokens))
    last_B = jnp.max(jnp.arange(P) * (prompt.segments > 0), -1)
    logits_BV = jnp.take_along_axis(logits_BTV, last_B[:, None, None], 1)[:, 0]
    nothing = Generated(
        jnp.full((B, max_new_tokens), pad_id, jnp.int32), jnp.zeros(B, logits_BV.dtype), jnp.zeros(B, jnp.int32)
    )
    start = (jnp.zeros((), jnp.int32), logits_BV, cache, jnp.ones(B, bool), nothing)
    result = jax.lax.while_loop(goes_on, extend, start)[-1]
    return jax.tree.map(lambda x: constrain(x, "." * x.ndim), result)


def _as_tokens(tokens: Tokens | Any, config: ModelConfig, what: str, prefix: bool = False) -> Tokens:
    tokens = tokens if isinstance(tokens, Tokens) else Tokens.from_ids(tokens)
    check_tokens(tokens, config.vocab_size, config.max_length, what)
    return tokens.replace(prefix=tokens.segments > 0 if prefix else None)


def generate(
    model: Transformer,
    params: Any,
    prompt: Tokens | Any,
    *,
    source: Tokens | Any | None = None,
    max_new_tokens: int = 64,
    eos_id: int | None = None,
    pad_id: int = 0,
    beam_size: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Array | None = None,
) -> Generated:
    """New tokens for each prompt: the likeliest one after the other, or drawn at random where there is a `key`.

    Args:
        model: of either mode.
        params: its parameters.
        prompt: what the decoder has seen, at least the start token: Tokens padded on either side, or int[B, P].
        source: what the encoder reads, for an encoder-decoder.
        max_new_tokens: length of the result.
        eos_id: the token that ends a sequence, None for none.
        pad_id: fills the result after the end.
        beam_size: 1; beam search is not built yet.
        temperature: divides logits before a token is drawn.
        top_k: draw from so many of the likeliest tokens, 0 from all.
        top_p: draw from the fewest tokens whose probability reaches this, 1 from all.
        key: a `jax.random.key`; with it tokens are drawn, without it they are the likeliest.

    Raises:
        ValueError: an argument, a token id or a position is out of its range, or prompt and new tokens do not fit
            `max_length`.
    """
    prompt = prompt if isinstance(prompt, Tokens) else Tokens.from_ids(prompt)
    if max_new_tokens < 1 or prompt.ids.shape[1] + max_new_tokens > model.config.max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be at least 1 and, with the prompt's {prompt.ids.shape[1]} tokens, "
            f"at most the model's max_length={model.config.max_length}."
        )
    return _generate(
        model,
        params,
        prompt,
        source,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        beam_size=beam_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=key,
    )


def _generate(
    model: Transformer,
    params: Any,
    prompt: Tokens,
    source: Tokens | Any | None,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    pad_id: int = 0,
    beam_size: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Array | None = None,
) -> Generated:
    """As `generate`; a row whose prompt leaves room for fewer tokens ends at the model's `max_length`."""
    if beam_size != 1:
        raise ValueError(f"beam_size={beam_size}: only 1 so far; beam search is not built yet.")
    if not (LEAST_TEMPERATURE <= temperature < float("inf")):
        raise ValueError(f"temperature={temperature} must be at least {LEAST_TEMPERATURE} and finite.")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be at least 0.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1].")
    return _decode_loop(
        model,
        params,
        _as_tokens(prompt, model.config, "prompt", model.config.prefix_attention == "bidirectional"),
        None if source is None else _as_tokens(source, model.config, "source"),
        jax.random.key(0) if key is None else key,
        temperature,
        -1 if eos_id is None else eos_id,
        pad_id,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        top_p=top_p,
        sampled=key is not None,
    )


Prompt = tuple[np.ndarray | None, np.ndarray]
BUCKET = 32


def _bucket(length: int, most: int) -> int:
    """The length that sequences are padded to: few of them, so that few loops are compiled."""
    return min(-(-length // BUCKET) * BUCKET, most)


def _padded(rows: Sequence[np.ndarray], count: int, length: int) -> Tokens:
    ids, used = np.zeros((2, count, length), np.int32)
    for row, sequence in enumerate(rows):
        ids[row, : len(sequence)], used[row, : len(sequence)] = sequence, 1
    ids[len(rows) :, 0], used[len(rows) :, 0] = (
        ids[0, 0],
        1,
    )  # a row that fills up the batch needs a token to begin with
    return Tokens(ids, used, np.maximum(np.cumsum(used, -1) - 1, 0).astype(np.int32))


def generate_all(
    model: Transformer,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    key: Array | None = None,
    pause: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[tuple[int, np.ndarray, float]]:
    """(index, new ids, score) for any number of prompts, in batches of like length, as they come.

    A prompt is (what the encoder reads or None, what the decoder has seen). New tokens are fewer than
    `max_new_tokens` where the model's `max_length` leaves no more room. `pause` is called before each batch and may
    raise. The options are those of `generate`.
    """
    most = model.config.max_length
    order = sorted(range(len(prompts)), key=lambda i: [0 if ids is None else len(ids) for ids in prompts[i]])
    for start in range(0, len(order), batch_size):
        pause()
        chosen = order[start : start + batch_size]
        sources, seen = [prompts[i][0] for i in chosen], [prompts[i][1] for i in chosen]
        longest = max(map(len, seen))
        prompt = _padded(seen, batch_size, _bucket(longest, most) if longest > 1 else 1)
        read = [ids for ids in sources if ids is not None]
        source = _padded(read, batch_size, _bucket(max(map(len, read)), most)) if read else None
        batch_key = None if key is None else jax.random.fold_in(key, start)
        new = min(max_new_tokens, most - min(map(len, seen)))
        result = _generate(model, params, prompt, source, max_new_tokens=new, key=batch_key, **options)
        ids, lengths, scores = (np.asarray(x) for x in (result.ids, result.lengths, result.scores))
        for row, index in enumerate(chosen):
            yield index, ids[row, : lengths[row]], float(scores[row])
