"""Laws of linear layers with 8-bit operands: near the plain ones, and no token sees another's scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import example, forward, variables, variant

from transformer_jax import Batch, Tokens, Transformer, generate, make_loss, make_optimizer
from transformer_jax.config import LossConfig, OptimizerConfig
from transformer_jax.model.float8 import matmul8, scaled
from transformer_jax.step import TrainState, train_step

EINSUMS = {
    "BTD,DHK->BTHK": ((2, 5, 24), (24, 3, 4)),
    "BTHK,HKD->BTD": ((2, 5, 3, 4), (3, 4, 24)),
    "BTD,VD->BTV": ((2, 5, 24), (7, 24)),
    "BECD,EDF->BECF": ((2, 3, 5, 8), (3, 8, 6)),
}


def draw(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


def values(multiply, einsum):
    x_shape, w_shape = EINSUMS[einsum]
    x, w = draw(x_shape, 0), draw(w_shape, 1)
    y, back = jax.vjp(functools.partial(multiply, einsum), x, w)
    return (y, *back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)))


@pytest.mark.parametrize(
    "einsum",
    ["BTD,DHK->BTHK", "BECD,EDF->BECF", *(pytest.param(each, marks=pytest.mark.long) for each in list(EINSUMS)[1:3])],
)
def test_products_are_near_the_plain_ones(einsum):
    """Values have 3 bits behind the point: errors of a sum are a few percent of its size."""
    got = values(lambda spec, x, w: matmul8(spec, x, w, None), einsum)
    wanted = values(jnp.einsum, einsum)
    for each, plain, most in zip(got, wanted, (0.06, 0.06, 1e-6), strict=True):
        assert each.shape == plain.shape
        error = np.linalg.norm(each - plain) / np.linalg.norm(plain)
        assert error < most
    assert np.linalg.norm(got[0] - wanted[0]) > 0


def test_scales_reach_the_ends_of_the_range_and_no_further():
    x = jnp.asarray([[0.0, 0.0], [1e-30, -2e-30], [3e30, 1.0]])
    x8, scale = scaled(x, (1,))
    np.testing.assert_allclose(np.abs(x8.astype(jnp.float32) * scale).max(1), [0, 2e-30, 3e30], rtol=1e-6)
    assert float(scale[0, 0]) == 1
    bad, _ = scaled(jnp.asarray([[jnp.nan, 1.0], [jnp.inf, 1.0]]), (1,))
    assert np.isnan(np.asarray(bad.astype(jnp.float32))).any(1).all()


@pytest.mark.parametrize("mode", ["decoder-only", "encoder-decoder"])
def test_no_token_changes_another_by_its_size(mode):
    """Logits before a token, and those of the other rows, keep their bits when it becomes another."""
    config = variant("plain", mode).replace(linear_dtype="float8")
    target, source = example(config)
    before, ids = forward(config, target, source), np.array(target.ids)
    ids[0, 9] = (ids[0, 9] + 1) % config.vocab_size
    after = forward(config, target.replace(ids=ids), source)
    np.testing.assert_array_equal(after[0, :9], before[0, :9])
    np.testing.assert_array_equal(after[1:], before[1:])
    assert np.any(after[0, 9:] != before[0, 9:])
    plain = forward(config.replace(linear_dtype="same"), target, source)
    assert 0 < np.abs(before - plain).max() < 0.5


@pytest.mark.parametrize(
    "mode",
    [pytest.param("decoder-only", marks=pytest.mark.long), pytest.param("encoder-decoder", marks=pytest.mark.slow)],
)
def test_it_learns_as_the_plain_one_does(mode):
    losses = {}
    for kind in ("same", "float8"):
        config = variant("plain", mode).replace(linear_dtype=kind, dropout_rate=0.0, attention_dropout_rate=0.0)
        target, source = example(config)
        batch = Batch(target, np.asarray(target.ids), np.ones(target.ids.shape, np.float32), source)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule="constant"), 30)
        step = functools.partial(train_step, loss=make_loss(Transformer(config), LossConfig()), optimizer=optimizer)
        params = jax.tree.map(jnp.asarray, variables(config)["params"])
        state, step = TrainState.create(params, optimizer, 0), jax.jit(step)
        for _ in range(30):
            state, metrics = step(state, batch)
        losses[kind] = float(metrics["loss"])
    assert losses["float8"] == pytest.approx(losses["same"], rel=0.1, abs=0.02)
    assert losses["float8"] < 1.5


@pytest.mark.long
def test_decoding_says_what_the_whole_text_says():
    """The cached step and the whole forward pass scale alike, so both are the same to rounding."""
    config = variant("plain", "decoder-only").replace(linear_dtype="float8")
    model, params = Transformer(config), variables(config)["params"]
    prompt = Tokens.from_ids(np.array([[3, 5, 7, 11]]))
    found = generate(model, params, prompt, max_new_tokens=8)
    ids = np.concatenate([np.asarray(prompt.ids), np.asarray(found.ids)[:, :8]], 1)
    logits = np.asarray(model.apply({"params": params}, Tokens.from_ids(ids)))
    np.testing.assert_array_equal(logits[0, 3:11].argmax(-1), ids[0, 4:12])
