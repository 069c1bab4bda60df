"""Laws of numbers that go wrong: such a step changes nothing, and the module where it began is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from variants import example, jit, variables, variant

from transformer_jax import Batch, Transformer, make_loss, make_optimizer
from transformer_jax.config import LossConfig, OptimizerConfig, ParallelConfig
from transformer_jax.diagnose import make_diagnosis
from transformer_jax.partition import Partitioner
from transformer_jax.step import SPIKE, SPIKE_LEAST, SPIKE_WINDOW, TrainState, is_spike, train_step

MODES = ("encoder-decoder", "decoder-only")
every_mode = pytest.mark.parametrize("mode", MODES)


def batch_of(config):
    target, source = example(config)
    return Batch(target, np.asarray(target.ids), np.ones(target.ids.shape, np.float32), source)


def poisoned(params, path, value=np.nan):
    """The parameters with one number of one array replaced."""
    flat = flatten_dict(params, sep="/")
    array = np.array(flat[path])
    array.reshape(-1)[-1] = value
    return unflatten_dict(flat | {path: array}, sep="/")


@functools.cache
def diagnosis(config):
    model = Transformer(config)
    return make_diagnosis(
        model, make_loss(model, LossConfig()), Partitioner.create(ParallelConfig()), jax.random.key(0)
    )


def where(config, params):
    return diagnosis(config)(params, batch_of(config))


@pytest.mark.parametrize(
    ("label", "mode", "path", "says"),
    [
        ("plain", "decoder-only", "decoder/block_0/self_attention/out/w_HKD", "decoder/block_0/self_attention"),
        pytest.param(
            *("plain", "encoder-decoder", "encoder/block_0/self_attention/value/w_DGK"),
            "encoder/block_0/self_attention",
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("plain", "encoder-decoder", "decoder/block_1/cross_attention/key/w_DGK"),
            "decoder/block_1/cross_attention",
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("experts-scan", "decoder-only", "decoder/layers/block_1/feed_forward/up/w_EDF"),
            "block_1/feed_forward",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_first_module_is_named(label, mode, path, says):
    """Of layers that are scanned over, with the number of the layer."""
    config = variant(label, mode)
    params = variables(config)["params"]
    assert where(config, params) == ""
    found = where(config, poisoned(params, path))
    assert says in found
    assert ("of layer 1" in found) == (label == "experts-scan")


def test_a_gradient_that_overflows_is_named():
    """Where all values are finite: logits are, but not the sum over places of what a huge output layer passes back."""
    config = variant("plain").replace(tie_embeddings=False)
    flat = flatten_dict(variables(config)["params"], sep="/")
    flat["output/w_DV"] = flat["output/w_DV"] * np.float32(2e38)
    flat["decoder/final_norm/scale_D"] = np.full_like(flat["decoder/final_norm/scale_D"], 3e-38)
    flat["decoder/final_norm/bias_D"] = np.zeros_like(flat["decoder/final_norm/bias_D"])
    assert where(config, unflatten_dict(flat, sep="/")).startswith("the gradient of decoder/final_norm/")


# --- the step that is left out


def setup(mode, **options):
    config = variant("plain", mode)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0), 10)
    loss = make_loss(Transformer(config), LossConfig())
    step = jit(functools.partial(train_step, loss=loss, optimizer=optimizer, **options))
    params = jax.tree.map(jnp.asarray, variables(config)["params"])
    return batch_of(config), step, TrainState.create(params, optimizer, 0, ema=True, norms="spike_factor" in options)


def same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@every_mode
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.long)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(mode, value):
    """Not parameters, optimizer state or average; the next good step is taken, and is what it would have been."""
    batch, step, state = setup(mode, ema_decay=0.9)
    weights = batch.weights.copy()
    weights[0, 3] = value
    after, metrics = step(state, batch.replace(weights=weights))
    assert (int(metrics["skipped"]), int(after.skipped), int(after.step)) == (1, 1, 1)
    same((after.params, after.opt_state, after.ema), (state.params, state.opt_state, state.ema))
    again, metrics = step(after, batch)
    wanted, _ = step(state.replace(step=after.step), batch)
    assert (int(metrics["skipped"]), int(again.skipped)) == (0, 1)
    same((again.params, again.opt_state, again.ema), (wanted.params, wanted.opt_state, wanted.ema))


def test_a_spike_is_left_out():
    """Above the factor times the median of the latest norms, once there are enough; the norm itself is remembered."""
    batch, step, state = setup("decoder-only", spike_factor=2.0)
    norm = float(step(state, batch)[1]["grad_norm"])
    quiet = jnp.full(SPIKE_WINDOW, jnp.nan).at[:SPIKE_LEAST].set(norm / 3)
    after, metrics = step(state.replace(norms=quiet), batch)
    assert (int(metrics["skipped"]), int(after.skipped)) == (SPIKE, 1)
    assert float(after.norms[0]) == pytest.approx(norm)
    few = jnp.full(SPIKE_WINDOW, jnp.nan).at[: SPIKE_LEAST - 1].set(norm / 3)
    assert int(step(state.replace(norms=few), batch)[1]["skipped"]) == 0
    usual = jnp.full(SPIKE_WINDOW, norm).at[:9].set(norm / 99)
    assert int(step(state.replace(norms=usual), batch)[1]["skipped"]) == 0
    assert not is_spike(jnp.asarray(jnp.nan), quiet, 2.0)
