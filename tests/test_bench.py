"""Laws of benchmarks: the ways that are compared do the same work, and pages keep what is not theirs."""

import json
import re

import jax
import numpy as np
import pytest

from transformer_jax.bench import generate, measure
from transformer_jax.bench.command import placed
from transformer_jax.cli import run_command
from transformer_jax.config import ModelConfig

SMALL = dict(vocab_size=50, d_model=16, num_layers=2, num_heads=2, max_length=32, position="learned")
CASES = {
    "decoder": generate.Case(ModelConfig(mode="decoder-only", **SMALL), 2, 6, 8),
    "both": generate.Case(ModelConfig(**SMALL), 3, 6, 8),
    "beams": generate.Case(ModelConfig(**SMALL), 3, 6, 8, beam_size=3, uncached=False),
}


@pytest.mark.parametrize("name", ["decoder", "both"])
def test_all_ways_say_the_same(name, monkeypatch):
    """With a cache and without one, and with the source's keys computed again at each step."""
    monkeypatch.setattr(generate.peers, "gpt2", lambda *_: None)
    monkeypatch.setattr(generate.peers, "bart", lambda *_: None)
    found = {way: np.asarray(function()) for way, function in generate.ways(CASES[name]).items()}
    assert list(found) == ["no cache", "cache", "cache, source keys kept"][: 2 + (name == "both")]
    for ids in found.values():
        assert ids.shape == (CASES[name].batch, 8)
        np.testing.assert_array_equal(ids, found["no cache"])


def test_the_source_keys_are_computed_in_the_loop():
    """And not once before it, which is what the compiler would make of them."""
    case = CASES["both"]
    model, params = generate.Transformer(case.config), generate.random_params(case.config)
    tokens = generate.Tokens.from_ids(np.ones((3, 6), np.int32))
    text = generate.without_source_keys.lower(model, params, tokens, tokens, 8).compile().as_text()
    assert re.search(r'op_name="[^"]*while/body[^"]*remember[^"]*dot_general', text)


def test_a_result_is_a_table_a_page_and_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generate, "CASES", CASES)
    monkeypatch.setattr(generate, "read_bandwidth", lambda: 1e10)
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text("# Before\n\n<!-- generate: start -->\nold\n<!-- generate: end -->\n\nafter\n")
    words = ["bench", "generate", "--repeats", "2", "--json", str(out), "--markdown", str(page)]
    assert run_command(words) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result["repeats"] == 2
    assert result["commit"] is None or len(result["commit"]) == 40
    assert result["versions"]["jax"] == jax.__version__
    for name, case in result["cases"].items():
        assert name in printed
        rates = [row["tokens_per_second"] for row in case["ways"].values()]
        assert all(rate > 0 for rate in rates)
        assert all(len(row["seconds"]) == 2 for row in case["ways"].values())
        ours = [row for way, row in case["ways"].items() if way != "transformers"][-1]
        assert ours["ours_is_faster_by"] == 1
        assert case["share_of_bound"] == pytest.approx(
            ours["tokens_per_second"] / case["bound_tokens_per_second"], rel=1e-6
        )
    text = page.read_text()
    assert text.startswith("# Before\n\n<!-- generate: start -->\n| case |")
    assert text.endswith("<!-- generate: end -->\n\nafter\n")
    assert "old" not in text


def test_a_page_without_the_table_gets_it_at_the_end(tmp_path):
    page = tmp_path / "page.md"
    assert placed(page, "x", "new") == "new\n"
    page.write_text("# Page\n")
    assert placed(page, "x", "new") == "# Page\n\nnew\n"


def test_ways_take_turns():
    """Each is warmed up once; then all of them come in each round; a ratio is that of the turns."""
    calls = []
    functions = {name: (lambda name=name: calls.append(name) or np.zeros(1)) for name in "ab"}
    times = measure.interleaved(functions, 3)
    assert "".join(calls) == "ab" + "ab" * 3
    assert all(len(each.each) == 3 for each in times.values())
    fast, slow = measure.Times(0, (1.0, 2.0, 1.0)), measure.Times(0, (3.0, 2.0, 4.0))
    assert measure.ratio(fast, slow) == 3
    assert (fast.median, slow.spread) == (1.0, 2 / 3)
