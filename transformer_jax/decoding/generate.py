"""`generate`: checks what is asked and runs it in one compiled loop for each shape."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from transformer_jax.axes import constrain
from transformer_jax.config import ModelConfig
from transformer_jax.decoding import beam, single
from transformer_jax.decoding.choice import Choice
from transformer_jax.decoding.model import Generated, Plan, Request
from transformer_jax.decoding.speculative import Draft, decode_with
from transformer_jax.model.transformer import Transformer
from transformer_jax.tokens import Tokens, check_ids, check_tokens

Array = jax.Array
LEAST_TEMPERATURE = 1e-6  # logits that are divided by less can be beyond float32


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def decode(model: Transformer, params: Any, request: Request, plan: Plan) -> Generated:
    """All new tokens of a request."""
    way: Any = beam if plan.beam_size > 1 else single
    state = way.first(model, params, request, plan)
    result = way.results(way.more(model, params, request, plan, state, plan.max_new_tokens), request, plan)
    return jax.tree.map(lambda x: constrain(x, "." * x.ndim), result)


_first = functools.partial(jax.jit, static_argnames=("model", "plan"))(single.first)
_more = functools.partial(jax.jit, static_argnames=("model", "plan"), donate_argnames="state")(single.more)


def as_tokens(tokens: Tokens | Any, config: ModelConfig, what: str) -> Tokens:
    """Tokens whose ids and positions the model has."""
    tokens = tokens if isinstance(tokens, Tokens) else Tokens.from_ids(tokens)
    return check_tokens(tokens, config.vocabulary_of(what), config.max_length, what)


def _number(name: str, value: float, least: float, most: float, open_below: bool = False) -> None:
    """Raises ValueError where an option is outside of its range."""
    if not (least < value if open_below else least <= value) or not value <= most:
        inside = f"{'above' if open_below else 'at least'} {least:g}" + (
            " and finite" if most == np.finfo(np.float32).max else f" and at most {most:g}"
        )
        raise ValueError(f"{name}={value} must be {inside}.")


def make_request(
    model: Transformer,
    prompt: Tokens,
    source: Tokens | Any | None,
    *,
    row: ArrayLike | None = None,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    beam_size: int = 1,
    num_return: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    allowed: ArrayLike | None = None,
    forced: ArrayLike | None = None,
    key: Array | None = None,
) -> Request:
    """The options of `generate` as arrays, each checked (ValueError)."""
    config, B, most = model.config, len(prompt.ids), float(np.finfo(np.float32).max)
    if num_return < 1:
        raise ValueError(f"num_return={num_return} must be at least 1.")
    if beam_size < 1:
        raise ValueError(f"beam_size={beam_size} must be at least 1.")
    if beam_size > 1 and num_return > beam_size:
        raise ValueError(f"num_return={num_return} must be at most beam_size={beam_size}.")
    if beam_size == 1 and num_return > 1 and key is None:
        raise ValueError(
            f"num_return={num_return}: several outputs need a beam_size of as many, or drawing with a key."
        )
    if beam_size > 1 and key is not None:
        raise ValueError(f"beam_size={beam_size} takes the likeliest sequences, and a key draws at random: give one.")
    if beam_size > 1 and repetition_penalty != 1:
        raise ValueError(f"repetition_penalty={repetition_penalty} changes scores, so beam_size must be 1.")
    _number("length_penalty", length_penalty, -most, most)
    _number("temperature", temperature, LEAST_TEMPERATURE, most)
    _number("top_k", top_k, 0, most)
    _number("top_p", top_p, 0, 1, open_below=True)
    _number("min_p", min_p, 0, 1)
    _number("repetition_penalty", repetition_penalty, 0, most, open_below=True)
    stops = np.atleast_1d(np.asarray([] if eos_id is None else eos_id, np.int32))
    check_ids(stops, config.vocab_size, "eos_id")
    if allowed is not None:
        allowed = np.asarray(allowed, bool)
        if allowed.shape not in ((config.vocab_size,), (B, config.vocab_size)):
            raise ValueError(
                f"allowed has the shape {allowed.shape}; it must be [{config.vocab_size}] or "
                f"[{B}, {config.vocab_size}]."
            )
        if not allowed.any(-1).all():
            raise ValueError("allowed leaves no token to say.")
    if forced is not None:
        forced = np.asarray(forced, np.int32)
        if forced.ndim != 2 or len(forced) != B or not forced.size:
            raise ValueError(f"forced has the shape {forced.shape}; it must be [{B}, tokens].")
        check_ids(np.maximum(forced, 0), config.vocab_size, "forced token id")
    draws = key is not None
    choice = Choice(
        key=key,
        temperature=np.float32(temperature) if draws and temperature != 1 else None,
        top_p=np.float32(top_p) if draws and top_p < 1 else None,
        min_p=np.float32(min_p) if draws and min_p > 0 else None,
        repetition_penalty=np.float32(repetition_penalty) if repetition_penalty != 1 else None,
        allowed=allowed,
        forced=forced,
        top_k=top_k if draws else 0,
    )
    prompt = as_tokens(prompt, config, "prompt")
    prefix = np.asarray(prompt.segments) > 0 if config.prefix_attention == "bidirectional" else None
    return Request(
        prompt=prompt.replace(prefix=prefix),
        source=None if source is None else as_tokens(source, config, "source"),
        row=np.asarray(np.arange(B) if row is None else row, np.int32),
        choice=choice,
        stops=stops,
        pad_id=np.int32(pad_id),
        length_penalty=np.float32(length_penalty),
        early_stopping=np.bool_(early_stopping),
    )


def generate(
    model: Transformer,
    params: Any,
    prompt: Tokens | Any,
    *,
    source: Tokens | Any | None = None,
    max_new_tokens: int = 64,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    beam_size: int = 1,
    num_return: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    allowed: ArrayLike | None = None,
    forced: ArrayLike | None = None,
    key: Array | None = None,
    int8_cache: bool = False,
    draft: tuple[Transformer, Any] | None = None,
    draft_tokens: int = 4,
) -> Generated:
    """New tokens for each prompt: the likeliest one after the other, drawn at random with a `key`, or by beam search.

    Every token costs the model's work for one token: keys and values of earlier ones are kept, those of the source are
    computed once. A row's result does not depend on the rows beside it, nor on padding.

    Args:
        model: of either mode.
        params: its parameters.
        prompt: what the decoder has seen, at least the start token: Tokens padded on either side, or int[B, P].
        source: what the encoder reads, for an encoder-decoder.
        max_new_tokens: length of the result.
        eos_id: the token that ends a sequence, or several; None for none.
        pad_id: fills the result after the end.
        beam_size: sequences that are followed at once; more than 1 is beam search.
        num_return: outputs for each prompt, best first: of a beam search, or drawn with a key.
        length_penalty: by beam search, log-probabilities are divided by length to this power.
        early_stopping: beam search ends once `beam_size` sequences have ended, as fairseq's does, and not only where
            no other can become better. Where long sequences are favoured it finds shorter ones.
        temperature: divides logits before a token is drawn.
        top_k: draw from so many of the likeliest tokens, 0 from all.
        top_p: draw from the fewest tokens whose probability reaches this, 1 from all.
        min_p: draw from tokens that are at least this share as likely as the likeliest, 0 from all.
        repetition_penalty: above 1, tokens that prompt or output have already become less likely.
        allowed: bool[V] or bool[B, V], the tokens that may be said; None is all.
        forced: int[B, F], what the first new tokens have to be, -1 where they are free.
        key: a `jax.random.key`; with it tokens are drawn, without it they are the likeliest.
        int8_cache: keys and values are kept in 8 bits.
        draft: (model, params) of a smaller model of the same mode and vocabulary, for speculative decoding: the result
            is the same, or drawn from the same distribution.
        draft_tokens: tokens that the draft proposes at once.

    Raises:
        ValueError: an argument, a token id or a position is out of its range, two options exclude each other, or prompt
            and new tokens do not fit `max_length`.
    """
    prompt = prompt if isinstance(prompt, Tokens) else Tokens.from_ids(prompt)
    if max_new_tokens < 1 or prompt.ids.shape[1] + max_new_tokens > model.config.max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be at least 1 and, with the prompt's {prompt.ids.shape[1]} tokens, "
            f"at most the model's max_length={model.config.max_length}."
        )
    request = make_request(
        model,
        prompt,
        source,
        eos_id=eos_id,
        pad_id=pad_id,
        beam_size=beam_size,
        num_return=num_return,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        allowed=allowed,
        forced=forced,
        key=key,
    )
    helper = None if draft is None else Draft(*draft, draft_tokens)
    return run(model, params, request, Plan(max_new_tokens, beam_size, num_return, int8_cache), helper)


def run(model: Transformer, params: Any, request: Request, plan: Plan, draft: Draft | None = None) -> Generated:
    """A request decoded; of several drawn outputs each is a row of its own. Rows end at the model's `max_length`."""
    n = plan.num_return

    def decoded(request: Request) -> Generated:
        if draft is None:
            return decode(model, params, request, plan)
        return decode_with(model, params, request, plan, draft)[0]

    if plan.beam_size > 1 or n == 1:
        return decoded(request)
    many = jax.tree.map(lambda x: np.repeat(x, n, 0), (request.prompt, request.source))
    choice = request.choice
    if choice.allowed is not None and choice.allowed.ndim == 2:
        choice = choice.replace(allowed=np.repeat(choice.allowed, n, 0))
    if choice.forced is not None:
        choice = choice.replace(forced=np.repeat(choice.forced, n, 0))
    row = (np.asarray(request.row)[:, None] * n + np.arange(n)).reshape(-1).astype(np.int32)
    request = request.replace(prompt=many[0], source=many[1], choice=choice, row=row)
    result = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]), decoded(request))
    return beam.best_of(result.scores, n, result)[1]


def stream(model: Transformer, params: Any, request: Request, plan: Plan) -> Iterator[Array]:
    """int32[B], the new tokens as they come, one for each row; those of rows that have ended are `pad_id`."""
    state = _first(model, params, request, plan)
    for step in range(plan.max_new_tokens):
        yield state.result.ids[:, step]
        if not state.open_B.any():
            return
        state = _more(model, params, request, plan, state, np.int32(step + 2))
