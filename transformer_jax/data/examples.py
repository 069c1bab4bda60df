"""Plain text -> examples: each way to make a source and a target of a text that needs no sentinels."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from transformer_jax.config import DataConfig
from transformer_jax.data.ragged import Ragged, ranges
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import InputError

Fits = Callable[[int, int], bool]  # whether a source and a target of these lengths fit a row


class Examples(Protocol):
    """Sources and targets by index; their lengths are known before they are made, so rows can be packed ahead."""

    @property
    def source_lengths(self) -> np.ndarray: ...
    @property
    def target_lengths(self) -> np.ndarray: ...
    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]: ...


def generator(*key: int) -> np.random.Generator:
    """Random numbers from a key of whole numbers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def of_example(seed: int, index: int, epoch: int) -> np.random.Generator:
    """Random numbers of one example in one epoch: the same wherever and whenever it is made."""
    return np.random.Generator(np.random.Philox(key=[seed, (epoch << 40) + index]))


@dataclasses.dataclass(frozen=True)
class FixedExamples:
    """The same source and target every epoch."""

    sources: Ragged
    targets: Ragged

    @property
    def source_lengths(self) -> np.ndarray:
        return self.sources.lengths

    @property
    def target_lengths(self) -> np.ndarray:
        return self.targets.lengths

    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]:
        return self.sources.take(indices), self.targets.take(indices)


@dataclasses.dataclass(frozen=True)
class SegmentedExamples:
    """Pairs in `count` segmentations: segmentation s of n pairs' i-th is at s n + i. In epoch e it is (e + i) modulo
    `count` that is read, and the room that is kept is that of the longest."""

    sources: Ragged
    targets: Ragged
    count: int

    @property
    def source_lengths(self) -> np.ndarray:
        return self.sources.lengths.reshape(self.count, -1).max(0)

    @property
    def target_lengths(self) -> np.ndarray:
        return self.targets.lengths.reshape(self.count, -1).max(0)

    def _places(self, segmentations: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return (segmentations * (len(self.sources) // self.count) + indices).ravel()

    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]:
        places = self._places((epoch + indices) % self.count, indices)
        return self.sources.take(places), self.targets.take(places)


@dataclasses.dataclass(frozen=True)
class Selected:
    """Some of other examples."""

    examples: Examples
    kept: np.ndarray

    @property
    def source_lengths(self) -> np.ndarray:
        return self.examples.source_lengths[self.kept]

    @property
    def target_lengths(self) -> np.ndarray:
        return self.examples.target_lengths[self.kept]

    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]:
        return self.examples.make(self.kept[indices], epoch)


def selected(examples: Examples, kept: np.ndarray) -> Examples:
    """Those of the examples; nothing is copied."""
    return examples if len(kept) == len(examples.source_lengths) else Selected(examples, kept)


def chunk(documents: Ragged, longest: int) -> Ragged:
    """Each document cut into as few pieces of at most `longest` tokens as there can be, nearly equal in length."""
    pieces = -(-documents.lengths // longest)
    which = np.repeat(np.arange(len(documents)), pieces)
    part = ranges(np.zeros(len(documents), np.int64), pieces)
    starts = documents.lengths[which] * part // pieces[which]
    inner = documents.offsets[which] + starts
    return Ragged(documents.ids, np.append(inner, documents.offsets[-1]))


def longest_that(fits: Callable[[int], bool]) -> int:
    """The longest chunk that fits a row, where shorter ones than a fitting one fit too."""
    low, high = 2, 4
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not fits(low):
        raise InputError("max_length is too small for this objective: not even two tokens of text fit a row.")
    return low


def split_at(chunks: Ragged, places: np.ndarray) -> FixedExamples:
    """The part of each chunk before a place is the source, the rest the target."""
    starts, rest = chunks.offsets[:-1], chunks.lengths - places
    sources = Ragged(chunks.ids[ranges(starts, places)], np.append(0, np.cumsum(places)))
    return FixedExamples(sources, Ragged(chunks.ids[ranges(starts + places, rest)], np.append(0, np.cumsum(rest))))


def continuation(documents: Ragged, fits: Fits, tokenizer: Tokenizer, config: DataConfig, seed: int) -> FixedExamples:
    """The first half of each chunk of text is the source, the second half the target."""
    chunks = chunk(documents, longest_that(lambda length: fits(length // 2, length - length // 2)))
    return split_at(chunks, chunks.lengths // 2)


def prefix_lm(documents: Ragged, fits: Fits, tokenizer: Tokenizer, config: DataConfig, seed: int) -> FixedExamples:
    """Each chunk is cut at a place drawn evenly; what is before it is the source (Raffel et al. 2020, 3.3.1). Of a lone
    token the source is empty."""
    longest = longest_that(lambda length: fits(length - 1, 1) and fits(1, length - 1))
    chunks = chunk(documents, longest)
    places = generator(seed, len(chunks)).integers(1, np.maximum(chunks.lengths, 2))
    return split_at(chunks, np.where(chunks.lengths > 1, places, 0))


# --- fill in the middle

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
HOLE = "<|fim_hole|>"  # in a prompt, where the middle is missing


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Chunks of which some have their middle moved to the end, behind marks (Bavarian et al. 2022, section 3).

        prefix, suffix, middle    <|fim_prefix|> a <|fim_suffix|> c <|fim_middle|> b
        suffix, prefix, middle    <|fim_prefix|> <|fim_suffix|> c <|fim_middle|> a b

    Which are moved is settled once, half of them each way; where they are cut is drawn anew each epoch, from (seed,
    epoch, index) alone. There is no source: everything is learned.
    """

    chunks: Ragged
    moved: np.ndarray
    marks: tuple[int, int, int]
    seed: int

    @property
    def source_lengths(self) -> np.ndarray:
        return np.zeros(len(self.chunks), np.int64)

    @property
    def target_lengths(self) -> np.ndarray:
        return self.chunks.lengths + len(FIM) * self.moved

    def move(self, index: int, epoch: int) -> np.ndarray:
        """One chunk as it is learned."""
        ids = self.chunks[index]
        if not self.moved[index]:
            return ids
        rng, (prefix, suffix, middle) = of_example(self.seed, index, epoch), self.marks
        first, last = np.sort(rng.integers(len(ids) + 1, size=2))
        a, b, c = ids[:first], ids[first:last], ids[last:]
        if rng.integers(2):
            return np.concatenate([[prefix], a, [suffix], c, [middle], b]).astype(np.int32)
        return np.concatenate([[prefix, suffix], c, [middle], a, b]).astype(np.int32)

    def make(self, indices: np.ndarray, epoch: int) -> tuple[Ragged, Ragged]:
        made = Ragged.of([self.move(int(index), epoch) for index in indices])
        return Ragged(np.zeros(0, np.int32), np.zeros(len(indices) + 1, np.int64)), made


def fim_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of the three marks."""
    prefix, suffix, middle = (tokenizer.id_of(name) for name in FIM)
    return prefix, suffix, middle


def fill_in_the_middle(
    documents: Ragged, fits: Fits, tokenizer: Tokenizer, config: DataConfig, seed: int
) -> FillInTheMiddle:
    """The longest chunks that fit a row with their marks; a share of `fim_rate` of them has its middle moved."""
    chunks = chunk(documents, longest_that(lambda length: fits(0, length + len(FIM))))
    moved = generator(seed, len(chunks)).random(len(chunks)) < config.fim_rate
    return FillInTheMiddle(chunks, moved, fim_ids(tokenizer), seed)
