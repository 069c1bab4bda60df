"""Encoder-decoder, decoder-only and prefix LM on the same data, at a matched budget."""
