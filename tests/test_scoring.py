"""Laws of scoring: it is the sum of what the whole model says of each token, and what generation says of its own."""

import numpy as np
import pytest
from test_decoding import NEW, PROMPTS, SOURCES, V, next_log_probs, padded, run, slow_greedy
from variants import has_source, variables, variant

from transformer_jax import Transformer
from transformer_jax.decoding import generate_all
from transformer_jax.scoring import rolling, score

CONFIGS = [variant("plain", "encoder-decoder"), variant("rope-gqa"), variant("none-prefix")]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.position}-{config.mode}")


def model_of(config):
    return Transformer(config), variables(config)["params"]


def prompts_of(config):
    return [
        (np.array(source) if has_source(config) else None, np.array(seen)) for source, seen in zip(SOURCES, PROMPTS)
    ]


@every_config
def test_a_score_is_the_sum_over_the_tokens(config):
    """To 1e-5, in batches of any size, the empty continuation included."""
    said = [np.array(ids) for ids in ([4, 9, 9, 1], [], [22])]
    questions = list(zip(prompts_of(config), said))
    wanted, greedy = np.zeros(3), np.ones(3, bool)
    for place in range(4):
        rows = [[*seen, *ids[:place]] for seen, ids in zip(PROMPTS, said)]
        log_probs = next_log_probs(config, rows)
        for row, ids in enumerate(said):
            if place < len(ids):
                wanted[row] += log_probs[row, ids[place]]
                greedy[row] &= log_probs[row].argmax() == ids[place]
    for size in (1, 3):
        found = score(*model_of(config), questions, batch_size=size)
        np.testing.assert_allclose([each.log_prob for each in found], wanted, rtol=0, atol=1e-5)
        assert [each.greedy for each in found] == greedy.tolist()


@every_config
def test_generated_tokens_have_the_scores_that_generation_says(config):
    """Greedy ones to 1e-4, told to be greedy; the best of four beams too, divided by its length."""
    prompts = prompts_of(config)
    ids, scores = slow_greedy(config)
    found = score(*model_of(config), list(zip(prompts, ids)))
    np.testing.assert_allclose([each.log_prob for each in found], scores.sum(-1), rtol=0, atol=1e-4)
    assert all(each.greedy for each in found)
    outputs = sorted(generate_all(*model_of(config), prompts, max_new_tokens=NEW, beam_size=4, eos_id=3))
    found = score(*model_of(config), [(prompts[output.place], output.ids) for output in outputs])
    for output, each in zip(outputs, found):
        assert output.score == pytest.approx(each.log_prob / len(output.ids), abs=1e-4)


def test_a_long_text_is_asked_for_token_by_token_once():
    """Each token with half of the length before it, or all that there is; in the middle the score is a window's."""
    config, text = CONFIGS[1], np.arange(100) % (V - 1) + 1
    most = config.max_length
    questions = list(rolling(np.array([2]), text, most))
    assert np.concatenate([said for _, said in questions]).tolist() == text.tolist()
    asked = 0
    for (read, seen), said in questions:
        assert read is None
        assert len(seen) + len(said) - 1 <= most
        assert len(seen) == 1 or len(seen) >= most // 2
        assert [*seen] == [2, *text][asked + 1 - len(seen) : asked + 1]
        asked += len(said)
    assert [len(said) for _, said in rolling(np.array([2]), text[:most], most)] == [most]
    assert len(score(*model_of(config), questions)) == len(questions)


def test_what_cannot_be_scored_is_named():
    config = CONFIGS[1]
    for named, question in (
        ("max_length=32", ((None, np.ones(20, int)), np.ones(20, int))),
        ("token id 23", ((None, np.array([1])), np.array([23]))),
        ("token id -1", ((None, np.array([-1])), np.array([2]))),
    ):
        with pytest.raises(ValueError, match=named):
            score(*model_of(config), [question])


def test_padded_prompts_of_any_side_agree_with_it():
    """What `generate` says of prompts that are padded on the left."""
    config = CONFIGS[1]
    result = run(config, padded(PROMPTS, 9, left=True))
    found = score(*model_of(config), list(zip(prompts_of(config), result.ids)))
    np.testing.assert_allclose([each.log_prob for each in found], result.scores, rtol=0, atol=1e-4)
