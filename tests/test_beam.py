"""Laws of beam search: it is a plain beam search over the whole uncached model, ids and scores."""

import gzip
import itertools
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from test_decoding import PROMPTS, SOURCES, padded, run, slow_greedy, source_of
from variants import SOURCE, TARGET, TINY, VARIANTS, compiled, has_source, name, variables, variant

from transformer_jax import Transformer
from transformer_jax.decoding import generate_all
from transformer_jax.decoding.batches import bucket
from transformer_jax.decoding.beam import top_k
from transformer_jax.decoding.generate import decode

MULTI30K = Path(__file__).parents[2] / "shared/data/multi30k/test_2016_flickr.en.gz"
V, NEW = TINY["vocab_size"], 8
MODES = ("encoder-decoder", "decoder-only")
CONFIGS = [variant("plain", MODES[0]), variant("rope-gqa", MODES[1])]
# a window with a ring of slots, a prefix that sees all of itself, experts whose places are counted; and all the others
OTHERS = [variant("alibi-window"), variant("none-prefix"), variant("alibi-cross")]
REST = [config for config in VARIANTS if config not in [*OTHERS, *CONFIGS] and config.dtype != "bfloat16"]
every_mode = pytest.mark.parametrize("config", CONFIGS, ids=MODES)
first_mode = pytest.mark.parametrize(
    "config", [CONFIGS[0], *(pytest.param(config, marks=pytest.mark.long) for config in CONFIGS[1:])], ids=MODES
)


def log_probs(config, row, sequences):
    """Log-probabilities of the token after prompt `row` and each sequence of new tokens, by the uncached model."""
    found, prompt = [], PROMPTS[row]
    for part in (sequences[start : start + 3] for start in range(0, len(sequences), 3)):
        rows = [[*prompt, *ids] for ids in part]
        target = padded(rows + rows[:1] * (3 - len(rows)), TARGET)
        if config.prefix_attention == "bidirectional":
            target = target.replace(prefix=np.arange(TARGET) + 0 * target.ids < len(prompt))
        source = padded([SOURCES[row]] * 3, SOURCE) if has_source(config) else None
        logits = np.asarray(compiled(config)(variables(config), target, source, rngs=None), np.float64)
        last = logits[np.arange(len(rows)), [len(ids) - 1 for ids in rows]]
        found.extend(last - np.log(np.exp(last).sum(-1, keepdims=True)))
    return found


def slow_beams(config, row, size, stops, penalty=1.0, new=NEW, allowed=None, early=False):
    """[(ids, score)] of a plain beam search, the best first; to the last place, or till enough have ended."""
    live, ended = [((), 0.0)], []
    for length in range(1, new + 1):
        every = [
            ((*ids, token), total + each[token])
            for (ids, total), each in zip(live, log_probs(config, row, [ids for ids, _ in live]))
            for token in (range(V) if allowed is None else np.flatnonzero(allowed))
        ]
        every.sort(key=lambda pair: -pair[1])
        ended += [(ids, total / length**penalty) for ids, total in every[:size] if ids[-1] in stops or length == new]
        live = [pair for pair in every if pair[0][-1] not in stops][:size]
        if early and len(ended) >= size:
            break
    return sorted(ended, key=lambda pair: -pair[1])[:size]


def assert_same(result, wanted, row, count):
    """The ids and, to 1e-4, the scores of one row."""
    for n, (ids, score) in enumerate(wanted[:count]):
        assert result.ids[row, n, : result.lengths[row, n]].tolist() == list(ids)
        assert not result.ids[row, n, result.lengths[row, n] :].any()
        assert result.scores[row, n] == pytest.approx(score, abs=1e-4)


def stops_of(config):
    """End tokens that come at different times."""
    ids = slow_greedy(config)[0]
    return sorted({int(ids[0, 2]), int(ids[1, 4])})


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in range(3, 9))])
@every_mode
def test_it_is_a_plain_beam_search(config, size):
    """All of the `size` best, of three prompts at once, whose sequences end at different times."""
    stops = stops_of(config)
    result = run(config, padded(PROMPTS, 6), beam_size=size, num_return=size, eos_id=stops, max_new_tokens=NEW)
    for row in range(3):
        wanted = slow_beams(config, row, size, stops)
        assert_same(result, wanted, row, size)
    assert len(set(result.lengths.ravel().tolist())) > 1


