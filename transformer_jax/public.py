"""The public names, imported; `import transformer_jax` alone waits with that until one of them is used."""

from transformer_jax.config import ModelConfig, RunConfig
from transformer_jax.decoding import Generated, generate
from transformer_jax.huggingface.run import load_huggingface, save_huggingface
from transformer_jax.model.cache import Cache
from transformer_jax.model.int8 import int8_weights
from transformer_jax.model.transformer import Memory, Transformer
from transformer_jax.objective import make_loss
from transformer_jax.optimizer import make_optimizer
from transformer_jax.run import Run, load_run
from transformer_jax.step import TrainState, train_step
from transformer_jax.tokens import Batch, Tokens

__all__ = [
    "Batch",
    "Cache",
    "Generated",
    "Memory",
    "ModelConfig",
    "Run",
    "RunConfig",
    "Tokens",
    "TrainState",
    "Transformer",
    "generate",
    "int8_weights",
    "load_huggingface",
    "load_run",
    "make_loss",
    "make_optimizer",
    "save_huggingface",
    "train_step",
]
