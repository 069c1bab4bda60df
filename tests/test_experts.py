"""Laws of the mixture of experts: what one expert is, what many are, who finds a place, and what routers are told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from flax.traverse_util import flatten_dict, unflatten_dict

from transformer_jax import ModelConfig, Transformer
from transformer_jax.config import LossConfig
from transformer_jax.model.experts import Experts, Routes, capacity, places, route
from transformer_jax.model.layers import FeedForward
from transformer_jax.objective import make_loss
from transformer_jax.tokens import Batch

E, D, F, ROWS, LENGTH = 5, 8, 12, 3, 16
modes = pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])
gated = pytest.mark.parametrize("gated", [False, True])


def config(**changes):
    sizes = dict(vocab_size=11, d_model=D, d_ff=F, num_heads=2, num_layers=1, num_experts=E, activation="gelu")
    return ModelConfig(**sizes | changes)


def filled(config, seed=0):
    """The layer, and its parameters, biases too, at random."""
    layer, x_BTD = Experts(config), jnp.zeros((ROWS, LENGTH, D))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x_BTD, jnp.ones((ROWS, LENGTH), bool))["params"]
    random = np.random.default_rng(seed)
    return layer, jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


def inputs(seed=1, padding=True):
    """Activations, and which of them are no padding: rows of 16, 11 and 6 tokens."""
    x_BTD = np.random.default_rng(seed).normal(size=(ROWS, LENGTH, D)).astype(np.float32)
    used_B = np.array([LENGTH, 11, 6]) if padding else np.full(ROWS, LENGTH)
    return x_BTD, np.arange(LENGTH) < used_B[:, None]


@functools.cache
def applied(config):
    return jax.jit(lambda params, x, real: Experts(config).apply({"params": params}, x, real, mutable=["sums"]))


def answers(config, params, x_BTD, real_BT):
    """The layer's output and its sums."""
    y_BTD, sown = applied(config)(params, x_BTD, real_BT)
    return np.asarray(y_BTD), {name: float(value[0]) for name, value in sown["sums"].items()}


def feed_forward(params, x_ND, gated):
    """One feed-forward layer by its formula, in NumPy; `params` as of a FeedForward."""
    gelu = lambda x: np.asarray(jax.nn.gelu(x, approximate=False))  # noqa: E731
    h = x_ND @ params["up"]["w_DF"] + params["up"]["b_F"]
    if gated:
        h = h * gelu(x_ND @ params["gate"]["w_DF"] + params["gate"]["b_F"])
    else:
        h = gelu(h)
    return h @ params["down"]["w_FD"] + params["down"]["b_D"]


def expert(params, number):
    """The parameters of one expert, as of a FeedForward."""
    names = {"w_EDF": "w_DF", "w_EFD": "w_FD", "b_EF": "b_F", "b_ED": "b_D"}
    return {
        part: {names[name]: np.asarray(leaf[number]) for name, leaf in params[part].items()}
        for part in ("up", "gate", "down")
        if part in params
    }


@pytest.mark.parametrize(
    ("mode", "capacity"),
    [
        pytest.param("encoder-decoder", 0.0, marks=pytest.mark.long),
        pytest.param("decoder-only", 1.0, marks=pytest.mark.long),
        pytest.param("encoder-decoder", 1.0, marks=pytest.mark.slow),
        pytest.param("decoder-only", 0.0, marks=pytest.mark.slow),
    ],
)
def test_one_expert_is_the_plain_feed_forward(mode, capacity):
    """Logits and gradients of a whole model with one expert are those of the model without, to 1e-5."""
    plain = ModelConfig(mode=mode, **variants.TINY | dict(activation="gelu", gated=True))
    one = plain.replace(num_experts=1, expert_capacity=capacity)
    target, source = variants.example(plain)
    batch = Batch(target, np.asarray(target.ids), np.ones(target.ids.shape, np.float32), source)
    params = jax.jit(Transformer(plain).init)(jax.random.key(0), target, source)["params"]

    def as_expert(path, leaf):
        """`w_DF` of a feed-forward -> `w_EDF` with one expert."""
        kind, letters = path[-1].split("_")
        return (*path[:-1], f"{kind}_E{letters}"), leaf[None]

    flat = flatten_dict(params)
    moved = dict(as_expert(p, leaf) if "feed_forward" in p else (p, leaf) for p, leaf in flat.items())
    routers = {(*path[:-2], "router", "w_DE"): jnp.ones((16, 1)) for path in moved if path[-1] == "w_EFD"}
    gradient = {
        name: jax.jit(jax.value_and_grad(make_loss(Transformer(kind), LossConfig(router_z_loss=0)), has_aux=True))
        for name, kind in (("plain", plain), ("one", one))
    }
    (_, sums), wanted = gradient["plain"](params, batch, None)
    (_, got_sums), got = gradient["one"](unflatten_dict(moved | routers), batch, None)
    np.testing.assert_allclose(got_sums["loss"], sums["loss"], rtol=1e-6)
    wanted = dict(as_expert(p, g) if "feed_forward" in p else (p, g) for p, g in flatten_dict(wanted).items())
    got = flatten_dict(got)
    for path, leaf in wanted.items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-5, err_msg=str(path))


