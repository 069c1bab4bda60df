"""Rows that say which array of ours is which tensor of theirs, and how its axes lie there. They serve both ways."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from transformer_jax.axes import SCANNED
from transformer_jax.config import ModelConfig

STACKED = "n"  # the letter of an axis along which several arrays of ours lie in one tensor of theirs


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of theirs for each block, and each expert where there are some.

    Attributes:
        theirs: its name, with {i} for a block's number and {e} for an expert's.
        layouts: its axes in our letters, grouped as einops does (`(H K) D`): one layout for all arrays of ours, with
            STACKED where they alternate, or one for each, which then lie end to end along the first axis.
        ours: the paths of our arrays, whose names end in their letters, with {i} as in theirs.
    """

    theirs: str
    layouts: tuple[str, ...]
    ours: tuple[str, ...]

    def split(self, tensor: np.ndarray, length: dict[str, int]) -> list[np.ndarray]:
        """Our arrays, views of the tensor where that can be."""
        if len(self.layouts) == 1:
            count = {STACKED: len(self.ours)} if len(self.ours) > 1 else {}
            parts = _turned(tensor, self.layouts[0], STACKED * bool(count) + self._letters(0), length | count)
            return list(parts) if count else [parts]
        ends = np.cumsum([_shape(layout, length)[0] for layout in self.layouts])[:-1]
        pieces = np.split(tensor, ends)
        return [
            _turned(piece, layout, self._letters(number), length)
            for number, (piece, layout) in enumerate(zip(pieces, self.layouts, strict=True))
        ]

    def joined(self, arrays: Sequence[np.ndarray], length: dict[str, int]) -> np.ndarray:
        """Their tensor, from our arrays."""
        first = self.layouts[0]
        if len(self.layouts) > 1:
            parts = zip(arrays, self.layouts, strict=True)
            back = [_back(array, self._letters(n), layout, length) for n, (array, layout) in enumerate(parts)]
            return np.concatenate(back)
        if len(self.ours) == 1:
            return _back(arrays[0], self._letters(0), first, length)
        return _back(np.stack(arrays), STACKED + self._letters(0), first, length | {STACKED: len(arrays)})

    def shape(self, length: dict[str, int]) -> tuple[int, ...]:
        """Of their tensor."""
        if len(self.layouts) == 1:
            return _shape(self.layouts[0], length | {STACKED: len(self.ours)})
        shapes = [_shape(layout, length) for layout in self.layouts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _letters(self, number: int) -> str:
        """The axes of one of our arrays, without that of the experts where each of theirs is one expert's."""
        letters = self.ours[number].rpartition("_")[2]
        return letters.replace("E", "") if "{e}" in self.theirs else letters


def _used(letters: str, length: dict[str, int]) -> dict[str, int]:
    return {letter: length[letter] for letter in letters}


def _flat(layout: str) -> str:
    return re.sub(r"[^A-Za-z]", "", layout)


def _shape(layout: str, length: dict[str, int]) -> tuple[int, ...]:
    groups = [a or b for a, b in re.findall(r"\(([^)]*)\)|(\w)", layout)]
    return tuple(int(np.prod([length[letter] for letter in _flat(group)])) for group in groups)


def _turned(tensor: np.ndarray, layout: str, letters: str, length: dict[str, int]) -> np.ndarray:
    return _rearranged(tensor, f"{layout} -> {' '.join(letters)}", _used(_flat(layout), length))


def _back(array: np.ndarray, letters: str, layout: str, length: dict[str, int]) -> np.ndarray:
    return _rearranged(array, f"{' '.join(letters)} -> {layout}", _used(letters, length))


def _rearranged(array: np.ndarray, pattern: str, length: dict[str, int]) -> np.ndarray:
    from einops import rearrange  # only who moves weights needs it

    return rearrange(array, pattern, **length)


# --- what most rows are


def linear(theirs: str, ours: str, layout: str, turned: bool = False) -> list[Row]:
    """A weight and its bias. The layout is that of a `torch.nn.Linear`: outputs, inputs; `turned`: inputs, outputs."""
    outputs, inputs = re.findall(r"\([^)]*\)|\w", layout)
    weight = f"{inputs} {outputs}" if turned else layout
    return [
        Row(f"{theirs}.weight", (weight,), (f"{ours}/w_{_flat(inputs + outputs)}",)),
        Row(f"{theirs}.bias", (outputs,), (f"{ours}/b_{_flat(outputs)}",)),
    ]


def norm(theirs: str, ours: str, axis: str = "D") -> list[Row]:
    """The scale and the bias of a norm over the axis of a letter."""
    return [
        Row(f"{theirs}.weight", (axis,), (f"{ours}/scale_{axis}",)),
        Row(f"{theirs}.bias", (axis,), (f"{ours}/bias_{axis}",)),
    ]


def attention(theirs: str, ours: str, names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> list[Row]:
    """Queries, keys, values and outputs, in that order."""
    layouts = {"query": "(H K) D", "key": "(G K) D", "value": "(G K) D", "out": "D (H K)"}
    pairs = zip(names, layouts.items(), strict=True)
    return [row for name, (part, layout) in pairs for row in linear(f"{theirs}.{name}", f"{ours}/{part}", layout)]


def fused(theirs: str, ours: str, weight: str, bias: str) -> list[Row]:
    """Queries, keys and values as one map, of multi-head attention; the layouts of its weight and its bias."""
    parts = {"query": "HK", "key": "GK", "value": "GK"}
    return [
        Row(f"{theirs}.weight", (weight,), tuple(f"{ours}/{part}/w_D{axes}" for part, axes in parts.items())),
        Row(f"{theirs}.bias", (bias,), tuple(f"{ours}/{part}/b_{axes}" for part, axes in parts.items())),
    ]


# --- all of a model


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of theirs and where it goes.

    Attributes:
        name: of the tensor.
        row: that it is of.
        places: for each array of ours its path, and the index of the part of it that is meant, by axis in turn.
    """

    name: str
    row: Row
    places: tuple[tuple[str, tuple[int, ...]], ...]


def pieces(rows: Sequence[Row], config: ModelConfig, paths: Mapping[str, Any]) -> Iterator[Piece]:
    """Every tensor of theirs that a model has, by the rows of its family and the paths of our arrays."""
    for row in rows:
        stack = config.of_stack("encoder" if row.ours[0].startswith("encoder/") else "decoder")
        for i in range(stack.num_layers if "{i}" in row.ours[0] else 1):
            found = [_placed(path, i, stack) for path in row.ours]
            if any(path not in paths for path, _ in found):
                continue
            for e in range(config.num_experts if "{e}" in row.theirs else 1):
                expert = (e,) if "{e}" in row.theirs else ()
                places = tuple((path, (*index, *expert)) for path, index in found)
                yield Piece(row.theirs.format(i=i, e=e), row, places)


def _placed(path: str, block: int, config: ModelConfig) -> tuple[str, tuple[int, ...]]:
    """Where a block's array is: in a path of its own, or as a part of that of a loop's layers."""
    if "{i}" not in path or not config.scan_layers:
        return path.format(i=block), ()
    period = config.blocks_in_a_round()
    stack, _, rest = path.format(i=block % period).partition("/")
    return f"{stack}/{SCANNED}/{rest}", (block // period,)
