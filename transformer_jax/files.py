"""Files in, whole within a limit or by lines; files out, whole or not at all. Every complaint names the file."""

import codecs
import contextlib
import gzip
import itertools
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from transformer_jax import host
from transformer_jax.errors import InputError, StorageError

PACKED = (".gz", ".zst")
RATIO, UNPACKED = 200, 2**28  # what a .gz may unpack to: text packs 3 to 20 times, a file made to do harm up to 1032
CHUNK = 2**20
PIECE = 2**12  # of a .zst, which may unpack to 32,768 times as many bytes


def most_bytes() -> int:
    """Bytes that a file of data may have: a quarter of the machine's memory, as all of a text is held at once."""
    return (host.memory() or 2**36) // 4


class Readable(Protocol):
    """An open file, a pipe, or what unpacks one."""

    def read(self, size: int, /) -> bytes: ...


def _chunks(file: Readable) -> Iterator[bytes]:
    return iter(lambda: file.read(CHUNK), b"")


def _gather(name: str | Path, chunks: Iterator[bytes], most: int) -> bytearray:
    found = bytearray()
    for chunk in chunks:
        found += chunk
        if len(found) > most:
            raise too_large(name, most)
    return found


def too_large(name: str | Path, most: int) -> InputError:
    """What is said of more than can be held."""
    return InputError(f"{name}: larger than {most:,} bytes, the limit for it on this machine.")


@contextlib.contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """What goes wrong while a file is read, as one message with its name.

    Raises:
        InputError: in place of any error of the system or of gzip.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such file.") from None
    except PermissionError:
        raise InputError(f"{name}: no permission to read it.") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error}).") from None
    except (EOFError, ValueError, zlib.error) as error:  # a path may hold what no name of a file can
        raise InputError(f"{name}: cannot be read ({error}).") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise InputError(f"{name}: cannot be read ({error}).") from None


def read_stream(name: str, file: Readable) -> bytearray:
    """All of an open file or pipe, such as stdin.

    Raises:
        InputError: it cannot be read, or is larger than memory allows.
    """
    with reading(name):
        return _gather(name, _chunks(file), most_bytes())


def read_whole(path: str | Path, most: int | None = None) -> bytearray:
    """A file's bytes, unpacked where its name ends in .gz or .zst: `most` of them, or as many as memory allows.

    Raises:
        InputError: it is missing, is no file or pipe, cannot be read or unpacked, or is too large.
    """
    return _gather(path, _opened(path), most_bytes() if most is None else most)


def lines_of(path: str | Path) -> Iterator[str]:
    """A file's lines, one at a time, as `read_whole` and `decode` would give them; only a line feed ends one, so that
    parallel files stay parallel.

    Raises:
        InputError: as these two; a line is too large; or, at the end, there is no text in it.
    """
    blank, empty = True, True
    for line in _lines(path, _opened(path)):
        blank, empty = blank and not line.strip(), False
        yield line
    if blank:
        raise no_text(path, empty)


def lines_from(name: str, file: BinaryIO) -> Iterator[str]:
    """The lines of an open file or pipe, each when it is there, such as those of stdin; there may be none.

    Raises:
        InputError: it cannot be read, is not UTF-8, or a line is too large.
    """
    with reading(name):
        yield from _lines(name, iter(lambda: file.readline(CHUNK), b""))


def _lines(name: str | Path, chunks: Iterator[bytes]) -> Iterator[str]:
    start = 0
    for number, raw in enumerate(_raw_lines(name, chunks), 1):
        try:
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(name, start + error.start, number, raw[error.start]) from None
        text, start = text.removeprefix("\ufeff") if number == 1 else text, start + len(raw)
        if text:
            yield text.removesuffix("\n")


def stream_text(path: str | Path) -> Iterator[str]:
    """A file's text as `decode` has it, some of it at a time.

    Raises:
        InputError: as `read_whole` and `decode`; or, at the end, there is no text in it.
    """
    decoder, left, at, line, blank, begun = codecs.getincrementaldecoder("utf-8")(), "", 0, 1, True, False
    for raw, last in itertools.chain(zip(_opened(path), itertools.repeat(False)), [(b"", True)]):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, last)
        except UnicodeDecodeError as error:
            lines = error.object.count(b"\n", 0, error.start)
            raise _not_utf8(path, at - held + error.start, line + lines, error.object[error.start]) from None
        text, begun = left + (text if begun else text.removeprefix("\ufeff")), begun or bool(text)
        at, line = at + len(raw), line + raw.count(b"\n")
        left = "\r" if not last and text.endswith("\r") else ""  # whose line feed may follow
        text = text.removesuffix(left).replace("\r\n", "\n")
        blank = blank and not text.strip()
        yield text
    if blank:
        raise no_text(path, not at)


def no_text(path: str | Path, empty: bool) -> InputError:
    """What is said of a file without text."""
    return InputError(f"{path}: the file is empty." if empty else f"{path}: only blank lines, no text.")


def _raw_lines(path: str | Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their line feeds."""
    most, rest = most_bytes(), bytearray()
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest += first
        if len(rest) > most:
            raise too_large(path, most)
        if others:
            yield bytes(rest) + b"\n"
            yield from (line + b"\n" for line in others[:-1])
            rest = bytearray(others[-1])
    if rest:
        yield bytes(rest)


