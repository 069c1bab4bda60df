"""Laws of packing and batches: every example once, rows as a slow construction makes them, batches pure functions."""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax import Batch, Tokens
from transformer_jax.data.batches import Batches, PackedRows, StreamRows, in_order, pack
from transformer_jax.data.examples import FixedExamples
from transformer_jax.data.objectives import ARRANGEMENTS, Room
from transformer_jax.data.ragged import Ragged, chain
from transformer_jax.data.tokenizer import make_tokenizer

law = settings(derandomize=True, deadline=None, max_examples=60)
TOKENIZER = make_tokenizer("char", 0, lambda: ["abc"])
PAD, BOS, EOS, SEP = TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.sep_id
MODES = tuple(ARRANGEMENTS)
ids_of_text = st.lists(st.integers(100, 999), max_size=5)
pairs = st.lists(st.tuples(ids_of_text, ids_of_text), min_size=1, max_size=12)


def ragged(lists):
    return Ragged.of([np.asarray(ids, np.int32) for ids in lists])


def assert_same(left, right):
    """Equal trees: equal structure, and equal arrays of equal types."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- packing


def assert_packed(lengths, rows, room):
    """No row holds more than its room in either dimension, and the rows are 0, 1, 2, ... without a gap."""
    held = np.zeros((rows.max() + 1, 2), np.int64)
    np.add.at(held, rows, lengths)
    assert (held <= np.asarray(room)).all()
    assert set(rows) == set(range(len(held)))


@law
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=60))
def test_no_row_is_over_its_room(lengths):
    room, lengths = Room(9, 12), np.array(lengths)
    assert_packed(lengths, pack(lengths, room), room)


def test_packing_of_many():
    """More examples than a row can choose from: of lengths like those of sentences, at least 97 % of the room is used,
    and 92 % where they are up to half a row and the two sides know nothing of each other."""
    draw = np.random.default_rng(0)
    sources = draw.integers(5, 30, 20_000)
    like = np.stack([sources, np.maximum(sources + draw.integers(-5, 6, 20_000), 2)], -1)
    cases = (like, Room(256, 256), 0.97), (like * [0, 1], Room(0, 256), 0.99)
    for lengths, room, least in (*cases, (draw.integers(1, 60, (20_000, 2)), Room(128, 128), 0.92)):
        rows = pack(lengths, room)
        assert_packed(lengths, rows, room)
        assert rows.max() > 1000
        assert lengths.sum() > least * (rows.max() + 1) * sum(room)


# --- rows of examples


class Slow(NamedTuple):
    """One sequence after the other in a row, written as a loop."""

    read: list[int]
    labels: list[int]
    weights: list[float]
    prefix: list[bool]
    source: list[int]


def slow_example(mode, source, target):
    """What the decoder reads and predicts, which predictions count, what is given, and what the encoder reads."""
    if mode == "encoder-decoder":
        whole, given, encoder = [BOS, *target, EOS], 1, [*source, EOS]
    else:
        whole, given, encoder = [BOS, *source, SEP, *target, EOS], len(source) + 2, []
    counts = [float(place >= given) for place in range(1, len(whole))]
    return Slow(whole[:-1], whole[1:], counts, [place < given for place in range(len(whole) - 1)], encoder)


def filled(parts, length, kind=np.int32):
    row = [value for part in parts for value in part]
    return np.array(row + [0] * (length - len(row)), kind)


def slow_tokens(parts, length, prefix=None):
    segments = filled(([number] * len(part) for number, part in enumerate(parts, 1)), length)
    return Tokens(filled(parts, length), segments, filled((range(len(part)) for part in parts), length), prefix)


def slow_row(mode, examples, room, bidirectional):
    made = [slow_example(mode, *example) for example in examples]
    prefix = filled((example.prefix for example in made), room.target, bool) if bidirectional else None
    target = slow_tokens([example.read for example in made], room.target, prefix)
    labels = filled((example.labels for example in made), room.target)
    weights = filled((example.weights for example in made), room.target, np.float32)
    source = slow_tokens([example.source for example in made], room.source) if room.source else None
    return Batch(target, labels, weights, source)


def packed(mode, examples, bidirectional=False, room=14):
    room = Room(room if mode == "encoder-decoder" else 0, room)
    made = FixedExamples(ragged([source for source, _ in examples]), ragged([target for _, target in examples]))
    return PackedRows(made, ARRANGEMENTS[mode], TOKENIZER, room, bidirectional)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("mode", MODES)
@law
@given(pairs, st.data())
def test_rows_are_those_of_a_slow_construction(mode, bidirectional, examples, data):
    """In any order of rows, with empty ones among them; every example is in one row once."""
    rows = packed(mode, examples, bidirectional)
    assert sorted(rows.members.ids) == list(range(len(examples)))
    chosen = data.draw(st.lists(st.integers(-1, len(rows) - 1), min_size=1, max_size=5))
    members = [[] if row < 0 else [examples[index] for index in rows.members[row]] for row in chosen]
    slow = [slow_row(mode, member, rows.room, bidirectional) for member in members]
    assert_same(rows.batch(np.array(chosen), 0), jax.tree.map(lambda *arrays: np.stack(arrays), *slow))


@pytest.mark.parametrize("mode", MODES)
@law
@given(pairs)
def test_loss_is_on_targets_and_their_ends(mode, examples):
    """The labels that count are, example by example, the target and <eos>: no source token, no <sep>, no padding."""
    rows = packed(mode, examples)
    batch = rows.batch(np.arange(len(rows)), 0)
    wanted = [token for index in rows.members.ids for token in [*examples[index][1], EOS]]
    assert batch.labels[batch.weights > 0].tolist() == wanted
    assert set(np.unique(batch.weights)) <= {0.0, 1.0}


@pytest.mark.parametrize("mode", MODES)
def test_the_share_of_used_places(mode):
    rows = packed(mode, [([101] * n, [102] * n) for n in range(5)] * 4)
    batch = rows.batch(np.arange(len(rows)), 0)
    sides = [batch.target, *([batch.source] if batch.source else [])]
    segments = np.concatenate([tokens.segments for tokens in sides], -1)
    assert rows.used == pytest.approx((segments > 0).mean(), abs=1e-12)


# --- rows of running text


def stream(lengths, length, moving, seed=0):
    """Rows of documents whose tokens are 1, 2, 3, ... throughout, so that a token's number tells its place."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = Ragged(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets)
    return StreamRows(documents, BOS, EOS, length, seed, moving)


