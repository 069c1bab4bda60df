"""Processes of our own that work for this one, and end with it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import connection
from typing import Any


def _begin(prepare: Callable[..., None], *args: Any) -> None:
    """Ctrl-C is the first process's affair, and without it there is nothing left to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()
    prepare(*args)


@contextlib.contextmanager
def processes(count: int, prepare: Callable[..., None], *args: Any) -> Iterator[Executor]:
    """So many new processes, in each of which `prepare` is called first. Where something goes wrong they are ended at
    once: what they are at is not wanted any more."""
    context = multiprocessing.get_context("spawn")  # a fork would share locks that a thread of ours may hold
    pool = ProcessPoolExecutor(count, context, _begin, (prepare, *args))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def interrupt() -> None:
    """Asks all of them to come to an end, those that are at something that can be saved."""
    for child in multiprocessing.active_children():
        child.terminate()
