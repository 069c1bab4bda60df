"""Examples -> packed rows -> batches. `batch(step)` is a pure function of (seed, step): there is no state to lose."""

import dataclasses
import functools
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.data.examples import Examples, generator
from transformer_jax.data.objectives import Arrangement, Room
from transformer_jax.data.ragged import Ragged, ranges
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.tokens import ALL, Batch, Mine, Tokens, check_batch


class Rows(Protocol):
    """An epoch of packed rows, any of which can be made at any time; row -1 is an empty one. `used` is the share of
    places that hold a token."""

    @property
    def used(self) -> float: ...

    def __len__(self) -> int: ...
    def batch(self, rows: np.ndarray, epoch: int) -> Batch: ...


AHEAD = 1024  # examples that a row can choose from
LAST = 3  # of a row's examples are chosen, and those before taken as they come
ROUNDING = 1e-12  # of shares of a row
TRIES = 8  # examples that are looked at for one that is taken as it comes


def pack(lengths: np.ndarray, room: Room) -> np.ndarray:
    """The row of each example, int64[n], one row after the other: examples that fit as they come, and for the end of a
    row, of AHEAD of them, those that leave least. So both sides of a row fill up together, however examples differ.

    `lengths` is int64[n, 2], the room that each example takes of source and target; none takes more than a row has.
    """
    assert (lengths <= np.asarray(room)).all(), "an example is longer than a row"
    whole, count, row = np.maximum(np.asarray(room, float), 1), len(lengths), 0
    shares, rows = lengths / whole, np.zeros(count, np.int64)
    size = following = min(AHEAD, count)
    pool, turn = list(range(size)), 0
    needs, columns = shares[:size].tolist(), shares[:size].T.copy()  # the pool's, to look at one or at all
    enough = (LAST * shares.mean(0)).tolist() if count else []  # for as many examples as there are on average
    source = target = 1.0  # what is left of a row
    for _ in range(count):
        place = -1
        while place < 0:
            if source > enough[0] and target > enough[1]:
                for each in range(turn, turn + min(TRIES, size)):
                    if needs[each % size][0] <= source and needs[each % size][1] <= target:
                        place = each % size
                        break
                turn = place + 1
            if place < 0:
                less, lower = source - columns[0], target - columns[1]
                waste = np.where((less >= 0) & (lower >= 0), less * less + lower * lower, np.inf)
                best = int(waste.argmin())
                place = best if waste[best] < np.inf else -1
            if place < 0:
                row, source, target = row + 1, 1.0, 1.0
        rows[pool[place]] = row
        source, target = source - needs[place][0] + ROUNDING, target - needs[place][1] + ROUNDING
        pool[place] = following
        needs[place] = shares[following].tolist() if following < count else [np.inf, np.inf]
        columns[:, place] = needs[place]
        following += 1
    return rows


