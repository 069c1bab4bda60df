"""Laws of files: what is read is limited, what is written is there whole or not at all."""

import gzip
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax import files
from transformer_jax.errors import InputError, StorageError
from transformer_jax.files import check_output, decode, read_stream, read_whole, write_output

law = settings(derandomize=True, deadline=None, max_examples=150)


def test_a_file_a_pack_and_a_pipe_are_read_whole(tmp_path):
    raw = bytes(range(256)) * 999
    (tmp_path / "a").write_bytes(raw)
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw) + gzip.compress(b"and more"))
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(raw,)).start()
    assert read_whole(tmp_path / "a") == raw
    assert read_whole(tmp_path / "a.gz") == raw + b"and more"
    assert read_whole(tmp_path / "pipe") == raw


def test_what_is_larger_than_allowed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))
    assert len(read_whole(tmp_path / "a", 100)) == 100
    with pytest.raises(InputError, match="a: larger than 99 bytes, the limit"):
        read_whole(tmp_path / "a", 99)
    monkeypatch.setattr(files, "most_bytes", lambda: 99)
    with (tmp_path / "a").open("rb") as file, pytest.raises(InputError, match="stdin: larger than 99 bytes"):
        read_stream("stdin", file)


def test_a_pack_may_unpack_to_so_much(tmp_path, monkeypatch):
    """Beyond both limits it is refused, below one of them it is read."""
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(100_000)))
    assert len(read_whole(tmp_path / "a.gz")) == 100_000
    monkeypatch.setattr(files, "UNPACKED", 1000)
    with pytest.raises(InputError, match=r"a.gz: its \d+ bytes unpack to .* 200 times"):
        read_whole(tmp_path / "a.gz")
    monkeypatch.setattr(files, "RATIO", 1000)
    assert len(read_whole(tmp_path / "a.gz")) == 100_000


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 300])
def test_what_no_file_can_be_called_is_no_file(path):
    with pytest.raises(InputError, match="cannot be read"):
        read_whole(path)


def test_text_is_without_a_mark_and_with_plain_line_ends():
    assert decode("a", "\ufeffone\r\ntwo\rthree\u2028".encode()) == "one\ntwo\rthree\u2028"
    with pytest.raises(InputError, match=r"a: byte 4 \(line 2\) is not valid UTF-8: found 0xff"):
        decode("a", b"one\n\xff")


def test_an_output_replaces_what_was_there(tmp_path):
    """It keeps its mode, a link stays a link, and nothing else is left."""
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    (tmp_path / "link").symlink_to("a")
    write_output(tmp_path / "link", "--output", "new\u2028\n")
    assert (tmp_path / "a").read_bytes() == "new\u2028\n".encode()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink()
    write_output(Path(os.devnull), "--output", "nothing")
    assert Path(os.devnull).is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match=r"--output .*a: cannot be written \(No space left"):
        write_output(tmp_path / "a", "--output", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_an_output_is_checked_before_the_work(tmp_path):
    """And nothing is made by the check."""
    (tmp_path / "a").write_text("read")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    check_output(None, "--output")
    check_output(tmp_path / "new", "--output", tmp_path / "a", tmp_path / "gone")
    for path, says in ((tmp_path / "b", "also what is read"), (tmp_path, "a folder"), (tmp_path / "no/x", "no folder")):
        with pytest.raises(InputError, match=says):
            check_output(path, "--output", tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@law
@given(st.text("aé\r\n\ufeff日👋 ", max_size=30), st.integers(1, 7))
def test_a_streamed_text_is_the_whole_one(tmp_path_factory, text, size):
    """However its bytes come apart: within a letter, within a line's end, within a byte order mark."""
    path = tmp_path_factory.mktemp("f") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", size)
        if not text.removeprefix("\ufeff").strip():
            with pytest.raises(InputError, match=r"empty|only blank lines"):
                list(files.stream_text(path))
        else:
            assert "".join(files.stream_text(path)) == files.decode(path, text.encode())


@pytest.mark.parametrize("size", [1, 3, 2**20])
def test_a_streamed_text_names_the_byte_that_is_none(tmp_path, monkeypatch, size):
    (tmp_path / "a.txt").write_bytes("é\n\nab".encode() + b"\xff\n")
    monkeypatch.setattr(files, "CHUNK", size)
    with pytest.raises(InputError, match=r"byte 6 \(line 3\) is not valid UTF-8: found 0xff"):
        list(files.stream_text(tmp_path / "a.txt"))
