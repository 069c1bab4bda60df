"""Laws of the objectives: nothing of a text is lost, lengths are as promised, and noise is as the config says."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.config import DataConfig, ModelConfig
from transformer_jax.data.objectives import (
    ARRANGEMENTS,
    SpanCorruption,
    chunk,
    continuation,
    fitting,
    noise_shape,
    objective_name,
    room_of,
    sentinels_needed,
    span_corruption,
)
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import make_tokenizer
from transformer_jax.errors import InputError

law = settings(derandomize=True, deadline=None, max_examples=100)
TOKENIZER = make_tokenizer("char", 0, lambda: ["abc"], 40)
MODES = tuple(ARRANGEMENTS)


def texts(*lengths):
    """Documents of these lengths, whose tokens are 0, 1, 2, ... throughout."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Ragged(np.arange(offsets[-1], dtype=np.int32), offsets)


def corruption(documents, density=0.15, mean_span=3.0, seed=0):
    most = int(max(noise_shape(documents.lengths, density, mean_span)[1]))
    sentinels = np.arange(documents.ids.max() + 1, documents.ids.max() + most + 2)
    return SpanCorruption(documents, sentinels.astype(np.int32), density, mean_span, seed)


def runs_between(ids, first):
    """[(sentinel or None, the tokens behind it), ...], where sentinels are `first` and above."""
    runs = [(None, [])]
    for token in ids.tolist():
        runs.append((token, [])) if token >= first else runs[-1][1].append(token)
    return runs


def settings_of(mode, length, **data):
    return ModelConfig(mode=mode, vocab_size=99, d_model=8, num_heads=2, max_length=length), DataConfig(**data)


def shape(length, density, mean_span):
    """(source tokens, target tokens) of a corrupted text."""
    hidden, spans = noise_shape(length, density, mean_span)
    return int(length - hidden + spans), int(hidden + spans + 1)


# --- chunks


@law
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 12))
def test_chunks_keep_every_token_in_order(lengths, longest):
    """As few pieces of each document as there can be, of nearly equal length, none longer than the longest."""
    documents = texts(*lengths)
    chunks = chunk(documents, longest)
    pieces = [chunks[index].tolist() for index in range(len(chunks))]
    assert list(itertools.chain(*pieces)) == documents.ids.tolist()
    assert all(1 <= len(piece) <= longest for piece in pieces)
    for number, length in enumerate(lengths):
        own = [len(piece) for piece in pieces if set(piece) & set(documents[number].tolist())]
        assert sum(own) == length
        assert len(own) == -(-length // longest)
        assert not own or max(own) - min(own) <= 1


@pytest.mark.parametrize("mode", MODES)
@law
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(6, 24))
def test_continuation_is_the_text_in_halves(mode, lengths, room):
    documents, (model, data) = texts(*lengths), settings_of(mode, room)
    examples = continuation(documents, fitting(model, data), TOKENIZER, data, 0)
    sources, targets = examples.make(np.arange(len(examples.sources)), 0)
    halves = [part for index in range(len(sources)) for part in (sources[index], targets[index])]
    assert np.concatenate(halves).tolist() == documents.ids.tolist()
    assert set(targets.lengths - sources.lengths) <= {0, 1}
    need = ARRANGEMENTS[mode].lengths(examples.source_lengths, examples.target_lengths)
    assert (need <= room_of(model, data)).all()


# --- span corruption


@law
@given(
    st.lists(st.integers(2, 80), min_size=1, max_size=4),
    st.floats(0.02, 0.95),
    st.floats(1, 8),
    st.integers(0, 2**32 - 1),
    st.integers(0, 1000),
)
def test_span_corruption_hides_and_tells(lengths, density, mean_span, seed, epoch):
    """Source and target put together are the text; lengths are as promised; sentinels come in order."""
    documents = texts(*lengths)
    examples = corruption(documents, density, mean_span, seed)
    first = examples.sentinels[0]
    sources, targets = examples.make(np.arange(len(documents)), epoch)
    np.testing.assert_array_equal(sources.lengths, examples.source_lengths)
    np.testing.assert_array_equal(targets.lengths, examples.target_lengths)
    for index in range(len(documents)):
        kept, hidden = runs_between(sources[index], first), runs_between(targets[index], first)
        spans = len(kept) - 1
        assert [sentinel for sentinel, _ in kept[1:]] == examples.sentinels[:spans].tolist()
        assert [sentinel for sentinel, _ in hidden[1:]] == examples.sentinels[: spans + 1].tolist()
        assert hidden[0][1] == hidden[-1][1] == []
        assert all(ids for _, ids in kept[:-1])
        assert all(ids for _, ids in hidden[1:-1])
        answers = dict(hidden[1:])
        whole = [token for sentinel, ids in kept for token in answers.get(sentinel, []) + ids]
        assert whole == documents[index].tolist()


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.3, 1.0)])
def test_noise_is_as_configured(density, mean_span):
    """Over texts of 400 to 600 tokens: the share of hidden tokens to 1 %, the mean span to 2 %."""
    lengths = np.arange(400, 600)
    examples = corruption(texts(*lengths), density, mean_span)
    _, targets = examples.make(np.arange(len(lengths)), 0)
    sentinels = (targets.ids >= examples.sentinels[0]).sum()
    hidden, spans = len(targets.ids) - sentinels, sentinels - len(lengths)
    assert hidden / lengths.sum() == pytest.approx(density, rel=0.01)
    assert hidden / spans == pytest.approx(mean_span, rel=0.02)


