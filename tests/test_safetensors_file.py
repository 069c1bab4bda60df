"""Laws of reading safetensors: what was written comes back, and no byte of a file does more than be refused."""

import json
import pickle
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.errors import InputError
from transformer_jax.safetensors_file import DTYPES, SafetensorsFile

law = settings(derandomize=True, deadline=None, max_examples=300)
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}


def packed(header, data=b"", length=None):
    """The bytes of a file with this header, an object or text, over this data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def written(arrays, metadata=None):
    """The bytes of a sound file."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, array in arrays.items():
        raw = array.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    return packed(header, data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "../../etc/passwd": np.array(7, np.int64),
    "empty": np.zeros((0, 5), np.float16),
    "b": np.array([True, False, True]),
    "c/d": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
}
SOUND = written(ARRAYS, {"format": "pt"})


@pytest.fixture
def file(tmp_path):
    def make(content, name="w.safetensors"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return make


@pytest.mark.parametrize("kind", DTYPES)
def test_every_type_comes_back(file, kind):
    """To the bit, at any alignment: a name of each length moves the data by a byte."""
    raw = np.arange(48, dtype=np.uint8) % (2 if kind == "BOOL" else 48)
    for name in ("x", "xx", "xxx"):
        array = raw.view(DTYPES[kind]).reshape(2, -1)
        with SafetensorsFile(file(written({name: array}))) as found:
            np.testing.assert_array_equal(found[name].view(np.uint8), array.view(np.uint8))
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].flags.aligned


def test_a_file_is_its_arrays_by_name(file):
    """Names are keys; arrays are read-only and stay after the file is closed."""
    with SafetensorsFile(file(SOUND)) as found:
        assert list(found) == list(ARRAYS)
        assert found.metadata == {"format": "pt"}
        assert "a" in found
        assert "A" not in found
        kept = dict(found)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(kept[name], array)
    with pytest.raises(ValueError, match="read-only"):
        kept["a"][0, 0] = 1


def test_it_agrees_with_the_formats_own_library(file):
    library = pytest.importorskip("safetensors.numpy")
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}
    path = file(b"")
    library.save_file(arrays, path)
    with SafetensorsFile(path) as found:
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


