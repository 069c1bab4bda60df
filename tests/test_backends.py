"""Every way to compute attention gives what the reference gives, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import Tokens
from transformer_jax.model import backends
from transformer_jax.model.attention import sees
from transformer_jax.model.backends import BACKENDS, Shape, Sight, choose

CPU = Shape("cpu", "float32", 8, 64, 64, 4, 32)
LARGE = CPU._replace(queries=4096, keys=4096)
CAUSAL = CPU._replace(queries=256, keys=256, segments=True, causal=True)
GPU = CPU._replace(platform="gpu", dtype="bfloat16", head_dim=64)
TPU = CPU._replace(platform="tpu", dtype="bfloat16", queries=256, keys=256, head_dim=128, segments=True)


def inputs(causal, window=0, length=256, heads=4, groups=2, width=128, bias=False):
    """Queries, keys and values of packed rows, one with padding at its end, and what sees what."""
    random = np.random.default_rng(0)
    segments = np.repeat([[1, 1, 2, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]], length // 8, 1).astype(np.int32)
    starts = np.where(np.diff(segments, prepend=-1) != 0, np.arange(length), 0)
    places = np.arange(length) - np.maximum.accumulate(starts, -1)
    tokens = Tokens(jnp.zeros_like(segments), jnp.asarray(segments), jnp.asarray(places, jnp.int32))

    def draw(*shape):
        return jnp.asarray(random.normal(0, 1, shape), jnp.float32)

    q = draw(2, length, heads, width) * width**-0.5
    bias = draw(2, heads, length, length) if bias else None
    mask = sees(tokens, tokens, causal, window)
    sight = Sight(mask, bias, (tokens.segments, tokens.segments), causal, window)
    return q, draw(2, length, groups, width), draw(2, length, groups, width), sight


def with_gradients(attend, q, k, v, sight, cap, keep=None):
    """The output and the gradients of its product with fixed numbers."""
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def value(q, k, v):
        out = attend(q, k, v, sight, cap, keep)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


def same(one, other, atol):
    for x, y in zip(one, other, strict=True):
        assert np.isfinite(np.asarray(x)).all()
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (False, 0), (True, 40), (False, 40)])
@pytest.mark.parametrize(
    ("name", "block", "length"), [("blocks", 64, 256), ("blocks", 32, 256), ("blocks", 32, 200), ("xla", 0, 256)]
)
def test_backends_give_what_the_reference_gives(monkeypatch, name, block, length, causal, window):
    """Packed rows, padding, windows, both directions, a bias: outputs and gradients to 2e-5, padding exactly zero.

    Parts of a row are a block, or several, or of a length that is no multiple of one.
    """
    monkeypatch.setattr(backends, "BLOCK", block)
    given = inputs(causal, window, length, width=32, bias=True)
    wanted = with_gradients(backends.reference, *given, cap=None)
    got = with_gradients(BACKENDS[name].attend, *given, cap=None)
    same(got, wanted, 2e-5)
    assert not np.any(got[0][0, -length // 4 :])


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 40), (False, 40)])
def test_blocks_leave_out_keys_that_no_query_of_a_part_sees(causal, window):
    """A NaN among the values is in what the parts give that can see it by its place, and in no other."""
    q, k, v, sight = inputs(causal, window, width=32)
    for place in (0, 255):
        out = backends.blocks(q, k, v.at[:, place].set(jnp.nan), sight, None, None)
        touched = np.isnan(np.asarray(out)).any((0, 2, 3)).reshape(4, 64).all(-1)
        before = [True, not window, not window, not window]
        np.testing.assert_array_equal(touched, [False, False, False, True] if place else before)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_full_rows_need_no_mask(causal, full):
    """Rows of one document without padding go another way, with the same outputs and gradients; others do not."""
    attend = backends._library("xla", full_rows=True)
    q, k, v, sight = inputs(causal, length=64, width=32)
    if full:
        ones = jnp.ones((2, 64), jnp.int32)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((64, 64), bool)) if causal else True, (2, 64, 64))
        sight = Sight(mask, None, (ones, ones), causal)
    wanted = with_gradients(backends.reference, q, k, v, sight, cap=None)
    same(with_gradients(attend, q, k, v, sight, cap=None), wanted, 2e-5)
    text = str(jax.make_jaxpr(lambda q: attend(q, k, v, sight, None, None))(q))
    assert "cond" in text
    if full:  # what it does then has no mask to read
        wrong = sight.replace(mask_BTS=jnp.zeros_like(sight.mask_BTS))
        same(with_gradients(attend, q, k, v, wrong, cap=None), wanted, 2e-5)


def test_blocks_take_caps_and_dropout(monkeypatch):
    monkeypatch.setattr(backends, "BLOCK", 64)
    given = inputs(True, width=32)
    keep = jax.random.bernoulli(jax.random.key(0), 0.8, (2, 4, 256, 256)) / 0.8
    wanted = with_gradients(backends.reference, *given, cap=2.0, keep=keep)
    same(with_gradients(backends.blocks, *given, cap=2.0, keep=keep), wanted, 2e-5)


@pytest.mark.long
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (False, 0), (True, 40), (False, 40)])
def test_splash_gives_what_the_reference_gives(causal, window):
    """The kernel for TPU in Pallas's interpreter, to 1e-4: packing, padding, windows, a cap."""
    given = inputs(causal, window)
    splash = functools.partial(backends.splash, interpret=True)
    cap = 2.0 if causal and not window else None
    wanted, got = (with_gradients(f, *given, cap=cap) for f in (backends.reference, splash))
    segments = given[3].segments
    assert segments is not None
    real = np.asarray(segments[0] > 0)
    np.testing.assert_allclose(got[0][real], wanted[0][real], rtol=0, atol=1e-4)
    assert not np.any(np.asarray(got[0])[~real])