def test_every_way_to_hide_is_equally_likely():
    """12 tokens, 3 spans of 6 hidden: all 10 x 10 patterns, chi-square below its 99.9 % point for 99 degrees."""
    count, examples = 4000, corruption(texts(*[12] * 4000), 0.5, 2.0)
    sources, _ = examples.make(np.arange(count), 0)
    kept = [tuple(sources[index][sources[index] < examples.sentinels[0]] - 12 * index) for index in range(count)]
    patterns, seen = np.unique(kept, axis=0, return_counts=True)
    assert len(patterns) == 100
    assert ((seen - count / 100) ** 2 / (count / 100)).sum() < 148.2


def test_an_example_is_its_seed_epoch_and_index():
    """The same three give the same example, whatever else is made with it; another of any gives another."""
    documents = Ragged(np.tile(np.arange(200, dtype=np.int32), 4), np.arange(5) * 200)

    def source(seed, epoch, index):
        return corruption(documents, seed=seed).corrupt(index, epoch)[0].tolist()

    together, _ = corruption(documents, seed=9).make(np.array([3, 2, 0]), 5)
    assert [together[row].tolist() for row in range(3)] == [source(9, 5, index) for index in (3, 2, 0)]
    keys = list(itertools.product((0, 1, 2**32 - 1), (0, 1, 7), (0, 1, 3)))
    assert len({tuple(source(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 4.0)])
@pytest.mark.parametrize("length", [8, 33, 128])
def test_chunks_fill_a_row_and_sentinels_suffice(mode, density, mean_span, length):
    """Chunks are as few as fit their rows, leave out texts of one token, and have sentinels enough for any length."""
    model, data = settings_of(mode, length, noise_density=density, mean_span=mean_span)
    fits = fitting(model, data)
    examples = span_corruption(texts(1000, 1, 7, 2), fits, TOKENIZER, data, 0)
    longest = next(n for n in itertools.count(2) if not fits(*shape(n + 1, density, mean_span)))
    pieces = -(-1000 // longest)
    assert examples.chunks.lengths.max() == -(-1000 // pieces)
    assert 1 not in examples.chunks.lengths
    need = ARRANGEMENTS[mode].lengths(examples.source_lengths, examples.target_lengths)
    assert (need <= room_of(model, data)).all()
    spans = noise_shape(np.arange(2, longest + 1), density, mean_span)[1]
    assert sentinels_needed("span-corruption", model, data) == spans.max() + 1


# --- which objective


@pytest.mark.parametrize(
    ("kind", "mode", "asked", "wanted"),
    [
        ("pairs", "encoder-decoder", "auto", "sequence-to-sequence"),
        ("pairs", "decoder-only", "auto", "sequence-to-sequence"),
        ("pairs", "decoder-only", "sequence-to-sequence", "sequence-to-sequence"),
        ("text", "encoder-decoder", "auto", "span-corruption"),
        ("text", "decoder-only", "auto", "causal"),
        ("text", "decoder-only", "span-corruption", "span-corruption"),
        ("text", "encoder-decoder", "continuation", "continuation"),
        ("text", "decoder-only", "continuation", "continuation"),
    ],
)
def test_the_two_by_two_table(kind, mode, asked, wanted):
    assert objective_name(kind, *settings_of(mode, 32, objective=asked)) == wanted


@pytest.mark.parametrize(
    ("kind", "mode", "asked", "prefix", "named"),
    [
        ("pairs", "decoder-only", "causal", "causal", "data.objective='causal'.*pairs"),
        ("pairs", "encoder-decoder", "span-corruption", "causal", "data.objective='span-corruption'.*pairs"),
        ("text", "decoder-only", "sequence-to-sequence", "causal", "data.objective='sequence-to-sequence'.*text"),
        ("text", "encoder-decoder", "causal", "causal", "data.objective='causal'.*no source"),
        ("text", "decoder-only", "causal", "bidirectional", "prefix_attention='bidirectional'.*causal"),
        ("text", "decoder-only", "auto", "bidirectional", "prefix_attention='bidirectional'.*causal"),
    ],
)
def test_objectives_that_make_no_sense(kind, mode, asked, prefix, named):
    model, data = settings_of(mode, 32, objective=asked)
    with pytest.raises(InputError, match=named):
        objective_name(kind, model.replace(prefix_attention=prefix), data)


@pytest.mark.parametrize("objective", [continuation, span_corruption])
def test_a_row_too_small_for_any_text(objective):
    model, data = settings_of("decoder-only", 3)
    with pytest.raises(InputError, match="max_length is too small"):
        objective(texts(50), fitting(model, data), TOKENIZER, data, 0)
