"""Laws of ragged arrays: they do what lists of lists do."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data.ragged import Ragged, Shards, chain, ranges

law = settings(derandomize=True, deadline=None, max_examples=150)
token = st.integers(0, 2**31 - 1)
sequences = st.lists(st.lists(token, max_size=6), max_size=8)


def ragged(lists):
    return Ragged.of([np.asarray(ids, np.int32) for ids in lists])


def lists_of(sequences):
    return [sequences[index].tolist() for index in range(len(sequences))]


@law
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 6)), max_size=8))
def test_ranges_are_ranges_end_to_end(parts):
    starts, lengths = (np.array([part[side] for part in parts], np.int64) for side in (0, 1))
    wanted = [number for start, length in parts for number in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == wanted


@law
@given(sequences)
def test_of_keeps_the_sequences(lists):
    made = ragged(lists)
    assert lists_of(made) == lists
    assert len(made) == len(lists)
    assert made.lengths.tolist() == [len(ids) for ids in lists]
    assert made.ids.dtype == np.int32
    assert made.offsets.dtype == np.int64


@law
@given(sequences, st.data())
def test_take_is_indexing(lists, data):
    """In any order, with repeats, and nothing at all."""
    index = st.integers(0, max(len(lists) - 1, 0))
    chosen = data.draw(st.lists(index, max_size=10 if lists else 0))
    taken = ragged(lists).take(np.array(chosen, np.int64))
    assert lists_of(taken) == [lists[index] for index in chosen]
    assert lists_of(taken.take(np.arange(len(chosen)))) == lists_of(taken)


@law
@given(st.data(), st.integers(0, 6))
def test_chain_is_concatenation_one_by_one(data, count):
    """Of sequences and single tokens in any order, one part of sequences at least."""
    of_count = st.lists(st.lists(token, max_size=4), min_size=count, max_size=count)
    before, after = (data.draw(st.lists(token | of_count, max_size=3)) for _ in range(2))
    parts = [*before, data.draw(of_count), *after]
    chained = chain(*(part if isinstance(part, int) else ragged(part) for part in parts))
    wanted = [[] for _ in range(count)]
    for part in parts:
        for row in range(count):
            wanted[row] += [part] if isinstance(part, int) else part[row]
    assert lists_of(chained) == wanted
    assert chained.ids.dtype == np.int32


@law
@given(st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=5), max_size=5), st.data())
def test_shards_are_one_array(parts, data):
    """Of whatever type their numbers are: any slice and any places give what the joined array has there."""
    shards = Shards([np.asarray(part, "<u2") for part in parts])
    whole = np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)])
    assert len(shards) == len(whole)
    first, last = (data.draw(st.none() | st.integers(-30, 30)) for _ in "ab")
    part = shards[first:last]
    assert (part.tolist(), part.dtype) == (whole[first:last].tolist(), np.int32)
    places = np.asarray(data.draw(st.lists(st.integers(0, max(len(whole) - 1, 0)), max_size=8 if len(whole) else 0)))
    found = shards[places.reshape(-1, 1).astype(np.int64)]
    assert (found.tolist(), found.dtype) == (whole[places.astype(np.int64)].reshape(-1, 1).tolist(), np.int32)
