"""Laws of one update: sums are divided once, gradients are derivatives, packing and padding change nothing."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from variants import TINY, jit, variables, variant

from transformer_jax import Transformer
from transformer_jax.config import LossConfig, OptimizerConfig
from transformer_jax.data.batches import PackedRows
from transformer_jax.data.examples import FixedExamples
from transformer_jax.data.objectives import ARRANGEMENTS, Room
from transformer_jax.data.ragged import Ragged
from transformer_jax.data.tokenizer import make_tokenizer
from transformer_jax.objective import make_loss
from transformer_jax.optimizer import make_optimizer
from transformer_jax.step import TrainState, gradient_sums, train_step

TOKENIZER = make_tokenizer("char", 0, lambda: [""])  # for the ids of its special tokens, which are below 5
SGD = OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0)
MODES = tuple(ARRANGEMENTS)
EXAMPLES = 8  # of unequal lengths, so that rows hold unequal numbers of real tokens
every_mode = pytest.mark.parametrize("mode", MODES)
labelled = pytest.mark.parametrize("label", ["plain", "none-prefix"])
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)


def packed(config, count=EXAMPLES):
    """Rows of random pairs, several of them in one row."""
    random = np.random.default_rng(0)

    def texts(*lengths):
        return Ragged.of([random.integers(5, TINY["vocab_size"], length).astype(np.int32) for length in lengths])

    examples = FixedExamples(texts(*random.integers(0, 6, count)), texts(*random.integers(1, 9, count)))
    room = Room(16 if config.mode == "encoder-decoder" else 0, 18)
    bidirectional = config.prefix_attention == "bidirectional"
    return PackedRows(examples, ARRANGEMENTS[config.mode], TOKENIZER, room, bidirectional)


def filled(rows, count=EXAMPLES):
    """All of the rows and empty ones, `count` together."""
    return rows.batch(np.pad(np.arange(len(rows)), (0, count - len(rows)), constant_values=-1), 0)


def one_by_one(config, count=EXAMPLES):
    """The same pairs, each in a row of its own."""
    rows = packed(config, count)
    alone = [
        PackedRows(FixedExamples(*rows.examples.make(np.array([index]), 0)), *(getattr(rows, name) for name in FIELDS))
        for index in range(count)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *(row.batch(np.array([0]), 0) for row in alone))


FIELDS = ("arrangement", "tokenizer", "room", "bidirectional")


@functools.cache
def compiled(config, **options):
    """The jitted train step of a config with SGD."""
    loss = make_loss(Transformer(config), LossConfig(label_smoothing=0.1))
    return jit(functools.partial(train_step, loss=loss, optimizer=make_optimizer(SGD, 10), **options))


def start(config, seed=0, step=0, ema=False):
    params = jax.tree.map(jnp.asarray, variables(config)["params"])
    return TrainState.create(params, make_optimizer(SGD, 10), seed, ema).replace(step=jnp.asarray(step, jnp.int32))


def still(label, mode):
    """A variant of one layer without dropout."""
    return variant(label, mode).replace(num_layers=1, dropout_rate=0.0, attention_dropout_rate=0.0)


def assert_trees(check, left, right):
    left, right = (flatten_dict(tree) for tree in (left, right))
    assert left.keys() == right.keys()
    for path in left:
        check(left[path], right[path], err_msg=str(path))


# --- sums


@every_mode
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_microbatches_add_up_to_the_batch(mode, count):
    """Two steps with momentum, of rows with unequal numbers of tokens, one of them empty: parameters to 1e-6."""
    config = still("plain", mode)
    batch = one_by_one(config)
    batch = jax.tree.map(lambda array: np.concatenate([array[:-1], 0 * array[-1:]]), batch)
    assert len(set(batch.weights.sum(-1))) > 3
    whole, parts = start(config), start(config)
    for _ in range(2):
        whole, wanted = compiled(config)(whole, batch)
        parts, metrics = compiled(config, accumulate=count)(parts, batch)
        assert metrics["tokens"] == wanted["tokens"] == batch.weights.sum()
        for name in wanted:
            np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-6, err_msg=name)
    assert_trees(close, parts.params, whole.params)
    assert any(np.any(flatten_dict(start(config).params)[path] != x) for path, x in flatten_dict(parts.params).items())


def test_every_nth_row_is_a_microbatch():
    """So that each lies on all devices alike. Dropout has a key of its own in each. Gradients to 1e-5."""
    config = still("plain", "decoder-only").replace(dropout_rate=0.2)
    batch, params, key = one_by_one(config), variables(config)["params"], jax.random.key(3)
    loss = make_loss(Transformer(config), LossConfig())
    gradient = jit(jax.grad(loss, has_aux=True))
    parts = [jax.tree.map(operator.itemgetter(slice(number, None, 2)), batch) for number in range(2)]
    first, second = (gradient(params, part, jax.random.fold_in(key, number)) for number, part in enumerate(parts))
    wanted = jax.tree.map(operator.add, first, second)
    got = jit(functools.partial(gradient_sums, loss, accumulate=2))(params, batch, key)
    np.testing.assert_allclose(got[1]["loss"], wanted[1]["loss"], rtol=1e-6)
    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got[0], wanted[0])


@every_mode
def test_devices_are_added_before_the_division(mode):
    """`reduce` sees sums: twice the sums are the same step to the last bit, and twice the tokens."""
    config = still("plain", mode)
    batch = one_by_one(config)
    state, metrics = compiled(config)(start(config), batch)
    double = functools.partial(jax.tree.map, lambda x: 2 * x)
    reduced, seen = compiled(config, reduce=double)(start(config), batch)
    assert_trees(np.testing.assert_array_equal, reduced.params, state.params)
    assert seen["tokens"] == 2 * metrics["tokens"]
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_array_equal(seen[name], metrics[name])


@every_mode
def test_the_step_is_the_gradient_of_the_mean(mode):
    """The first step of SGD is the clipped gradient of the loss per token, and `grad_norm` its norm before that."""
    config = still("plain", mode)
    batch, state = one_by_one(config), start(config)
    after, metrics = compiled(config)(state, batch)
    loss = make_loss(Transformer(config), LossConfig(label_smoothing=0.1))
    gradient = jit(jax.grad(lambda params: loss(params, batch, None)[0] / batch.weights.sum()))(state.params)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    scale = 0.1 / max(norm, 1.0)
    assert_trees(close, after.params, jax.tree.map(lambda p, g: p - scale * g, state.params, gradient))


# --- derivatives


QUICK = [("rope-gqa", "encoder-decoder"), ("learned-post", "decoder-only"), ("t5-cross", "decoder-only")]
REST = [("rope-gqa", "decoder-only"), ("learned-post", "encoder-decoder"), ("t5-cross", "encoder-decoder")]


@pytest.mark.parametrize(("label", "mode"), [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in REST)])
def test_gradients_are_finite_differences(label, mode):
    """In float64, of every array along a random direction: central differences to 1e-5, with dropout's key kept."""
    with jax.enable_x64(True):
        config = still(label, mode).replace(dtype="float64", param_dtype="float64", dropout_rate=0.1)
        batch, params = filled(packed(config)), variables(config)["params"]
        loss = make_loss(Transformer(config), LossConfig(label_smoothing=0.1, z_loss=1e-3))
        of_params = lambda params: loss(params, batch, jax.random.key(7))[0]  # noqa: E731
        value, gradient = jit(of_params), flatten_dict(jit(jax.grad(of_params))(params))
        assert {leaf.dtype for leaf in gradient.values()} == {np.dtype("float64")}
        for number, (path, leaf) in enumerate(flatten_dict(params).items()):
            direction = np.random.default_rng(number).normal(size=leaf.shape) / np.sqrt(leaf.size)
            ahead, behind = (value(moved(params, path, h * direction)) for h in (1e-4, -1e-4))
            wanted, got = (ahead - behind) / 2e-4, (gradient[path] * direction).sum()
            # adding the same to all keys changes no attention without rotation, so their bias has no gradient
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8, err_msg=str(path))


