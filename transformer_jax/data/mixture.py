"""Several sources in one run: rows dealt in exact shares, and rows end to end."""

import dataclasses
import functools
from fractions import Fraction

import numpy as np

from transformer_jax.data.batches import Rows, overlay
from transformer_jax.tokens import Batch


@functools.cache
def turns(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(whose turn it is, the how manieth of its own), int64[sum of the shares] each: in any number of turns from the
    first, each has had its share of them but for less than one (Tijdeman 1980, The chairman assignment problem)."""
    count, total = len(shares), sum(shares)
    found, own, had = np.zeros(total, np.int64), np.zeros(total, np.int64), [0] * count
    slack = Fraction(1, 2 * count - 2) if count > 1 else Fraction(0)
    for turn in range(1, total + 1):
        due = [Fraction(turn * share, total) - each for share, each in zip(shares, had, strict=True)]
        asking = [part for part in range(count) if due[part] >= slack]
        left = {part: (1 - slack - due[part]) * total / shares[part] for part in asking}
        part = min(asking, key=lambda part: (left[part], part))
        found[turn - 1], own[turn - 1] = part, had[part]
        had[part] += 1
    return found, own


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources of training rows, each in an endless shuffled order of its own, dealt in shares."""

    parts: tuple[Rows, ...]
    shares: tuple[int, ...]

    @property
    def used(self) -> float:
        """The share of places that hold a token, of rows as they are dealt."""
        return float(np.average([part.used for part in self.parts], weights=self.shares))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def deal(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(whose row it is, the how manieth of them) of each place of the stream."""
        order, own = turns(self.shares)
        rounds, turn = np.divmod(places, len(order))
        return order[turn], rounds * np.asarray(self.shares)[order[turn]] + own[turn]

    def counts(self, places: int) -> list[int]:
        """Rows of each source among the first places of the stream."""
        rounds, turn = divmod(places, sum(self.shares))
        begun = np.bincount(turns(self.shares)[0][:turn], minlength=len(self.shares))
        return [rounds * share + int(more) for share, more in zip(self.shares, begun, strict=True)]


@dataclasses.dataclass(frozen=True)
class Joined:
    """Rows of several sources, end to end."""

    parts: tuple[Rows, ...]

    @property
    def used(self) -> float:
        return float(np.average([part.used for part in self.parts], weights=[len(part) for part in self.parts]))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        made, start = [], 0
        for part in self.parts:
            mine = (rows >= start) & (rows < start + len(part))
            made.append(part.batch(np.where(mine, rows - start, -1), epoch))
            start += len(part)
        return overlay(made)
