"""Each program of docs/examples runs and does what it says; and laws of what a program can add to the package."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.cli import run_command
from transformer_jax.errors import InputError
from transformer_jax.huggingface.folder import write_config
from transformer_jax.model import backends
from transformer_jax.pictures import attention_of

FOLDER = Path(__file__).parent.parent / "docs/examples"
PROGRAMS = ("attention_variant", "custom_objective", "custom_optimizer", "vmap_seeds")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What an example adds to the package is gone after it."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    monkeypatch.setitem(tj.ModelConfig.__annotations__, "attention", tj.ModelConfig.__annotations__["attention"])


def example(name):
    return importlib.import_module(name)


def test_all_examples_are_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*PROGRAMS, "reversal"}


@pytest.mark.long
def test_an_attention_in_under_40_lines(capsys):
    """In both modes it learns, and says with a cache what it says without."""
    assert len((FOLDER / "attention_variant.py").read_text().splitlines()) < 40
    example("attention_variant").main(steps=30)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == ["encoder-decoder", "decoder-only"]
    for learned, said in zip(lines[::2], lines[1::2], strict=True):
        before, after = (float(word) for word in learned.split("loss ")[1].split(" -> "))
        assert after < before - 1
        assert said.startswith("  100% of")


@pytest.mark.long
def test_passes_agree_where_the_objective_asks_for_it():
    found = example("custom_objective").main(steps=60)
    assert found[1.0] < 0.8 * found[0.0]


@pytest.mark.long
def test_the_objective_without_its_part_is_the_package_s():
    """Without dropout and with weight 0 the loss and its sums are those of `make_loss`."""
    objective, task = example("custom_objective"), example("reversal")
    model = tj.Transformer(task.TINY)
    params, batch = task.init(model), task.draw(jax.random.key(1), "encoder-decoder")
    own, ours = (jax.jit(loss)(params, batch, None)[1] for loss in (objective.r_drop(model, 0.0), tj.make_loss(model)))
    for name in ("loss", "tokens", "correct"):
        np.testing.assert_allclose(own[name], ours[name], rtol=1e-5)


@pytest.mark.long
def test_the_optimizer_learns_and_is_not_adamw():
    plain, cautious = example("custom_optimizer").main(steps=60).values()
    assert plain[0] == cautious[0]
    assert cautious[-10:].mean() < cautious[0] - 1
    assert abs(plain - cautious).max() > 0.01


@pytest.mark.long
def test_members_of_a_sweep_train_as_if_alone():
    """The program itself asserts it, to 1e-5."""
    with jax.enable_x64(True):
        final = example("vmap_seeds").main(steps=10)
    assert final.shape == (3, 3)
    assert len(np.unique(final)) == 9


# --- what can be added


def test_an_added_attention_is_a_word_of_the_config_and_the_command_line(capsys):
    with pytest.raises(ValueError, match="attention='sigmoid' must be one of"):
        tj.ModelConfig(attention="sigmoid")
    tj.add_attention("sigmoid", example("attention_variant").sigmoid)
    assert tj.ModelConfig(attention="sigmoid").replace(num_layers=2).attention == "sigmoid"
    assert run_command(["describe", "dates", "--model.attention", "sigmoid"]) == 0
    assert run_command(["describe", "dates", "--model.attention", "sigmoyd"]) == 2
    assert "Did you mean 'sigmoid'?" in capsys.readouterr().err


def test_a_name_of_the_package_is_not_replaced():
    with pytest.raises(ValueError, match="'xla' is one of the package's own"):
        tj.add_attention("xla", backends.attention_weights)


def even(q_BTHK, k_BSGK, sight, cap, share):
    return share * jnp.broadcast_to(sight.mask_BTS[:, None], (1, 8, 4, 4))


@pytest.mark.long
def test_a_name_that_is_added_again_has_the_new_weights():
    """Also in what was compiled before, and in pictures, which show what the attention takes."""
    config = tj.ModelConfig(mode="decoder-only", vocab_size=7, d_model=8, num_layers=1)
    tokens = tj.Tokens.from_ids([[1, 2, 3, 4]])
    params = jax.jit(tj.Transformer(config).init)(jax.random.key(0), tokens)["params"]
    found, forward = {}, jax.jit(lambda params: model.apply({"params": params}, tokens))
    for share in (0.0, 1.0):
        tj.add_attention("even", functools.partial(even, share=share))
        model = tj.Transformer(config.replace(attention="even"))
        found[share] = forward(params)
        assert attention_of(model, params, tokens, None)["self"].max() == share
    assert abs(found[0.0] - found[1.0]).max() > 1e-3


def test_a_model_with_an_added_attention_is_not_exported():
    """No family of `transformers` computes it."""
    tj.add_attention("sigmoid", example("attention_variant").sigmoid)
    llama = dict(mode="decoder-only", vocab_size=16, position="rope", norm="rmsnorm", use_bias=False, activation="silu")
    llama |= dict(gated=True, scale_embeddings=False, tie_embeddings=False)
    assert write_config("llama", tj.ModelConfig(**llama, attention="blocks"))
    with pytest.raises(InputError, match="attention='sigmoid'"):
        write_config("llama", tj.ModelConfig(**llama, attention="sigmoid"))
