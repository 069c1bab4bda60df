"""Laws of the objectives: nothing of a text is lost, lengths are as promised, and noise is as the config says."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.config import DataConfig, ModelConfig
from transformer_jax.data.batches import Batches, PackedRows, draw_checked
from transformer_jax.data.denoising import MODES as WAYS
from transformer_jax.data.denoising import Denoised, Denoiser, noise_shape, span_corruption, ul2, ul2_denoisers
from transformer_jax.data.examples import FIM, HOLE, chunk, continuation, fill_in_the_middle, prefix_lm
from transformer_jax.data.masking import MASK, Masked, masked_lm
from transformer_jax.data.objectives import (
    ARRANGEMENTS,
    IN_PLACE,
    TEXT_OBJECTIVES,
    arrangement_of,
    fitting,
    objective_name,
    room_of,
    tokens_needed,
)
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import make_tokenizer, sentinels
from transformer_jax.errors import InputError
from transformer_jax.pace import ahead

law = settings(derandomize=True, deadline=None, max_examples=100)
TOKENIZER = make_tokenizer("char", 0, lambda: ["abc"], [*sentinels(90), *WAYS, *FIM, MASK])
MODES = tuple(ARRANGEMENTS)


def texts(*lengths):
    """Documents of these lengths, whose tokens are 0, 1, 2, ... throughout."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Ragged(np.arange(offsets[-1], dtype=np.int32), offsets)


