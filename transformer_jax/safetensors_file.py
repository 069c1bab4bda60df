"""A safetensors file -> its arrays, and back. Whoever made a file is not trusted: all of its header is checked, against
the file's size and itself, before memory is taken for a single number.

    8 bytes    n, little endian
    n bytes    JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}}
    the rest   the arrays end to end, little endian, each with its rows one after the other

Names are keys and never paths. Nothing in the file can name code to run: it is no pickle, and a pickle is refused.
"""

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from transformer_jax.config_checks import shown
from transformer_jax.config_file import no_twins
from transformer_jax.errors import InputError
from transformer_jax.files import reading

MOST_HEADER = 100_000_000  # bytes, as in the format's own reader
MOST_TENSORS = 200_000  # a file of the largest published models has half of it
MOST_AXES = 32
PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # PyTorch's two forms of a .bin

DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the header says of one array: its type, its shape, and its bytes, counted from the header's end."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_counts(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(_is_count, value))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _read_header(name: str, raw: bytes) -> dict[str, Any]:
    # each array has 2 brackets, 4 commas and a comma for each axis: what has far more would only fill memory
    if sum(raw.count(mark) for mark in (b"{", b"[", b",")) > 16 * MOST_TENSORS:
        raise InputError(f"{name}: its header has more parts than {MOST_TENSORS:,} tensors have.")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: its header is not JSON ({error}).") from None
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise InputError(f"{name}: its header is not an object of at most {MOST_TENSORS:,} tensors.")
    return header


def _read_metadata(name: str, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{name}: __metadata__ must be an object of texts; got {shown(found)}.")
    return found


def _read_entry(where: str, found: Any) -> Entry:
    if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: expected dtype, shape and data_offsets; got {shown(found)}.")
    kind, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(f"{where}: dtype must be one of {', '.join(DTYPES)}; got {shown(kind)}.")
    if not _is_counts(shape, MOST_AXES):
        raise InputError(f"{where}: shape must be at most {MOST_AXES} whole numbers from 0; got {shown(shape)}.")
    if not _is_counts(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: data_offsets must be a start and an end from 0; got {shown(offsets)}.")
    dtype = np.dtype(DTYPES[kind])
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 2**63:
        raise InputError(f"{where}: shape {shown(shape)} is beyond what a machine can address.")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise InputError(
            f"{where}: {kind} of shape {shown(shape)} has {size:,} bytes; data_offsets say {offsets[1] - offsets[0]:,}."
        )
    return Entry(dtype, tuple(shape), *offsets)


def _check_cover(name: str, entries: dict[str, Entry], size: int) -> None:
    """The arrays fill the rest of the file: no byte is shared, left out or beyond the end."""
    reached = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            what = "shares bytes with another" if entry.start < reached else "has a gap before it"
            raise InputError(f"{name}, tensor {shown(tensor)}: {what}: it starts at {entry.start:,}, not {reached:,}.")
        reached = entry.end
    if reached != size:
        what = "it was cut short" if reached > size else "there is more behind them"
        raise InputError(f"{name}: its tensors have {reached:,} bytes, and the file {size:,} for them: {what}.")


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The arrays of a file by name, each read when it is asked for; use it in a `with`, or close it.

    Attributes:
        entries: what the header says of each array.
        metadata: the header's `__metadata__`, texts by name.

    An array is a read-only view of the file, mapped into memory: it takes none until it is read, and the file must stay
    as it is while it is used. Of a file that is closed, arrays in use stay valid.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises InputError, with the file's and the tensor's name, where anything in it is not as it must be."""
        self.name = os.fspath(path)
        with reading(self.name):
            if not os.path.isfile(self.name) and os.path.exists(self.name):
                raise InputError(f"{self.name}: cannot be read (it is not a file).")
            with open(self.name, "rb") as file:
                raw, first, size = file.read(8), file.read(1), os.fstat(file.fileno()).st_size
                length = int.from_bytes(raw, "little")
                if first != b"{" and raw.startswith(PICKLES):
                    raise InputError(
                        f"{self.name}: a pickle, which could run code when it is read. Only safetensors are read; "
                        "convert it where you trust it."
                    )
                if first != b"{" or length > min(MOST_HEADER, size - 8):
                    raise InputError(
                        f"{self.name}: not a safetensors file, or cut short: a header of {length:,} bytes in a file of "
                        f"{size:,}."
                    )
                file.seek(8)
                header = _read_header(self.name, file.read(length))
                self.metadata = _read_metadata(self.name, header.pop("__metadata__", {}))
                self.entries = {
                    name: _read_entry(f"{self.name}, tensor {shown(name)}", found) for name, found in header.items()
                }
                self._begin = 8 + length
                _check_cover(self.name, self.entries, size - self._begin)
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        array = np.ndarray(entry.shape, entry.dtype, self._map, self._begin + entry.start)
        if entry.dtype == np.bool_ and (array.view(np.uint8) > 1).any():
            raise InputError(f"{self.name}, tensor {shown(name)}: a BOOL must be 0 or 1.")
        return np.require(array, requirements="A")  # a header of an odd length leaves what follows unaligned

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file. Arrays that are still in use keep it until they are gone."""
        del self._map


NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}


class Pending(NamedTuple):
    """An array that is made when it is written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Pending":
        return cls(array.dtype, array.shape, lambda: array)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray | Pending], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays as a file, whole or not at all."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = NAMES[tensor.dtype.newbyteorder("=")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".tmp")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            array = tensor.make() if isinstance(tensor, Pending) else tensor
            assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape)
            raw = np.ascontiguousarray(array, tensor.dtype.newbyteorder("<"))
            file.write(raw.reshape(-1).view(np.uint8).data if raw.size else b"")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
