"""Laws of the model over VARIANTS: the switch, who sees whom, equal numbers by other ways."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from variants import (
    CHOICES,
    SOURCE,
    TARGET,
    VARIANTS,
    change,
    compiled,
    document,
    example,
    forward,
    has_source,
    jit,
    name,
    pack,
    variables,
    variant,
)

from transformer_jax import ModelConfig, Tokens, Transformer
from transformer_jax.axes import letters_of
from transformer_jax.config import RopeConfig
from transformer_jax.model.attention import sees
from transformer_jax.model.cache import Cache, Room
from transformer_jax.model.layers import Einsum

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}  # of logits, whose standard deviation is about 1.2
RELATIVE = [config for config in VARIANTS if not config.position.startswith(("sinusoidal", "learned"))]
# of the module: all laws over one variant run one after the other, in one process
every_variant = pytest.mark.parametrize("config", VARIANTS, ids=name, scope="module")
# all with a source, of whose decoder the others are a part, and every third of those
some_variants = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, marks=[pytest.mark.long] * (not has_source(config) and number % 3 > 0))
        for number, config in enumerate(VARIANTS)
    ],
    ids=name,
    scope="module",
)


def assert_close(logits, wanted, config):
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE[config.dtype])


def take(tokens, index):
    """The same part of every array of some tokens."""
    return jax.tree.map(lambda array: np.asarray(array)[index], tokens)


def rows(config, *documents):
    """Rows of packed documents of 8 tokens with sources of 6, each (place of target, place of source, seed)."""
    target = pack(TARGET, *((place, document(config, seed, 8)) for place, _, seed in documents))
    source = pack(SOURCE, *((place, document(config, seed + 1000, 6)) for _, place, seed in documents))
    return target, source if has_source(config) else None


# --- what goes in, what comes out


@pytest.mark.parametrize("kind", [ModelConfig, RopeConfig])
def test_the_variants_cover_every_choice(kind):
    """Each value of each field that is a choice occurs (float64, which needs x64, and float8 have their own tests)."""
    configs = VARIANTS if kind is ModelConfig else [config.rope for config in VARIANTS]
    for field, hint in typing.get_type_hints(kind).items():
        wanted = (False, True) if hint is bool else typing.get_args(hint) if typing.get_origin(hint) else ()
        strings = {choice for choice in wanted if isinstance(choice, (str, bool))} - {"float64", "float8"}
        assert strings <= {getattr(config, field) for config in configs}, field


@every_variant
@pytest.mark.long  # what is not finite would not be equal to itself in the laws below
def test_logits_are_finite_float32(config):
    """One number for each row, position and entry of the vocabulary."""
    target, source = example(config)
    logits = forward(config, target, source)
    assert logits.shape == (*target.ids.shape, config.vocab_size)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("label", CHOICES)
def test_the_switch_only_takes_parameters_away(label):
    """A decoder-only model has the encoder-decoder's parameters without the encoder's and cross-attention's."""

    def shapes(mode):
        return {path: leaf.shape for path, leaf in flatten_dict(variables(variant(label, mode))).items()}

    def of_decoder(path):
        return path[1] not in ("encoder", "source_embedding") and not any(part.startswith("cross_") for part in path)

    whole = shapes("encoder-decoder")
    assert shapes("decoder-only") == {path: shape for path, shape in whole.items() if of_decoder(path)}
    assert any(path[1] == "encoder" for path in whole)


def test_a_source_is_for_an_encoder():
    """A source without an encoder, an encoder without a source, and a model without a vocabulary raise ValueError."""
    both, one = variant("plain", "encoder-decoder"), variant("plain", "decoder-only")
    target, source = example(both)
    for config, given in ((both, None), (one, source)):
        with pytest.raises(ValueError, match=f"{config.mode}.*source"):
            jax.eval_shape(Transformer(config).init, jax.random.key(0), target, given)
        with pytest.raises(ValueError, match=f"{config.mode}.*source"):
            forward(config, target, given)
    with pytest.raises(ValueError, match="vocab_size"):
        jax.eval_shape(Transformer(one.replace(vocab_size=None)).init, jax.random.key(0), target)


