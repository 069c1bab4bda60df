"""Laws of `verify`: small models are of the recipe's kind, errors are what the table says, and a wrong way is found."""

import dataclasses
import json
from typing import get_args

import jax
import numpy as np
import pytest
from variants import CHOICES, variables, variant

from transformer_jax import Transformer, verify
from transformer_jax.cli import run_command
from transformer_jax.config import LossConfig, Mode
from transformer_jax.recipes import RECIPES, find_recipe
from transformer_jax.run import abstract_params

MODES = get_args(Mode)
every_mode = pytest.mark.parametrize("mode", MODES)


def subject(mode, label="rope-gqa"):
    return verify.Subject(verify.small(variant(label)).replace(mode=mode, d_ff=16), LossConfig(), 8)


# --- the small model

SHRUNK = "vocab_size d_model num_layers num_encoder_layers num_heads num_kv_heads head_dim d_ff max_length windows"
OFF = "query_scale dropout_rate attention_dropout_rate scan_layers remat num_experts num_shared_experts expert_capacity"


@every_mode
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_small_model_is_of_the_same_kind(recipe, mode):
    """All of a recipe's choices but sizes and what the checks turn on; grouped heads stay so; it can be built."""
    config = find_recipe(recipe).model
    small = verify.small(config).replace(mode=mode)
    for field in dataclasses.fields(config):
        was, now = getattr(config, field.name), getattr(small, field.name)
        if field.name not in f"{SHRUNK} {OFF} mode experts_per_token".split():
            assert now == verify.SMOOTH.get(was, was) if field.name == "activation" else now == was, field.name
    assert [n > 1 for n in (small.num_kv_heads, small.num_heads // small.num_kv_heads)] == [
        n > 1 for n in (config.num_kv_heads, config.num_heads // config.num_kv_heads)
    ]
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(small))) < 2_000_000


@every_mode
@pytest.mark.parametrize("label", CHOICES)
def test_every_variant_has_a_small_model(label, mode):
    for name in verify.MODELS:
        verify.Subject(verify.small(variant(label, mode)), LossConfig(), 8).model(name)


# --- what they are trained on


@every_mode
@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_uneven(mode, packed):
    """Of unequal rows, the last ones empty; the same tokens count, packed or not."""
    config = subject(mode).config
    alone, batches = (verify.batches(config, 16, packed) for packed in (False, packed))
    for batch, other in zip(batches, alone, strict=True):
        used_B = (batch.target.segments > 0).sum(-1)
        assert used_B[-3:].max() == 0
        assert len(set(used_B)) > (2 if packed else 5)
        assert batch.weights.sum() == other.weights.sum()
        assert np.array_equal(np.sort(batch.labels[batch.weights > 0]), np.sort(other.labels[other.weights > 0]))
        assert (batch.target.segments.max() > 1) == packed
    assert len({batch.weights.sum() for batch in batches}) == verify.STEPS


@every_mode
@pytest.mark.parametrize("label", ["rope-gqa", "rope-llama3"])
def test_stacked_parameters_are_those_of_a_scan(label, mode):
    config = subject(mode, label).config
    wanted = abstract_params(config.replace(scan_layers=True))
    params = variables(config)["params"]
    got = verify.stacked(params, config)
    assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, wanted)
    layer = got["decoder"]["layers"]["block_0"]["feed_forward"]["up"]["w_DF"][1]
    assert np.array_equal(layer, params["decoder"][f"block_{len(config.windows)}"]["feed_forward"]["up"]["w_DF"])


# --- errors


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("2 microbatches", "decoder-only", marks=pytest.mark.long),
        ("packed rows", "decoder-only"),
        pytest.param("scan over layers", "encoder-decoder", marks=pytest.mark.long),
        pytest.param("logits of cached decoding", "encoder-decoder", marks=pytest.mark.long),
    ],
)
def test_right_ways_are_within_the_tolerance(name, mode):
    (check,) = (check for check in verify.CHECKS if check.name == name)
    errors = check.errors(subject(mode))
    assert set(errors) == ({"logits"} if "logits" in name else {"loss", "parameters"})
    assert all(0 <= error < verify.TOLERANCES["float32"] for error in errors.values())