def wrapped(rows):
    """(documents with their ends, the number of each token's document)."""
    whole = chain(rows.bos, rows.documents, rows.eos)
    return whole, np.repeat(np.arange(len(whole)), whole.lengths)


@pytest.mark.parametrize("moving", [True, False], ids=["moving", "still"])
@law
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 16), st.integers(0, 5))
def test_every_token_is_predicted_once(moving, lengths, length, epoch):
    """In every epoch, each token of a document and its end are a label once, behind the token before it."""
    rows = stream(lengths, length, moving)
    batch = rows.batch(np.arange(len(rows)), epoch)
    counts = batch.weights > 0
    whole, _ = wrapped(rows)
    assert batch.labels[counts].tolist() == np.delete(whole.ids, whole.offsets[:-1]).tolist()
    assert batch.target.ids[counts].tolist() == np.delete(whole.ids, whole.offsets[1:] - 1).tolist()
    np.testing.assert_array_equal(batch.target.segments > 0, counts)
    assert rows.used == pytest.approx(counts.mean(), abs=1e-12)


@pytest.mark.parametrize("moving", [True, False], ids=["moving", "still"])
@law
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 16), st.integers(0, 5))
def test_documents_in_a_row_are_apart(moving, lengths, length, epoch):
    """A row's documents have the segments 1, 2, ..., positions from 0, and nothing else at padding than zeros."""
    rows = stream(lengths, length, moving)
    batch = rows.batch(np.arange(len(rows)), epoch)
    whole, of_token = wrapped(rows)
    of_read, place = np.delete(of_token, whole.offsets[1:] - 1), 0
    for row in range(len(rows)):
        count = int((batch.target.segments[row] > 0).sum())
        groups = [list(group) for _, group in itertools.groupby(of_read[place : place + count])]
        place += count
        segments = [number for number, group in enumerate(groups, 1) for _ in group]
        assert batch.target.segments[row][batch.target.segments[row] > 0].tolist() == segments
        assert batch.target.positions[row][batch.target.segments[row] > 0].tolist() == [
            place for group in groups for place in range(len(group))
        ]
    empty = batch.target.segments == 0
    for array in (batch.target.ids, batch.target.positions, batch.labels):
        assert not array[empty].any()


def test_cuts_move_with_the_epoch_and_the_seed():
    """Training reads a text from other places each epoch; validation from the same."""
    first = {
        stream([400], 16, True, seed).batch(np.array([1]), epoch).target.ids[0, 0]
        for seed in (0, 1)
        for epoch in range(4)
    }
    assert len(first) > 4
    still = {
        stream([400], 16, False, seed).batch(np.array([1]), epoch).target.ids[0, 0]
        for seed in (0, 1)
        for epoch in range(4)
    }
    assert still == {16}


def test_an_empty_row_of_running_text_is_empty():
    batch = stream([9, 9], 4, True).batch(np.array([-1, 1]), 0)
    assert not any(array[0].any() for array in jax.tree.leaves(batch))
    assert batch.weights[1].any()