def _opened(path: str | Path) -> Iterator[bytes]:
    """A file's bytes in parts, unpacked, and no more of them than a file can honestly be packed from."""
    with reading(path):
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISFIFO(about.st_mode):
            what = "folder" if stat.S_ISDIR(about.st_mode) else "device"
            raise InputError(f"{path}: cannot be read (it is a {what}, not a file).")
        with open(path, "rb") as file:
            if not str(path).endswith(PACKED):
                yield from _chunks(file)
                return
            found = 0
            for chunk in _unzipped(file) if str(path).endswith(".gz") else _unpacked(str(path), file):
                found += len(chunk)
                if found > max(UNPACKED, RATIO * about.st_size):
                    raise InputError(
                        f"{path}: its {about.st_size:,} bytes unpack to {found:,} and more, beyond the limit of "
                        f"{RATIO} times as many. Unpack it first where it is meant."
                    )
                yield chunk


def _unzipped(file: Any) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        yield from _chunks(unpacked)


def _unpacked(name: str, file: Readable) -> Iterator[bytes]:
    """What a .zst file holds, of one frame or several; few bytes go in at a time, as many may come out of each.

    Raises:
        EOFError: it ends in the middle of a frame.
        InputError: the library that unpacks it is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{name}: a .zst file needs pip install 'transformer_jax[data]'.") from None
    frame = None
    for part in iter(lambda: file.read(PIECE), b""):
        while part:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(part)
            part, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


def decode(name: str | Path, raw: bytes | bytearray) -> str:
    """UTF-8 bytes as text, without a byte order mark and with plain line ends.

    Raises:
        InputError: they are not UTF-8; the message says in which line.
    """
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error.start, raw.count(b"\n", 0, error.start) + 1, raw[error.start]) from None


def _not_utf8(name: str | Path, place: int, line: int, byte: int) -> InputError:
    return InputError(
        f"{name}: byte {place} (line {line}) is not valid UTF-8: found 0x{byte:02x}. Convert it to UTF-8 first."
    )


def read_text(path: str | Path) -> str:
    """A file's text, unpacked where its name ends in .gz or .zst, without a byte order mark and with plain line ends.

    Raises:
        InputError: as `read_whole` and `decode`; or there is no text in it.
    """
    text = decode(path, read_whole(path))
    if not text.strip():
        raise no_text(path, not text)
    return text


def check_output(path: Path | None, flag: str, *read: str | Path) -> None:
    """Before any work is done for an output: it can be written, and is none of the files that are read.

    Raises:
        InputError: it cannot, or it is.
    """
    if path is None:
        return
    folder = os.path.dirname(os.path.realpath(path))
    if path.is_dir():
        raise InputError(f"{flag} {path}: cannot be written (it is a folder).")
    if not os.path.isdir(folder):
        raise InputError(f"{flag} {path}: cannot be written (there is no folder {folder}).")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"{flag} {path}: cannot be written (no permission).")
    for other in read:
        if path.exists() and os.path.exists(other) and os.path.samefile(path, other):
            raise InputError(f"{flag} {path}: is also what is read ({other}), and would be lost.")


def write_output(path: Path, flag: str, text: str) -> None:
    """Writes a file as `output_file`."""
    with output_file(path, flag) as file:
        file.write(text)


@contextlib.contextmanager
def output_file(path: Path, flag: str) -> Iterator[TextIO]:
    """A file to write whole, under another name first, so that a failure leaves what was there. A device is written to.

    Raises:
        StorageError: the disk is full, or refuses it.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    temporary = target.with_name(f".transformer-jax-{os.getpid()}.tmp")
    device = target.exists() and not target.is_file()
    try:
        with (target if device else temporary).open("w", encoding="utf-8") as file:
            yield file
        if not device:
            if target.exists():
                shutil.copymode(target, temporary)
            temporary.replace(target)
    except OSError as error:
        raise StorageError(f"{flag} {path}: cannot be written ({error.strerror}).") from None
    finally:
        temporary.unlink(missing_ok=True)