@pytest.mark.parametrize(
    "config",
    [
        *OTHERS,
        *(
            pytest.param(config, marks=pytest.mark.long if config.mode == "encoder-decoder" else pytest.mark.slow)
            for config in REST
        ),
    ],
    ids=name,
)
def test_so_it_is_with_other_models(config):
    stops = stops_of(config)
    result = run(config, padded(PROMPTS, 6), beam_size=4, num_return=4, eos_id=stops, max_new_tokens=NEW)
    for row in range(3):
        assert_same(result, slow_beams(config, row, 4, stops), row, 4)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 2.0])
def test_lengths_are_weighed(penalty):
    config = variant("plain", MODES[0])
    stops = stops_of(config)
    options = dict(beam_size=3, num_return=3, eos_id=stops, max_new_tokens=NEW)
    result = run(config, padded(PROMPTS, 6), length_penalty=penalty, **options)
    for row in range(3):
        assert_same(result, slow_beams(config, row, 3, stops, penalty), row, 3)


@every_mode
def test_it_can_end_once_enough_have_ended(config):
    """With a penalty that favours long sequences; the others would be longer."""
    stops = stops_of(config)
    options = dict(beam_size=3, num_return=3, eos_id=stops, max_new_tokens=NEW, length_penalty=2.0)
    early, late = (run(config, padded(PROMPTS, 6), **options, early_stopping=early) for early in (True, False))
    for row in range(3):
        assert_same(early, slow_beams(config, row, 3, stops, 2.0, early=True), row, 3)
    assert early.lengths.sum() < late.lengths.sum()


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 10_007])
def test_the_best_are_those_of_the_library(size):
    """Ties, and what is never said, included; `width` values alone, so that most are ties."""
    for width in (2, 10**6):
        x = np.random.default_rng(size).integers(0, width, (3, 2, size)).astype(np.float32)
        x[0, 0, 1 : size - size // 4] = -np.inf
        for k in {1, min(4, size), min(16, size)}:
            for got, wanted in zip(jax.jit(top_k, static_argnums=1)(x, k), jax.lax.top_k(x, k), strict=True):
                np.testing.assert_array_equal(got, wanted)


@first_mode
def test_the_best_alone_is_the_first_of_many(config):
    """It may stop earlier, and finds the same."""
    options = dict(beam_size=5, eos_id=stops_of(config), max_new_tokens=NEW)
    many = run(config, padded(PROMPTS, 6), num_return=5, **options)
    one = run(config, padded(PROMPTS, 6), **options)
    np.testing.assert_array_equal(one.ids, many.ids[:, 0])
    np.testing.assert_allclose(one.scores, many.scores[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(one.lengths, many.lengths[:, 0])


@first_mode
def test_one_beam_is_greedy(config):
    """Without an end token also by the loop of beams: the best of 2 is at least as likely."""
    greedy = run(config, padded(PROMPTS, 6), beam_size=1)
    np.testing.assert_array_equal(greedy.ids, slow_greedy(config)[0])
    two = run(config, padded(PROMPTS, 6), beam_size=2, length_penalty=0.0)
    assert (two.scores >= greedy.scores - 1e-5).all()


@every_mode
@pytest.mark.long
def test_neighbours_and_padding_do_not_matter(config):
    """Alone at its own length, and among others on the other side of more padding."""
    options = dict(beam_size=3, num_return=2, eos_id=stops_of(config), max_new_tokens=NEW)
    wanted = run(config, padded(PROMPTS, 6), **options)
    left = run(config, padded(PROMPTS, 9, left=True), source_of(config, left=True), **options)
    np.testing.assert_array_equal(left.ids, wanted.ids)
    np.testing.assert_allclose(left.scores, wanted.scores, rtol=0, atol=1e-5)
    alone = run(config, np.array([PROMPTS[1]]), np.array([SOURCES[1]]) if has_source(config) else None, **options)
    np.testing.assert_array_equal(alone.ids[0], wanted.ids[1])
    np.testing.assert_allclose(alone.scores[0], wanted.scores[1], rtol=0, atol=1e-5)


def test_a_mask_and_forced_tokens_hold_for_every_beam():
    """Among four tokens; after a forced one all beams begin alike; of a single sequence there is no second."""
    config = variant("plain")
    allowed = np.isin(np.arange(V), [2, 5, 9, 11])
    options = dict(beam_size=3, num_return=3, max_new_tokens=NEW)
    result = run(config, padded(PROMPTS, 6), allowed=allowed, eos_id=5, **options)
    for row in range(3):
        assert_same(result, slow_beams(config, row, 3, [5], allowed=allowed), row, 3)
    forced = run(config, padded(PROMPTS, 6), forced=np.tile([7, -1, 8], (3, 1)), **options)
    assert (forced.ids[:, :, 0] == 7).all()
    assert (forced.ids[:, :, 2] == 8).all()
    assert len({tuple(ids) for ids in forced.ids[0].tolist()}) == 3
    single = run(config, padded(PROMPTS, 6), allowed=np.arange(V) == 4, **options)
    assert single.lengths.tolist() == [[NEW, 0, 0]] * 3
    assert (single.scores[:, 1:] == -np.inf).all()
    assert not single.ids[:, 1:].any()


@first_mode
def test_any_number_of_prompts(config):
    """Batches of any size give the same outputs, and rows with less room end at `max_length`."""
    stops = stops_of(config)
    options = dict(beam_size=3, num_return=2, eos_id=stops, max_new_tokens=NEW)
    prompts = [(np.array(SOURCES[i % 3]) if has_source(config) else None, np.array(PROMPTS[i % 3])) for i in range(5)]
    found = list(generate_all(Transformer(config), variables(config)["params"], prompts, batch_size=2, **options))
    assert sorted(output.place for output in found) == [number for number in range(5) for _ in range(2)]
    for row in range(3):
        wanted = slow_beams(config, row, 3, stops)[:2]
        for index in range(row, 5, 3):
            outputs = [output for output in found if output.place == index]
            assert [output.ids.tolist() for output in outputs] == [list(ids) for ids, _ in wanted]
            np.testing.assert_allclose([o.score for o in outputs], [score for _, score in wanted], rtol=0, atol=1e-4)


# --- how often it is compiled


def compiles_of(config, sources, **options):
    """How often the loop is compiled for so many sources, and their outputs by place."""
    model, params = Transformer(config), variables(config)["params"]
    before = decode._cache_size()
    found = list(generate_all(model, params, [(ids, np.array([2])) for ids in sources], **options))
    return decode._cache_size() - before, {output.place: output for output in found}


@pytest.mark.long
def test_one_compile_for_a_bucket():
    """Sources of 1 to 90 tokens have 4 buckets of length, whatever the last batch holds; again, and nothing is new."""
    config = CONFIGS[0].replace(max_length=96)
    sources = [np.arange(length) % (V - 1) + 1 for length in range(1, 91, 3)]
    options = dict(beam_size=5, max_new_tokens=4, eos_id=3, batch_size=7)
    count, found = compiles_of(config, sources, **options)
    assert {bucket(len(ids), 96) for ids in sources} == {32, 48, 64, 96}
    assert 1 <= count <= 4
    assert sorted(found) == list(range(len(sources)))
    again, outputs = compiles_of(config, sources[::-1][:20], **options)
    assert again == 0
    assert all(outputs[n].ids.tolist() == found[len(sources) - 1 - n].ids.tolist() for n in outputs)


@pytest.mark.slow
@pytest.mark.skipif(not MULTI30K.exists(), reason="needs Multi30k, which is not part of the project")
def test_a_thousand_sentences_take_few_compiles():
    """Multi30k's test set by words of its own, beam 5: at most 6 compiles."""
    with gzip.open(MULTI30K, "rt", encoding="utf-8") as file:
        lines = [line.split() for line in itertools.islice(file, 1000)]
    assert len(lines) == 1000
    sources = [np.array([zlib.crc32(word.encode()) % (V - 4) + 4 for word in line], np.int32) for line in lines]
    options = dict(beam_size=5, max_new_tokens=48, eos_id=3, batch_size=64)
    count, found = compiles_of(CONFIGS[0].replace(max_length=64), sources, **options)
    assert count <= 6
    assert len(found) == 1000
