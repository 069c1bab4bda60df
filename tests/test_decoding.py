"""Laws of generation: it is the model asked again for each token, and nobody's neighbours or padding matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from variants import SOURCE, TARGET, TINY, compiled, has_source, variables, variant

from transformer_jax import Tokens, Transformer
from transformer_jax.decoding import filter_logits, generate, generate_all

law = settings(derandomize=True, deadline=None, max_examples=100)
V, NEW, PAD = TINY["vocab_size"], 12, 0
PROMPTS = ([3, 9, 1, 4, 17, 6], [5, 8], [2])
SOURCES = ([7, 7, 1, 20, 3], [4], list(range(1, 15)))
LABELS = ("plain", "none-prefix", "t5-cross")
CONFIGS = [variant(label, mode) for label in LABELS for mode in ("encoder-decoder", "decoder-only")]
SOME = [CONFIGS[0], CONFIGS[-1], *(pytest.param(config, marks=pytest.mark.long) for config in CONFIGS[1:-1])]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.position}-{config.mode}")
first_and_last = pytest.mark.parametrize("config", SOME, ids=lambda config: f"{config.position}-{config.mode}")
every_mode = pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: config.mode)


def padded(rows, length, left=False):
    """Rows of ids as Tokens of one length, padded on one side. A model may well say 0, so padding is told by place."""
    gaps = [np.zeros(length - len(row), int) for row in rows]
    ids, used = (
        np.array([np.append(gap, row) if left else np.append(row, gap) for row, gap in zip(values, gaps)], np.int32)
        for values in (rows, [np.ones(len(row)) for row in rows])
    )
    return Tokens(ids, used, np.maximum(np.cumsum(used, -1) - 1, 0).astype(np.int32))


def source_of(config, left=False):
    return padded(SOURCES, SOURCE, left) if has_source(config) else None


def run(config, prompt, source="own", **options):
    """`generate` with a variant's parameters, as NumPy arrays."""
    source = source_of(config) if source == "own" else source
    options = dict(max_new_tokens=NEW) | options
    return jax.tree.map(
        np.asarray, generate(Transformer(config), variables(config)["params"], prompt, source=source, **options)
    )


def next_log_probs(config, rows):
    """Log-probabilities of the token after each row, [3, V], by the whole model without a cache."""
    target = padded(rows, TARGET)
    if config.prefix_attention == "bidirectional":
        target = target.replace(prefix=np.arange(TARGET) < np.array([[len(prompt)] for prompt in PROMPTS]))
    logits = compiled(config)(variables(config), target, source_of(config), rngs=None)
    last = np.asarray(logits, np.float64)[np.arange(len(rows)), [len(row) - 1 for row in rows]]
    return last - np.log(np.exp(last).sum(-1, keepdims=True))


@functools.cache
def slow_greedy(config):
    """The likeliest token again and again, none of them an end: (new ids [3, NEW], their log-probabilities)."""
    rows, scores = [list(prompt) for prompt in PROMPTS], []
    for _ in range(NEW):
        log_probs = next_log_probs(config, rows)
        best = log_probs.argmax(-1)
        rows = [[*row, int(token)] for row, token in zip(rows, best)]
        scores.append(log_probs[np.arange(len(rows)), best])
    return np.array([row[-NEW:] for row in rows]), np.array(scores).T


def ended(ids, scores, eos, pad):
    """What is left of endless rows when `eos` ends them: (ids, summed scores, lengths)."""
    lengths = np.array([row.index(eos) + 1 if eos in row else len(row) for row in ids.tolist()])
    counts = np.arange(ids.shape[1]) < lengths[:, None]
    return np.where(counts, ids, pad), (scores * counts).sum(-1), lengths


# --- greedy


@every_config
def test_greedy_is_the_model_asked_for_each_token(config):
    """Token by token the argmax of the whole uncached model; the score is the sum of log-probabilities, to 1e-4."""
    ids, scores = slow_greedy(config)
    result = run(config, padded(PROMPTS, 6))
    np.testing.assert_array_equal(result.ids, ids)
    np.testing.assert_allclose(result.scores, scores.sum(-1), rtol=0, atol=1e-4)
    assert result.lengths.tolist() == [NEW] * 3
    assert [leaf.dtype for leaf in (result.ids, result.scores, result.lengths)] == [np.int32, np.float32, np.int32]


@first_and_last
def test_an_end_token_ends_its_row(config):
    """Padding after it; score and length count up to it, the others go on."""
    ids, scores = slow_greedy(config)
    for eos in {int(ids[0, 3]), int(ids[1, 5]), int(ids[2, 0])}:
        result = run(config, padded(PROMPTS, 6), eos_id=eos, pad_id=PAD + 30)
        wanted_ids, wanted_scores, lengths = ended(ids, scores, eos, PAD + 30)
        np.testing.assert_array_equal(result.ids, wanted_ids)
        np.testing.assert_array_equal(result.lengths, lengths)
        np.testing.assert_allclose(result.scores, wanted_scores, rtol=0, atol=1e-4)


