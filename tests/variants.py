"""Tiny models that cover every choice of the config, in both modes: VARIANTS, and functions that run them.

What comes in is a config; what goes out are NumPy logits. Compiled functions and parameters are kept, so that all laws
over one variant share them as long as they keep to the one shape: ROWS, TARGET and SOURCE.
"""

import functools
import zlib
from typing import Any, get_args

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from transformer_jax import ModelConfig, Tokens, Transformer
from transformer_jax.config import Mode, RopeConfig

ROWS, TARGET, SOURCE = 3, 18, 14
TINY: dict[str, Any] = dict(
    vocab_size=23, d_model=16, num_layers=1, num_encoder_layers=1, num_heads=4, d_ff=24, max_length=32
)
CHOICES: dict[str, dict[str, Any]] = {
    "plain": dict(dropout_rate=0.2, attention_dropout_rate=0.2, num_layers=2),
    "learned-post": dict(
        position="learned",
        norm_placement="post",
        embedding_norm=True,
        activation="gelu",
        scale_embeddings=False,
        num_layers=2,
        num_encoder_layers=2,
        position_offset=2,
        output_bias=True,
        initializer="xavier",
    ),
    "none-prefix": dict(
        position="none",
        prefix_attention="bidirectional",
        share_source_embedding=False,
        num_encoder_layers=2,
        attention="reference",
    ),
    "t5": dict(
        position="t5",
        relative_buckets=8,
        relative_max_distance=6,
        norm="rmsnorm1p",
        use_bias=False,
        query_scale=1.0,
        scale_embeddings=False,
        scale_logits=True,
        num_layers=2,
        attention="blocks",
    ),
    "t5-cross": dict(
        position="t5",
        cross_position="same",
        relative_buckets=12,
        relative_max_distance=16,
        activation="gelu_tanh",
        gated=True,
        tie_embeddings=False,
        attention_softcap=4.0,
    ),
    "rope-gqa": dict(
        position="rope",
        norm="rmsnorm",
        use_bias=False,
        activation="silu",
        gated=True,
        num_kv_heads=2,
        tie_embeddings=False,
        dropout_rate=0.2,
        attention="xla",
        qkv_bias=True,
    ),
    "rope-linear-cross": dict(
        position="rope",
        cross_position="same",
        rope=RopeConfig(fraction=0.5, scaling="linear", factor=2.0, local_base=100.0),
        activation="tanh",
        parallel_residual=True,
        windows=(3,),
        param_dtype="bfloat16",
    ),
    "rope-ntk-mqa": dict(
        position="rope", rope=RopeConfig(scaling="ntk", factor=4.0), num_kv_heads=1, qk_norm=True, attention="splash"
    ),
    "rope-llama3": dict(
        position="rope",
        rope=RopeConfig(base=500.0, scaling="llama3", factor=8.0, original_length=64),
        norm="rmsnorm",
        qk_norm=True,
        head_dim=6,
        norm_placement="sandwich",
        attention_softcap=2.0,
        logits_softcap=3.0,
        windows=(3, 0),
        num_layers=2,
    ),
    "rope-yarn-cross": dict(
        position="rope",
        cross_position="same",
        rope=RopeConfig(scaling="yarn", factor=4.0, original_length=64, high=32.0),
        norm_placement="sandwich",
        head_dim=8,
        attention="cudnn",
    ),
    "alibi-window": dict(
        position="alibi", windows=(0, 3), num_layers=2, activation="relu_squared", norm_placement="post"
    ),
    "alibi-cross": dict(
        position="alibi",
        cross_position="same",
        num_heads=3,
        head_dim=5,
        embedding_norm=True,
        num_experts=2,
        expert_capacity=8.0,
        normalize_gates=False,
        remat="full",
    ),
    "experts-scan": dict(
        num_experts=3,
        num_shared_experts=1,
        gated=True,
        activation="silu",
        scan_layers=True,
        remat="dots",
        windows=(0, 3),
        encoder_windows=(5,),
        num_layers=4,
        num_encoder_layers=2,
        dropout_rate=0.2,
    ),
    "bfloat16": dict(position="sinusoidal_t2t", position_offset=2, dtype="bfloat16", windows=(3,)),
}
NAMES = {
    ModelConfig(mode=mode, **TINY | choice): f"{label}-{mode}"
    for label, choice in CHOICES.items()
    for mode in get_args(Mode)
}
VARIANTS = list(NAMES)