@pytest.mark.parametrize(
    ("initializer", "spec", "shape", "variance"),
    [
        ("lecun", "BTD,DHK->BTHK", (1, 1, 128), 1 / 128),
        ("lecun", "BTHK,HKD->BTD", (1, 1, 4, 24), 1 / 96),
        ("xavier", "BTD,DHK->BTHK", (1, 1, 128), 2 / 224),
        ("xavier", "BTHK,HKD->BTD", (1, 1, 4, 24), 2 / 224),
    ],
)
def test_linear_layers_start_with_the_variance_of_their_initializer(initializer, spec, shape, variance):
    """The mean is 0, the deviation right to 5 %, and Xavier's distribution is uniform; biases start at 0."""
    layer = Einsum(spec, ModelConfig(d_model=128, num_heads=4, head_dim=24, initializer=initializer), bias=True)
    weight, bias = layer.init(jax.random.key(0), jnp.zeros(shape))["params"].values()
    assert abs(weight.mean()) < 0.05 * variance**0.5
    assert weight.std() == pytest.approx(variance**0.5, rel=0.05)
    most = abs(weight).max() / variance**0.5
    assert most == pytest.approx(3**0.5, rel=0.01) if initializer == "xavier" else most > 2
    assert not bias.any()


@pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])
def test_xavier_takes_queries_keys_and_values_as_one_matrix(mode):
    """As in torch.nn.Transformer: in self- and cross-attention they have the variance of one [D, 3 D]."""
    config = ModelConfig(mode=mode, vocab_size=23, d_model=64, num_layers=1, num_heads=4, initializer="xavier")
    params = jax.jit(Transformer(config).init)(jax.random.key(0), *example(config))["params"]
    of = {"query": 1 / 128, "key": 1 / 128, "value": 1 / 128, "out": 1 / 64, "up": 2 / 320, "down": 2 / 320}
    found = 0
    for path, weight in flatten_dict(params).items():
        if path[-2] in of and path[-1].startswith("w_"):
            assert weight.std() == pytest.approx(of[path[-2]] ** 0.5, rel=0.05), path
            found += 1
    assert found == (16 if mode == "encoder-decoder" else 6)


# --- who sees whom


@every_variant
def test_no_token_sees_a_later_one(config):
    """Another token changes no logits before it, to the last bit, and changes its own and the next one's."""
    target, source = example(config)
    before, after = forward(config, target, source), forward(config, change(target, 9), source)
    np.testing.assert_array_equal(after[:, :9], before[:, :9])
    assert (after != before)[:, 9:11].any(-1).all()


@every_variant
def test_padding_changes_nothing(config):
    """Right, left or both, in target and source, whatever ids it has, and none after the target."""
    right = forward(config, *rows(config, (0, 0, 1)))[:, :8]
    for place, source_place in ((TARGET - 8, SOURCE - 6), (5, 3), (0, 5), (3, 0)):
        padded = forward(config, *rows(config, (place, source_place, 1)))[:, place : place + 8]
        assert_close(padded, right, config)
    _, source = rows(config, (0, 0, 1))
    whole = document(config, 1, TARGET)
    cut = pack(TARGET, (0, take(whole, np.s_[:, :8])))
    assert_close(forward(config, cut, source)[:, :8], forward(config, whole, source)[:, :8], config)


@pytest.mark.parametrize("label", ["plain", "t5-cross", "rope-yarn-cross"])
def test_padding_is_no_padding(label):
    """Padded target and source give the logits of target and source at their own lengths."""
    config = variant(label, "encoder-decoder")
    alone = forward(config, document(config, 1, 8), document(config, 1001, 6))
    assert_close(forward(config, *rows(config, (7, 5, 1)))[:, 7:15], alone, config)