@first_and_last
def test_padding_does_not_matter(config):
    """On the left, on the right, more of it, in prompt or source: the same tokens, scores to 1e-5."""
    wanted = run(config, padded(PROMPTS, 6))
    for prompt, left in ((padded(PROMPTS, 6, left=True), True), (padded(PROMPTS, 9), False)):
        result = run(config, prompt, source_of(config, left))
        np.testing.assert_array_equal(result.ids, wanted.ids)
        np.testing.assert_allclose(result.scores, wanted.scores, rtol=0, atol=1e-5)


@every_config
def test_neighbours_do_not_matter(config):
    """Alone at its own length, and in another order, a prompt gets the same tokens, scores to 1e-5."""
    wanted, order = run(config, padded(PROMPTS, 6)), [2, 0, 1]
    source = jax.tree.map(lambda array: array[np.array(order)], source_of(config))
    result = run(config, padded([PROMPTS[row] for row in order], 6), source)
    np.testing.assert_array_equal(result.ids, wanted.ids[order])
    np.testing.assert_allclose(result.scores, wanted.scores[order], rtol=0, atol=1e-5)
    alone = run(config, np.array([PROMPTS[1]]), np.array([SOURCES[1]]) if has_source(config) else None)
    np.testing.assert_array_equal(alone.ids[0], wanted.ids[1])
    np.testing.assert_allclose(alone.scores[0], wanted.scores[1], rtol=0, atol=1e-5)


@every_mode
def test_fewer_tokens_are_the_first_ones(config):
    np.testing.assert_array_equal(run(config, padded(PROMPTS, 6), max_new_tokens=1).ids, slow_greedy(config)[0][:, :1])


@every_mode
def test_the_last_place_can_be_used(config):
    """A prompt and its new tokens fill `max_length` to the end, and the first ones are as before."""
    result = run(config, padded(PROMPTS, 6), max_new_tokens=config.max_length - 6)
    np.testing.assert_array_equal(result.ids[:, :NEW], slow_greedy(config)[0])
    assert result.lengths.tolist() == [config.max_length - 6] * 3


# --- sampling


@pytest.mark.parametrize(
    "config", [pytest.param(CONFIGS[0], marks=pytest.mark.long), CONFIGS[1]], ids=lambda config: config.mode
)
def test_drawing_from_the_best_alone_is_greedy(config):
    """top_k=1, the smallest top_p, a temperature near 0: whatever the key."""
    wanted = run(config, padded(PROMPTS, 6))
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)):
        result = run(config, padded(PROMPTS, 6), key=jax.random.key(3), **options)
        np.testing.assert_array_equal(result.ids, wanted.ids)
        np.testing.assert_allclose(result.scores, wanted.scores, rtol=0, atol=1e-4)


@every_mode
def test_drawn_tokens_have_the_models_own_scores(config):
    """The key is the result; the score is the log-probability without temperature, by the uncached model to 1e-4."""
    result = run(config, padded(PROMPTS, 6), key=jax.random.key(5), temperature=1.5, top_k=8)
    again = run(config, padded(PROMPTS, 6), key=jax.random.key(5), temperature=1.5, top_k=8)
    other = run(config, padded(PROMPTS, 6), key=jax.random.key(6), temperature=1.5, top_k=8)
    assert jax.tree.all(jax.tree.map(np.array_equal, result, again))
    assert (result.ids != other.ids).any(-1).all()
    scores = np.zeros(3)
    for place in range(NEW):
        rows = [[*prompt, *ids[:place]] for prompt, ids in zip(PROMPTS, result.ids.tolist())]
        log_probs = next_log_probs(config, rows)
        scores += log_probs[np.arange(3), result.ids[:, place]]
        ranks = (log_probs > log_probs[np.arange(3), result.ids[:, place]][:, None]).sum(-1)
        assert (ranks < 8).all()
    np.testing.assert_allclose(result.scores, scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("temperature", "top_k", "point"), [(1.0, 0, 48.3), (2.0, 0, 48.3), (0.7, 6, 20.5)])
def test_tokens_are_drawn_in_proportion(temperature, top_k, point):
    """4,000 rows, chi-square below its 99.9 % point for 22 or 5 degrees of freedom."""
    config, count = CONFIGS[1], 4000
    weights = np.exp(next_log_probs(config, PROMPTS)[0] / temperature)
    weights *= weights >= np.sort(weights)[-(top_k or V)]
    wanted = count * weights / weights.sum()
    options = dict(max_new_tokens=1, key=jax.random.key(11), temperature=temperature, top_k=top_k)
    seen = np.bincount(run(config, np.tile(PROMPTS[0], (count, 1)), **options).ids[:, 0], minlength=V)
    drawn = wanted > 0
    assert not seen[~drawn].any()
    assert (np.square(seen - wanted)[drawn] / wanted[drawn]).sum() < point


