"""The alphabet: one letter is one axis, in names, in einsums and in the sharding table.

    B batch          T query position       S key position        D model width
    H query heads    G key/value heads      K head width          F feed-forward width
    V vocabulary     L rows of a learned position table           R buckets of relative distance

An array's name ends in its letters (`q_BTHK`). So does a parameter's (`w_DHK`), which is how every tool that walks
the parameter tree (partitioning, weight decay, Muon, import and export) knows what each of its axes means.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from transformer_jax.config import ModelConfig

LETTERS = "BTSDHGKFVLR"


def sizes(config: ModelConfig) -> dict[str, int]:
    """Length of every axis that a parameter can have."""
    return {
        "D": config.d_model,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "K": config.head_dim,
        "F": config.d_ff,
        "V": config.vocab_size,
        "L": config.max_length,
        "R": config.relative_buckets,
    }


def letters_of(path: Sequence[str], ndim: int) -> str:
    """The letters of the array at `path` in a parameter or optimizer tree, `""` where it has none.

    The last part of the path that ends in `_` and letters decides. An array of another rank (a factored second
    moment, a counter) is not laid out like the parameter, so it has none.
    """
    for name in reversed(path):
        tail = name.rpartition("_")[2]
        if tail and all(letter in LETTERS for letter in tail):
            return tail if len(tail) == ndim else ""
    return ""


def path_names(path: tuple[Any, ...]) -> list[str]:
    """The names along a path of `jax.tree_util`."""
    return [str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path]


def map_named(f: Callable[[list[str], Any], Any], tree: Any) -> Any:
    """`f(names along the path, leaf)` for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(path_names(path), leaf), tree)
