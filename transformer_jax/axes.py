"""The alphabet: one letter is one axis, in names, in einsums and in the table that splits arrays over devices.

    B batch          T query position       S key position        D model width
    H query heads    G key/value heads      K head width          F feed-forward width
    V vocabulary     L rows of a learned position table           R buckets of relative distance
    E experts        C places an expert has for a row's tokens    N layers that are scanned over

An array's name ends in its letters (`q_BTHK`). So does a parameter's (`w_DHK`), which is how every tool that walks
the parameter tree (partitioning, weight decay, Muon, import and export) knows what each of its axes means.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from transformer_jax.config import ModelConfig

LETTERS = "BTSDHGKFVLRECN"
SCANNED = "layers"  # the part of a path below which every array has the axis N before its own

# letter: the mesh axes that it is split over, as far as they are not taken by a letter further up. A letter that is
# not here is whole everywhere. So D is split over fsdp in parameters, and in activations, where B is, it is not.
RULES: dict[str, tuple[str, ...]] = {
    "E": ("expert",),
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "S": ("context",),
    "V": ("tensor",),
    "H": ("tensor",),
    "G": ("tensor",),
    "F": ("tensor",),
    "D": ("fsdp",),
}
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

Split = dict[str, tuple[str, ...]]


def sizes(config: ModelConfig) -> dict[str, int]:
    """Length of every axis that a parameter can have."""
    return {
        "D": config.d_model,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "K": config.head_dim,
        "F": config.d_ff,
        "V": config.vocab_size,
        "L": config.max_length + config.position_offset,
        "R": config.relative_buckets,
        "E": config.num_experts,
    }


def letters_of(path: Sequence[str], ndim: int) -> str:
    """The letters of the array at `path` in a parameter or optimizer tree, `""` where it has none.

    The last part of the path that ends in `_` and letters decides. An array of another rank (a factored second
    moment, a counter) is not laid out like the parameter, so it has none.
    """
    for name in reversed(path):
        tail = name.rpartition("_")[2]
        if tail and all(letter in LETTERS for letter in tail):
            letters = "N" + tail if SCANNED in path else tail
            return letters if len(letters) == ndim else ""
    return ""


def path_names(path: tuple[Any, ...]) -> list[str]:
    """The names along a path of `jax.tree_util`."""
    return [str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path]


def map_named(f: Callable[[list[str], Any], Any], tree: Any) -> Any:
    """`f(names along the path, leaf)` for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(path_names(path), leaf), tree)


def mesh_in_use() -> dict[str, int]:
    """The mesh axes that a function is being compiled for, with their sizes; none outside the strategy `mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    named = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in named if kind == AxisType.Auto and size > 1}


def split(lengths: Mapping[str, int], mesh: Mapping[str, int], given: Split | None = None) -> Split:
    """The mesh axes that each letter of an array is split over. An axis that cannot be split evenly is whole.

    With `given`, the split of an array that this one meets, only what that leaves is shared out.
    """
    result: Split = dict(given or {})
    taken = {axis for axes in result.values() for axis in axes}
    for letter, axes in RULES.items():
        if letter in result:
            continue
        free = tuple(axis for axis in axes if mesh.get(axis, 1) > 1 and axis not in taken)
        if free and letter in lengths and lengths[letter] % math.prod(mesh[axis] for axis in free) == 0:
            result[letter] = free
            taken.update(free)
    return result


def axes_of(where: Split, letters: Iterable[str]) -> tuple[str, ...]:
    """All mesh axes that these letters are split over."""
    return tuple(axis for letter in letters for axis in where.get(letter, ()))


def spec(letters: str, where: Split) -> PartitionSpec:
    """A split as JAX writes it for an array with these letters."""
    return PartitionSpec(*(where.get(letter) for letter in letters))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Name the axes of an activation, which says where it lives; the same values. `.` is whole."""
    mesh = mesh_in_use()
    if not mesh:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters, split(dict(zip(letters, x.shape, strict=True)), mesh)))


def varying(x: jax.Array, axes: Iterable[str], already: Iterable[str] = ()) -> jax.Array:
    """Says within a `shard_map` that x will be used differently along these mesh axes, as it is along those that it is
    split over already. Its gradient is summed over them here, once, however often x is used."""
    new = tuple(axis for axis in axes if axis not in already)
    return jax.lax.pcast(x, new, to="varying") if new else x


def gathered(x: jax.Array, letters: str, have: Split, want: Split) -> jax.Array:
    """A part of an array within a `shard_map`, with the axes that are split in `have` and not in `want` made whole.

    Its gradient is summed and split again in one go (reduce-scatter).
    """
    for place, letter in enumerate(letters):
        for axis in reversed([axis for axis in have.get(letter, ()) if axis not in want.get(letter, ())]):
            x = jax.lax.all_gather(x, axis, axis=place, tiled=True)
    return x
