"""Laws of the loss: it is its formula, padding has no part in it, and sums of parts add up to the whole."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import TINY, compiled, example, jit, variables, variant

from transformer_jax import Batch, Tokens, Transformer
from transformer_jax.config import LossConfig
from transformer_jax.objective import cross_entropy, make_loss, token_sums

V = 11
CONFIGS = {
    "plain": LossConfig(),
    "smoothed": LossConfig(label_smoothing=0.1),
    "z": LossConfig(z_loss=1e-2),
    "both": LossConfig(label_smoothing=0.3, z_loss=1e-4),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def draw(rows=4, length=7, seed=0):
    """Logits, and a batch with unequal numbers of tokens that count, one row with none."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (rows, length, V)).astype(np.float32)
    labels = random.integers(0, V, (rows, length)).astype(np.int32)
    weights = (np.arange(length) < np.arange(rows)[:, None] * 2).astype(np.float32)
    return logits, Batch(Tokens(labels, (weights > 0).astype(np.int32), labels * 0), labels, weights)


def slow_cross_entropy(logits, label, config):
    """One token's loss in float64, from the smoothed distribution itself."""
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum())
    wanted = np.full(V, config.label_smoothing / V)
    wanted[label] += 1 - config.label_smoothing
    return -(wanted * (logits - log_z)).sum() + config.z_loss * log_z**2


def slow_losses(logits, labels, config):
    places = np.ndindex(*labels.shape)
    return np.reshape([slow_cross_entropy(logits[place], labels[place], config) for place in places], labels.shape)


@functools.cache
def sums_of(config):
    return jit(lambda logits, batch: token_sums(logits, batch.labels, batch.weights, config))


@every_config
def test_cross_entropy_is_its_formula(config):
    """To 1e-6 of the value, and at most 1e-6 off near zero."""
    logits, batch = draw()
    got = jit(functools.partial(cross_entropy, config=config))(logits, batch.labels)
    np.testing.assert_allclose(got, slow_losses(logits, batch.labels, config), rtol=1e-6, atol=1e-6)


@every_config
def test_large_logits_do_not_overflow(config):
    """Logits of 1e4 that tell the label from the others, or nothing: the formula's limits, to float32's step at 1e4."""
    logits = jnp.zeros((1, 2, V)).at[0, 0, 3].set(1e4).at[0, 1].set(-1e4)
    got = jit(functools.partial(cross_entropy, config=config))(logits, np.array([[3, 5]]))
    others = config.label_smoothing * 1e4 * (V - 1) / V
    wanted = [others + config.z_loss * 1e8, np.log(V) + config.z_loss * (np.log(V) - 1e4) ** 2]
    np.testing.assert_allclose(got[0], wanted, rtol=1e-6, atol=np.spacing(np.float32(1e4)))


def test_smoothing_is_least_at_the_smoothed_distribution():
    """The gradient vanishes (to 1e-6) where the model says what the smoothed labels say."""
    config, labels = LossConfig(label_smoothing=0.2), np.array([[4]])
    wanted = np.full(V, 0.2 / V)
    wanted[4] += 0.8
    gradient = jit(jax.grad(lambda logits: cross_entropy(logits, labels, config).sum()))
    np.testing.assert_allclose(gradient(jnp.log(wanted.astype(np.float32))[None, None]), 0, rtol=0, atol=1e-6)


@every_config
def test_sums_are_over_the_tokens_that_count(config):
    logits, batch = draw()
    sums, counts = sums_of(config)(logits, batch), batch.weights > 0
    np.testing.assert_allclose(sums["loss"], slow_losses(logits, batch.labels, config)[counts].sum(), rtol=1e-6)
    assert sums["tokens"] == counts.sum()
    assert sums["correct"] == (logits.argmax(-1) == batch.labels)[counts].sum()


@every_config
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_padding_does_not_count_whatever_it_holds(config, value):
    """Other logits, NaN ones too, and other labels where the weight is 0: the same sums to the last bit."""
    logits, batch = draw()
    wanted, padding = sums_of(config)(logits, batch), batch.weights == 0
    logits[padding] = value
    labels = np.where(padding, 0, batch.labels).astype(np.int32)
    for name, got in sums_of(config)(logits, batch.replace(labels=labels)).items():
        np.testing.assert_array_equal(got, wanted[name], name)


@every_config
def test_padding_gets_no_gradient(config):
    logits, batch = draw()
    gradient = jit(jax.grad(lambda logits: token_sums(logits, batch.labels, batch.weights, config)["loss"]))(logits)
    assert not np.any(gradient[batch.weights == 0])
    assert np.any(gradient[batch.weights > 0], -1).all()


@every_config
def test_sums_of_halves_add_up(config):
    """Rows in two halves: the loss to 1e-6, tokens and hits exactly."""
    logits, batch = draw(rows=6)
    first, second = (jax.tree.map(operator.itemgetter(part), (logits, batch)) for part in (slice(3), slice(3, 6)))
    whole = sums_of(config)(logits, batch)
    total = jax.tree.map(operator.add, sums_of(config)(*first), sums_of(config)(*second))
    np.testing.assert_allclose(total["loss"], whole["loss"], rtol=1e-6)
    assert (total["tokens"], total["correct"]) == (whole["tokens"], whole["correct"])


def test_an_empty_batch_sums_to_zero():
    logits, batch = draw()
    sums = sums_of(LossConfig())(logits, batch.replace(weights=batch.weights * 0))
    assert all(value == 0 for value in sums.values())


@pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])
def test_the_loss_of_a_model_is_that_of_its_logits(mode):
    """Without a key nothing is dropped; with one the loss is another."""
    config = variant("plain", mode)
    target, source = example(config)
    labels = np.random.default_rng(0).integers(0, TINY["vocab_size"], target.ids.shape).astype(np.int32)
    batch = Batch(target, labels, (labels % 3 > 0).astype(np.float32), source)
    loss = jit(make_loss(Transformer(config), CONFIGS["both"]))
    params = variables(config)["params"]
    value, sums = loss(params, batch, None)
    logits = compiled(config)({"params": params}, target, source, rngs=None)
    wanted = token_sums(logits, batch.labels, batch.weights, CONFIGS["both"])
    assert value == sums["loss"]
    for name in wanted:
        np.testing.assert_allclose(sums[name], wanted[name], rtol=1e-6, err_msg=name)
    assert loss(params, batch, jax.random.key(0))[0] != value