def name(config: ModelConfig) -> str:
    """The name of a variant, for `ids`."""
    return NAMES[config]


def variant(label: str, mode: Mode = "decoder-only") -> ModelConfig:
    """The variant of a row of CHOICES in one mode."""
    return ModelConfig(mode=mode, **TINY | CHOICES[label])


def has_source(config: ModelConfig) -> bool:
    return config.mode == "encoder-decoder"


def document(config: ModelConfig, seed: int, length: int) -> Tokens:
    """Random documents, one a row, without padding; where a prefix sees all of itself, it is their first two tokens."""
    ids_BT = np.random.default_rng(seed).integers(1, TINY["vocab_size"], (ROWS, length))
    tokens = Tokens.from_ids(ids_BT)
    return tokens.replace(prefix=tokens.positions < 2) if config.prefix_attention == "bidirectional" else tokens


def example(config: ModelConfig, seed: int = 0) -> tuple[Tokens, Tokens | None]:
    """A target, and the source of an encoder-decoder."""
    return document(config, seed, TARGET), document(config, seed + 1000, SOURCE) if has_source(config) else None


def pack(length: int, *placed: tuple[int, Tokens]) -> Tokens:
    """Rows of `length` with documents that start at the given places; between them is padding, with random ids."""
    shape = (ROWS, length)
    ids_BT, segments_BT = np.random.default_rng(length).integers(1, TINY["vocab_size"], shape), np.zeros(shape, int)
    positions_BT, prefix_BT = np.zeros(shape, int), np.zeros(shape, bool)
    for segment, (place, tokens) in enumerate(placed, 1):
        here = np.s_[:, place : place + tokens.ids.shape[1]]
        ids_BT[here], segments_BT[here], positions_BT[here] = tokens.ids, segment, tokens.positions
        prefix_BT[here] = False if tokens.prefix is None else tokens.prefix
    arrays = (np.asarray(array, np.int32) for array in (ids_BT, segments_BT, positions_BT))
    return Tokens(*arrays, prefix=None if placed[0][1].prefix is None else prefix_BT)


def change(tokens: Tokens, *places: int) -> Tokens:
    """The same tokens with another id at some places of every row."""
    ids_BT = np.array(tokens.ids)
    ids_BT[:, places] = ids_BT[:, places] % (TINY["vocab_size"] - 1) + 1
    return tokens.replace(ids=ids_BT)


@functools.cache
def variables(config: ModelConfig) -> dict[str, Any]:
    """Random parameters, where norms and biases are random too; those of the same path are the same in any config.

    They are drawn by NumPy, as compiling `init` takes longer than all of a variant's laws.
    """

    def draw(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = np.random.default_rng(zlib.crc32("/".join(path).encode())).normal(0, 0.3, leaf.shape)
        return (noise + path[-1].startswith("scale_")).astype(leaf.dtype)

    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), *example(config))
    return unflatten_dict({path: draw(path, leaf) for path, leaf in flatten_dict(shapes).items()})


def jit(function):
    """`jax.jit`, half as long to compile."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    return jax.jit(function, compiler_options=options)


@functools.cache
def compiled(config: ModelConfig, method: str = "__call__"):
    """The jitted `apply` of a model's method."""
    return jit(functools.partial(Transformer(config).apply, method=method))


def forward(config: ModelConfig, target: Tokens, source: Tokens | None = None, **rngs: jax.Array) -> np.ndarray:
    """Logits of a variant with its `variables`, [B, T, V]; with `dropout=key` it drops out."""
    return np.asarray(compiled(config)(variables(config), target, source, rngs=rngs or None))
