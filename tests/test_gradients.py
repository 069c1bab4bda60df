"""Derivatives that are written by hand, against those that JAX works out of the plain formula, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.config import LossConfig, ModelConfig
from transformer_jax.model.gradients import (
    gelu,
    layer_norm,
    masked_softmax,
    matmul,
    picked,
    rms_norm,
    rows_of,
    scaled,
    sum_of_parts,
)
from transformer_jax.model.transformer import Head, Transformer
from transformer_jax.objective import head_sums, make_loss, parts_of, token_sums
from transformer_jax.tokens import Batch, Tokens

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape):
    return RNG.normal(size=shape)


def same(function, plain, *args):
    """The values and the gradients of both, whatever is passed back."""
    (y, back), (wanted, plain_back) = jax.vjp(function, *args), jax.vjp(plain, *args)
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    dy = jnp.asarray(draw(*y.shape), y.dtype)
    for got, want in zip(back(dy), plain_back(dy), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("einsum", "x", "w"),
    [
        ("BTD,DHK->BTHK", (2, 3, 4), (4, 5, 6)),
        ("BTHK,HKD->BTD", (2, 3, 4, 5), (4, 5, 6)),
        ("BTF,FD->BTD", (2, 3, 9), (9, 4)),
        ("BTF,FD->BTD", (2, 3, 4), (4, 9)),
        ("BTD,VD->BTV", (2, 3, 4), (3, 4)),
        ("BTD,VD->BTV", (2, 3, 4), (7, 4)),
        ("BECD,EDF->BECF", (2, 3, 4, 5), (3, 5, 6)),
    ],
)
def test_a_product_with_a_weight(einsum, x, w):
    same(lambda x, w: matmul(einsum, x, w, None), lambda x, w: jnp.einsum(einsum, x, w), draw(*x), draw(*w))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_table_that_is_used_again(tied):
    """Of a table whose rows come more than once, and that a product reads, or nothing does."""
    ids, w = np.array([[0, 2, 2], [6, 0, 0]]), draw(4)

    def threaded(table):
        rows, again = rows_of(table, ids)
        return rows @ w + ((again @ w).sum() if tied else 0)

    same(threaded, lambda table: table[ids] @ w + ((table @ w).sum() if tied else 0), draw(7, 4))


def test_gradients_of_rows_are_added_into_those_of_the_output_layer():
    """What is added to is the output layer's gradient of the table; no array of its size is filled with zeros."""
    model = Transformer(ModelConfig(mode="decoder-only", vocab_size=4099, d_model=8, num_layers=1, num_heads=2))
    tokens = Tokens(*np.ones((3, 1, 4), np.int32))
    params = model.init(jax.random.key(0), tokens)["params"]
    batch = Batch(tokens, tokens.ids, np.ones((1, 4), np.float32))
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda params: make_loss(model)(params, batch, None)[0]))(params))
    assert "f32[4099,8] = scatter-add" in jaxpr
    assert "f32[4099,8] = broadcast_in_dim" not in jaxpr


def plain_layer_norm(x, eps):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)


def plain_rms_norm(x, eps):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps)


@pytest.mark.parametrize(("norm", "plain"), [(layer_norm, plain_layer_norm), (rms_norm, plain_rms_norm)])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_norms(norm, plain, shape, eps):
    """Also where the eps is not small beside the variance."""
    same(lambda x: norm(x, eps), lambda x: plain(x, eps), draw(*shape))


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 8)])
def test_scale_and_bias(shape):
    same(lambda x, s: scaled(x, s, None), lambda x, s: x * s, draw(*shape), draw(8))
    same(scaled, lambda x, s, b: x * s + b, draw(*shape), draw(8), draw(8))
    x, scale = jnp.asarray(draw(*shape), jnp.float32), jnp.ones(8, jnp.bfloat16)
    assert [g.dtype for g in jax.vjp(lambda x, s: scaled(x, s, None), x, scale)[1](x)] == [x.dtype, scale.dtype]


def test_a_picked_number():
    """An index outside of the axis, as where devices share it, picks nothing and passes nothing on."""
    index = np.array([[0, 6, 3], [-1, 7, -8]])
    one_hot = (index[..., None] == np.arange(7)).astype(float)
    assert one_hot.sum() == 3
    same(lambda x: picked(x, index), lambda x: (x * one_hot).sum(-1), draw(2, 3, 7))


