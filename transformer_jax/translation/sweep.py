"""`transformer-jax sweep`: how a run's outputs on validation data score for each width of the beam and length penalty.

It is a command beside `evaluate`, whose numbers (loss, accuracy, ...) are of the model, however it is decoded, and
which writes one object and one file of outputs.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformer_jax.config_checks import at_least
from transformer_jax.errors import InputError
from transformer_jax.flags import RunFolder, parse
from transformer_jax.translation.scores import TOKENIZED_BLEU, measures

if TYPE_CHECKING:
    from transformer_jax.data.corpora import Pairs
    from transformer_jax.run import Run

MetricName = Literal["bleu", "chrf", "exact_match", "tokenized_bleu_lowercased"]


@dataclasses.dataclass(frozen=True)
class SweepArguments:
    run: RunFolder
    """A run's folder."""
    data: tuple[Path, ...]
    """Pairs: one path, or two parallel files, as --data.train takes them. Choose on validation data, never on the
    data of the test."""
    beam_size: tuple[int, ...] = (1, 4)
    """Widths of the beam search; 1 is greedy, which has no length penalty."""
    length_penalty: tuple[float, ...] = (0.6, 1.0, 1.4)
    """Exponents on the length that a beam's score is divided by."""
    metric: MetricName = "bleu"
    """What the best is chosen by."""
    tokenized_bleu: str = ""
    """Score BLEU of lower-cased tokens too: of Moses's for this language (de, en, ...), or none: of texts as they
    are."""
    checkpoint: str = "newest"
    """The checkpoint to read: newest, best (as --checkpoint.best of the run says), or a step."""
    limit: int = 0
    """Decode so many pairs at most; 0 is all."""
    batch_size: int = 64
    """Pairs decoded together."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.data) <= 2:
            raise ValueError(f"--data takes one path, or two parallel files; got {len(self.data)}.")
        if not self.beam_size or min(self.beam_size) < 1:
            raise ValueError(f"beam-size={self.beam_size} must be one or several, each at least 1.")
        if not self.length_penalty or not all(map(math.isfinite, self.length_penalty)):
            raise ValueError(f"length-penalty={self.length_penalty} must be one or several, each finite.")
        if self.metric == TOKENIZED_BLEU and not self.tokenized_bleu:
            raise ValueError(f"--metric {self.metric} needs --tokenized-bleu LANGUAGE.")
        at_least(self, 0, "limit")
        at_least(self, 1, "batch_size")


def ways(beam_sizes: Sequence[int], length_penalties: Sequence[float]) -> list[dict[str, Any]]:
    """Options of decoding, the cheapest first: each pair of the two; of greedy decoding one, without a penalty."""
    penalties = sorted(set(length_penalties))
    found: list[dict[str, Any]] = [{"beam_size": 1}] if 1 in beam_sizes else []
    wider = sorted(set(beam_sizes) - {1})
    return found + [dict(beam_size=beam, length_penalty=penalty) for beam in wider for penalty in penalties]


def flags_of(way: dict[str, Any]) -> str:
    """The same as `generate` and `evaluate` take them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in way.items())


def sweep(
    run: "Run",
    pairs: "Pairs",
    chosen: Sequence[dict[str, Any]],
    tokenized: str = "",
    batch_size: int = 64,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """For each way to decode its options, the number of pairs, and their `translation_scores`, as they come.

    `tell` hears what is being done.
    """
    from transformer_jax.evaluate import answer
    from transformer_jax.translation.scores import translation_scores

    batches = -(-len(pairs) // batch_size)
    for way in chosen:
        counted = iter(range(1, batches + 1))
        texts = answer(
            pairs.sources,
            run.model,
            run.params,
            run.config,
            run.tokenizer,
            batch_size=batch_size,
            pause=lambda way=way, counted=counted: tell(f"{flags_of(way)}: batch {next(counted)} of {batches}"),
            **way,
        )
        yield way | {"decoded": len(pairs)} | translation_scores(texts, pairs.targets, tokenized)


def best_of(found: Sequence[dict[str, Any]], metric: str) -> int:
    """The place of the best, the first and so the cheapest of equals."""
    return max(range(len(found)), key=lambda place: (found[place][metric], -place))


def _table(found: list[dict[str, Any]], best: int) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    names = [name for name in found[0] if f"{name}_signature" in found[0]]
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("beam size", "length penalty", "exact match", *(name.replace("_", " ") for name in names), ""):
        table.add_column(column, justify="right")
    for place, each in enumerate(found):
        row = [str(each["beam_size"]), str(each.get("length_penalty", "")), f"{each['exact_match']:.1%}"]
        row += [f"{each[name]:.2f}" for name in names]
        table.add_row(*row, "best" if place == best else "", style="bold" if place == best else None)
    return table


def command_sweep(arguments: list[str]) -> int:
    """scores beam widths and length penalties on validation pairs, one JSON object each"""
    about = "Scores beam widths and length penalties on validation pairs, one JSON object each; says which is best."
    args = parse(SweepArguments, "transformer-jax sweep", arguments, about)
    measures(args.tokenized_bleu)
    from rich.console import Console

    from transformer_jax.data.corpora import Pairs
    from transformer_jax.data.sources import read
    from transformer_jax.evaluate import check_kind, to_score
    from transformer_jax.host import prepare
    from transformer_jax.run import load_run

    prepare()
    run = load_run(args.run, args.checkpoint)
    _, corpus, missing = to_score(run, check_kind(run, read(tuple(map(str, args.data)))))
    if not isinstance(corpus, Pairs):
        raise InputError(f"--data holds {corpus.kind}; outputs are scored beside the targets of pairs.")
    pairs, console = corpus.take(slice(args.limit or len(corpus))), Console(stderr=True, highlight=False)
    found: list[dict[str, Any]] = []
    with console.status("sweep") as status:
        chosen = ways(args.beam_size, args.length_penalty)
        for each in sweep(run, pairs, chosen, args.tokenized_bleu, args.batch_size, status.update):
            print(json.dumps(each | missing), flush=True)
            found.append(each)
    best = best_of(found, args.metric)
    console.print(_table(found, best))
    console.print(f"Best by {args.metric.replace('_', ' ')}: {flags_of(chosen[best])}")
    return 0
