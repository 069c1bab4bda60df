"""One Transformer in JAX: a full encoder-decoder or a causal decoder-only model, by one switch."""

from transformer_jax.config import ModelConfig
from transformer_jax.model.transformer import Transformer
from transformer_jax.tokens import Batch, Tokens

__all__ = ["Batch", "ModelConfig", "Tokens", "Transformer"]
__version__ = "0.1.0"
