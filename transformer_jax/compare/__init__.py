"""Encoder-decoder, decoder-only and prefix LM on the same data, at a matched budget."""

from typing import Any

ARMS: dict[str, dict[str, Any]] = {  # what is changed of a recipe's model
    "encoder-decoder": {"mode": "encoder-decoder", "prefix_attention": "causal"},
    "decoder-only": {"mode": "decoder-only", "prefix_attention": "causal"},
    "prefix-lm": {"mode": "decoder-only", "prefix_attention": "bidirectional"},
}
