"""A run's folder: made where there is none, held by one writer at a time, its papers written whole."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from transformer_jax import job
from transformer_jax.errors import BusyError, InputError
from transformer_jax.manifest import sync, write_synced

LOCK = "lock"


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by a new one; whoever reads it, also after a crash, finds the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_synced(temporary, text)
    temporary.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """A run's folder, ours alone until the end. The first of several processes holds it for all.

    Raises:
        BusyError: another run is writing there; the message names its host and process.
        InputError: the folder cannot be made or written.
    """
    with contextlib.ExitStack() as held:
        status, message = 0, ""
        if job.is_first():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if holder := held.enter_context(_lock(folder)):
                    status, message = (
                        BusyError.status,
                        f"{folder} is in use: {holder} is training there. Wait for its end",
                    )
            except OSError as error:
                status, message = InputError.status, f"{folder}: cannot be used as a run's folder ({error.strerror})"
        status, message = json.loads(job.shared(json.dumps([status, message])))
        if status:
            kind = BusyError if status == BusyError.status else InputError
            raise kind(f"--workdir {message}, or give another --workdir.")
        yield folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[str]:
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
