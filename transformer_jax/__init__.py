"""One Transformer in JAX: a full encoder-decoder or a causal decoder-only model, by one switch."""

# ruff: noqa: F403, F405 - the names are those of public.py
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_jax.public import *

__all__ = [
    "Batch",
    "Cache",
    "Generated",
    "Loss",
    "LossConfig",
    "Memory",
    "Mode",
    "ModelConfig",
    "OptimizerConfig",
    "Run",
    "RunConfig",
    "Tokens",
    "TrainState",
    "Transformer",
    "add_attention",
    "attention_logits",
    "generate",
    "int8_weights",
    "load_huggingface",
    "load_run",
    "make_loss",
    "make_optimizer",
    "save_huggingface",
    "train_step",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name. JAX is imported with the first one: a wrong flag is answered without it, and data prepared."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformer_jax import public

    return getattr(public, name)