@every_variant
def test_packed_documents_are_alone(config):
    """Two documents in a row are as each by itself, and do not change, to the last bit, with the other.

    But of experts with a capacity: which of their places a token takes depends on the row, and so does its rounding.
    """
    first, second, third = (1, 0, 1), (10, 7, 2), (1, 0, 3)
    packed = forward(config, *rows(config, first, second))
    assert_close(packed[:, 1:9], forward(config, *rows(config, first))[:, 1:9], config)
    assert_close(packed[:, 10:], forward(config, *rows(config, second))[:, 10:], config)
    changed = forward(config, *rows(config, third, second))
    if config.expert_capacity:
        assert_close(changed[:, 10:], packed[:, 10:], config)
    else:
        np.testing.assert_array_equal(changed[:, 10:], packed[:, 10:])
    assert (changed != packed)[:, 1:9].any()


@every_variant
def test_rows_are_alone(config):
    """Rows in another order give the same logits in that order (to 1e-6)."""
    inputs, order = example(config), np.array([2, 0, 1])
    logits = forward(config, *take(inputs, order))
    np.testing.assert_allclose(logits, forward(config, *inputs)[order], rtol=0, atol=1e-6)


@every_variant
def test_rows_of_only_padding_are_finite(config):
    """An empty target, an empty source and both are finite, and leave the other rows as they are, to the last bit."""
    target, source = example(config)
    logits, keep = forward(config, target, source), np.array([[0], [1], [1]])

    def emptied(tokens):
        return tokens if tokens is None else tokens.replace(segments=np.asarray(tokens.segments * keep))

    for inputs in ((emptied(target), source), (target, emptied(source)), (emptied(target), emptied(source))):
        emptied_logits = forward(config, *inputs)
        assert np.isfinite(emptied_logits).all()
        np.testing.assert_array_equal(emptied_logits[1:], logits[1:])
    if source is not None:
        without, other = (forward(config, target, emptied(given)) for given in (source, change(source, 2)))
        np.testing.assert_array_equal(without[0], other[0])


def test_gradients_of_only_padding_are_finite():
    """Rows that may attend to nothing, with norms of queries and keys, send no NaN back."""
    config = variant("rope-llama3", "encoder-decoder").replace(num_layers=1)
    target, source = example(config)
    target, source = (x.replace(segments=np.asarray(x.segments) * [[0], [1], [1]]) for x in (target, source))
    gradients = jit(jax.grad(lambda params: jnp.square(Transformer(config).apply(params, target, source)).sum()))
    for path, gradient in flatten_dict(gradients(variables(config))).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 3])
def test_the_mask_is_its_rule(causal, window):
    """Every pair is as a loop over queries and keys says."""
    random = np.random.default_rng(0)

    def tokens(length):
        prefix = random.random((2, length)) < 0.3
        return Tokens(np.zeros((2, length), int), *random.integers(0, 4, (2, 2, length)), prefix=prefix)

    q, kv = tokens(9), tokens(12)
    mask = np.asarray(sees(q, kv, causal, window))
    for b, t, s in np.ndindex(mask.shape):
        gone = q.positions[b, t] - kv.positions[b, s]
        seen = kv.segments[b, s] != 0 and q.segments[b, t] == kv.segments[b, s]
        seen = seen and (not causal or gone >= 0 or kv.prefix[b, s]) and (not window or abs(gone) < window)
        assert mask[b, t, s] == seen, (b, t, s)


def test_a_window_ends_where_it_says():
    """In a layer of window 3, a token reaches the two after it, in an encoder the two before it too; layers add up."""
    base = variant("plain", "encoder-decoder").replace(windows=(3,), num_layers=1, num_encoder_layers=1)
    decoder = base.replace(mode="decoder-only", position="rope")
    target, _ = example(decoder)
    changed = (forward(decoder, change(target, 9), None) != forward(decoder, target, None)).any((0, 2))
    assert np.flatnonzero(changed).tolist() == [9, 10, 11]
    two = decoder.replace(num_layers=2, windows=(2, 3))
    changed = (forward(two, change(target, 9), None) != forward(two, target, None)).any((0, 2))
    assert np.flatnonzero(changed).tolist() == [9, 10, 11, 12]

    def keys(source):
        return np.asarray(compiled(base, "encode")(variables(base), source).layers[0].k_BSGK)

    _, source = example(base)
    changed = (keys(change(source, 7)) != keys(source)).any((0, 2, 3))
    assert np.flatnonzero(changed).tolist() == [5, 6, 7, 8, 9]
    base = base.replace(encoder_windows=(2,))
    changed = (keys(change(source, 7)) != keys(source)).any((0, 2, 3))
    assert np.flatnonzero(changed).tolist() == [6, 7, 8]


