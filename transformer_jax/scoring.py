"""The log-probability of given targets, by the whole uncached model."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.config import ModelConfig, RunConfig
from transformer_jax.data.chat import Chats
from transformer_jax.data.corpora import Pairs
from transformer_jax.data.load import prompts_of
from transformer_jax.data.sources import Corpus
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding import Prompt
from transformer_jax.decoding.batches import bucket, padded
from transformer_jax.errors import InputError
from transformer_jax.model.transformer import Transformer
from transformer_jax.tokens import Tokens, check_tokens

Array = jax.Array
Question = tuple[Prompt, np.ndarray]


class Score(NamedTuple):
    """What a model says of a continuation.

    Attributes:
        log_prob: the sum over its tokens, in nats.
        greedy: each of them is the likeliest one.
    """

    log_prob: float
    greedy: bool


@functools.partial(jax.jit, static_argnames="model")
def _score(
    model: Transformer, params: Any, target: Tokens, labels_BT: Array, counts_BT: Array, source: Tokens | None
) -> tuple[Array, Array]:
    logits_BTV = model.apply({"params": params}, target, source)
    assert isinstance(logits_BTV, jax.Array)
    log_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], -1)[..., 0] - jax.nn.logsumexp(logits_BTV, -1)
    best_BT = logits_BTV.argmax(-1) == labels_BT
    return jnp.sum(log_BT * counts_BT, -1), (best_BT | ~counts_BT).all(-1)


def score(model: Transformer, params: Any, questions: Sequence[Question], *, batch_size: int = 32) -> list[Score]:
    """The score of each continuation after its prompt, in batches of like length and few shapes.

    A question is (prompt, continuation): the prompt as `generate_all` takes it, the continuation its next ids.

    Raises:
        ValueError: an id is outside of the vocabulary, or a question is longer than `max_length`.
    """
    most, found = model.config.max_length, [Score(0.0, True)] * len(questions)
    batch_size = min(batch_size, max(len(questions), 1))

    def lengths(index: int) -> tuple[int, int]:
        (read, seen), said = questions[index]
        return 0 if read is None else len(read), len(seen) + len(said)

    order = sorted((i for i in range(len(questions)) if len(questions[i][1])), key=lengths)
    for start in range(0, len(order), batch_size):
        chosen = [questions[i] for i in order[start : start + batch_size]]
        whole = [np.concatenate([seen, said]).astype(np.int32) for (_, seen), said in chosen]
        length = max(map(len, whole)) - 1
        if length > most:
            raise ValueError(f"{length} tokens are longer than the model's max_length={most}.")
        target = padded([ids[:-1] for ids in whole], batch_size, bucket(length, most))
        labels, counts = np.zeros(target.ids.shape, np.int32), np.zeros(target.ids.shape, bool)
        given = np.ones((batch_size, 1), int)
        for row, ((_, seen), said) in enumerate(chosen):
            given[row] = len(seen)
            place = slice(len(seen) - 1, len(seen) - 1 + len(said))
            labels[row, place], counts[row, place] = said, True
        if model.config.prefix_attention == "bidirectional":
            target = target.replace(prefix=np.arange(target.ids.shape[1]) < given)
        read = [ids for (ids, _), _ in chosen if ids is not None]
        source = padded(read, batch_size, bucket(max(map(len, read)), most)) if read else None
        for name, tokens in (("target", target), ("target", target.replace(ids=labels)), ("source", source)):
            if tokens is not None:
                check_tokens(tokens, model.config.vocabulary_of(name), most, name)
        log_probs, greedy = (np.asarray(x) for x in _score(model, params, target, labels, counts, source))
        for row, index in enumerate(order[start : start + batch_size]):
            found[index] = Score(float(log_probs[row]), bool(greedy[row]))
    return found


def rolling(start: np.ndarray, ids: np.ndarray, most: int) -> Iterator[Question]:
    """A text of any length as questions that ask for each of its tokens once, the first after `start`.

    Each but the first token has at least half of `most` tokens before it, or all that there are.
    """
    whole = np.concatenate([start, ids]).astype(np.int32)
    begin = len(start)
    while begin < len(whole):
        first = max(0, begin - (most + 1) // 2) if begin > len(start) else 0
        end = min(first + most + 1, len(whole))
        yield (None, whole[first:begin]), whole[begin:end]
        begin = end


def questions_of(corpus: Corpus, config: RunConfig, tokenizer: Tokenizer) -> list[list[Question]]:
    """What scores each target or text: of a pair its target and the end token, given the source; of a text all of it.

    Raises:
        InputError: the run predicts something else, or a pair is too long.
    """
    model: ModelConfig = config.model
    if isinstance(corpus, Pairs):
        prompts = prompts_of(corpus.sources, config, tokenizer)
        targets = [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode(corpus.targets)]
        for (read, seen), said, place in zip(prompts, targets, corpus.places, strict=True):
            size = max(len(seen) + len(said) - 1, 0 if read is None else len(read))
            if size > model.max_length:
                raise InputError(f"--data: {place}: {size} tokens are longer than max_length={model.max_length}.")
        return [[question] for question in zip(prompts, targets, strict=True)]
    if config.data.objective != "causal" or isinstance(corpus, Chats):
        raise InputError(f"--score: a run with the objective {config.data.objective} gives a text no probability.")
    texts = [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode(corpus.documents)]
    start = np.array([tokenizer.bos_id])
    return [list(rolling(start, ids, model.max_length)) for ids in texts]


def score_corpus(
    model: Transformer, params: Any, corpus: Corpus, config: RunConfig, tokenizer: Tokenizer, batch_size: int = 32
) -> list[float]:
    """The log-probability of each pair's target or of each text, in nats (InputError as above)."""
    parts = questions_of(corpus, config, tokenizer)
    scores = iter(score(model, params, [question for each in parts for question in each], batch_size=batch_size))
    return [sum(next(scores).log_prob for _ in each) for each in parts]