@gated
@pytest.mark.parametrize("changes", [{}, dict(num_shared_experts=2), dict(normalize_gates=False)])
def test_a_token_gets_the_weighted_answers_of_its_experts(gated, changes):
    """Without limit: sum over its likeliest experts of gate times expert, by a loop in NumPy, to 1e-5."""
    settings = config(gated=gated, **changes)
    _, params = filled(settings)
    x_BTD, real_BT = inputs()
    got, sums = answers(settings, params, x_BTD, real_BT)
    logits_BTE = x_BTD @ np.asarray(params["router"]["w_DE"])
    probability_BTE = np.exp(logits_BTE) / np.exp(logits_BTE).sum(-1, keepdims=True)
    for b, t in np.argwhere(real_BT):
        best = np.argsort(-probability_BTE[b, t])[:2]
        gate = probability_BTE[b, t, best]
        gate = gate / gate.sum() if settings.normalize_gates else gate
        wanted = sum(g * feed_forward(expert(params, e), x_BTD[b, t], gated) for g, e in zip(gate, best, strict=True))
        if settings.num_shared_experts:
            wanted = wanted + feed_forward(jax.tree.map(np.asarray, params["shared"]), x_BTD[b, t], gated)
        np.testing.assert_allclose(got[b, t], wanted, rtol=0, atol=1e-5)
    assert sums["dropped"] == 0
    assert sums["routed"] == real_BT.sum()


@gated
def test_enough_places_are_no_limit(gated):
    """With a place for every token the two ways to compute are one, gradients too, to 1e-5."""
    free = config(gated=gated)
    _, params = filled(free)
    x_BTD, real_BT = inputs()

    def total(params, settings):
        y_BTD, _ = Experts(settings).apply({"params": params}, jnp.asarray(x_BTD), real_BT, mutable=["sums"])
        return jnp.sum(jnp.sin(y_BTD) * real_BT[..., None])

    limited = free.replace(expert_capacity=float(E))
    got, wanted = (jax.jit(jax.value_and_grad(total), static_argnums=1)(params, each) for each in (limited, free))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_padding_is_nobodys_business(limit):
    """What stands in padding changes no other answer and no sum, and takes no place."""
    settings = config(expert_capacity=limit)
    _, params = filled(settings)
    x_BTD, real_BT = inputs()
    other = np.where(real_BT[..., None], x_BTD, 7.0).astype(np.float32)
    (y, sums), (y_other, sums_other) = (answers(settings, params, each, real_BT) for each in (x_BTD, other))
    np.testing.assert_array_equal(y[real_BT], y_other[real_BT])
    assert sums == sums_other


def test_rows_are_groups():
    """A row's answers and sums do not depend on the other rows, so not on devices or microbatches either."""
    settings = config(expert_capacity=0.5)
    _, params = filled(settings)
    x_BTD, real_BT = inputs()
    y, sums = answers(settings, params, x_BTD, real_BT)
    rows = [answers(settings, params, x_BTD[b : b + 1], real_BT[b : b + 1]) for b in range(ROWS)]
    np.testing.assert_allclose(y, np.concatenate([row for row, _ in rows]), rtol=0, atol=1e-6)
    for name, value in sums.items():
        np.testing.assert_allclose(value, sum(each[name] for _, each in rows), rtol=1e-5)
    assert sums["dropped"] > 0


def test_places_go_to_first_choices_and_to_earlier_tokens():
    """By a loop: all first choices in order, then all second ones; beyond the limit there is no place."""
    random, k, limit = np.random.default_rng(3), 2, 3
    chosen_BTk = np.stack([[random.permutation(E)[:k] for _ in range(LENGTH)] for _ in range(ROWS)])
    _, real_BT = inputs()
    got = np.asarray(places(jnp.asarray(chosen_BTk), jnp.asarray(real_BT), E, limit))
    for b in range(ROWS):
        taken = np.zeros(E, int)
        for choice in range(k):
            for t in np.flatnonzero(real_BT[b]):
                e = chosen_BTk[b, t, choice]
                wanted = e * limit + taken[e] if taken[e] < limit else E * limit
                taken[e] += 1
                assert got[b, t, choice] == wanted
    assert (got[~real_BT] == E * limit).all()
    used = got[got < E * limit]
    assert (got == E * limit).any()
    assert all(len(set(row[row < E * limit])) == (row < E * limit).sum() for row in got.reshape(ROWS, -1)), used