def wrong_parts(batch, count):
    """Microbatches of which the first comes twice, and the last never."""
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: x.at[-1].set(x[0]), parts)


@pytest.mark.long
def test_a_wrong_way_is_found(monkeypatch):
    """Microbatches that leave out rows, and a gradient that is a ten-thousandth too large."""
    right = verify.trained(accumulate=2)(subject("decoder-only"))
    monkeypatch.setattr("transformer_jax.step._microbatches", wrong_parts)
    wrong = verify.trained(accumulate=2)(subject("decoder-only"))
    assert min(wrong.values()) > 1e3 * max(right.values())
    monkeypatch.undo()

    def step(state, batch, **options):
        after, metrics = verify_step(state, batch, **options)
        more = jax.tree.map(lambda new, old: old + (new - old) * (1 + 1e-4), after.params, state.params)
        return after.replace(params=more), metrics

    verify_step = verify.train_step
    monkeypatch.setattr(verify, "train_step", step)
    wrong = verify.trained()(subject("decoder-only"))
    assert 5 * verify.TOLERANCES["float32"] < wrong["parameters"] < 2e-4  # later steps take some of it back


def test_a_wrong_mask_is_found(monkeypatch):
    """A cache whose slots are written one place too far."""
    right = verify.decoded(subject("decoder-only"))
    decode = Transformer.decode

    def shifted(self, target, memory=None, cache=None):
        logits_BTV, cache = decode(self, target, memory, cache)
        return logits_BTV, None if cache is None else cache.replace(index=cache.index - 1)

    monkeypatch.setattr(Transformer, "decode", shifted)
    wrong = verify.decoded(subject("decoder-only"))
    assert wrong["logits"] > 1e3 * right["logits"]


@pytest.mark.parametrize(
    ("errors", "result"),
    [({"loss": 1e-5}, "ok"), ({"loss": 0.0, "parameters": 1.1e-5}, "wrong"), ({"loss": float("nan")}, "wrong")],
)
def test_beyond_the_tolerance_is_wrong(errors, result):
    assert verify.Row("check", "decoder-only", "one device", errors, 1e-5).result == result


def test_nan_is_the_largest():
    assert np.isnan(verify.largest({"a": np.array([1.0, np.nan]), "b": np.array([3.0])}))
    assert verify.largest({"a": np.array([1.0, -4.0]), "b": np.array([3.0])}) == 4


# --- the command


@pytest.fixture
def few(monkeypatch):
    """Checks that take no time, of which one needs more devices than there are."""
    found = {"good": 1e-7, "better": 0.0}
    checks = [verify.Check(name, "one device", 1, lambda _, name=name: {"loss": found[name]}) for name in found]
    checks.append(verify.on_mesh("data=-1,tensor=64", 64))
    monkeypatch.setattr(verify, "CHECKS", checks)
    return found


def test_the_command_prints_and_writes(few, tmp_path, capsys):
    assert run_command(["verify", "dates", "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "data=-1,tensor=64" in out
    assert "needs 64 devices" in out
    assert "4 ok, 0 wrong, 2 skipped" in out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["mode"] for row in rows] == [mode for mode in MODES for _ in range(3)]
    assert rows[0]["errors"] == {"loss": 1e-7}
    assert [row["result"] for row in rows[:3]] == ["ok", "ok", "skipped"]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_the_command_fails_where_numbers_differ(few, error, capsys):
    few["better"] = error
    assert run_command(["verify", "t5-small"]) == 1
    assert "2 ok, 2 wrong, 2 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("datse", "Did you mean 'dates'"),
        ("--devices 0", "devices=0 must be at least 1"),
        ("--devices 65", "devices=65 must be at most 64"),
        ("--devices many", "many"),
        ("--devices 2", "JAX has started"),
        ("--json no/folder.json", "--json no/folder.json: cannot be written"),
        ("--model.num-heads 3", "d_model=128 must be a multiple of num_heads=3"),
    ],
)
def test_wrong_input_is_answered(few, line, says, capsys):
    jax.devices()
    try:
        status = run_command(["verify", *line.split()])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert says in " ".join(err.split())