def spread(rows: np.ndarray, count: int, length: int, parts: Ragged, *others: Ragged) -> np.ndarray:
    """ids, segments, positions and the ids of the others, int32[count, length] each: sequences side by side in their
    rows, those of the others at the same places.

    `rows` is the row of each sequence, in ascending order.
    """
    lengths = parts.lengths
    ends = np.cumsum(lengths)
    first = np.searchsorted(rows, rows)  # the first sequence of the same row
    starts = ends - lengths - (ends - lengths)[first]
    where = ranges(rows * length + starts, lengths)
    segments = np.repeat(np.arange(len(rows)) - first + 1, lengths)
    positions = ranges(np.zeros(len(rows), np.int64), lengths)
    found = np.zeros((3 + len(others), count * length), np.int32)
    for array, values in zip(found, (parts.ids, segments, positions, *(part.ids for part in others)), strict=True):
        array[where] = values
    return found.reshape(-1, count, length)


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Examples with a source or a given part, packed so that a row holds several that never see each other.

    Which examples share a row is settled once; their order within an epoch is the batches' affair.
    """

    examples: Examples
    arrangement: Arrangement
    tokenizer: Tokenizer
    room: Room
    bidirectional: bool
    members: Ragged = dataclasses.field(init=False)
    taken: np.ndarray = dataclasses.field(init=False)  # places of all rows' sources and targets that hold a token

    def __post_init__(self) -> None:
        lengths = self.arrangement.lengths(self.examples.source_lengths, self.examples.target_lengths)
        rows = pack(lengths, self.room)
        order = np.argsort(rows, kind="stable")
        offsets = np.searchsorted(rows[order], np.arange(rows.max() + 2 if len(rows) else 1))
        object.__setattr__(self, "members", Ragged(order, offsets))
        object.__setattr__(self, "taken", lengths.sum(0))

    @property
    def used(self) -> float:
        return float(self.taken.sum() / (len(self) * sum(self.room))) if len(self) else 0.0

    def __len__(self) -> int:
        return len(self.members)

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        present = np.flatnonzero(rows >= 0)
        members = self.members.take(rows[present])
        row_of = np.repeat(present, members.lengths)
        made = self.examples.make(members.ids, epoch)
        source, read, predicted, learned, given = self.arrangement.arrange(*made, self.tokenizer)
        ids, segments, positions, labels, weights = spread(
            row_of, len(rows), self.room.target, read, predicted, learned
        )
        prefix = segments > 0 if self.bidirectional else None
        if prefix is not None:
            prefix[prefix] = positions[prefix] < np.repeat(given, read.lengths)
        encoder = None if source is None else Tokens(*spread(row_of, len(rows), self.room.source, source))
        return Batch(Tokens(ids, segments, positions, prefix), labels, weights.astype(np.float32), encoder)


@dataclasses.dataclass(frozen=True)
class StreamRows:
    """Plain text for causal language modelling: documents end to end, each between `bos` and `eos`, cut into rows.

    The cut moves with the epoch, so a text is read from other places each time; a document that a cut divides goes
    on in the next row. Documents in one row never see each other, and nothing is left out.
    """

    documents: Ragged
    bos: int
    eos: int
    length: int
    seed: int
    moving: bool

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """The first place of each document among the tokens that are read, and their number: its eos is not."""
        offsets = self.documents.offsets
        return offsets - offsets[0] + np.arange(len(offsets))

    def __len__(self) -> int:
        places = int(self._starts[-1])
        return 1 + -(-(places - 1) // self.length) if self.moving else max(1, -(-places // self.length))

    @property
    def used(self) -> float:
        return int(self._starts[-1]) / (len(self) * self.length)

    def _tokens(self, places: np.ndarray) -> np.ndarray:
        ids = self.documents.ids
        return ids[np.clip(places, 0, len(ids) - 1)] if len(ids) else np.zeros_like(places)

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        starts, offsets = self._starts, self.documents.offsets
        shift = int(generator(self.seed, epoch).integers(self.length)) if self.moving else 0
        row_start = rows[:, None] * self.length - shift
        place = row_start + np.arange(self.length)
        inside = (rows[:, None] >= 0) & (place >= 0) & (place < starts[-1])
        place = np.where(inside, place, 0)
        document = np.searchsorted(starts, place, side="right") - 1
        first = np.where(inside, document, len(starts)).min(-1, keepdims=True)
        segments = np.where(inside, document - first + 1, 0).astype(np.int32)
        positions = np.where(inside, place - np.maximum(starts[document], row_start), 0).astype(np.int32)
        following = offsets[document] + place - starts[document]  # what is read stands before it
        begins, ends = place == starts[document], following == offsets[document + 1]
        read, label = (self._tokens(each) for each in (following - 1, following))
        ids = np.where(inside, np.where(begins, self.bos, read), 0).astype(np.int32)
        labels = np.where(inside, np.where(ends, self.eos, label), 0).astype(np.int32)
        return Batch(Tokens(ids, segments, positions), labels, inside.astype(np.float32))


class Drawn(NamedTuple):
    """A batch and a digest of which rows of which epoch it is made of."""

    batch: Batch
    sha: str


@runtime_checkable
class Dealer(Protocol):
    """Where the rows of training come from, in what turn."""

    @property
    def parts(self) -> tuple[Rows, ...]: ...
    def deal(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def counts(self, places: int) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class Alone:
    """A single source."""

    rows: Rows

    @property
    def parts(self) -> tuple[Rows, ...]:
        return (self.rows,)

    def deal(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All its own turn."""
        return np.zeros_like(places), places

    def counts(self, places: int) -> list[int]:
        """All of them."""
        return [places]


