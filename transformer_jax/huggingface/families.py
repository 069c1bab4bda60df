"""All families, by the `model_type` of their config.json."""

from transformer_jax.huggingface.encoder_decoders import ENCODER_DECODERS
from transformer_jax.huggingface.gemma import GEMMAS
from transformer_jax.huggingface.gpt import GPT
from transformer_jax.huggingface.llama import LLAMAS
from transformer_jax.huggingface.t5gemma import T5GEMMA

FAMILIES = GPT | LLAMAS | GEMMAS | ENCODER_DECODERS | {"t5gemma": T5GEMMA}