def corruption(documents, density=0.15, mean_span=3.0, seed=0):
    most = int(max(noise_shape(documents.lengths, density, mean_span)[1]))
    names = np.arange(documents.ids.max() + 1, documents.ids.max() + most + 2).astype(np.int32)
    return Denoised(documents, np.zeros(len(documents), int), (Denoiser(density, mean_span),), (-1,), names, seed)


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
    examples = continuation(documents, fitting("continuation", model, data), TOKENIZER, data, 0)
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
    marks = (targets.ids >= examples.sentinels[0]).sum()
    hidden, spans = len(targets.ids) - marks, marks - len(lengths)
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
    fits = fitting("span-corruption", model, data)
    examples = span_corruption(texts(1000, 1, 7, 2), fits, TOKENIZER, data, 0)
    longest = next(n for n in itertools.count(2) if not fits(*shape(n + 1, density, mean_span)))
    pieces = -(-1000 // longest)
    sizes = np.stack([examples.source_lengths, examples.target_lengths], -1)
    assert sizes.max(0).tolist() == list(shape(-(-1000 // pieces), density, mean_span))
    assert sizes.min() >= 1
    need = ARRANGEMENTS[mode].lengths(examples.source_lengths, examples.target_lengths)
    assert (need <= room_of(model, data)).all()
    spans = noise_shape(np.arange(2, longest + 1), density, mean_span)[1]
    assert tokens_needed("span-corruption", model, data) == sentinels(int(spans.max()) + 1)


# --- the others


def vocabulary(documents, *names):
    """Documents whose tokens are none of the tokenizer's special ones."""
    return Ragged(documents.ids + TOKENIZER.size, documents.offsets)


def whole(source, target):
    """The text that was hidden from a source and told by a target."""
    first, last = TOKENIZER.sentinel_ids[0], TOKENIZER.sentinel_ids[-1]
    answers, said = {}, []
    for token in target.tolist():
        said = answers.setdefault(token, []) if first <= token <= last else (said.append(token) or said)
    return [one for token in source.tolist() for one in (answers[token] if first <= token <= last else [token])]


@pytest.mark.parametrize("mode", MODES)
@law
@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=4), st.integers(24, 90), st.integers(0, 99), st.integers(0, 9)
)
def test_every_denoiser_hides_and_tells(mode, lengths, room, seed, epoch):
    """UL2: each chunk has its mode in front and comes back whole; lengths are as promised and fit a row."""
    documents, (model, data) = vocabulary(texts(*lengths)), settings_of(mode, room)
    examples = ul2(documents, fitting("ul2", model, data), TOKENIZER, data, seed)
    sources, targets = examples.make(np.arange(len(examples.chunks)), epoch)
    np.testing.assert_array_equal(sources.lengths, examples.source_lengths)
    np.testing.assert_array_equal(targets.lengths, examples.target_lengths)
    assert (ARRANGEMENTS[mode].lengths(sources.lengths, targets.lengths) <= room_of(model, data)).all()
    texts_seen = []
    for index, kind in enumerate(examples.kinds):
        way, source, target = examples.denoisers[kind].mode, sources[index], targets[index]
        assert source[0] == TOKENIZER.id_of(way)
        told = [*source[1:].tolist(), *target.tolist()] if way == "[S]" else whole(source[1:], target)
        assert told == examples.chunks[index].tolist()
        texts_seen += told
    assert texts_seen == documents.ids.tolist()


@pytest.mark.long
def test_denoisers_are_those_of_the_paper():
    """Over 10,000 texts: each of the seven is met equally often, its density to 1 %, its mean span to 1 %."""
    lengths = np.random.default_rng(0).integers(1024, 2048, 10_000)
    few = np.arange(2000) + TOKENIZER.size
    documents = Ragged(np.resize(few, lengths.sum()).astype(np.int32), np.append(0, np.cumsum(lengths)))
    denoisers = ul2_denoisers(DataConfig())
    kinds = np.random.default_rng(1).integers(7, size=10_000)
    names = np.arange(10**6, 10**6 + 2000).astype(np.int32)
    examples = Denoised(documents, kinds, denoisers, (3,) * 7, names, 0)
    targets = examples.make(np.arange(10_000), 0)[1]
    for kind, denoiser in enumerate(denoisers):
        chosen = np.flatnonzero(kinds == kind)
        marks = (targets.take(chosen).ids >= 10**6).sum()
        hidden = targets.lengths[chosen].sum() - marks
        assert hidden / lengths[chosen].sum() == pytest.approx(denoiser.density, rel=0.01)
        if np.isfinite(denoiser.mean_span):
            assert hidden / (marks - len(chosen)) == pytest.approx(denoiser.mean_span, rel=0.01)
        else:
            assert marks == 0
    drawn = ul2(documents, lambda source, target: source + target < 3000, TOKENIZER, DataConfig(), 0).kinds
    assert np.abs(np.bincount(drawn) / len(drawn) - 1 / 7).max() < 0.012  # three standard errors


@pytest.mark.parametrize("mode", MODES)
@law
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(6, 40), st.integers(0, 99))
def test_a_prefix_and_its_rest_are_the_text(mode, lengths, room, seed):
    """Nothing is lost, and only a lone token has no prefix."""
    documents, (model, data) = texts(*lengths), settings_of(mode, room)
    examples = prefix_lm(documents, fitting("prefix-lm", model, data), TOKENIZER, data, seed)
    sources, targets = examples.make(np.arange(len(examples.sources)), 0)
    parts = [part for index in range(len(sources)) for part in (sources[index], targets[index])]
    assert np.concatenate(parts).tolist() == documents.ids.tolist()
    assert targets.lengths.min() >= 1
    assert (sources.lengths[sources.lengths + targets.lengths > 1] >= 1).all()
    assert (ARRANGEMENTS[mode].lengths(sources.lengths, targets.lengths) <= room_of(model, data)).all()


def test_prefixes_are_cut_anywhere():
    """10,000 texts of 11 tokens: each of the 10 places within 4 standard errors."""
    examples = prefix_lm(texts(*[11] * 10_000), lambda source, target: source + target < 12, TOKENIZER, DataConfig(), 0)
    seen = np.bincount(examples.source_lengths)[1:]
    assert len(seen) == 10
    assert np.abs(seen - 1000).max() < 4 * 30


@law
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(8, 60), st.integers(0, 99), st.floats(0, 1))
def test_the_middle_comes_back(lengths, room, seed, rate):
    """Each chunk is as it is, or its parts stand behind their marks in one of two orders; nothing is lost."""
    documents, (model, data) = vocabulary(texts(*lengths)), settings_of("decoder-only", room, fim_rate=rate)
    examples = fill_in_the_middle(documents, fitting("fill-in-the-middle", model, data), TOKENIZER, data, seed)
    sources, targets = examples.make(np.arange(len(examples.chunks)), 3)
    assert sources.lengths.tolist() == [0] * len(sources)
    np.testing.assert_array_equal(targets.lengths, examples.target_lengths)
    prefix, suffix, middle = (TOKENIZER.id_of(name) for name in FIM)
    read = []
    for index in range(len(targets)):
        ids = targets[index].tolist()
        if examples.moved[index]:
            assert ids[0] == prefix
            second, third = ids.index(suffix), ids.index(middle)
            ids = ids[1:second] + ids[third + 1 :] + ids[second + 1 : third]
        read += ids
    assert read == documents.ids.tolist()


