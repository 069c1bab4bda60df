"""A thread that ends a process in which no step ends: it says where every thread is, and which process is behind."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from transformer_jax import job
from transformer_jax.config_checks import as_time

STALLED = 7  # exit status of a process in which no step ends


class Watchdog:
    """Ends the process where `beat` is not called for `seconds`.

    Of several processes each writes down how far it has come, in a file of the run's folder that goes at the end.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._beat, self._step, self._doing = time.monotonic(), 0, "starts"
        self._end = threading.Event()

    def beat(self, step: int, doing: str) -> None:
        """The process lives: it has begun with this step, or is at something else that it does after it."""
        self._beat, self._step, self._doing = time.monotonic(), step, doing

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Within it the thread watches."""
        if self._seconds == float("inf"):
            yield self
            return
        self.beat(self._step, self._doing)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._end.set()
            thread.join()
            self._progress(job.number()).unlink(missing_ok=True)

    def _progress(self, number: int) -> Path:
        return self._folder / f"progress-{number}"

    def _watch(self) -> None:
        while not self._end.wait(min(self._seconds / 4, 10)):
            if job.count() > 1:
                with contextlib.suppress(OSError):  # a full disk is not the watchdog's affair
                    self._progress(job.number()).write_text(json.dumps([self._step, self._doing]))
            if time.monotonic() - self._beat > self._seconds:
                self._stop()

    def _stop(self) -> None:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        text = (
            f"transformer-jax: no step has ended for {as_time(self._seconds)} (--stall-after): the run {self._doing} "
            f"after step {self._step}. Above is where every thread is, the latest call first.{self._behind()} The same "
            "command goes on from the newest checkpoint.\n"
        )
        os.write(2, text.encode())
        os._exit(STALLED)

    def _behind(self) -> str:
        """Which of several processes have come less far than the others."""
        if job.count() == 1:
            return ""
        found = {job.number(): (self._step, self._doing)}
        for number in range(job.count()):
            with contextlib.suppress(OSError, ValueError):
                found[number] = tuple(json.loads(self._progress(number).read_text()))
        silent = sorted(set(range(job.count())) - found.keys())
        least = min(step for step, _ in found.values())
        behind = sorted(number for number, (step, _) in found.items() if step == least)
        if silent:
            return f" Process {', '.join(map(str, silent))} of {job.count()} has not been heard of."
        if len(behind) == job.count():
            return f" All {job.count()} processes are at step {least}."
        told = ", ".join(f"process {number} {found[number][1]} at step {least}" for number in behind)
        return f" Behind are: {told}; the others are at step {max(step for step, _ in found.values())}."
