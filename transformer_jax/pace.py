"""What paces a run: batches made ahead, the rate of tokens, and the wish to stop."""

import signal
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from transformer_jax.data.batches import Drawn
from transformer_jax.tokens import Batch
from transformer_jax.workers import processes


def ahead(
    draw: Callable[[int], Drawn],
    start: int,
    stop: int,
    waited: Callable[[float], None] = lambda _: None,
    workers: int = 0,
) -> Generator[Drawn, None, None]:
    """The batches of the steps, in order, made in the background while those before are used: by a thread, or by
    so many processes.

    `waited` is told the seconds that each was waited for.
    """
    with processes(workers, _begin, draw) if workers else ThreadPoolExecutor(1, "batches") as pool:
        make = _draw if workers else draw
        coming = deque(pool.submit(make, step) for step in range(start, min(start + 1 + workers, stop)))
        for step in range(start, stop):
            asked = time.perf_counter()
            drawn = coming.popleft().result()
            waited(time.perf_counter() - asked)
            if (following := step + 1 + workers) < stop:
                coming.append(pool.submit(make, following))
            yield drawn


_drawing: Callable[[int], Drawn] | None = None  # of a process that draws


def _begin(draw: Callable[[int], Drawn]) -> None:
    global _drawing
    _drawing = draw


def _draw(step: int) -> Drawn:
    assert _drawing is not None
    return _drawing(step)


def tokens_of(batch: Batch) -> int:
    """The real tokens that a step reads, on both sides."""
    sides = (batch.target,) if batch.source is None else (batch.target, batch.source)
    return sum(int(np.count_nonzero(side.segments)) for side in sides)


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
    """Tokens a second, of real tokens read, and the share of time that was waited for batches, since the last
    evaluation; the first step's compilation is not counted. And the seconds since it was made, in which all is counted.

    Steps are seen to end in bursts, so the rate is over all of them and not from one line of metrics to the next.
    """

    def __init__(self) -> None:
        self._since, self._tokens, self._waited = 0.0, 0, 0.0
        self._made = time.perf_counter()

    def count(self, drawn: Drawn) -> None:
        """One more step is done."""
        if not self._since:
            self.restart()
            return
        self._tokens += tokens_of(drawn.batch)

    def waited(self, seconds: float) -> None:
        """For a batch."""
        self._waited += seconds

    @property
    def data_wait(self) -> float:
        """The share of time that was waited for batches."""
        return self._waited / (time.perf_counter() - self._since) if self._tokens else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second so far."""
        return self._tokens / (time.perf_counter() - self._since) if self._tokens else 0.0

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._made

    def restart(self) -> None:
        """Leaves out the time before: an evaluation is no training."""
        self._since, self._tokens, self._waited = time.perf_counter(), 0, 0.0
