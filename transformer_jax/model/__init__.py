"""Tokens -> logits: layers, positions, attention, cache and the Transformer that joins them."""