def test_blocks_need_less_memory():
    """With 4,096 queries the logits of one block are held, not those of all: a third of the memory or less."""
    q, k = jnp.zeros((1, 4096, 2, 16)), jnp.zeros((1, 4096, 2, 16))
    sight = Sight(jnp.ones((1, 4096, 4096), bool))

    def size(attend):
        f = jax.jit(jax.grad(lambda q: attend(q, k, k, sight, None, None).sum()))
        return getattr(f.lower(q).compile().memory_analysis(), "temp_size_in_bytes")  # noqa: B009

    assert size(backends.blocks) < size(backends.reference) / 3


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("auto", CPU, "reference"),
        ("auto", LARGE, "blocks"),
        ("auto", LARGE._replace(queries=4095), "blocks"),
        ("auto", LARGE._replace(queries=1, batch=4096), "reference"),
        ("auto", CAUSAL, "blocks"),
        ("auto", CAUSAL._replace(queries=255), "reference"),
        ("auto", CAUSAL._replace(causal=False), "reference"),
        ("auto", CAUSAL._replace(segments=False), "reference"),
        ("auto", CAUSAL._replace(platform="gpu"), "reference"),
        ("auto", GPU, "cudnn"),
        ("auto", GPU._replace(dtype="float32"), "reference"),
        ("auto", GPU._replace(cap=True), "reference"),
        ("auto", GPU._replace(bias=True), "reference"),
        ("auto", GPU._replace(queries=1), "reference"),
        ("auto", TPU, "splash"),
        ("auto", TPU._replace(segments=False), "reference"),
        ("auto", TPU._replace(queries=100), "reference"),
        ("cudnn", CPU, "reference"),
        ("splash", GPU, "reference"),
        ("xla", CPU, "xla"),
        ("xla", CPU._replace(dropout=True), "reference"),
        ("xla", CPU._replace(dtype="float64"), "reference"),
        ("blocks", CPU, "blocks"),
        ("blocks", CPU._replace(queries=1), "reference"),
    ],
)
def test_the_choice_fits_and_says_why(name, shape, wanted):
    chosen, why = choose(name, shape)
    assert chosen == wanted
    assert BACKENDS[chosen].why_not(shape) is None
    assert why
    assert name in ("auto", wanted) or name in why