def test_rows_and_steps_draw_on_their_own():
    """The same prompt in several rows goes different ways, and no row repeats its first draw."""
    config = CONFIGS[1]
    ids = run(config, np.tile(PROMPTS[0], (8, 1)), key=jax.random.key(0), temperature=50.0).ids
    assert len({tuple(row) for row in ids.tolist()}) == 8
    assert all(len(set(row)) > 3 for row in ids.tolist())


logits_of = hnp.arrays(np.float32, (2, 9), elements=st.floats(-20, 20, width=32))


@law
@given(logits_of, st.integers(0, 12), st.floats(0.05, 1))
def test_filtered_logits_are_the_best(logits, top_k, top_p):
    """What stays is unchanged and better than all that goes; k of them, and the fewest that reach p."""
    kept = np.asarray(filter_logits(jnp.asarray(logits), top_k, None if top_p == 1 else top_p))
    for row, before in zip(kept, logits):
        stays = np.isfinite(row)
        np.testing.assert_array_equal(row[stays], before[stays])
        assert stays[before.argmax()]
        assert not (~stays).any() or before[~stays].max() < before[stays].min()
        if top_p == 1:
            least = np.sort(before)[-min(top_k or 9, 9)]
            np.testing.assert_array_equal(stays, before >= least)


@law
@given(logits_of, st.floats(0.05, 0.999))
def test_top_p_keeps_the_fewest_that_reach_it(logits, top_p):
    """To 1e-5 of probability, and equal logits together."""
    kept = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), 0, top_p)))
    for stays, row in zip(kept, logits.astype(np.float64)):
        weights = np.exp(row - row.max())
        weights /= weights.sum()
        assert weights[stays].sum() >= top_p - 1e-5
        assert weights[stays & (row > row[stays].min())].sum() < top_p + 1e-5


# --- any number of prompts


def all_of(config, indices, **options):
    """{index: (ids, score)} of `generate_all` for some of 7 prompts."""
    prompts = [(np.array(SOURCES[i % 3]) if has_source(config) else None, np.array(PROMPTS[i % 3])) for i in indices]
    found = list(generate_all(Transformer(config), variables(config)["params"], prompts, **options))
    assert sorted(number for number, _, _ in found) == list(range(len(indices)))
    return {indices[number]: (ids.tolist(), score) for number, ids, score in found}


@every_mode
@pytest.mark.long
def test_batches_of_any_size_give_the_same(config):
    """Each prompt once, without padding; scores to 1e-5."""
    ids, scores = slow_greedy(config)
    eos = int(ids[0, 4])
    wanted, wanted_scores, lengths = ended(ids, scores, eos, PAD)
    for size in (3, 5):
        for index, (found, score) in all_of(config, range(7), max_new_tokens=NEW, batch_size=size, eos_id=eos).items():
            assert found == wanted[index % 3, : lengths[index % 3]].tolist()
            assert score == pytest.approx(wanted_scores[index % 3], abs=1e-4)


def test_a_long_neighbour_does_not_shorten_the_output():
    """Where max_length leaves room for 2 new tokens after the one and for 12 after the other."""
    config = CONFIGS[1]
    prompts = [(None, np.array(PROMPTS[1])), (None, np.arange(config.max_length - 2) % (V - 1) + 1)]
    found = generate_all(Transformer(config), variables(config)["params"], prompts, max_new_tokens=NEW, batch_size=2)
    lengths = {index: len(ids) for index, ids, _ in found}
    assert lengths == {0: NEW, 1: 2}


# --- complaints


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("max_new_tokens=0", dict(max_new_tokens=0)),
        ("max_new_tokens=-1", dict(max_new_tokens=-1)),
        ("max_new_tokens=27.*6 tokens.*max_length=32", dict(max_new_tokens=27)),
        ("temperature=0", dict(temperature=0.0)),
        ("temperature=-1", dict(temperature=-1.0)),
        ("temperature=nan", dict(temperature=float("nan"))),
        ("temperature=inf", dict(temperature=float("inf"))),
        ("top_k=-1", dict(top_k=-1)),
        ("top_p=0", dict(top_p=0.0)),
        ("top_p=1.5", dict(top_p=1.5)),
        ("top_p=nan", dict(top_p=float("nan"))),
        ("beam_size=0", dict(beam_size=0)),
    ],
)
def test_options_out_of_their_range_are_named(named, options):
    for config in CONFIGS[:2]:
        with pytest.raises(ValueError, match=named):
            run(config, padded(PROMPTS, 6), **options)


@pytest.mark.parametrize("ids", [[3, 4], [[[3]]]])
def test_a_prompt_has_rows(ids):
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        run(CONFIGS[1], np.array(ids))


def test_a_source_is_for_an_encoder():
    both, one = CONFIGS[:2]
    for config, source in ((both, None), (one, padded(SOURCES, SOURCE))):
        with pytest.raises(ValueError, match=f"{config.mode}.*source"):
            run(config, padded(PROMPTS, 6), source)
