"""Examples -> packed rows -> batches. `batch(step)` is a pure function of (seed, step): there is no state to lose."""

import dataclasses
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np

from transformer_jax.data.objectives import Arrangement, Examples, Room
from transformer_jax.data.ragged import Ragged, ranges
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.tokens import ALL, Batch, Mine, Tokens


def generator(*key: int) -> np.random.Generator:
    """Random numbers from a key of whole numbers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Rows(Protocol):
    """An epoch of packed rows, any of which can be made at any time; row -1 is an empty one. `used` is the share of
    places that hold a token."""

    @property
    def used(self) -> float: ...

    def __len__(self) -> int: ...
    def batch(self, rows: np.ndarray, epoch: int) -> Batch: ...


OPEN_ROWS = 256


def pack(lengths: np.ndarray, room: Room) -> np.ndarray:
    """The row of each example, int64[n]: first fit among the last OPEN_ROWS rows, longest of each stretch first.

    `lengths` is int64[n, 2], the room that each example takes of source and target.
    """
    capacity = np.asarray(room)
    left, rows = np.full((OPEN_ROWS, 2), -1), np.empty(len(lengths), np.int64)
    opened, stretch = 0, 16 * OPEN_ROWS
    for start in range(0, len(lengths), stretch):
        part = lengths[start : start + stretch]
        for index in start + np.argsort(-part.sum(-1), kind="stable"):
            need = lengths[index]
            fits = np.flatnonzero((left >= need).all(-1))
            slot = int(fits[0]) if len(fits) else -1
            if slot < 0:
                slot = opened % OPEN_ROWS
                left[slot], opened = capacity, opened + 1
            left[slot] -= need
            # the row that this slot holds now
            rows[index] = opened - 1 - (opened - 1 - slot) % OPEN_ROWS
    return rows


def spread(parts: Ragged, rows: np.ndarray, count: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, segments, positions), int32[count, length] each: sequences side by side in their rows.

    `rows` is the row of each sequence, in ascending order.
    """
    lengths = parts.lengths
    ends = np.cumsum(lengths)
    first = np.searchsorted(rows, rows)  # the first sequence of the same row
    starts = ends - lengths - (ends - lengths)[first]
    where = ranges(rows * length + starts, lengths)
    ids, segments, positions = np.zeros((3, count * length), np.int32)
    ids[where] = parts.ids
    segments[where] = np.repeat(np.arange(len(rows)) - first + 1, lengths)
    positions[where] = ranges(np.zeros(len(rows), np.int64), lengths)
    return ids.reshape(count, length), segments.reshape(count, length), positions.reshape(count, length)


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
    used: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        lengths = self.arrangement.lengths(self.examples.source_lengths, self.examples.target_lengths)
        rows = pack(lengths, self.room)
        order = np.argsort(rows, kind="stable")
        offsets = np.searchsorted(rows[order], np.arange(rows.max() + 2 if len(rows) else 1))
        object.__setattr__(self, "members", Ragged(order, offsets))
        object.__setattr__(self, "used", lengths.sum() / (len(self) * sum(self.room)) if len(self) else 0.0)

    def __len__(self) -> int:
        return len(self.members)

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        present = np.flatnonzero(rows >= 0)
        members = self.members.take(rows[present])
        row_of = np.repeat(present, members.lengths)
        source, target, given = self.arrangement.arrange(*self.examples.make(members.ids, epoch), self.tokenizer)
        # all but the last token is read, all but the first is predicted
        lengths = target.lengths - 1
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        read = Ragged(target.ids[ranges(target.offsets[:-1], lengths)], offsets)
        predicted = Ragged(target.ids[ranges(target.offsets[:-1] + 1, lengths)], offsets)
        ids, segments, positions = spread(read, row_of, len(rows), self.room.target)
        labels = spread(predicted, row_of, len(rows), self.room.target)[0]
        given_BT = np.zeros((len(rows), self.room.target), np.int64)
        given_BT[segments > 0] = np.repeat(given, lengths)
        weights = ((segments > 0) & (positions >= given_BT - 1)).astype(np.float32)
        prefix = (segments > 0) & (positions < given_BT) if self.bidirectional else None
        encoder = Tokens(*spread(source, row_of, len(rows), self.room.source)) if source is not None else None
        return Batch(Tokens(ids, segments, positions, prefix), labels, weights, encoder)


@dataclasses.dataclass(frozen=True)
class StreamRows:
    """Plain text for causal language modelling: documents end to end, cut into rows.

    The cut moves with the epoch, so a text is read from other places each time; a document that a cut divides goes
    on in the next row. Documents in one row never see each other, and nothing is left out.
    """

    documents: Ragged
    length: int
    seed: int
    moving: bool

    def __len__(self) -> int:
        return 1 + -(-(len(self.documents.ids) - 2) // self.length) if self.moving else self._still

    @property
    def _still(self) -> int:
        return max(1, -(-(len(self.documents.ids) - 1) // self.length))

    @property
    def used(self) -> float:
        return (len(self.documents.ids) - len(self.documents)) / (len(self) * self.length)

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        tokens, offsets = self.documents.ids, self.documents.offsets
        shift = int(generator(self.seed, epoch).integers(self.length)) if self.moving else 0
        row_start = rows[:, None] * self.length - shift
        place = row_start + np.arange(self.length)
        inside = (rows[:, None] >= 0) & (place >= 0) & (place < len(tokens) - 1)
        place = np.where(inside, place, 0)
        document = np.searchsorted(offsets, place, side="right") - 1
        inside &= place + 1 < offsets[document + 1]  # a document's last token predicts nothing
        first = np.where(inside, document, len(offsets)).min(-1, keepdims=True)
        segments = np.where(inside, document - first + 1, 0).astype(np.int32)
        positions = np.where(inside, place - np.maximum(offsets[document], row_start), 0).astype(np.int32)
        ids = np.where(inside, tokens[place], 0).astype(np.int32)
        labels = np.where(inside, tokens[place + inside], 0).astype(np.int32)
        return Batch(Tokens(ids, segments, positions), labels, inside.astype(np.float32))


class Drawn(NamedTuple):
    """A batch and a digest of which rows of which epoch it is made of."""

    batch: Batch
    sha: str


@dataclasses.dataclass
class Batches:
    """Batches of shuffled rows, each a pure function of (seed, step). Every row comes once an epoch.

    A batch that reaches an epoch's end goes on with the next one's first rows, so none is short and none is dropped.
    `mine` are the places of every batch that this process reads.
    """

    rows: Rows
    batch_size: int
    seed: int
    mine: Mine = dataclasses.field(default_factory=lambda: ALL)
    _orders: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = generator(self.seed, epoch).permutation(len(self.rows))
        return self._orders[epoch]

    def draw(self, step: int) -> Drawn:
        """The batch of a step, this process's part of it; the digest is of the whole."""
        places = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(places, len(self.rows))
        mine = self.mine
        chosen = np.concatenate([self._order(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        parts = [
            self.rows.batch(np.where(epochs[mine] == e, chosen[mine], -1), int(e)) for e in np.unique(epochs[mine])
        ]
        digest = blake2b(np.stack([epochs, chosen]).astype("<i8").tobytes(), digest_size=8).hexdigest()
        return Drawn(_overlay(parts), digest)


def _overlay(parts: list[Batch]) -> Batch:
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
