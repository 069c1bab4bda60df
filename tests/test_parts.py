"""The model's parts by their formulas: attention and what tells it of places, each written again in NumPy."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import ModelConfig
from transformer_jax.config import RopeConfig
from transformer_jax.model import positions
from transformer_jax.model.attention import KeyValue, attend
from transformer_jax.model.backends import Sight


def test_attention_is_its_formula():
    """Softmax(capped logits + bias) times values, by a loop in NumPy, to 1e-5; zeros where no key is seen."""
    B, T, S, H, G, K, cap = 2, 5, 7, 6, 2, 4, 3.0
    random = np.random.default_rng(0)
    q, k, v = (random.normal(0, 1.5, shape) for shape in ((B, T, H, K), (B, S, G, K), (B, S, G, K)))
    bias, mask = random.normal(0, 1, (B, H, T, S)), random.random((B, T, S)) < 0.6
    mask[0, 3] = False
    wanted = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        logits = k[b, :, h // (H // G)] @ q[b, t, h] + bias[b, h, t]
        weights = np.exp(cap * np.tanh(logits / cap)) * mask[b, t]
        wanted[b, t, h] = weights @ v[b, :, h // (H // G)] / max(weights.sum(), 1e-9)
    q, k, v, bias = (jnp.asarray(array, jnp.float32) for array in (q, k, v, bias))
    got = attend(q, KeyValue(k, v), Sight(jnp.asarray(mask), bias), cap)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    assert not np.any(got[0, 3])


def test_sinusoid_is_the_papers():
    """PE(p, 2i) = sin(p / 10000^(2i/D)) and PE(p, 2i + 1) its cosine, as halves, to 1e-4 up to position 511."""
    place, i = np.arange(512)[:, None], np.arange(16)
    angles = place / 10_000 ** (2 * i / 32)
    got = positions.sinusoid(jnp.arange(512)[None], 32)[0]
    np.testing.assert_allclose(got, np.concatenate([np.sin(angles), np.cos(angles)], -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rope_is_a_complex_rotation(fraction):
    """Feature i and its partner half a turning width on are one complex number, times exp(i place frequency)."""
    config = ModelConfig(num_heads=2, head_dim=16, rope=RopeConfig(fraction=fraction))
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    places = np.array([[0, 1, 2, 3, 4], [31, 7, 7, 0, 100]])
    width = int(16 * fraction)
    z = x[..., : width // 2] + 1j * x[..., width // 2 : width]
    z = z * np.exp(1j * places[..., None, None] * 10_000.0 ** (-2 * np.arange(width // 2) / width))
    wanted = np.concatenate([z.real, z.imag, x[..., width:]], -1)
    got = positions.rotate(jnp.asarray(x), jnp.asarray(places), config)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


def llama3_frequencies(base, width, factor, low, high, length):
    """Llama 3.1: by wavelength, with a linear mix between length / high and length / low."""
    frequencies = []
    for i in range(width // 2):
        frequency = base ** (-2 * i / width)
        wavelength = 2 * math.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        if wavelength > length / low:
            frequency /= factor
        elif wavelength >= length / high:
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return frequencies, 1.0


def yarn_frequencies(base, width, factor, low, high, length):
    """Peng et al. 2023: a ramp over feature indices, between those that turn `high` and `low` times in the length."""

    def index_of(turns):
        return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    start, end = max(math.floor(index_of(high)), 0), min(math.ceil(index_of(low)), width - 1)
    frequencies = []
    for i in range(width // 2):
        stretched = min(max((i - start) / (end - start), 0), 1)
        frequencies.append(base ** (-2 * i / width) * (stretched / factor + 1 - stretched))
    return frequencies, 1 + 0.1 * math.log(factor)


FORMULAS = {
    "none": lambda base, width, *_: ([base ** (-2 * i / width) for i in range(width // 2)], 1.0),
    "linear": lambda base, width, factor, *_: ([base ** (-2 * i / width) / factor for i in range(width // 2)], 1.0),
    "ntk": lambda base, width, factor, *_: FORMULAS["none"](base * factor ** (width / (width - 2)), width),
    "llama3": llama3_frequencies,
    "yarn": yarn_frequencies,
}


@pytest.mark.parametrize("scaling", FORMULAS)
@pytest.mark.parametrize(
    ("base", "width", "factor", "low", "high", "length"),
    [(500_000.0, 128, 8.0, 1.0, 4.0, 8192), (10_000.0, 64, 16.0, 1.0, 32.0, 4096), (10_000.0, 16, 4.0, 1.0, 8.0, 64)],
)
def test_rope_frequencies_are_their_formula(scaling, base, width, factor, low, high, length):
    """Frequencies to a relative 1e-5, and the factor on queries and keys."""
    rope = RopeConfig(base=base, scaling=scaling, factor=factor, original_length=length, low=low, high=high)
    frequencies, scale = positions.rope_frequencies(rope, width)
    wanted, wanted_scale = FORMULAS[scaling](base, width, factor, low, high, length)
    np.testing.assert_allclose(frequencies, wanted, rtol=1e-5)
    assert scale == pytest.approx(wanted_scale)


def test_alibi_slopes_are_the_papers():
    """8 heads: 1/2 to 1/256. 12 heads: those, and the odd ones of 16 heads, as in the authors' code."""
    eight = [2.0**-i for i in range(1, 9)]
    assert positions.alibi_slopes(8) == eight
    assert positions.alibi_slopes(12) == pytest.approx([*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert positions.alibi_slopes(16) == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (12, 16)])
def test_t5_buckets_are_their_rule(causal, buckets, furthest):
    """Exact for the near half, then as many equal steps of the logarithm up to the furthest, in exact fractions."""

    count = buckets if causal else buckets // 2
    exact = steps = count // 2
    edges = [Fraction(furthest, exact) ** step for step in range(steps)]

    def bucket(distance):
        after = 0 if causal or distance >= 0 else count
        distance = max(distance, 0) if causal else abs(distance)
        if distance < exact:
            return after + distance
        return after + exact + sum(edge <= Fraction(distance, exact) ** steps for edge in edges) - 1

    distances = np.arange(-furthest - 50, furthest + 50)
    got = positions.t5_bucket(jnp.asarray(distances), causal, buckets, furthest)
    assert np.asarray(got).tolist() == [bucket(int(distance)) for distance in distances]
