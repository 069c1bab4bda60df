"""A run's folder: made where there is none, held by one writer at a time."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformer_jax import job
from transformer_jax.errors import BusyError, InputError
from transformer_jax.folders import locked


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
                if holder := held.enter_context(locked(folder)):
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