def moved(tree, path, change):
    """A tree with one array changed."""
    if not path:
        return tree + change
    return tree | {path[0]: moved(tree[path[0]], path[1:], change)}


# --- packing and padding


@every_mode
@labelled
def test_packed_rows_are_their_pairs(label, mode):
    """Sums and gradients of packed rows are those of the same pairs in rows of their own, to 1e-5."""
    config = still(label, mode)
    gradient = jit(jax.grad(make_loss(Transformer(config), LossConfig()), has_aux=True))
    params, rows = variables(config)["params"], packed(config)
    assert len(rows) < EXAMPLES
    (packed_gradient, sums), (wanted, wanted_sums) = (
        gradient(params, batch, None) for batch in (filled(rows), one_by_one(config))
    )
    assert (sums["tokens"], sums["correct"]) == (wanted_sums["tokens"], wanted_sums["correct"])
    np.testing.assert_allclose(sums["loss"], wanted_sums["loss"], rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    assert_trees(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * scale), packed_gradient, wanted)


@every_mode
def test_a_batch_of_padding_changes_nothing(mode):
    """Loss, hits, tokens and gradient are 0; parameters stay to the last bit; the step counts."""
    config = still("plain", mode)
    batch, state = packed(config).batch(np.full(EXAMPLES, -1), 0), start(config)
    after, metrics = compiled(config)(state, batch)
    assert all(value == 0 for value in metrics.values())
    assert_trees(np.testing.assert_array_equal, after.params, state.params)
    assert after.step == 1


# --- the state


def test_dropout_is_a_function_of_seed_and_step():
    config = still("plain", "encoder-decoder").replace(dropout_rate=0.2)
    batch = one_by_one(config)

    def loss(seed, step):
        return float(compiled(config)(start(config, seed, step), batch)[1]["loss"])

    keys = [(seed, step) for seed in (0, 1, 2**32 - 1) for step in (0, 1, 2)]
    losses = {key: loss(*key) for key in keys}
    assert len(set(losses.values())) == len(keys)
    assert losses == {key: loss(*key) for key in reversed(keys)}


def test_the_average_follows_its_formula():
    """ema <- decay ema + (1 - decay) params, from the first parameters on, to 1e-6; evaluation uses it."""
    config = still("plain", "decoder-only")
    batch, state, decay = one_by_one(config), start(config, ema=True), 0.9
    assert_trees(np.testing.assert_array_equal, state.ema, state.params)
    average = state.ema
    for _ in range(3):
        state, _ = compiled(config, ema_decay=decay)(state, batch)
        average = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, average, state.params)
    assert_trees(close, state.ema, average)
    assert state.best_params is state.ema
    assert start(config).best_params is not None
    assert start(config).ema is None


def test_a_step_returns_a_new_state():
    """What goes in is as it was; the same in is the same out to the last bit; only the step counts on its own."""
    config = still("plain", "decoder-only").replace(dropout_rate=0.2)
    batch, state = one_by_one(config), start(config, seed=5, step=3)
    before = jax.tree.map(np.array, (state, batch))
    first, second = (compiled(config)(state, batch) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, (state, batch)))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    after, _ = first
    assert (after.step, after.seed) == (4, 5)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(operator.eq, *(jax.tree.map(lambda x: x.dtype, s) for s in (after, state))))
