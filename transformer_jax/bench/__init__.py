"""Benchmarks: what is compared takes turns in one process, and every row is a ratio of medians."""
