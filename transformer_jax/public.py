"""The public names, imported; `import transformer_jax` alone waits with that until one of them is used."""

# ruff: noqa: F401 - which names they are is said there

from transformer_jax import __all__ as __all__
from transformer_jax.config import LossConfig, Mode, ModelConfig, OptimizerConfig, RunConfig
from transformer_jax.decoding import Generated, generate
from transformer_jax.huggingface.run import load_huggingface, save_huggingface
from transformer_jax.model.backends import add_attention, attention_logits
from transformer_jax.model.cache import Cache
from transformer_jax.model.int8 import int8_weights
from transformer_jax.model.transformer import Memory, Transformer
from transformer_jax.objective import Loss, make_loss
from transformer_jax.optimizer import make_optimizer
from transformer_jax.run import Run, load_run
from transformer_jax.step import TrainState, train_step
from transformer_jax.tokens import Batch, Tokens