@pytest.mark.parametrize(("factor", "places"), [(1.0, 7), (1.25, 8), (0.01, 1), (100.0, 16)])
def test_capacity_is_a_multiple_of_an_even_share(factor, places):
    """Of 16 tokens with 2 choices among 5 experts an even share is 6.4; a row never needs more than its length."""
    assert capacity(LENGTH, config(expert_capacity=factor)) == places


def test_a_token_without_a_place_passes_by():
    """All tokens want the same two experts with one place each: the first gets both, the others nothing."""
    settings = config(expert_capacity=0.01, use_bias=False)
    _, params = filled(settings)
    x_BTD, real_BT = inputs(padding=False)
    x_BTD = np.abs(x_BTD)
    params["router"]["w_DE"] = jnp.zeros((D, E)).at[:, 1].set(9.0).at[:, 3].set(5.0)
    y, sums = answers(settings, params, x_BTD, real_BT)
    assert np.abs(y[:, 0]).max() > 0
    assert not y[:, 1:].any()
    assert sums["dropped"] == ROWS * (LENGTH - 1)


def test_balance_is_one_where_even_and_grows_where_not():
    """Fedus et al. 2022, equation 4: 1 for each token of uniform routing, E / k where all choose the same k."""
    settings, real_BT = config(), inputs()[1]
    even = jnp.asarray(np.tile(3.0 * np.eye(E), (1, 4, 1))[:, :15])
    _, sums = route(even, jnp.ones((1, 15), bool), settings.replace(experts_per_token=1, normalize_gates=False))
    np.testing.assert_allclose(sums["balance"], 15, rtol=1e-5)
    same = jnp.zeros((ROWS, LENGTH, E)).at[..., :2].set(30.0)
    _, sums = route(same, real_BT, settings)
    np.testing.assert_allclose(sums["balance"], real_BT.sum() * E / 2, rtol=1e-5)
    np.testing.assert_allclose(sums["router_z"], real_BT.sum() * (30 + np.log(2)) ** 2, rtol=1e-5)


@pytest.mark.long
def test_routers_learn_and_are_weighed():
    """The router's gradient is of the loss, of balance and of z, each with its weight."""
    settings = ModelConfig(mode="decoder-only", **variants.TINY | dict(num_experts=4))
    target, _ = variants.example(settings)
    batch = Batch(target, np.asarray(target.ids), np.ones(target.ids.shape, np.float32))
    params = jax.jit(Transformer(settings).init)(jax.random.key(0), target)["params"]

    def gradient(**weights):
        losses = LossConfig(**dict(balance_loss=0.0, router_z_loss=0.0) | weights)
        grads = jax.jit(jax.grad(make_loss(Transformer(settings), losses), has_aux=True))(params, batch, None)[0]
        return np.asarray(grads["decoder"]["block_0"]["feed_forward"]["router"]["w_DE"])

    plain = gradient()
    balance, z = gradient(balance_loss=1.0) - plain, gradient(router_z_loss=1.0) - plain
    assert all(np.abs(part).max() > 1e-3 for part in (plain, balance, z))
    both = gradient(balance_loss=0.5, router_z_loss=0.25)
    np.testing.assert_allclose(both, plain + 0.5 * balance + 0.25 * z, rtol=1e-4, atol=1e-4)


def test_shared_experts_are_one_feed_forward_beside():
    settings = config(num_shared_experts=2)
    _, params = filled(settings)
    x_BTD, real_BT = inputs()
    wide = config(num_experts=0, d_ff=2 * F)
    beside = FeedForward(wide).apply({"params": params["shared"]}, x_BTD)
    alone = {name: part for name, part in params.items() if name != "shared"}
    got, _ = answers(settings, params, x_BTD, real_BT)
    without, _ = answers(config(), alone, x_BTD, real_BT)
    np.testing.assert_allclose(got[real_BT], (without + np.asarray(beside))[real_BT], rtol=0, atol=1e-5)


def test_gates_of_padding_are_zero():
    x, real_BT = inputs()
    routes, _ = route(jnp.asarray(x[..., :E]), jnp.asarray(real_BT), config())
    assert isinstance(routes, Routes)
    assert not np.asarray(routes.gate_BTk)[~real_BT].any()
    np.testing.assert_allclose(np.asarray(routes.gate_BTk).sum(-1)[real_BT], 1, rtol=1e-6)
