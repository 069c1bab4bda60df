"""Training examples as a person reads them: what is read, what is given, what is learned."""

import itertools
from collections.abc import Iterator

import numpy as np
from rich.text import Text

from transformer_jax.data.load import Data
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.tokens import Batch

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")  # of the segments of a row, in turn
Stretch = tuple[str, list[str]]  # whether it is given or learned, and what it says
SHOWN = {"\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"}


def _said(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Each token as its text, or by its name where it has none of its own."""
    texts = [(tokenizer.decode([token]), name) for token, name in zip(ids.tolist(), tokenizer.tokens(ids), strict=True)]
    shown = (text if text and "\ufffd" not in text else name for text, name in texts)
    return ["".join(SHOWN.get(letter, letter) for letter in text) for text in shown]


def _line(label: str, said: list[str], style: str) -> Text:
    line = Text(f"  {label:8}")
    for number, text in enumerate(said):
        line.append("|" if number else "", "dim")
        line.append(text, style)
    return line


def _in_order(ids: np.ndarray, labels: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> Iterator[Stretch]:
    """Where each label is the next token: all of it, in stretches that are given or learned."""
    whole, place = _said(np.append(ids, labels[-1:]), tokenizer), 0
    for flag, stretch in itertools.groupby([False, *learned.tolist()]):
        length = len(list(stretch))
        yield ("learned" if flag else "given"), whole[place : place + length]
        place += length


def _in_place(ids: np.ndarray, labels: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> Iterator[Stretch]:
    """Where labels stand where they are asked for: what is read, and the labels that count."""
    yield "given", _said(ids, tokenizer)
    parts = itertools.groupby(zip(learned.tolist(), _said(labels, tokenizer), strict=True), lambda pair: pair[0])
    yield "learned", [text for flag, part in parts for text in ([said for _, said in part] if flag else ["\u2026"])]


def lines_of(batch: Batch, row: int, tokenizer: Tokenizer) -> Iterator[list[Text]]:
    """The examples of a row, as lines; those of a segment have its colour."""
    segments = np.asarray(batch.target.segments[row])
    for segment in range(1, int(segments.max(initial=0)) + 1):
        place, colour = segments == segment, COLOURS[(segment - 1) % len(COLOURS)]
        lines = []
        if batch.source is not None:
            read = np.asarray(batch.source.ids[row])[np.asarray(batch.source.segments[row]) == segment]
            lines.append(_line("source", _said(read, tokenizer.source), colour))
        ids, labels, weights = (np.asarray(x[row])[place] for x in (batch.target.ids, batch.labels, batch.weights))
        stretches = _in_order if np.array_equal(ids[1:], labels[:-1]) else _in_place
        for label, said in stretches(ids, labels, weights > 0, tokenizer):
            lines.append(_line(label, said, f"bold {colour}" if label == "learned" else f"dim {colour}"))
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
