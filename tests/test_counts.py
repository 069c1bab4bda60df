"""Parameter counts of published models, from shapes alone: no array is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import ModelConfig, Tokens, Transformer

DECODER = dict(mode="decoder-only")
VASWANI = dict(vocab_size=37_000, norm_placement="post")
PUBLISHED = {
    # Radford et al. 2019, as `gpt2` is on the hub
    "gpt2": (
        124_439_808,
        DECODER | dict(vocab_size=50257, d_model=768, num_layers=12, num_heads=12, max_length=1024, position="learned"),
    ),
    # Raffel et al. 2020
    "t5-small": (
        60_506_624,
        dict(vocab_size=32128, d_model=512, num_layers=6, num_heads=8, head_dim=64, d_ff=2048, position="t5")
        | dict(norm="rmsnorm", use_bias=False),
    ),
    # Lewis et al. 2020; its positions start at 2, so their tables have 1,026 rows
    "bart-base": (
        139_420_416,
        dict(vocab_size=50265, d_model=768, num_layers=6, num_heads=12, max_length=1026, position="learned")
        | dict(norm_placement="post", embedding_norm=True, activation="gelu"),
    ),
    # Grattafiori et al. 2024
    "llama-3-8b": (
        8_030_261_248,
        DECODER
        | dict(vocab_size=128256, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, d_ff=14336)
        | dict(norm="rmsnorm", use_bias=False, gated=True, position="rope", tie_embeddings=False),
    ),
    # Vaswani et al. 2017, table 3 (65 and 213 million): with one table of 37,000 rows and biases everywhere
    "transformer-base": (63_082_496, VASWANI),
    "transformer-big": (214_245_376, VASWANI | dict(d_model=1024, num_heads=16, d_ff=4096)),
}


def count(config: ModelConfig) -> int:
    """Parameters of a model."""
    tokens = Tokens.from_ids(jnp.ones((1, 2), jnp.int32))
    source = tokens if config.mode == "encoder-decoder" else None
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, source)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(name):
    """Exactly."""
    published, fields = PUBLISHED[name]
    assert count(ModelConfig(**fields)) == published


@pytest.mark.parametrize("name", ["transformer-base", "t5-small"])
def test_the_switch_counts(name):
    """Decoder-only is less by the encoder, cross-attention with its norm, and nothing else."""
    config = ModelConfig(**PUBLISHED[name][1])
    attention, norm, feed_forward = 4 * 512 * 512, 512, 2 * 512 * 2048
    final, table = norm, 32 * 8  # of the encoder: its final norm, its relative bias
    if config.use_bias:
        attention, norm, feed_forward, final, table = attention + 4 * 512, 2 * 512, feed_forward + 2048 + 512, 0, 0
    encoder, cross = 6 * (attention + feed_forward + 2 * norm) + final + table, 6 * (attention + norm)
    assert count(config) - count(config.replace(mode="decoder-only")) == encoder + cross
