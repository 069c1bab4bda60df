"""Laws of how tokens are chosen: what may be said, what is drawn, and what is kept of a long text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from test_decoding import NEW, PROMPTS, V, ended, logits_of, next_log_probs, padded, run, slow_greedy, source_of
from variants import compiled, document, has_source, name, variables, variant

from transformer_jax import Transformer
from transformer_jax.decoding import filter_logits, generate_all, stream_one
from transformer_jax.model.cache import Room

law = settings(derandomize=True, deadline=None, max_examples=50)
CONFIGS = [variant("plain", "encoder-decoder"), variant("rope-gqa")]
every_mode = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.mode)


# --- what may be said


@every_mode
def test_only_what_is_allowed_is_said(config):
    """The likeliest of it at each step, by the uncached model; scores are the model's, whatever was allowed."""
    allowed = np.isin(np.arange(V), [1, 4, 6, 20])
    result = run(config, padded(PROMPTS, 6), allowed=allowed, max_new_tokens=5)
    scores = np.zeros(3)
    for place in range(5):
        log_probs = next_log_probs(config, [[*p, *ids[:place]] for p, ids in zip(PROMPTS, result.ids.tolist())])
        np.testing.assert_array_equal(result.ids[:, place], np.where(allowed, log_probs, -np.inf).argmax(-1))
        scores += log_probs.max(-1, where=np.arange(V) == result.ids[:, place, None], initial=-np.inf)
    np.testing.assert_allclose(result.scores, scores, rtol=0, atol=1e-4)
    rows = np.arange(V) == np.array([[3], [9], [17]])  # another mask for each row
    assert run(config, padded(PROMPTS, 6), allowed=rows, max_new_tokens=2).ids.tolist() == [[3, 3], [9, 9], [17, 17]]


@every_mode
def test_forced_tokens_come_first(config):
    """Where they are not free; what follows is greedy after them."""
    forced = np.array([[7, 8], [9, -1], [-1, -1]])
    result = run(config, padded(PROMPTS, 6), forced=forced, max_new_tokens=6)
    assert result.ids[0, :2].tolist() == [7, 8]
    assert result.ids[1, 0] == 9
    np.testing.assert_array_equal(result.ids[2], slow_greedy(config)[0][2, :6])
    for place in range(2, 6):
        log_probs = next_log_probs(config, [[*p, *ids[:place]] for p, ids in zip(PROMPTS, result.ids.tolist())])
        np.testing.assert_array_equal(result.ids[:, place], log_probs.argmax(-1))


@every_mode
def test_several_tokens_may_end_a_row(config):
    ids = slow_greedy(config)[0]
    stops = [int(ids[0, 4]), int(ids[1, 2])]
    result = run(config, padded(PROMPTS, 6), eos_id=stops)
    for row in range(3):
        first = next((n for n, token in enumerate(ids[row].tolist()) if token in stops), NEW - 1)
        assert result.lengths[row] == first + 1
        np.testing.assert_array_equal(result.ids[row, : first + 1], ids[row, : first + 1])


@every_mode
def test_a_repetition_is_less_likely(config):
    """Logits of what prompt and output have are divided or multiplied; by a lot, and nothing is said twice."""
    result = run(config, padded(PROMPTS, 6), repetition_penalty=1e6, max_new_tokens=8)
    for prompt, ids in zip(PROMPTS, result.ids.tolist()):
        assert len({*prompt, *ids}) == len(set(prompt)) + 8 or len(set(ids)) == 8
    mild = run(config, padded(PROMPTS, 6), repetition_penalty=1.3, max_new_tokens=1).ids[:, 0]
    target = padded(PROMPTS, 18)
    logits = np.asarray(compiled(config)(variables(config), target, source_of(config), rngs=None))
    logits = logits[np.arange(3), [len(p) - 1 for p in PROMPTS]]
    for row, prompt in enumerate(PROMPTS):
        seen = np.isin(np.arange(V), prompt)
        wanted = np.where(seen, np.where(logits[row] > 0, logits[row] / 1.3, logits[row] * 1.3), logits[row])
        assert mild[row] == wanted.argmax()


# --- what is drawn


@law
@given(logits_of)
def test_min_p_is_a_share_of_the_likeliest(logits):
    kept = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), min_p=0.25)))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    sure = np.abs(weights - 0.25) > 1e-4
    np.testing.assert_array_equal(kept[sure], (weights >= 0.25)[sure])
    assert kept[np.arange(2), logits.argmax(-1)].all()