@dataclasses.dataclass
class Batches:
    """Batches of shuffled rows, each a pure function of (seed, step). Of each source every row comes once an epoch.

    A batch that reaches an epoch's end goes on with the next one's first rows, so none is short and none is dropped.
    `mine` are the places of every batch that this process reads.
    """

    rows: Rows | Dealer
    batch_size: int
    seed: int
    mine: Mine = dataclasses.field(default_factory=lambda: ALL)
    _orders: dict[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.source: Dealer = self.rows if isinstance(self.rows, Dealer) else Alone(self.rows)

    def _order(self, part: int, epoch: int) -> np.ndarray:
        if (part, epoch) not in self._orders:
            self._orders.pop((part, epoch - 2), None)
            key = (self.seed, epoch, part) if part else (self.seed, epoch)
            self._orders[part, epoch] = generator(*key).permutation(len(self.source.parts[part]))
        return self._orders[part, epoch]

    def places(self, step: int) -> np.ndarray:
        """int64[batch, 3], the source, the epoch and the row of each place of a batch."""
        which, turns = self.source.deal(step * self.batch_size + np.arange(self.batch_size))
        epochs, rows = np.divmod(turns, np.array([len(part) for part in self.source.parts])[which])
        for part, epoch in np.unique(np.stack([which, epochs], -1), axis=0).tolist():
            here = (which == part) & (epochs == epoch)
            rows[here] = self._order(part, epoch)[rows[here]]
        return np.stack([which, epochs, rows], -1)

    def following(self, step: int) -> list[dict[str, int]]:
        """The epoch of each source that goes on with a step, and how many of its rows are behind."""
        counts = self.source.counts(step * self.batch_size)
        return [dict(zip(("epoch", "row"), divmod(n, len(rows)))) for n, rows in zip(counts, self.source.parts)]

    def draw(self, step: int) -> Drawn:
        """The batch of a step, this process's part of it; the digest is of the whole."""
        places = self.places(step)
        which, epochs, rows = places[self.mine].T
        parts = [
            self.source.parts[part].batch(np.where((which == part) & (epochs == epoch), rows, -1), epoch)
            for part, epoch in np.unique(places[self.mine][:, :2], axis=0).tolist()
        ]
        digest = blake2b(np.ascontiguousarray(places, "<i8").tobytes(), digest_size=8).hexdigest()
        return Drawn(overlay(parts), digest)


def draw_checked(batches: Batches, model: ModelConfig, step: int) -> Drawn:
    """The batch of a step, all of whose ids and positions are in their tables."""
    drawn = batches.draw(step)
    check_batch(drawn.batch, model.vocab_size, model.max_length, model.source_vocab_size)
    return drawn


def overlay(parts: list[Batch]) -> Batch:
    """Batches that are empty where the others are not, as one."""
    import jax  # only to walk the tree

    return jax.tree.map(
        lambda *arrays: np.bitwise_or.reduce(arrays) if arrays[0].dtype != np.float32 else sum(arrays), *parts
    )


def in_order(rows: Rows, batch_size: int, most: int = 0, mine: Mine = ALL) -> Iterator[Batch]:
    """Every row once, in order, the last batch filled up with empty rows; at most `most` rows, spread evenly.

    `mine` are the places of every batch that this process reads.
    """
    chosen = np.arange(len(rows))
    if most and most < len(rows):
        chosen = np.arange(most) * len(rows) // most
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        yield rows.batch(np.pad(part, (0, batch_size - len(part)), constant_values=-1)[mine], 0)
