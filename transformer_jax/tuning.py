"""Fine-tuning: which parameters move.

`split` parts a model's parameters into those that are trained and those that stay; `join` puts them together again, a
pure function that the loss begins with. Neither the model nor the optimizer knows of it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from transformer_jax.axes import letters_of
from transformer_jax.config import TuningConfig
from transformer_jax.errors import InputError

Array = jax.Array
Tree = Any
A, B = "lora_a", "lora_b"
RANK = "r"  # the letter of the axis between the two


def _flat(tree: Tree) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="/"))


def _nested(flat: Mapping[str, Any]) -> Tree:
    return unflatten_dict(dict(flat), sep="/")


def sides(letters: str) -> tuple[str, str, str]:
    """The letters of a weight: what there are several of (layers of a loop, experts), inputs, outputs.

    A router, which ends in DE, has experts for outputs.
    """
    many = "".join(letter for letter in letters if letter in ("N" if letters.endswith("DE") else "NE"))
    rest = "".join(letter for letter in letters if letter not in many)
    return (many, rest[0], rest[1:]) if rest[0] == "D" else (many, rest[:-1], rest[-1])


def ranks_of(paths: Mapping[str, Any], config: TuningConfig) -> dict[str, int]:
    """The rank of the adapter of each weight that gets one, by its path; the first pattern that fits counts.

    Raises:
        InputError: a pattern fits no weight.
    """
    weights, ranks = [path for path in paths if path.rpartition("/")[2].startswith("w_")], {}
    for text in config.lora:
        pattern, _, rank = text.rpartition("=")
        found = [path for path in weights if re.search(pattern, path)]
        if not found:
            raise InputError(f"tuning.lora={text!r} fits no weight. There are {', '.join(weights[:8])}, ...")
        ranks = dict.fromkeys(found, int(rank)) | ranks
    return ranks


def _frozen(paths: Mapping[str, Any], config: TuningConfig) -> set[str]:
    """The paths that stay as they are. Raises InputError for a pattern that fits nothing, or all there is."""
    frozen, some = set[str](), ", ".join(list(paths)[:8])
    for pattern in config.freeze:
        found = {path for path in paths if re.search(pattern, path)}
        if not found:
            raise InputError(f"tuning.freeze={pattern!r} fits no parameter. There are {some}, ...")
        frozen |= found
    if frozen and len(frozen) == len(paths):
        raise InputError(f"tuning.freeze={config.freeze} leaves nothing to train.")
    return frozen


def split(params: Tree, config: TuningConfig, key: Array) -> tuple[Tree, Tree | None]:
    """(what is trained, what stays), both with the paths of the parameters; None where nothing stays.

    With LoRA (Hu et al. 2022) two thin matrices are trained beside each weight that the patterns name, the first drawn
    uniformly within 1 / sqrt(inputs), the second zero, and all else stays.

    Raises:
        InputError: a pattern fits nothing.
    """
    flat = _flat(params)
    if config.lora:
        adapters = {}
        for number, (path, rank) in enumerate(ranks_of(flat, config).items()):
            w, module = flat[path], path.rpartition("/")[0]
            letters = letters_of(path.split("/"), w.ndim)
            many, inputs, outputs = sides(letters)
            length = dict(zip(letters, w.shape, strict=True)) | {RANK: rank}
            bound = math.prod(length[letter] for letter in inputs) ** -0.5
            first, second = (tuple(length[letter] for letter in many + x) for x in (inputs + RANK, RANK + outputs))
            drawn = jax.random.uniform(jax.random.fold_in(key, number), first, w.dtype, -bound, bound)
            adapters |= {f"{module}/{A}": drawn, f"{module}/{B}": jnp.zeros(second, w.dtype)}
        return _nested(adapters), params
    if not config.freeze:
        return params, None
    frozen = _frozen(flat, config)
    parts = ({path: x for path, x in flat.items() if (path in frozen) == stays} for stays in (False, True))
    trained, stays = map(_nested, parts)
    return trained, stays


def deltas(adapters: Tree, paths: Mapping[str, Any], config: TuningConfig) -> dict[str, Array]:
    """What each adapter adds to its weight, by the weight's path."""
    flat, found = _flat(adapters), {}
    for path, a in flat.items():
        module, _, name = path.rpartition("/")
        if name == A:
            weight = next(each for each in paths if each.startswith(f"{module}/w_"))
            letters = letters_of(weight.split("/"), paths[weight].ndim)
            many, inputs, outputs = sides(letters)
            einsum = f"{many}{inputs}{RANK},{many}{RANK}{outputs}->{letters}"
            found[weight] = jnp.einsum(einsum, a, flat[f"{module}/{B}"]) * (config.lora_alpha / a.shape[-1])
    return found


def join(trained: Tree, stays: Tree | None, config: TuningConfig) -> Tree:
    """The parameters of the model."""
    if stays is None:
        return trained
    flat = _flat(stays)
    if not config.lora:
        return _nested(flat | _flat(trained))
    return _nested(flat | {path: flat[path] + delta for path, delta in deltas(trained, flat, config).items()})


def resized(rows: Array, count: int, axis: int) -> Array:
    """An array with so many rows along the axis of the vocabulary: the first ones, and for new tokens the mean."""
    have = rows.shape[axis]
    kept = jax.lax.slice_in_dim(rows, 0, min(have, count), axis=axis)
    mean = jnp.mean(rows, axis, keepdims=True).astype(rows.dtype)
    return jnp.concatenate([kept, jnp.repeat(mean, max(count - have, 0), axis)], axis)
