"""Any number of prompts -> their outputs, in batches of like length and few shapes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer_jax.decoding.generate import make_request, run, stream
from transformer_jax.decoding.model import Plan
from transformer_jax.decoding.speculative import Draft
from transformer_jax.model.transformer import Transformer
from transformer_jax.tokens import Tokens

Prompt = tuple[np.ndarray | None, np.ndarray]
LEAST_BUCKET = 32


class Output(NamedTuple):
    """One output of a prompt.

    Attributes:
        place: of the prompt, from 0.
        ids: int32, the new tokens, the end token included.
        score: as `Generated.scores` has it.
    """

    place: int
    ids: np.ndarray
    score: float


def bucket(length: int, most: int) -> int:
    """The length that sequences are padded to: 32, 48, 64, 96, 128, ..., so that few loops are compiled."""
    size = LEAST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most)


def padded(rows: Sequence[np.ndarray], count: int, length: int) -> Tokens:
    """`count` rows of so many tokens, the first ones these; a row that fills up the batch begins like the first."""
    ids, used = np.zeros((2, count, length), np.int32)
    for row, sequence in enumerate(rows):
        ids[row, : len(sequence)], used[row, : len(sequence)] = sequence, 1
    ids[len(rows) :, 0], used[len(rows) :, 0] = ids[0, 0], 1
    return Tokens(ids, used, np.maximum(np.cumsum(used, -1) - 1, 0).astype(np.int32))


def generate_all(
    model: Transformer,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    beam_size: int = 1,
    num_return: int = 1,
    int8_cache: bool = False,
    key: jax.Array | None = None,
    forced: np.ndarray | None = None,
    draft: tuple[Transformer, Any] | None = None,
    draft_tokens: int = 4,
    first: int = 0,
    pause: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[Output]:
    """The outputs of any number of prompts, in batches of like length, as they come; `num_return` each, best first.

    A prompt is (what the encoder reads or None, what the decoder has seen). New tokens are fewer than
    `max_new_tokens` where the model's `max_length` leaves no more room. `pause` is called before each batch and may
    raise. The options are those of `generate`; `forced` is int32[F], the same for all. What is drawn for a prompt
    depends on its place in `prompts` alone, or with `first`, the place of the first of them, in a longer list.
    """
    most = model.config.max_length
    order = sorted(range(len(prompts)), key=lambda i: [0 if ids is None else len(ids) for ids in prompts[i]])
    # one plan for all batches, so that another length of a prompt is the only reason to compile
    plan = Plan(min(max_new_tokens, most - 1), beam_size, num_return, int8_cache)
    helper = None if draft is None else Draft(*draft, draft_tokens)
    if forced is not None:
        options["forced"] = np.tile(forced, (batch_size, 1))
    for start in range(0, len(order), batch_size):
        pause()
        chosen = order[start : start + batch_size]
        sources, seen = [prompts[i][0] for i in chosen], [prompts[i][1] for i in chosen]
        longest = max(map(len, seen))
        prompt = padded(seen, batch_size, bucket(longest, most) if longest > 1 else 1)
        read = [ids for ids in sources if ids is not None]
        source = padded(read, batch_size, bucket(max(map(len, read)), most)) if read else None
        row = first + np.pad(chosen, (0, batch_size - len(chosen)))
        drawing = dict(key=key, row=row, beam_size=beam_size, num_return=num_return)
        result = run(model, params, make_request(model, prompt, source, **drawing, **options), plan, helper)
        ids, lengths, scores = (
            np.asarray(x).reshape(batch_size, num_return, *x.shape[1 if num_return == 1 else 2 :])
            for x in (result.ids, result.lengths, result.scores)
        )
        for row, index in enumerate(chosen):
            for n in range(num_return):
                yield Output(index, ids[row, n, : lengths[row, n]], float(scores[row, n]))


def stream_one(
    model: Transformer, params: Any, prompt: Prompt, *, max_new_tokens: int, int8_cache: bool = False, **options: Any
) -> Iterator[int]:
    """The new tokens of one prompt as they come, the end token included; the options are those of `generate`."""
    (read, seen), most = prompt, model.config.max_length
    source = None if read is None else padded([read], 1, bucket(len(read), most))
    target = padded([seen], 1, bucket(len(seen), most) if len(seen) > 1 else 1)
    if options.get("forced") is not None:
        options["forced"] = np.asarray(options["forced"])[None]
    plan = Plan(min(max_new_tokens, most - 1), int8=int8_cache)
    for id_B in stream(model, params, make_request(model, target, source, **options), plan):
        yield int(id_B[0])
