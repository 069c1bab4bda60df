"""Sequences of unequal length in one flat array: no Python loop touches a token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each of the lengths, end to end: ranges([5, 0], [2, 3]) is [5, 6, 0, 1, 2]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


class Shards:
    """Arrays end to end, read by a slice or by places as one array of int32 would be; those of files stay there."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __reduce__(self) -> Any:
        """For another process: files are opened there."""
        parts = [(str(p.filename), p.dtype.str) if isinstance(p, np.memmap) else (p, "") for p in self.parts]
        return _shards_again, (parts,)

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        if isinstance(where, slice):
            first, last, _ = where.indices(len(self))
            found, place = [np.zeros(0, np.int32)], first
            while place < last:
                number = int(np.searchsorted(self.ends, place, side="right"))
                part, end = self.parts[number], int(self.ends[number])
                stop = min(last, end)
                found.append(part[len(part) - (end - place) : len(part) - (end - stop)])
                place = stop
            return np.concatenate(found, dtype=np.int32)
        flat = where.ravel()
        found = np.empty(len(flat), np.int32)
        numbers = np.searchsorted(self.ends, flat, side="right")
        for number in np.unique(numbers):
            here, part = numbers == number, self.parts[number]
            found[here] = part[flat[here] - (int(self.ends[number]) - len(part))]
        return found.reshape(where.shape)


def _shards_again(parts: list[tuple[Any, str]]) -> Shards:
    return Shards([np.memmap(part, dtype, "r") if dtype else part for part, dtype in parts])


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequence i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: Any  # an array or Shards
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray]) -> "Ragged":
        """The sequences end to end."""
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences], dtype=np.int64)]).astype(np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *sequences]), offsets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def size(self) -> int:
        """Numbers of all sequences."""
        return int(self.offsets[-1] - self.offsets[0])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: np.ndarray) -> "Ragged":
        """The sequences at the indices, in that order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Ragged(self.ids[ranges(self.offsets[:-1][indices], lengths)], offsets)


def chain(*parts: "Ragged | int") -> Ragged:
    """Each sequence of a part joined with those of the others: chain(bos, x, eos) wraps every x. An int is a token."""
    count = next(len(part) for part in parts if isinstance(part, Ragged))
    ones = np.ones(count, np.int64)
    lengths = [part.lengths if isinstance(part, Ragged) else ones for part in parts]
    offsets = np.concatenate([[0], np.cumsum(np.sum(lengths, 0))])
    ids, start = np.empty(offsets[-1], np.int32), offsets[:-1].copy()
    for part, length in zip(parts, lengths, strict=True):
        ids[ranges(start, length)] = part.ids if isinstance(part, Ragged) else part
        start += length
    return Ragged(ids, offsets)
