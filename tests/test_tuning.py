"""Laws of fine-tuning: what moves and what does not, what adapters add, and what a run starts from."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_cli import call, every_mode, finished, quick, records, train  # noqa: F401 - the fixture is for this file too
from variants import VARIANTS, example, name, variables

from transformer_jax import ModelConfig, load_run
from transformer_jax.axes import letters_of
from transformer_jax.config import OptimizerConfig, RunConfig, SpecialConfig, TuningConfig
from transformer_jax.errors import InputError
from transformer_jax.model.transformer import Transformer
from transformer_jax.run import first_state, join_of, step_of
from transformer_jax.step import TrainState
from transformer_jax.tokens import Batch
from transformer_jax.tuning import A, B, deltas, join, resized, sides, split

ALL = TuningConfig(lora=("w_=3",))
SMALL = dict(vocab_size=23, d_model=16, num_layers=2, num_encoder_layers=2, num_heads=4, d_ff=24, max_length=32)


def flat(tree):
    return {path: np.asarray(x) for path, x in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize(
    ("letters", "parts"),
    [
        ("DHK", ("", "D", "HK")),
        ("NHKD", ("N", "HK", "D")),
        ("DV", ("", "D", "V")),
        ("NEFD", ("NE", "F", "D")),
        ("NDE", ("N", "D", "E")),
    ],
)
def test_a_weight_has_two_sides(letters, parts):
    assert sides(letters) == parts


FEW = [each for number, each in enumerate(VARIANTS) if number % 8 == 0]


@pytest.mark.parametrize(
    "config", [c if c in FEW else pytest.param(c, marks=pytest.mark.long) for c in VARIANTS], ids=name
)
def test_adapters_add_the_product_of_two_thin_matrices(config):
    """Nothing at first; then, to 1e-6, what a loop over the matrices adds, of every kind of weight."""
    params = variables(config)["params"]
    adapters, stays = split(params, ALL, jax.random.key(1))
    before = flat(params)
    assert set(flat(stays)) == set(before)
    for path, x in flat(join(adapters, stays, ALL)).items():
        np.testing.assert_array_equal(x, before[path])
    draw = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), adapters)
    parts, after = flat(adapters), flat(join(adapters, stays, ALL))
    weights = [path for path in before if path.rpartition("/")[2].startswith("w_")]
    assert set(deltas(adapters, stays_of(stays), ALL)) == set(weights)
    for path in before:
        module = path.rpartition("/")[0]
        if path not in weights:
            np.testing.assert_array_equal(after[path], before[path])
            continue
        parts_of_it = sides(letters_of(path.split("/"), before[path].ndim))
        many, inputs = len(parts_of_it[0]), len(parts_of_it[1])
        a, b = parts[f"{module}/{A}"], parts[f"{module}/{B}"]
        assert (a.shape[-1], b.shape[many]) == (3, 3)
        w, rows = before[path].astype(np.float64), np.prod(before[path].shape[many : many + inputs])
        w = w.reshape(*w.shape[:many], rows, -1)
        wanted = w + (16 / 3) * a.reshape(*w.shape[:-1], 3).astype(np.float64) @ b.reshape(*w.shape[:many], 3, -1)
        np.testing.assert_allclose(after[path].reshape(w.shape), wanted, rtol=1e-5, atol=1e-5)


def stays_of(stays):
    return dict(flatten_dict(stays, sep="/"))


def run_of(tuning, **model):
    optimizer = OptimizerConfig(warmup_steps=0)
    return RunConfig(model=ModelConfig(**SMALL | model), tuning=tuning, optimizer=optimizer, steps=9)


def stepped(run, steps=3):
    """The states before the first step and after some."""
    target, source = example(run.model)
    batch = Batch(target, np.asarray(target.ids), (np.asarray(target.segments) > 0).astype(np.float32), source)
    state, step = first_state(run, jax.random.key(0)), jax.jit(step_of(run))
    last = functools.reduce(lambda state, _: step(state, batch)[0], range(steps), state)
    return state, last


@pytest.mark.parametrize("mode", ["decoder-only", pytest.param("encoder-decoder", marks=pytest.mark.long)])
@pytest.mark.long
def test_training_moves_adapters_alone(mode):
    """And the optimizer has no moments of anything else. The same model with the adapters merged says the same."""
    run = run_of(TuningConfig(lora=("attention/(query|value)=4", "feed_forward=2"), lora_alpha=8.0), mode=mode)
    before, after = stepped(run)
    for x, y in zip(jax.tree.leaves(before.frozen), jax.tree.leaves(after.frozen), strict=True):
        np.testing.assert_array_equal(x, y)
    assert {path.rpartition("/")[2] for path in flat(after.params)} == {A, B}
    assert all(np.any(x != flat(before.params)[path]) for path, x in flat(after.params).items())
    moments = jax.tree.leaves(after.opt_state)
    assert sum(x.size for x in moments if x.ndim) == 2 * sum(x.size for x in jax.tree.leaves(after.params))
    ranks = {path: x.shape[-1] for path, x in flat(after.params).items() if path.endswith(A)}
    assert {rank for path, rank in ranks.items() if "feed_forward" in path} == {2}
    assert {rank for path, rank in ranks.items() if "attention" in path} == {4}
    merged = join_of(run)(after.params, after.frozen)
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, before.frozen)
    target, source = example(run.model)
    logits = Transformer(run.model).apply({"params": merged}, target, source)
    assert not np.allclose(logits, Transformer(run.model).apply({"params": before.frozen}, target, source), atol=1e-3)


def test_what_is_frozen_stays():
    run = run_of(TuningConfig(freeze=("^embedding", "encoder/")))
    before, after = stepped(run)
    for state in (before, after):
        assert all(path.startswith(("embedding", "encoder/")) for path in flat(state.frozen))
        assert all(path.startswith("decoder/") for path in flat(state.params))
    for x, y in zip(jax.tree.leaves(before.frozen), jax.tree.leaves(after.frozen), strict=True):
        np.testing.assert_array_equal(x, y)
    assert all(np.any(x != flat(before.params)[path]) for path, x in flat(after.params).items())


def test_nothing_frozen_is_the_plain_state():
    state = first_state(run_of(TuningConfig()), jax.random.key(0))
    assert isinstance(state, TrainState)
    assert state.frozen is None


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        (dict(lora=("atention=4",)), "tuning.lora='atention=4' fits no weight. There are decoder/"),
        (dict(freeze=("embeding",)), "tuning.freeze='embeding' fits no parameter"),
        (dict(freeze=(".",)), "leaves nothing to train"),
    ],
)
def test_patterns_that_fit_nothing_are_told(tuning, says):
    with pytest.raises(InputError, match=says):
        first_state(run_of(TuningConfig(**tuning), mode="decoder-only"), jax.random.key(0))


def test_new_rows_are_the_mean():
    rows = np.arange(6.0).reshape(3, 2).astype(np.float32)
    np.testing.assert_array_equal(resized(rows, 5, 0), [*rows, [2, 3], [2, 3]])
    np.testing.assert_array_equal(resized(rows, 2, 0), rows[:2])
    np.testing.assert_array_equal(resized(rows.T, 4, 1)[:, 3], [2, 3])


# --- on the command line

LORA = ["--tuning.lora", "attention=2", "feed_forward=3"]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["encoder-decoder", pytest.param("decoder-only", marks=pytest.mark.slow)])
def test_a_run_starts_from_another_one(mode):
    """With its model and tokenizer whatever the recipe says; adapters that learned nothing say what it said."""
    base = finished(mode)
    before = load_run(base)
    run = f"from-{mode}"
    words = ["train", "pairs", "--steps 4", "--batch-size 4", "--eval-every 4", "--data.train pairs.tsv"]
    status, _, err = call(*words, "--init-from", base, "--workdir", run, LORA)
    assert status == 0, err
    after = load_run(run)
    assert dataclasses.replace(after.config.model) == before.config.model
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert {path.rpartition("/")[2] for path in flat(after.adapters)} == {A, B}
    assert any(np.any(x != flat(before.params)[path]) for path, x in flat(after.params).items())
    # it stops and goes on as any run does
    parts = [*words, "--init-from", base, "--workdir", f"parts-{mode}", LORA, "--checkpoint.every 2"]
    assert call(*parts, "--stop-at 2")[0] == 0
    assert call(*parts)[0] == 0
    assert records(Path(f"parts-{mode}"))[-1]["param_digest"] == records(Path(run))[-1]["param_digest"]
    assert call("evaluate", run, "--data pairs.tsv --limit 3")[0] == 0
    size = before.config.model.vocab_size + 5
    larger = ["--init-from", base, "--workdir", f"larger-{mode}", "--model.vocab-size", size]
    status, _, err = call(*words, *larger)
    assert status == 0, err
    assert load_run(f"larger-{mode}").config.model.vocab_size == size


@pytest.mark.long
@pytest.mark.parametrize("mode", [pytest.param("encoder-decoder", marks=pytest.mark.slow), "decoder-only"])
def test_what_goes_out_comes_in_and_says_the_same(mode, tmp_path):
    """export, import, generate; the other mode made of it trains; adapters go out alone."""
    fits = ["--model.activation relu --model.scale-embeddings False"]
    if mode == "encoder-decoder":
        fits += ["--model.position t5 --model.query-scale 1 --model.scale-logits True"]
    else:
        fits += ["--model.gated True --model.activation silu"]
    fits += ["--model.norm rmsnorm --model.norm-eps 1e-6 --model.use-bias False"]
    first, out, back = f"fits-{mode}", tmp_path / "out", tmp_path / "back"
    status, _, err = train(first, mode, *fits)
    assert status == 0, err
    status, said, err = call("export", first, out)
    assert status == 0, err
    assert ("t5" if mode == "encoder-decoder" else "llama") in said
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert call("import", out, back)[0] == 0
    for path, x in flat(load_run(back).params).items():
        np.testing.assert_array_equal(x, flat(load_run(first).params)[path])
    prompt = ["--max-new-tokens 6 --prompt", ["01.02.2001"]]
    assert call("generate", first, *prompt) == call("generate", back, *prompt)
    other = {"encoder-decoder": "decoder-only", "decoder-only": "encoder-decoder"}[mode]
    status, said, err = call("import", out, tmp_path / "other", "--as", other)
    assert status == 0, err
    assert "cross_attention" in said
    assert load_run(tmp_path / "other").config.model.mode == other
    status, _, err = call("import", out, tmp_path / "again", "--as", mode)
    assert (status, "that is the mode" in err) == (2, True)
    status, _, err = call("export", first, tmp_path / "none", "--adapter")
    assert (status, "has no adapters" in err) == (2, True)
    words = ["train", "pairs", "--steps 2", "--batch-size 4", "--eval-every 2", "--data.train pairs.tsv"]
    status, _, err = call(*words, "--init-from", out, "--workdir", tmp_path / "tuned", LORA)
    assert status == 0, err
    assert call("export", tmp_path / "tuned", tmp_path / "adapter", "--adapter")[0] == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], set(settings["rank_pattern"].values())) == (2, {3})
    assert settings["base_model_name_or_path"] == str(out)


def test_training_drops_what_only_published_prompts_have():
    """A token that outputs are made to begin with is in no target here, so a tuned model is not made to say it."""
    special = SpecialConfig(pad=0, bos=2, first=7, prompts="tokenizer")
    assert special.for_training == SpecialConfig(pad=0, bos=2)
