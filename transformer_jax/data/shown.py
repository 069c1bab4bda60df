"""Training examples as a person reads them: what is read, what is given, what is learned."""

import itertools
from collections.abc import Iterator

import numpy as np
from rich.text import Text

from transformer_jax.data.load import Data
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.tokens import Batch

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")  # of the segments of a row, in turn
SHOWN = {"\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"}


def _said(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """Each token as its text, or by its name where it has none of its own."""
    for token, name in zip(ids.tolist(), tokenizer.tokens(ids), strict=True):
        text = tokenizer.decode([token])
        yield "".join(SHOWN.get(letter, letter) for letter in text) if text and "\ufffd" not in text else name


def _line(label: str, ids: np.ndarray, tokenizer: Tokenizer, style: str) -> Text:
    line = Text(f"  {label:8}")
    for number, said in enumerate(_said(ids, tokenizer)):
        line.append("|" if number else "", "dim")
        line.append(said, style)
    return line


def _learned(ids: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Iterator[tuple[bool, np.ndarray]]:
    """What a sequence says, in stretches that are given or learned."""
    whole, mask = np.append(ids, labels[-1:]), np.append(False, weights > 0)
    place = 0
    for learned, stretch in itertools.groupby(mask.tolist()):
        length = len(list(stretch))
        yield learned, whole[place : place + length]
        place += length


def lines_of(batch: Batch, row: int, tokenizer: Tokenizer) -> Iterator[list[Text]]:
    """The examples of a row, as lines; those of a segment have its colour."""
    segments = np.asarray(batch.target.segments[row])
    for segment in range(1, int(segments.max(initial=0)) + 1):
        place, colour = segments == segment, COLOURS[(segment - 1) % len(COLOURS)]
        lines = []
        if batch.source is not None:
            read = np.asarray(batch.source.ids[row])[np.asarray(batch.source.segments[row]) == segment]
            lines.append(_line("source", read, tokenizer, colour))
        said = (np.asarray(x[row])[place] for x in (batch.target.ids, batch.labels, batch.weights))
        for learned, ids in _learned(*said):
            style = f"bold {colour}" if learned else f"dim {colour}"
            lines.append(_line("learned" if learned else "given", ids, tokenizer, style))
        yield lines


def show(data: Data, count: int) -> None:
    """Prints the first examples that a run is trained on."""
    from rich.console import Console

    console, shown = Console(highlight=False, soft_wrap=True), 0
    for line in data.report:
        console.print(line, markup=False)
    batches = data.batches()
    for step in itertools.count():
        batch = batches.draw(step).batch
        for row in range(len(batch.labels)):
            for number, lines in enumerate(lines_of(batch, row, data.tokenizer), 1):
                console.print(f"\nexample {shown + 1}: step {step}, row {row}, segment {number}", markup=False)
                for line in lines:
                    console.print(line)
                shown += 1
                if shown == count:
                    return