def test_middles_are_as_configured():
    """10,000 chunks: half of them moved, half of those each way, and the middle is a third of the text, to 3 %."""
    documents = vocabulary(texts(*[30] * 10_000))
    examples = fill_in_the_middle(documents, lambda s, t: t < 34, TOKENIZER, DataConfig(), 0)
    targets = examples.make(np.arange(10_000), 0)[1]
    suffix, middle = (TOKENIZER.id_of(name) for name in FIM[1:])
    moved = [targets[index].tolist() for index in np.flatnonzero(examples.moved)]
    assert len(moved) / 10_000 == pytest.approx(0.5, rel=0.03)
    straight = [ids for ids in moved if ids[1] != suffix]
    lengths = [len(ids) - ids.index(middle) - 1 for ids in straight]
    assert len(straight) / len(moved) == pytest.approx(0.5 * 30 / 31, rel=0.05)  # where the prefix is not empty
    assert np.mean(lengths) == pytest.approx(10, rel=0.05)


# --- tokens hidden in place


def masked(documents, rate=0.15, seed=0):
    return Masked(documents, rate, TOKENIZER.id_of(MASK), np.array([5, 6, 7], np.int32), seed)


@law
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.integers(8, 40),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32 - 1),
    st.integers(0, 1000),
)
def test_masks_hide_and_tell_in_place(lengths, room, rate, seed, epoch):
    """What is read where nothing is asked for, and what is predicted elsewhere, are the text; as many tokens are chosen
    as promised, all of a text is prefix, and texts that share a row are apart."""
    documents, (model, data) = vocabulary(texts(*lengths)), settings_of("decoder-only", room, mask_rate=rate)
    examples = masked_lm(documents, fitting("masked-lm", model, data), TOKENIZER, data, seed)
    rows = PackedRows(examples, IN_PLACE, TOKENIZER, room_of(model, data), True)
    batch = rows.batch(np.arange(len(rows)), epoch)
    target, said = batch.target, []
    np.testing.assert_array_equal(target.prefix, target.segments > 0)
    for row in range(len(rows)):
        for number, index in enumerate(rows.members[row], 1):
            place = target.segments[row] == number
            ids, labels, weights = (x[row][place] for x in (target.ids, batch.labels, batch.weights))
            assert (ids[0], ids[-1], weights[0], weights[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id, 0, 0)
            assert target.positions[row][place].tolist() == list(range(len(ids)))
            assert weights.sum() == min(max(round((len(ids) - 2) * rate), 1), len(ids) - 2)
            assert not labels[weights == 0].any()
            told = np.where(weights > 0, labels, ids)[1:-1].tolist()
            assert told == examples.chunks[index].tolist()
            said += told
    assert sorted(said) == documents.ids.tolist()


def test_masks_are_those_of_the_paper():
    """Over 10,000 texts, to 1 %: 15 % of the tokens are chosen, 80 % of those masked, 10 % another, 10 % as they were;
    each token of the vocabulary is as likely, and each place to 4 standard errors."""
    lengths = np.random.default_rng(0).integers(20, 200, 10_000)
    documents = vocabulary(texts(*lengths))
    examples = masked(documents)
    sources, targets = examples.make(np.arange(10_000), 3)
    chosen = targets.ids >= 0
    kinds = sources.ids[chosen] == examples.mask, np.isin(sources.ids[chosen], examples.words)
    np.testing.assert_array_equal(sources.ids[~chosen], documents.ids[~chosen])
    assert chosen.mean() == pytest.approx(0.15, rel=0.01)
    for kind, share in zip((*kinds, sources.ids[chosen] == documents.ids[chosen]), (0.8, 0.1, 0.1), strict=True):
        assert kind.mean() == pytest.approx(share, rel=0.01)
    swapped = np.unique(sources.ids[chosen][kinds[1]], return_counts=True)[1]
    assert np.abs(swapped / swapped.sum() - 1 / 3).max() < 4 * np.sqrt(2 / 9 / swapped.sum())
    starts = documents.offsets[:-1]
    assert abs(chosen[starts].mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 10_000)


def test_masks_are_their_seed_epoch_and_index():
    """The same three give the same example, whatever else is made with it; another of any gives another."""
    documents = Ragged(np.tile(np.arange(200, dtype=np.int32), 4), np.arange(5) * 200)
    together = masked(documents, seed=9).make(np.array([3, 2, 0]), 5)
    for row, index in enumerate((3, 2, 0)):
        for part, alone in zip(together, masked(documents, seed=9).hide(index, 5), strict=True):
            np.testing.assert_array_equal(part[row], alone)
    keys = list(itertools.product((0, 1, 2**32 - 1), (0, 1, 7), (0, 1, 3)))
    seen = {tuple(masked(documents, seed=seed).hide(index, epoch)[1].tolist()) for seed, epoch, index in keys}
    assert len(seen) == len(keys)


def test_a_swapped_token_is_no_special_one():
    assert TOKENIZER.tokens(TOKENIZER.word_ids) == ["a", "b", "c"]


@pytest.mark.parametrize("name", TEXT_OBJECTIVES)
@pytest.mark.parametrize("hosts", [2, 8])
def test_examples_do_not_know_the_hosts(name, hosts):
    """What all hosts read of a batch together is the batch."""
    mode = "decoder-only" if TEXT_OBJECTIVES[name].arrangement else "encoder-decoder"
    model, data = settings_of(mode, 40)
    documents = vocabulary(texts(*range(20, 200, 9)))
    examples = TEXT_OBJECTIVES[name].examples(documents, fitting(name, model, data), TOKENIZER, data, 5)
    rows = PackedRows(examples, arrangement_of(name, mode), TOKENIZER, room_of(model, data), False)
    for step in (0, 5):
        whole_batch = Batches(rows, 8, 1).draw(step)
        parts = [
            Batches(rows, 8, 1, mine=np.array_split(np.arange(8), hosts)[host]).draw(step) for host in range(hosts)
        ]
        assert {part.sha for part in parts} == {whole_batch.sha}
        for name_of, side in (("target", lambda b: b.target.ids), ("labels", lambda b: b.labels)):
            together = np.concatenate([side(part.batch) for part in parts])
            np.testing.assert_array_equal(together, side(whole_batch.batch), err_msg=name_of)


@pytest.mark.parametrize("workers", [1, 3])
def test_examples_do_not_know_the_processes(workers):
    """Made by so many of them, the batches are those of this one, in order."""
    model, data = settings_of("encoder-decoder", 40)
    examples = ul2(texts(*range(20, 200, 9)), fitting("ul2", model, data), TOKENIZER, data, 5)
    rows = PackedRows(examples, ARRANGEMENTS["encoder-decoder"], TOKENIZER, room_of(model, data), False)
    draw = functools.partial(draw_checked, Batches(rows, 4, 1), model.replace(vocab_size=10_000))
    waited = []
    for step, drawn in enumerate(ahead(draw, 3, 12, waited.append, workers), 3):
        assert drawn.sha == draw(step).sha
        for one, other in zip(jax.tree.leaves(drawn.batch), jax.tree.leaves(draw(step).batch), strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(waited) == 9


def test_prompts_are_what_the_objective_reads():
    """Of UL2 the mode says whether to fill in or to go on; of fill-in-the-middle a hole is what is asked for."""

    def prompt(name, text):
        return TOKENIZER.tokens(TEXT_OBJECTIVES[name].prompt(text, TOKENIZER))

    assert prompt("ul2", "ab") == ["[S]", "a", "b"]
    assert prompt("ul2", "a<extra_id_0>b") == ["[R]", "a", "<extra_id_0>", "b"]
    assert prompt("span-corruption", "a<extra_id_0>b") == ["a", "<extra_id_0>", "b"]
    assert prompt("fill-in-the-middle", f"a{HOLE}bc") == [FIM[0], "a", FIM[1], "b", "c", FIM[2]]
    assert prompt("fill-in-the-middle", "ab") == prompt("prefix-lm", "ab") == ["a", "b"]


# --- which objective


@pytest.mark.parametrize(
    ("kind", "mode", "asked", "wanted"),
    [
        ("pairs", "encoder-decoder", "auto", "sequence-to-sequence"),
        ("pairs", "decoder-only", "auto", "sequence-to-sequence"),
        ("pairs", "decoder-only", "sequence-to-sequence", "sequence-to-sequence"),
        ("text", "encoder-decoder", "auto", "span-corruption"),
        ("text", "decoder-only", "auto", "causal"),
        ("text", "decoder-only", "fill-in-the-middle", "fill-in-the-middle"),
        ("text", "encoder-decoder", "ul2", "ul2"),
        ("text", "decoder-only", "prefix-lm", "prefix-lm"),
        ("text", "decoder-only", "span-corruption", "span-corruption"),
        ("text", "encoder-decoder", "continuation", "continuation"),
        ("text", "decoder-only", "continuation", "continuation"),
    ],
)
def test_the_two_by_two_table(kind, mode, asked, wanted):
    model, data = settings_of(mode, 32, objective=asked)
    assert objective_name(kind, model, data) == wanted
    if kind == "text" and asked == "auto" and mode == "decoder-only":
        assert objective_name(kind, model.replace(prefix_attention="bidirectional"), data) == "prefix-lm"


def test_masks_go_with_a_prefix_that_is_all():
    model, data = settings_of("decoder-only", 32, objective="masked-lm")
    assert objective_name("text", model.replace(prefix_attention="bidirectional"), data) == "masked-lm"


@pytest.mark.parametrize(
    ("kind", "mode", "asked", "prefix", "named"),
    [
        ("pairs", "decoder-only", "causal", "causal", "data.objective='causal'.*pairs"),
        ("pairs", "encoder-decoder", "span-corruption", "causal", "data.objective='span-corruption'.*pairs"),
        ("text", "decoder-only", "sequence-to-sequence", "causal", "data.objective='sequence-to-sequence'.*text"),
        ("text", "encoder-decoder", "causal", "causal", "data.objective='causal'.*no source"),
        ("text", "decoder-only", "causal", "bidirectional", "prefix_attention='bidirectional'.*causal"),
        ("text", "encoder-decoder", "fill-in-the-middle", "causal", "'fill-in-the-middle' has no source"),
        ("text", "decoder-only", "fill-in-the-middle", "bidirectional", "has none"),
        ("pairs", "decoder-only", "masked-lm", "bidirectional", "data.objective='masked-lm'.*pairs"),
        ("text", "decoder-only", "masked-lm", "causal", "'masked-lm' needs --model.prefix-attention bidirectional"),
        ("text", "encoder-decoder", "masked-lm", "causal", "'masked-lm' has no source.*--model.mode decoder-only"),
    ],
)
def test_objectives_that_make_no_sense(kind, mode, asked, prefix, named):
    model, data = settings_of(mode, 32, objective=asked)
    with pytest.raises(InputError, match=named):
        objective_name(kind, model.replace(prefix_attention=prefix), data)


@pytest.mark.parametrize("name", TEXT_OBJECTIVES)
def test_a_row_too_small_for_any_text(name):
    model, data = settings_of("decoder-only", 3)
    with pytest.raises(InputError, match="max_length is too small"):
        TEXT_OBJECTIVES[name].examples(texts(50), fitting(name, model, data), TOKENIZER, data, 0)
