"""All families, by the `model_type` of their config.json."""

from transformer_jax.huggingface.decoders import DECODERS
from transformer_jax.huggingface.encoder_decoders import ENCODER_DECODERS

FAMILIES = DECODERS | ENCODER_DECODERS
