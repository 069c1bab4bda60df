"""Prompts -> new tokens, in both modes: greedy, by sampling, by beam search, and for any number of prompts."""

from transformer_jax.decoding.batches import Output, Prompt, generate_all, stream_one
from transformer_jax.decoding.choice import filter_logits
from transformer_jax.decoding.generate import generate, stream
from transformer_jax.decoding.model import Generated

__all__ = ["Generated", "Output", "Prompt", "filter_logits", "generate", "generate_all", "stream", "stream_one"]