@every_mode
def test_several_outputs_are_drawn_for_a_prompt(config):
    """The best first, all different from each other, with the model's scores; the same key gives the same."""
    options = dict(num_return=4, key=jax.random.key(2), temperature=2.0, max_new_tokens=6)
    result = run(config, padded(PROMPTS, 6), **options)
    assert result.ids.shape == (3, 4, 6)
    assert result.scores.shape == result.lengths.shape == (3, 4)
    assert (np.diff(result.scores, axis=1) <= 0).all()
    assert all(len({tuple(ids) for ids in row}) == 4 for row in result.ids.tolist())
    again = run(config, padded(PROMPTS, 6), **options)
    np.testing.assert_array_equal(again.ids, result.ids)
    scores = np.zeros(3)
    for place in range(6):
        rows = [[*prompt, *ids[0][:place]] for prompt, ids in zip(PROMPTS, result.ids.tolist())]
        scores += next_log_probs(config, rows)[np.arange(3), result.ids[:, 0, place]]
    np.testing.assert_allclose(result.scores[:, 0], scores, rtol=0, atol=1e-4)


@every_mode
@pytest.mark.long
def test_what_is_drawn_does_not_depend_on_the_batch(config):
    """Batches of 2 and of 5, in parts, and alone: a prompt's place is what tells its drawing apart."""
    prompts = [(np.arange(4) + i if has_source(config) else None, np.array(PROMPTS[i % 3])) for i in range(5)]
    options = dict(max_new_tokens=6, key=jax.random.key(4), temperature=1.5)

    def drawn(chosen, **more):
        found = generate_all(Transformer(config), variables(config)["params"], chosen, **options, **more)
        return {output.place: output.ids.tolist() for output in found}

    wanted = drawn(prompts, batch_size=5)
    assert drawn(prompts, batch_size=2) == wanted
    assert drawn(prompts[3:], batch_size=2, first=3) == {0: wanted[3], 1: wanted[4]}
    assert drawn(prompts[4:], batch_size=1, first=4) == {0: wanted[4]}


@every_mode
def test_tokens_can_be_had_as_they_come(config):
    """One at a time, the same as all at once, and none after the end."""
    ids, scores = slow_greedy(config)
    eos = int(ids[0, 3])
    wanted, _, lengths = ended(ids, scores, eos, 0)
    prompt = (np.array([7, 7, 1, 20, 3]) if has_source(config) else None, np.array(PROMPTS[0]))
    found = list(stream_one(*model_of(config), prompt, max_new_tokens=NEW, eos_id=eos))
    assert found == wanted[0, : lengths[0]].tolist()


def model_of(config):
    return Transformer(config), variables(config)["params"]


# --- what is kept


@pytest.mark.parametrize("config", [*CONFIGS, pytest.param(variant("experts-scan"), marks=pytest.mark.long)], ids=name)
def test_eight_bits_are_close(config):
    """Logits within 2 % of their spread and not the same, so it is on; a byte a number, and a scale for each head."""
    tokens, source = document(config, 3, 12), document(config, 4, 10) if has_source(config) else None
    params = variables(config)
    memory = compiled(config, "encode")(params, source) if has_source(config) else None

    def run_through(int8):
        fill = jax.jit(functools.partial(Transformer(config).apply, room=Room(12, int8=int8), method="decode"))
        logits, cache = fill(params, jax.tree.map(lambda x: x[:, :4], tokens), memory)
        found = []
        for place in range(4, 12):
            part = jax.tree.map(lambda x, n=place: x[:, n : n + 1], tokens)
            logits, cache = compiled(config, "decode")(params, part, memory, cache)
            found.append(np.asarray(logits))
        return np.concatenate(found, 1), cache

    (exact, cache), (close, small) = run_through(False), run_through(True)
    assert 0 < np.abs(close - exact).max() < 0.02 * (exact.max() - exact.min())
    width = config.head_dim
    assert sum(x.nbytes for x in jax.tree.leaves(small.layers)) == sum(
        x.nbytes * (width + 4) // (4 * width) for x in jax.tree.leaves(cache.layers)
    )


# --- complaints


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("num_return=0", dict(num_return=0)),
        ("num_return=2.*key", dict(num_return=2)),
        ("num_return=3.*beam_size=2", dict(num_return=3, beam_size=2)),
        ("beam_size=2.*key", dict(beam_size=2, key=jax.random.key(0))),
        ("repetition_penalty=2", dict(beam_size=2, repetition_penalty=2.0)),
        ("repetition_penalty=0", dict(repetition_penalty=0.0)),
        ("length_penalty=nan", dict(beam_size=2, length_penalty=float("nan"))),
        ("min_p=2", dict(min_p=2.0)),
        ("eos_id 23", dict(eos_id=23)),
        ("eos_id -1", dict(eos_id=[1, -1])),
        ("forced token id 23", dict(forced=np.full((3, 1), 23))),
        (r"forced.*\[3, tokens\]", dict(forced=np.zeros((2, 1), int))),
        (r"allowed.*\[23\]", dict(allowed=np.ones(22, bool))),
        ("no token", dict(allowed=np.zeros(23, bool))),
    ],
)
def test_options_that_cannot_be_are_named(named, options):
    with pytest.raises(ValueError, match=named):
        run(CONFIGS[1], padded(PROMPTS, 6), **options)