ZEROS = bytes(8)
# what is wrong: (the file, what the message says besides its name)
DAMAGE = {
    "empty": (b"", "header of 0 bytes in a file of 0"),
    "short": (b"\x08\0\0", "not a safetensors file"),
    "header beyond the file": (packed({}, length=999), "header of 999 bytes in a file of 10"),
    "header of 2^63": (packed({}, length=2**63), "header of 9,223,372,036,854,775,808 bytes"),
    "text": (b"hello, this is no file of weights", "not a safetensors file"),
    "pickle": (pickle.dumps({"w": [1.0]}), "a pickle, which could run code"),
    "zip": (b"PK\x03\x04" + bytes(99), "a pickle, which could run code"),
    "a list": (packed(b"[1, 2]"), "not a safetensors file"),
    "not JSON": (packed(b'{"a": '), "header is not JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "header is not JSON"),
    "NaN": (packed(b'{"a": NaN}'), "NaN is no JSON"),
    "deep": (packed(b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"), "header is not JSON"),
    "endless number": (packed(b'{"a": 1' + b"0" * 5000 + b"}"), "header is not JSON"),
    "two of a name": (packed(b'{"a": 1, "a": 1}'), "'a' is given more than once"),
    "two of a field": (packed(b'{"a": {"dtype": "F32", "dtype": "F64"}}'), "'dtype' is given more than once"),
    "too many parts": (packed(b'{"a": [' + b"[]," * 2_000_000 + b"0]}"), "more parts than 200,000 tensors"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "__metadata__ must be an object of texts"),
    "no object": (packed({"a": 5}), "tensor 'a': expected dtype, shape and data_offsets; got 5"),
    "no shape": (packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, ZEROS), "tensor 'a': expected dtype"),
    "one field more": (packed({"a": entry() | {"code": "x"}}, ZEROS), "tensor 'a': expected dtype"),
    "unknown type": (packed({"a": entry(dtype="F31")}, ZEROS), "tensor 'a': dtype must be one of .*F31"),
    "a type that is a list": (packed({"a": entry(dtype=["F32"])}, ZEROS), "tensor 'a': dtype must be"),
    "negative shape": (packed({"a": entry(shape=[-2])}, ZEROS), "tensor 'a': shape must be"),
    "shape of a float": (packed({"a": entry(shape=[2.0])}, ZEROS), "tensor 'a': shape must be"),
    "shape of a bool": (packed({"a": entry(shape=[True, 2])}, ZEROS), "tensor 'a': shape must be"),
    "shape of text": (packed({"a": entry() | {"shape": "2"}}, ZEROS), "tensor 'a': shape must be"),
    "33 axes": (packed({"a": entry(shape=[1] * 32 + [2])}, ZEROS), "tensor 'a': shape must be at most 32"),
    "shape that overflows": (packed({"a": entry(shape=[2**62, 2**62, 2])}, ZEROS), "tensor 'a': shape .* beyond"),
    "empty shape that overflows": (packed({"a": entry("F32", [0, 2**62, 2**62], [0, 0])}), "tensor 'a': .* beyond"),
    "one offset": (packed({"a": entry(offsets=[0])}, ZEROS), "tensor 'a': data_offsets must be"),
    "offsets backwards": (packed({"a": entry(offsets=[8, 0])}, ZEROS), "tensor 'a': data_offsets must be"),
    "negative offsets": (packed({"a": entry(offsets=[-8, 0])}, ZEROS), "tensor 'a': data_offsets must be"),
    "offsets of 2^70": (packed({"a": entry(offsets=[2**70, 2**70 + 8])}, ZEROS), "tensor 'a': data_offsets must be"),
    "another size": (packed({"a": entry(shape=[3])}, ZEROS), r"tensor 'a': F32 of shape \[3\] has 12 bytes; .* 8"),
    "cut": (packed({"a": entry()}, ZEROS[:5]), "8 bytes, and the file 5 for them: it was cut short"),
    "more behind": (packed({"a": entry()}, ZEROS + b"x"), "8 bytes, and the file 9 for them: there is more"),
    "overlap": (packed({"a": entry(), "b": entry(offsets=[4, 12])}, ZEROS * 2), "tensor 'b': shares bytes"),
    "alike": (packed({"a": entry(), "b": entry()}, ZEROS * 2), "tensor 'b': shares bytes"),
    "gap": (packed({"a": entry(), "b": entry(offsets=[12, 20])}, ZEROS * 3), "tensor 'b': has a gap before it"),
    "gap at the start": (packed({"a": entry(offsets=[4, 12])}, ZEROS * 2), "tensor 'a': has a gap before it"),
    "nothing but data": (packed({}, ZEROS), "0 bytes, and the file 8 for them"),
    "a bool of 2": (packed({"a": entry("BOOL", [2], [0, 2])}, b"\1\2"), "tensor 'a': a BOOL must be 0 or 1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(file, case):
    content, says = DAMAGE[case]
    with pytest.raises(InputError, match=f"(?s)w.safetensors.*{says}"), SafetensorsFile(file(content)) as found:
        dict(found)


def test_what_is_no_file_is_named(tmp_path):
    for path, says in (
        (tmp_path, "it is not a file"),
        (tmp_path / "none", "no such file"),
        ("/dev/zero", "not a file"),
    ):
        with pytest.raises(InputError, match=says):
            SafetensorsFile(path)


def test_no_memory_is_taken_for_what_a_header_claims(file):
    """2^40 bytes are claimed, and refused by the size of the file."""
    content = packed({"a": entry("U8", [2**40], [0, 2**40])}, ZEROS)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="cut short"):
            SafetensorsFile(file(content))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@law
@given(st.data())
def test_mutated_bytes_are_read_or_refused(tmp_path_factory, data):
    """And never more memory than a small multiple of the file is taken."""
    raw = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with SafetensorsFile(path) as found:
            assert sum(array.nbytes for array in found.values()) <= len(raw)
    except InputError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**18