def test_gelu():
    x = np.concatenate([draw(100), [0.0, -30.0, 30.0]])
    same(gelu, lambda x: jax.nn.gelu(x, approximate=False), x)


def test_softmax_over_what_is_seen():
    mask = RNG.random((3, 4, 5)) < 0.6
    mask[0, 0] = False
    logits = np.where(mask, draw(3, 4, 5), 1e300)  # what is hidden must not matter

    def plain(logits):
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), -1, where=mask)
        return jnp.where(mask, weights, 0)

    seen = mask.any(-1)
    got, back = jax.vjp(lambda logits: masked_softmax(logits, mask), logits)
    wanted, plain_back = jax.vjp(plain, logits)
    np.testing.assert_allclose(got[seen], wanted[seen], rtol=1e-12)
    assert not np.any(got[~seen])
    dp = draw(3, 4, 5)
    np.testing.assert_allclose(back(dp)[0][seen], plain_back(dp)[0][seen], atol=1e-13)
    assert not np.any(np.asarray(back(dp)[0])[~mask])


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_sums_of_parts(parts):
    x, w, labels = draw(6, 3), draw(3, 4), RNG.integers(0, 4, 6)

    def f(x, w, labels):
        hit = jax.nn.log_softmax(x @ w)[jnp.arange(len(labels)), labels]
        return hit.sum(), {"count": jnp.asarray(len(labels), jnp.int32)}

    def loss(x, w):
        total, others = sum_of_parts(f, parts, x, w, labels)
        return 3 * total, others

    (value, others), got = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)
    wanted = jax.value_and_grad(lambda x, w: 3 * f(x, w, labels)[0], (0, 1))(x, w)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-12)
    assert others["count"] == 6
    for one, other in zip(got, wanted[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)


# --- the loss of tokens in parts


@pytest.mark.parametrize(("tokens", "vocab", "mib", "parts"), [(4096, 50257, 128, 7), (8, 65, 128, 1), (9, 5, 0, 1)])
def test_parts_are_as_many_as_memory_asks_for(tokens, vocab, mib, parts):
    assert parts_of(tokens, vocab, mib) == parts
    assert not mib or tokens / parts * vocab * 4 <= mib * 2**20


@pytest.mark.parametrize("einsum", ["BTD,VD->BTV", "BTD,DV->BTV"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_loss_in_parts_is_that_of_all_logits(einsum, cap, monkeypatch):
    """Gradients too, where the last part is not full, and with all that is added to a loss."""
    B, T, D, V = 3, 5, 4, 11
    config = LossConfig(label_smoothing=0.1, z_loss=0.01)
    x_BTD, w, b_V = draw(B, T, D), draw(*((V, D) if "VD" in einsum else (D, V))), draw(V) if cap else None
    batch = Batch(Tokens.from_ids(np.ones((B, T))), RNG.integers(0, V, (B, T)), RNG.integers(0, 2, (B, T)) * 1.0)

    def plain(x_BTD, w, b_V):
        logits_BTV = jnp.einsum(einsum, x_BTD, w) + (0 if b_V is None else b_V)
        logits_BTV = logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)
        sums = token_sums(logits_BTV, batch.labels, batch.weights, config)
        return sums["loss"], sums

    def in_parts(x_BTD, w, b_V):
        sums = head_sums(x_BTD, Head(einsum, w, b_V), batch, cap, config)
        return sums["loss"], sums

    monkeypatch.setattr("transformer_jax.objective.parts_of", lambda *_: 4)
    got = jax.jit(jax.value_and_grad(in_parts, (0, 1, 2), has_aux=True))(x_BTD, w, b_V)
    wanted = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)(x_BTD, w, b_V)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), got, wanted)


def test_all_logits_are_never_held():
    """No array of the compiled gradient is as large as the logits of all tokens."""
    B, T, D, V = 4, 64, 8, 8192
    x_BTD, w = np.zeros((B, T, D), np.float32), np.zeros((V, D), np.float32)
    batch = Batch(Tokens.from_ids(np.ones((B, T))), np.zeros((B, T), np.int32), np.ones((B, T), np.float32))

    def memory(mib):
        def loss(x, w):
            return head_sums(x, Head("BTD,VD->BTV", w, None), batch, None, LossConfig(logits_mib=mib))["loss"]

        return jax.jit(jax.grad(loss, (0, 1))).lower(x_BTD, w).compile().memory_analysis().temp_size_in_bytes

    assert memory(1) < B * T * V * 4 / 2 < memory(0)
