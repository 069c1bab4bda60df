"""Laws of speculative decoding: whatever the draft proposes, what comes out is the model's own."""

import itertools
import math

import jax
import numpy as np
import pytest
from test_decoding import NEW, PROMPTS, padded, run, source_of
from variants import TARGET, compiled, variables, variant

from transformer_jax import Transformer
from transformer_jax.decoding.generate import make_request
from transformer_jax.decoding.model import Plan
from transformer_jax.decoding.speculative import Draft, decode_with

# a model, its draft of another kind or size, and the number of proposals
PAIRS = [
    (variant("plain", "encoder-decoder"), variant("rope-gqa", "encoder-decoder"), 4),
    (variant("rope-gqa"), variant("plain"), 3),
    (variant("alibi-window"), variant("rope-llama3"), 5),  # both with rings of slots
    pytest.param(variant("none-prefix"), variant("alibi-cross"), 2, marks=pytest.mark.long),
]
every_pair = pytest.mark.parametrize(
    ("config", "small", "tokens"),
    [pytest.param(*PAIRS[0], marks=pytest.mark.long), *PAIRS[1:]],
    ids=lambda x: getattr(x, "position", None),
)


def draft_of(config):
    return Transformer(config), variables(config)["params"]


@every_pair
def test_greedily_the_tokens_are_the_same(config, small, tokens):
    """Of prompts of several lengths, which hold proposals of their own number; scores to 1e-4."""
    wanted = run(config, padded(PROMPTS, 6))
    result = run(config, padded(PROMPTS, 6), draft=draft_of(small), draft_tokens=tokens)
    np.testing.assert_array_equal(result.ids, wanted.ids)
    np.testing.assert_array_equal(result.lengths, wanted.lengths)
    np.testing.assert_allclose(result.scores, wanted.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "small", "tokens"),
    [pytest.param(*PAIRS[0], marks=pytest.mark.slow), pytest.param(*PAIRS[1], marks=pytest.mark.long)],
    ids=["encoder-decoder", "decoder-only"],
)
def test_an_end_token_ends_its_row(config, small, tokens):
    """Also in the middle of what was proposed; and `max_length` ends it."""
    ids = run(config, padded(PROMPTS, 6)).ids
    for eos in {int(ids[0, 2]), int(ids[1, 5])}:
        wanted = run(config, padded(PROMPTS, 6), eos_id=eos, pad_id=7)
        result = run(config, padded(PROMPTS, 6), eos_id=eos, pad_id=7, draft=draft_of(small), draft_tokens=tokens)
        np.testing.assert_array_equal(result.ids, wanted.ids)
        np.testing.assert_array_equal(result.lengths, wanted.lengths)
        np.testing.assert_allclose(result.scores, wanted.scores, rtol=0, atol=1e-4)
    full = dict(max_new_tokens=config.max_length - 6)
    wanted, result = (run(config, padded(PROMPTS, 6), **full, **more) for more in ({}, dict(draft=draft_of(small))))
    np.testing.assert_array_equal(result.ids, wanted.ids)


def test_a_draft_that_is_right_saves_steps():
    """The model as its own draft: every proposal holds, and each round gives one token more than that."""
    config = variant("rope-gqa")
    request = make_request(Transformer(config), padded(PROMPTS, 6), None)
    result, rounds = decode_with(*draft_of(config), request, Plan(NEW), Draft(*draft_of(config), 4))
    np.testing.assert_array_equal(result.ids, run(config, padded(PROMPTS, 6)).ids)
    assert rounds.tolist() == [math.ceil((NEW - 1) / 5)] * 3


@pytest.mark.parametrize(
    "small", [pytest.param("plain", id="another"), pytest.param("rope-gqa", id="itself", marks=pytest.mark.long)]
)
def test_drawn_tokens_have_the_models_distribution(small):
    """Three tokens of 4,000 rows among the likeliest 3: chi-square below its 99.9 % point for 26 degrees of freedom."""
    config, count, temperature = variant("rope-gqa"), 4000, 1.5
    prompt = PROMPTS[0]

    def chances(rows):
        target = padded((rows + rows[:1] * 3)[:3], TARGET)
        logits = np.asarray(compiled(config)(variables(config), target, source_of(config), rngs=None), np.float64)
        last = logits[np.arange(len(rows)), len(rows[0]) - 1] / temperature
        last = np.where(last < np.sort(last, -1)[:, -3:-2], -np.inf, last)
        weights = np.exp(last - last.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    wanted = {(): 1.0}
    for _ in range(3):
        longer = {}
        for ids, chance in wanted.items():
            (each,) = chances([[*prompt, *ids]])
            longer |= {(*ids, int(token)): chance * each[token] for token in np.flatnonzero(each)}
        wanted = longer
    options = dict(max_new_tokens=3, key=jax.random.key(7), temperature=temperature, top_k=3, draft_tokens=2)
    result = run(config, np.tile(prompt, (count, 1)), draft=draft_of(variant(small)), **options)
    seen = dict.fromkeys(wanted, 0) | {
        ids: len(list(group)) for ids, group in itertools.groupby(sorted(map(tuple, result.ids.tolist())))
    }
    assert seen.keys() == wanted.keys()
    likely = [ids for ids in wanted if wanted[ids] * count >= 5]
    assert sum((seen[ids] - count * wanted[ids]) ** 2 / (count * wanted[ids]) for ids in likely) < 54.1


def test_a_draft_has_to_fit():
    config, draft = PAIRS[1][0], draft_of(PAIRS[1][1])
    for named, options in (
        ("draft_tokens=0", dict(draft_tokens=0)),
        ("beam_size", dict(beam_size=2)),
        ("repetition_penalty", dict(repetition_penalty=1.5)),
    ):
        with pytest.raises(ValueError, match=named):
            run(config, padded(PROMPTS, 6), draft=draft, **options)
    other = (Transformer(config.replace(vocab_size=29)), None)
    with pytest.raises(ValueError, match="vocab_size=29"):
        run(config, padded(PROMPTS, 6), draft=other)
    with pytest.raises(ValueError, match="encoder-decoder"):
        run(config, padded(PROMPTS, 6), draft=draft_of(PAIRS[0][0]))
