"""Weights in 8 bits: the same as the rounded weights give, at a quarter of the memory."""

import jax
import numpy as np
import pytest
from test_decoding import PROMPTS, padded
from variants import VARIANTS, compiled, example, name, variables, variant

from transformer_jax import Transformer, generate, int8_weights
from transformer_jax.model import layers
from transformer_jax.model.int8 import Packed

SOME = [
    pytest.param(config, id=name(config), marks=[pytest.mark.long] * (number != 12))
    for number, config in enumerate(VARIANTS)
    if number % 4 == 0
]


def is_packed(leaf):
    return isinstance(leaf, Packed)


def rounded(packed, like):
    """The ordinary parameters that packed ones stand for."""
    return jax.tree.map(lambda q, x: q.astype(x.dtype) if is_packed(q) else q, packed, like, is_leaf=is_packed)


def logits(config, params):
    return np.asarray(compiled(config)({"params": params}, *example(config)), np.float32)


@pytest.mark.parametrize("config", SOME)
def test_logits_are_those_of_the_rounded_weights(config):
    """To what a dtype's sums are exact; and near those of the weights themselves."""
    params = variables(config)["params"]
    packed = int8_weights(params)
    found = logits(config, packed)
    tolerance = 0.05 if config.dtype == "bfloat16" or config.param_dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(found, logits(config, rounded(packed, params)), rtol=0, atol=tolerance)
    assert 0 < np.abs(found - logits(config, params)).max() < 0.3


@pytest.mark.parametrize("label", ["plain", "experts-scan"])
def test_a_weight_has_a_scale_for_each_output(label):
    """Every weight is within half a step, the largest of each output is 127 steps; the rest is as it was."""
    params = variables(variant(label, "encoder-decoder"))["params"]
    packed = int8_weights(params)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(packed, is_leaf=is_packed), jax.tree_util.tree_leaves(params), strict=True
    )
    for (path, q), x in pairs:
        key = jax.tree_util.keystr(path)
        assert is_packed(q) == (("'w_" in key and "router" not in key) or "table" in key), key
        if not is_packed(q):
            assert q is x
            continue
        assert q.values.dtype == np.int8
        assert (np.abs(np.asarray(q.astype(np.float32)) - x) <= np.asarray(q.scale) * 0.5001).all(), key
        summed = tuple(axis for axis, (n, m) in enumerate(zip(q.scale.shape, x.shape)) if n != m)
        assert (np.abs(q.values).max(summed) == 127).all(), key
        outputs = {"w_DHK": 2, "w_DGK": 2, "w_HKD": 1, "w_DF": 1, "w_FD": 1, "w_EDF": 2, "w_EFD": 2, "table_VD": 1}
        stacked = "'layers'" in key
        assert q.scale.ndim - len(summed) - stacked == outputs[key.rpartition("'")[0].rpartition("'")[2]], key


@pytest.mark.parametrize("mode", ["encoder-decoder", pytest.param("decoder-only", marks=pytest.mark.long)])
@pytest.mark.long
def test_what_is_said_is_that_of_the_rounded_weights(mode, monkeypatch):
    """Also where weights are read block by block, as large ones are on a CPU."""
    config = variant("plain", mode)
    params = variables(config)["params"]
    packed = int8_weights(params)
    source = padded(PROMPTS, 6) if mode == "encoder-decoder" else None
    plain = generate(Transformer(config), rounded(packed, params), padded(PROMPTS, 6), source=source, max_new_tokens=8)
    for block, new in ((layers.BLOCK, 8), (64, 7)):  # another length is compiled anew
        monkeypatch.setattr(layers, "BLOCK", block)
        found = generate(Transformer(config), packed, padded(PROMPTS, 6), source=source, max_new_tokens=new)
        np.testing.assert_array_equal(found.ids, plain.ids[:, :new])
