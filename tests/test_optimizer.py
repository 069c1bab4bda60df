"""Laws of schedules and optimizers: rates at named steps, who decays, and that every optimizer learns."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from variants import TINY, VARIANTS, example, jit, name, variables, variant

from transformer_jax import Batch, Transformer
from transformer_jax.config import LossConfig, OptimizerConfig, OptimizerName, ScheduleName
from transformer_jax.objective import make_loss
from transformer_jax.optimizer import OPTIMIZERS, SCHEDULES, decays, describe_decay, make_optimizer, make_schedule

NAMES = typing.get_args(OptimizerName)
PEAK = 2e-3
# rates are float32: 2e-7 is its precision
close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


def rates(steps=100, **options):
    """The learning rate of every step of a run and of the one after it."""
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **options), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def without_decay(optimizer, **options):
    return OptimizerConfig(
        name=optimizer, weight_decay=0.0, clip_norm=0.0, schedule="constant", warmup_steps=0, **options
    )


# --- schedules


def test_the_tables_are_the_configs_choices():
    assert set(OPTIMIZERS) == set(NAMES)
    assert set(SCHEDULES) == set(typing.get_args(ScheduleName))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_is_a_line_to_the_peak(schedule):
    """The first step's rate is peak / warm-up, the last one's the peak, and none after that is above it."""
    found = rates(schedule=schedule, warmup_steps=20)
    close(found[:20], PEAK * np.arange(1, 21) / 20)
    assert (np.diff(found[19:]) <= 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_is_a_tenth_unless_given(schedule):
    close(rates(schedule=schedule), rates(schedule=schedule, warmup_steps=10))
    close(rates(9, schedule=schedule), rates(9, schedule=schedule, warmup_steps=0))
    close(rates(schedule=schedule, warmup_steps=0)[0], PEAK)
    close(rates(schedule=schedule, warmup_steps=100)[99], PEAK)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_ends_of_falling_schedules(final):
    """At the end the final fraction; half-way, linear and cosine are half-way between."""
    for schedule in ("linear", "cosine", "wsd"):
        close(rates(schedule=schedule, final_fraction=final, warmup_steps=20)[100], PEAK * final, atol=1e-9)
    for schedule in ("linear", "cosine"):
        close(rates(schedule=schedule, final_fraction=final, warmup_steps=20)[60], PEAK * (1 + final) / 2)


def test_cosine_is_its_formula():
    """Loshchilov and Hutter 2017, equation 5."""
    share = np.arange(81) / 80
    close(
        rates(schedule="cosine", warmup_steps=20)[20:], PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2), atol=1e-9
    )


def test_wsd_is_a_plateau_and_a_fall():
    """The peak until the last fifth of the run, then a line."""
    found = rates(schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.1)
    close(found[10:81], PEAK)
    close(found[80:], PEAK * np.linspace(1, 0.1, 21))
    close(rates(schedule="wsd", warmup_steps=10, decay_fraction=0.0)[10:100], PEAK)
    close(rates(schedule="wsd", warmup_steps=50, decay_fraction=1.0)[50:], PEAK * np.linspace(1, 0.1, 51))


def test_constant_stays():
    close(rates(schedule="constant", warmup_steps=10)[9:], PEAK)


def test_inverse_sqrt_is_the_papers():
    """Vaswani et al. 2017, equation 3: d^-0.5 min(s^-0.5, s w^-1.5) at update s = 1, 2, ..., to 1e-6."""
    d, warmup, update = 512, 40, np.arange(1, 201)
    config = OptimizerConfig(learning_rate=(d * warmup) ** -0.5, schedule="inverse-sqrt", warmup_steps=warmup)
    schedule = make_schedule(config, 200)
    paper = d**-0.5 * np.minimum(update**-0.5, update * warmup**-1.5)
    close([float(schedule(step)) for step in range(200)], paper)


def test_inverse_sqrt_halves_when_the_update_is_the_fourth_multiple():
    """The rate of update s, which is step s - 1, with or without a warm-up."""
    found = rates(401, schedule="inverse-sqrt", warmup_steps=50)
    close([found[199] / PEAK, found[399] / found[99]], 0.5)
    close(rates(schedule="inverse-sqrt", warmup_steps=0)[3], PEAK / 2)


# --- decay


@pytest.mark.parametrize("config", VARIANTS, ids=name)
def test_only_linear_maps_decay(config):
    """Matrices of attention, feed-forward and an output layer of its own; no norm, bias, embedding or position."""
    for path, flag in flatten_dict(decays(variables(config)["params"])).items():
        inside = {"query", "key", "value", "out", "up", "gate", "down", "router", "output"}
        assert flag == (bool(inside & set(path[-2:-1])) and path[-1].startswith("w_")), path
        assert not (flag and {"embedding", "source_embedding"} & set(path)), path


def untied(mode="encoder-decoder"):
    """A model with all that a model can have: biases, a table of positions, an output layer, two embeddings."""
    config = variant("t5-cross", mode).replace(share_source_embedding=False)
    return config, variables(config)["params"]


def updated(config, params, gradients, steps=1):
    """Parameters after some steps with the same gradients."""
    optimizer = make_optimizer(config, 10)

    def run(params):
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return jit(run)(params)


@pytest.mark.parametrize("optimizer", NAMES)
def test_decay_is_decoupled_and_of_linear_maps_alone(optimizer):
    """Two steps without a gradient multiply `w_...` by (1 - rate decay)^2, to 1e-5, and leave the rest to the bit."""
    _, params = untied()
    config = OptimizerConfig(name=optimizer, learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_steps=0)
    after = updated(config, params, jax.tree.map(jnp.zeros_like, params), steps=2)
    for path, value in flatten_dict(after).items():
        before = flatten_dict(params)[path]
        if path[-1].startswith("w_"):
            np.testing.assert_allclose(value, before * 0.95**2, rtol=1e-5, err_msg=str(path))
        else:
            np.testing.assert_array_equal(value, before, err_msg=str(path))


def test_the_description_counts_all_parameters():
    _, params = untied()
    flags, leaves = jax.tree.leaves(decays(params)), jax.tree.leaves(params)
    decayed = sum(leaf.size for leaf, flag in zip(leaves, flags) if flag)
    text = describe_decay(params, OptimizerConfig(weight_decay=0.05))
    for part in ("0.05", f"{sum(flags)} arrays", f"({decayed:,}", f"({sum(leaf.size for leaf in leaves) - decayed:,})"):
        assert part in text


# --- updates


def random_like(params, seed=0):
    keys = iter(range(1000))
    return jax.tree.map(
        lambda x: np.random.default_rng([seed, next(keys)]).normal(0, 1, x.shape).astype(x.dtype), params
    )


@pytest.mark.parametrize("clip", [0.5, 3.0])
def test_gradients_are_clipped_by_their_global_norm(clip):
    """Larger ones are shortened to it (to 1e-5), smaller ones and those of a run without clipping are left alone."""
    params = {"w_DF": jnp.ones((4, 6)), "b_F": jnp.ones(6)}
    gradients = random_like(params)
    norm = float(optax.tree.norm(gradients))
    assert norm > 3
    base = dict(name="sgd", learning_rate=1.0, b1=0.0, weight_decay=0.0, schedule="constant", warmup_steps=0)

    def step_of(gradients, clip):
        after = updated(OptimizerConfig(clip_norm=clip, **base), params, gradients)
        return jax.tree.map(lambda a, b: np.asarray(b - a), after, params)

    for path, got in step_of(gradients, clip).items():
        np.testing.assert_allclose(got, gradients[path] * clip / norm, rtol=1e-5, atol=1e-6)
    small = jax.tree.map(lambda g: g * 0.9 * clip / norm, gradients)
    for given, limit in ((small, clip), (gradients, 0.0)):
        for path, got in step_of(given, limit).items():
            np.testing.assert_allclose(got, given[path], rtol=1e-5, atol=1e-6)


def test_adamw_is_its_formula():
    """Loshchilov and Hutter 2019, algorithm 2, three steps in float64, to 1e-5."""
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, clip_norm=0.0, schedule="constant", warmup_steps=0)
    params = {"w_DF": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}
    gradients = random_like(params)
    x, g = params["w_DF"].astype(float), gradients["w_DF"].astype(float)
    m = v = 0.0
    for t in (1, 2, 3):
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
        x = x - 0.01 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8) + 0.1 * x)
    np.testing.assert_allclose(updated(config, params, gradients, 3)["w_DF"], x, rtol=1e-5, atol=1e-6)


@functools.cache
def muon_steps(mode):
    """(parameters before, after a step of muon, after one of adamw) with the same gradients, without decay."""
    _, params = untied(mode)
    gradients = random_like(params)
    after = (updated(without_decay(each, learning_rate=0.1), params, gradients) for each in ("muon", "adamw"))
    return tuple(map(flatten_dict, (params, *after)))


every_mode = pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])


@every_mode
def test_muon_leaves_all_but_inner_matrices_to_adamw(mode):
    """Embeddings, positions, norms, biases and the output get AdamW's step, to 1e-6."""
    _, muon, adamw = muon_steps(mode)
    for path, value in muon.items():
        if path[0] == "output" or not path[-1].startswith("w_"):
            np.testing.assert_allclose(value, adamw[path], rtol=1e-6, atol=1e-6, err_msg=str(path))


