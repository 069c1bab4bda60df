"""Folders that are written to: files that are on the disk itself, and whole; one writer at a time."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformer_jax.errors import InputError, StorageError

LOCK = "lock"


def sync(path: Path) -> None:
    """Until a file, or a folder's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str) -> None:
    """A new file, on the disk itself."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by a new one; whoever reads it, also after a crash, finds the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_synced(temporary, text)
    temporary.replace(path)
    sync(path.parent)


def check_new(folder: str, what: str) -> Path:
    """The path of a folder that is to be made. Raises InputError where there is something already."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{folder}: there is something already, and {what} replaces nothing. Give another folder.")
    return path


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which has its name when all is written; nothing of it is left where that fails.

    Raises:
        StorageError: it cannot be written.
    """
    work = folder.absolute().with_name(f".{folder.absolute().name}-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        yield work
        work.rename(folder)  # which may be there, empty
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str]:
    """`""` while the lock of a folder is ours, else who holds it.

    The kernel lets go of a lock when its process ends, however it ends. The file is removed at the end; whoever waits
    with the removed one in hand finds out and opens the new one.
    """
    path = folder / LOCK
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                yield file.read() or "another process"
                return
            if not _is_at(path, file.fileno()):
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            try:
                yield ""
            finally:
                path.unlink()
            return


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:  # its holder has removed it meanwhile
        return False
