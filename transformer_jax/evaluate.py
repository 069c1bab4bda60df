"""How good a model is: loss over every token of a corpus, and for pairs its greedy outputs against the targets."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.config import LossConfig, RunConfig
from transformer_jax.data.batches import Rows, in_order
from transformer_jax.data.corpora import Pairs
from transformer_jax.data.load import make_rows, prompts_of, template_of
from transformer_jax.data.prepared import Prepared
from transformer_jax.data.sources import Corpus, Source
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding import Prompt, generate_all
from transformer_jax.errors import InputError
from transformer_jax.model.transformer import Transformer
from transformer_jax.objective import make_loss
from transformer_jax.partition import Partitioner
from transformer_jax.run import Run
from transformer_jax.tokens import Batch, check_batch
from transformer_jax.translation.scores import translation_scores

Evaluator = Callable[[Any, Iterable[Batch]], dict[str, float]]


def make_evaluator(model: Transformer, partitioner: Partitioner, batch_size: int) -> Evaluator:
    """(params, batches of so many rows) -> loss in nats a token, perplexity, accuracy and tokens, over all of them."""
    config, loss = model.config, make_loss(model, LossConfig())
    sums = partitioner.evaluate(lambda params, batch: loss(params, batch, None)[1])

    def evaluate(params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        limits = config.vocab_size, config.max_length, config.source_vocab_size
        checked = (check_batch(batch, *limits) for batch in batches)
        parts = [sums(params, partitioner.put(batch, batch_size)) for batch in checked]
        total = {name: sum(float(part[name]) for part in parts) for name in ("loss", "correct", "tokens")}
        tokens = max(total["tokens"], 1)
        mean = total["loss"] / tokens
        perplexity = math.exp(min(mean, 700))
        return {
            "loss": mean,
            "perplexity": perplexity,
            "accuracy": total["correct"] / tokens,
            "tokens": total["tokens"],
        }

    return evaluate


class Answer(NamedTuple):
    """One output for a prompt: its text, its ids with the end token, and its score as `Generated.scores` has it."""

    text: str
    ids: np.ndarray
    score: float


def decoding_options(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """How a run's outputs begin and end."""
    special = config.data.special
    end = template_of(config, tokenizer).end_of("assistant") if config.data.objective == "chat" else None
    ends = [tokenizer.eos_id, *special.stops, *([] if end is None else [end])]
    options = {"max_new_tokens": config.max_new_tokens, "eos_id": ends, "pad_id": tokenizer.pad_id}
    return options if special.first is None else options | {"forced": np.array([special.first], np.int32)}


def answers(
    model: Transformer, params: Any, tokenizer: Tokenizer, prompts: list[Prompt], **options: Any
) -> list[list[Answer]]:
    """The model's outputs for each prompt, the best first; the options are those of `generate_all`."""
    found: list[list[Answer]] = [[] for _ in prompts]
    for place, ids, score in generate_all(model, params, prompts, **options):
        found[place].append(Answer(tokenizer.decode(ids), ids, score))
    return found


def answer(
    texts: list[str], model: Transformer, params: Any, config: RunConfig, tokenizer: Tokenizer, **options: Any
) -> list[str]:
    """The model's output for each text, in order; the options are those of `generate_all`."""
    prompts = prompts_of(texts, config, tokenizer)
    found = answers(model, params, tokenizer, prompts, **decoding_options(config, tokenizer) | options)
    return [each[0].text for each in found]


def target_bytes(corpus: Corpus) -> int:
    """Bytes of the text that is predicted: all of a plain text, the targets of pairs."""
    texts = corpus.targets if isinstance(corpus, Pairs) else corpus.all_texts()
    return sum(len(text.encode()) for text in texts)


def check_kind(run: Run, corpus: Source) -> Corpus:
    """The corpus. Raises InputError where it is not of the kind that a run was trained on, or is no text any more."""
    if isinstance(corpus, Prepared):
        raise InputError(f"--data {corpus.folder}: holds tokens; give the text that they were made of.")
    kind = {"sequence-to-sequence": "pairs", "chat": "chat"}.get(run.config.data.objective, "text")
    if corpus.kind != kind:
        raise InputError(f"--data holds {corpus.kind}, and the run was trained on {kind}.")
    return corpus


def to_score(run: Run, corpus: Corpus) -> tuple[Rows, Corpus, dict[str, int]]:
    """What is scored: packed rows, the text of what they hold, and what scores say of the examples that they do not:
    `left_out` are those too long, where the run drops such, or of no use.

    Pairs and conversations may be as long as the model takes, however long the rows of training were.

    Raises:
        InputError: an example is longer.
    """
    config = run.config
    if corpus.kind != "text":
        data = dataclasses.replace(config.data, source_length=None, target_length=None)
        config = dataclasses.replace(config, data=data)
    rows, scored, _ = make_rows("--data", corpus, config, run.tokenizer)
    count = len(corpus) - len(scored)
    return rows, scored, {"left_out": count} if count else {}


def evaluate_run(
    run: Run, corpus: Source, batch_size: int = 0, limit: int = 0, tokenized: str = "", **decoding: Any
) -> tuple[dict[str, Any], list[str]]:
    """A run's scores on a corpus and, for pairs, its outputs; `limit` decodes so many pairs at most, 0 all. `tokenized`
    is as in `translation_scores`.

    Bits per byte are given where every byte is predicted: for pairs and for causal language modelling. Outputs are
    greedy where `decoding`, options of `generate_all`, does not say otherwise.

    Raises:
        InputError: the corpus is not of the run's kind, or a pair is too long.
    """
    config, partitioner = run.config, Partitioner("jit", None)
    rows, corpus, missing = to_score(run, check_kind(run, corpus))
    scores: dict[str, Any] = {"step": run.step, "examples": len(corpus)} | missing
    batch_size = min(batch_size, len(rows)) or config.batch_size
    scores |= make_evaluator(run.model, partitioner, batch_size)(run.params, in_order(rows, batch_size))
    if config.data.objective in ("causal", "sequence-to-sequence"):
        scores["bits_per_byte"] = scores["loss"] * scores["tokens"] / math.log(2) / max(target_bytes(corpus), 1)
    if not isinstance(corpus, Pairs):
        return scores, []
    outputs, targets = outputs_of(run, corpus, limit, **decoding)
    return scores | {"decoded": len(outputs)} | translation_scores(outputs, targets, tokenized), outputs


def outputs_of(run: Run, corpus: Pairs, limit: int = 0, **decoding: Any) -> tuple[list[str], list[str]]:
    """A run's outputs for the first so many sources, 0 all, and their targets."""
    chosen = corpus.take(slice(limit or len(corpus)))
    return answer(chosen.sources, run.model, run.params, run.config, run.tokenizer, **decoding), chosen.targets