def test_documents_wrapped_in_bos_and_eos_teach_their_end():
    """<eos> is a label, <bos> never."""
    rows = StreamRows(ragged([[101, 102], [], [103]]), BOS, EOS, 4, 0, moving=False)
    batch = rows.batch(np.arange(len(rows)), 0)
    assert batch.labels[batch.weights > 0].tolist() == [101, 102, EOS, EOS, 103, EOS]


# --- batches


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Rows that say which they are: ids are the row's number + 1, labels the epoch + 1."""

    count: int
    used: float = 1.0

    def __len__(self):
        return self.count

    def batch(self, rows, epoch):
        here = (rows >= 0)[:, None]
        ids = np.where(here, rows[:, None] + 1, 0).astype(np.int32)
        tokens = Tokens(ids, here.astype(np.int32), np.zeros_like(ids), here)
        return Batch(tokens, np.where(here, epoch + 1, 0).astype(np.int32), here.astype(np.float32), tokens)


def places(batches, *steps):
    """(epoch, row) of every place of the steps' batches."""
    drawn = [batches.draw(step).batch for step in steps]
    return [(int(e), int(r)) for batch in drawn for e, r in zip(batch.labels[:, 0] - 1, batch.target.ids[:, 0] - 1)]


@law
@given(st.integers(1, 20), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_every_row_comes_once_an_epoch(count, size, seed):
    """Batches one after the other are epochs one after the other, each full, each a row once in an order of its own."""
    steps = -(-3 * count // size)
    found = places(Batches(Numbered(count), size, seed), *range(steps))
    assert len(found) == steps * size
    assert [epoch for epoch, _ in found] == [place // count for place in range(steps * size)]
    for epoch in range(3):
        assert sorted(row for e, row in found if e == epoch) == list(range(count))


@law
@given(st.integers(2, 20), st.integers(1, 24), st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_batch_is_a_function_of_seed_and_step(count, size, steps):
    """Whatever was drawn before, in any order, by any object."""
    used = Batches(Numbered(count), size, 7)
    for step in steps:
        drawn, fresh = used.draw(step), Batches(Numbered(count), size, 7).draw(step)
        assert drawn.sha == fresh.sha
        assert_same(drawn.batch, fresh.batch)


@law
@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.integers(0, 20))
def test_shards_are_the_batch(count, part, shards, step):
    """End to end they are the whole batch, also where an epoch ends within; each knows the digest of the whole."""
    whole = Batches(Numbered(count), part * shards, 3).draw(step)
    drawn = [
        Batches(Numbered(count), part * shards, 3, np.arange(index * part, (index + 1) * part)).draw(step)
        for index in range(shards)
    ]
    assert_same(jax.tree.map(lambda *arrays: np.concatenate(arrays), *(one.batch for one in drawn)), whole.batch)
    assert {one.sha for one in drawn} == {whole.sha}


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_over_an_epochs_end_is_its_two_halves(mode):
    """Of real rows with prefix marks: the last rows of one epoch, then the first of the next."""
    rows = packed(mode, [([101] * n, [200 + n] * n) for n in range(5)] * 3, bidirectional=True)
    count = len(rows)
    one_by_one = [Batches(rows, 1, 0).draw(place).batch for place in range(2 * (count - 1))]
    both = Batches(rows, count - 1, 0).draw(1).batch
    assert_same(both, jax.tree.map(lambda *arrays: np.concatenate(arrays), *one_by_one[count - 1 :]))


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [
        tuple(row for _, row in places(Batches(Numbered(50), 50, seed), step)) for seed in (0, 1) for step in (0, 1)
    ]
    assert len(set(orders)) == 4
    batches = Batches(Numbered(50), 10, 0)
    assert len({batches.draw(step).sha for step in range(20)}) == 20


@law
@given(st.integers(1, 20), st.integers(1, 24), st.integers(0, 30))
def test_in_order_is_every_row_once(count, size, most):
    """All rows in order, or `most` of them spread evenly; every batch is full, with empty rows that weigh nothing."""
    batches = list(in_order(Numbered(count), size, most))
    assert {batch.target.ids.shape for batch in batches} == {(size, 1)}
    ids = np.concatenate([batch.target.ids[:, 0] for batch in batches])
    weights = np.concatenate([batch.weights[:, 0] for batch in batches])
    read = ids[weights > 0] - 1
    assert not ids[len(read) :].any()
    if not most or most >= count:
        assert read.tolist() == list(range(count))
    else:
        assert len(read) == most
        assert read[0] == 0
        assert set(np.diff([*read, count])) <= {count // most, count // most + 1}