def test_a_prefix_sees_all_of_itself():
    """A later prefix token changes earlier ones, a target token none before it; without a prefix all is causal."""
    config = variant("none-prefix")
    target = document(config, 1, TARGET)
    target = target.replace(prefix=np.asarray(target.positions) < 6)
    logits = forward(config, target)
    assert (forward(config, change(target, 5)) != logits)[:, :6].any(-1).all()
    later = forward(config, change(target, 9))
    np.testing.assert_array_equal(later[:, :9], logits[:, :9])
    assert (later != logits)[:, 9:].any(-1).all()
    plain = target.replace(prefix=np.zeros_like(target.prefix))
    assert_close(forward(config, plain), forward(config, plain.replace(prefix=None)), config)
    everything = Tokens.from_ids(target.ids, prefix=True)
    assert (forward(config, change(everything, TARGET - 1)) != forward(config, everything)).any(-1).all()


# --- the same numbers by another way


def in_chunks(config, target, source, lengths, cache=None):
    """Logits by decoding a chunk at a time; without a cache the first chunk makes one, with more slots than needed."""
    params, place, logits = variables(config), 0, []
    memory = compiled(config, "encode")(params, source) if has_source(config) else None
    for length in lengths:
        chunk = take(target, np.s_[:, place : place + length])
        if cache is None:
            fill = jit(functools.partial(Transformer(config).apply, room=Room(TARGET + 3), method="decode"))
            chunk_logits, cache = fill(params, chunk, memory)
        else:
            chunk_logits, cache = compiled(config, "decode")(params, chunk, memory, cache)
        place, logits = place + length, [*logits, np.asarray(chunk_logits)]
    assert cache.index == place
    return np.concatenate(logits, 1), cache


@some_variants
def test_cached_decoding_is_the_forward_pass(config):
    """A first chunk, then token by token; and in two chunks into an empty cache; left padding in one row.

    A layer with a window has no more slots than that. (A prefix that sees all of itself is one chunk.)
    """
    target, source = example(config, seed=5)
    padded = Tokens.from_ids(np.asarray(target.ids) * (np.arange(TARGET) >= [[0], [3], [0]]), pad_id=0)
    target = padded.replace(prefix=target.prefix if target.prefix is None else np.arange(TARGET) + padded.ids * 0 < 6)
    half = TARGET // 2
    full = forward(config, target, source)
    logits, cache = in_chunks(config, target, source, (half, *[1] * half))
    assert_close(logits, full, config)
    windows = [config.windows[number % len(config.windows)] for number in range(len(cache.layers))]
    assert [held.keys.shape[-2] for held in cache.layers] == [window or TARGET + 3 for window in windows]
    if has_source(config) == (config.cross_position == "same"):  # each row of CHOICES in one mode, to save compiling
        empty = Cache.empty(config, len(target.ids), Room(TARGET + 3, chunk=half))
        assert_close(in_chunks(config, target, source, (half, half), empty)[0], full, config)