@every_mode
def test_muon_steps_of_inner_matrices_are_nearly_orthogonal(mode):
    """As matrices of D against their other letters: singular values within a factor 2, a root mean square of 0.2
    within 30 %."""
    before, muon, _ = muon_steps(mode)
    for path in [path for path in muon if path[0] != "output" and path[-1].startswith("w_")]:
        step, width = np.asarray(before[path] - muon[path]) / 0.1, path[-1].index("D") - 2
        values = np.linalg.svd(np.moveaxis(step, width, 0).reshape(step.shape[width], -1), compute_uv=False)
        assert values.max() < 2 * values.min(), path
        assert np.sqrt(np.square(step).mean()) == pytest.approx(0.2, rel=0.3), path


RATES = {"adamw": 1e-2, "adafactor": 1e-2, "lion": 3e-3, "muon": 1e-2, "sgd": 1e-1}


@pytest.mark.parametrize("optimizer", NAMES)
def test_every_optimizer_learns(optimizer):
    """30 steps on one batch take the loss of a tiny model below 70 % of what it was; all numbers stay finite."""
    config = variant("rope-gqa").replace(dropout_rate=0.0)
    target, _ = example(config)
    labels = np.asarray((target.ids * 7) % TINY["vocab_size"], np.int32)
    batch = Batch(target, labels, np.ones(labels.shape, np.float32))
    loss = make_loss(Transformer(config), LossConfig())
    rule = make_optimizer(OptimizerConfig(name=optimizer, learning_rate=RATES[optimizer], warmup_steps=3), 30)

    def step(carry, _):
        params, state = carry
        gradients, sums = jax.grad(loss, has_aux=True)(params, batch, None)
        mean = sums["loss"] / sums["tokens"]
        updates, state = rule.update(jax.tree.map(lambda g: g / sums["tokens"], gradients), state, params)
        return (optax.apply_updates(params, updates), state), mean

    params = jit(Transformer(config).init)(jax.random.key(0), target)["params"]
    (params, _), losses = jit(lambda params: jax.lax.scan(step, (params, rule.init(params)), length=31))(params)
    assert losses[-1] < 0.7 * losses[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("optimizer", [name for name in NAMES if name != "adafactor"])
def test_momentum_in_bfloat16_takes_half_the_memory(optimizer):
    """Every first moment is bfloat16 and nothing else; an update is the float32 one to bfloat16's precision."""
    params = {"a": {"w_DF": jnp.linspace(-1, 1, 64, dtype=jnp.float32).reshape(8, 8)}}
    grads = {"a": {"w_DF": jax.random.normal(jax.random.key(0), (8, 8))}}
    found = {}
    for dtype in ("parameters", "bfloat16"):
        made = make_optimizer(without_decay(optimizer, momentum_dtype=dtype), 10)
        state = made.init(params)
        for _ in range(3):
            updates, state = made.update(grads, state, params)
        found[dtype] = updates["a"]["w_DF"], [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    (wanted, whole), (got, small) = found["parameters"], found["bfloat16"]
    assert sum(leaf.dtype == jnp.bfloat16 for leaf in small) == 1
    assert sum(leaf.nbytes for leaf in whole) - sum(leaf.nbytes for leaf in small) == 2 * 64
    np.testing.assert_allclose(got, wanted, rtol=0.03, atol=0.03 * float(jnp.abs(wanted).max()))


def test_adafactor_has_no_momentum_to_shrink():
    with pytest.raises(ValueError, match="adafactor keeps no momentum"):
        OptimizerConfig(name="adafactor", momentum_dtype="bfloat16")
