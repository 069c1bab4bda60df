"""What paces a run: batches made ahead, the rate of tokens, and the wish to stop."""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from transformer_jax.data.batches import Drawn


def ahead(draw: Callable[[int], Drawn], start: int, stop: int) -> Iterator[Drawn]:
    """The batches of the steps, each made in the background while the one before is used."""
    with ThreadPoolExecutor(1, "batches") as pool:
        future = pool.submit(draw, start)
        for step in range(start + 1, stop + 1):
            drawn, future = future.result(), pool.submit(draw, step)
            yield drawn


class Stopped(Exception):  # noqa: N818 - as StopIteration, it is no error
    """What is under way is given up because an end was asked for; it is done again when the run goes on."""


class StopSignal:
    """Notes that a signal or the clock asked for an end; the loop looks at it between steps.

    Until it is `patient`, when there is something to save, a signal ends at once what is under way.
    """

    def __init__(self, seconds: float) -> None:
        self.reason, self.patient = "", False
        self._deadline = time.monotonic() + seconds

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if not self.patient:
            self.patient = True  # another signal does not break what this one ends
            raise KeyboardInterrupt

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "the time limit"
        return bool(self.reason)


class Clock:
    """Tokens a second, of real tokens read, since the last evaluation; the first step's compilation is not counted.

    Steps are seen to end in bursts, so the rate is over all of them and not from one line of metrics to the next.
    """

    def __init__(self) -> None:
        self._since, self._tokens = 0.0, 0

    def count(self, drawn: Drawn) -> None:
        """One more step is done."""
        if not self._since:
            self.restart()
            return
        target, source = drawn.batch.target, drawn.batch.source
        self._tokens += int(np.count_nonzero(target.segments))
        self._tokens += 0 if source is None else int(np.count_nonzero(source.segments))

    @property
    def rate(self) -> float:
        """Tokens a second so far."""
        return self._tokens / (time.perf_counter() - self._since) if self._tokens else 0.0

    def restart(self) -> None:
        """Leaves out the time before: an evaluation is no training."""
        self._since, self._tokens = time.perf_counter(), 0