@pytest.mark.parametrize(
    "config", [variant("rope-gqa", "encoder-decoder"), variant("rope-ntk-mqa", "decoder-only")], ids=name
)
def test_grouped_heads_are_repeated_heads(config):
    """Multi-head attention whose key/value heads are repeated equals grouped-query attention."""
    full = config.replace(num_kv_heads=config.num_heads)

    def repeated(path, array):
        letters = letters_of(path, array.ndim)
        return np.repeat(array, config.num_heads // config.num_kv_heads, letters.find("G")) if "G" in letters else array

    params = {path: repeated(path, array) for path, array in flatten_dict(variables(config)).items()}
    target, source = example(config)
    logits = compiled(full)(unflatten_dict(params), target, source)
    assert_close(logits, forward(config, target, source), config)


def test_scales_are_factors():
    """Of embeddings, queries and logits, and the cap of the latter; a tied output is the table, transposed."""
    config = variant("rope-gqa")
    params = flatten_dict(variables(config)["params"])
    table, output = ("embedding", "table_VD"), ("output", "w_DV")
    factors = {path: config.head_dim**-0.5 / 0.3 for path in params if path[-2] == "query"}
    factors[table] = config.d_model**0.5
    target, _ = example(config)
    scaled = config.replace(scale_embeddings=False, query_scale=0.3, scale_logits=True, logits_softcap=0.5)
    logits = compiled(scaled)(
        {"params": unflatten_dict({path: array * factors.get(path, 1) for path, array in params.items()})}, target
    )
    wanted = 0.5 * np.tanh(forward(config, target) / config.d_model**0.5 / 0.5)
    assert_close(logits, wanted, config)
    tied = config.replace(tie_embeddings=True)
    untied = {"params": unflatten_dict(params | {output: params[table].T})}
    assert_close(forward(tied, target), compiled(config)(untied, target, None, rngs=None), config)


@pytest.mark.parametrize("config", [config for config in VARIANTS if config.dtype == "bfloat16"], ids=name)
def test_bfloat16_is_close_to_float32(config):
    """Logits are float32 and within 0.1 of the float32 model's (of which the standard deviation is about 1.2)."""
    target, source = example(config)
    logits = forward(config, target, source)
    assert logits.dtype == np.float32
    assert_close(logits, forward(config.replace(dtype="float32"), target, source), config)


def test_float64_is_close_to_float32():
    """Logits are float64 and within 1e-5 of the float32 model's."""
    config = variant("plain", "encoder-decoder")
    target, source = example(config)
    with jax.enable_x64(True):
        logits = forward(config.replace(dtype="float64", param_dtype="float64"), target, source)
    assert logits.dtype == np.float64
    assert_close(logits, forward(config, target, source), config)


@pytest.mark.parametrize("config", [variant("plain"), variant("rope-gqa", "encoder-decoder")], ids=name)
def test_dropout_is_its_key(config):
    """No key is no dropout, one key is one mask, two keys are two."""
    inputs, still = example(config), config.replace(dropout_rate=0.0, attention_dropout_rate=0.0)
    plain = forward(config, *inputs)
    np.testing.assert_array_equal(forward(still, *inputs), plain)
    first, again, other = (forward(config, *inputs, dropout=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    for a, b in ((first, plain), (first, other)):
        assert (a != b).any((1, 2)).all()
    assert (np.diff(first[:, 0], axis=0) != np.diff(plain[:, 0], axis=0)).any()


@pytest.mark.parametrize("config", [*RELATIVE, variant("plain"), variant("learned-post")], ids=name, scope="module")
def test_relative_positions_do_not_shift(config):
    """Rope, ALiBi and T5 know distances only: 7 places on, the same logits (to 2e-5). The absolute ones change."""
    target, source = example(config)
    shifted = (tokens and tokens.replace(positions=tokens.positions + 7) for tokens in (target, source))
    error = np.abs(forward(config, *shifted) - forward(config, target, source)).max()
    assert error < 2e-5 if config in RELATIVE else error > 0.01


@pytest.mark.parametrize("config", [c for c in RELATIVE if has_source(c)], ids=name, scope="module")
def test_cross_attention_has_order_if_asked(config):
    """A source 7 places on changes the logits with order in cross-attention, and without it (to 2e-5) nothing."""
    target, source = example(config)
    shifted = source.replace(positions=source.positions + 7)
    error = np.abs(forward(config, target, shifted) - forward(config, target, source))
    assert error.max() > 0.01 if config.cross_position == "same" else error.max() < 2e-5
    if config.position == "t5" and config.cross_position == "same":
        assert error[:, 0].max() > 0.01  # keys after the query have buckets of their own
