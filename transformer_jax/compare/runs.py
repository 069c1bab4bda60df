"""The runs of a comparison: one after the other on an accelerator, on a CPU one a core, in processes of their own."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax

from transformer_jax import host
from transformer_jax.compare.measure import RESULT, result_of
from transformer_jax.config import ParallelConfig, RunConfig
from transformer_jax.config_file import read_config
from transformer_jax.errors import ERRORS, InputError
from transformer_jax.loop import STOPPED, train
from transformer_jax.pace import StopSignal
from transformer_jax.terminal import Terminal
from transformer_jax.workers import interrupt, processes

ROOM = 0.7  # share of the machine's memory that runs may take together


class Task(NamedTuple):
    """One run: the settings of ARM.json with a seed, in a folder of its own."""

    folder: Path
    arm: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"


Outcome = dict[str, Any] | None  # scores, or why there are none; None where an end was asked for


class Voice(Terminal):
    """Says whose lines it says, and only how training goes on."""

    def __init__(self, name: str, alone: bool) -> None:
        super().__init__()
        self.name, self.has_bar = name, alone and self.has_bar

    def say(self, text: str) -> None:
        super().say(f"{self.name}: {text}")

    def introduce(self, run: RunConfig, folder: Path, parameters: int, report: list[str]) -> None:
        self.say(f"{parameters:,} parameters, {run.steps} steps, in {folder}")


def outcome(task: Task, alone: bool = False) -> Outcome:
    """What comes of a run, which is trained and measured where it is not yet."""
    folder = task.folder / f"{task.arm}-{task.seed}"
    try:
        if (folder / RESULT).exists():
            return json.loads((folder / RESULT).read_text("utf-8"))
        arm = read_config(task.folder / f"{task.arm}.json")
        if train(dataclasses.replace(arm, seed=task.seed, workdir=str(folder)), Voice(task.name, alone)) == STOPPED:
            return None
        return result_of(folder)
    except (*ERRORS, jax.errors.JaxRuntimeError) as error:  # the latter where a device has too little memory
        print(f"transformer-jax: {task.name}: {error}", file=sys.stderr)
        return {"error": str(error)}
    except KeyboardInterrupt:
        return None


def jobs_of(asked: int, runs: int, parallel: ParallelConfig, memory: int) -> int:
    """How many runs are trained at a time; `memory` is what one of them takes, in bytes.

    Raises:
        InputError: several are asked for, and each needs the whole of the devices.
    """
    shared = jax.default_backend() == "cpu" and parallel.strategy == "jit" and not parallel.coordinator
    if asked > 1 and not shared:
        raise InputError(f"--jobs {asked}: several runs at a time are for a CPU and --parallel.strategy jit.")
    if asked or not shared:
        return asked or 1
    fit = int(ROOM * host.memory() / max(memory, 1)) if host.memory() else runs
    return max(1, min(runs, len(host.cores()), fit))


def _begin(mine: Sequence[int], deterministic: bool) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine)
    host.prepare(deterministic)


def outcomes(tasks: Sequence[Task], jobs: int, deterministic: bool) -> Iterator[tuple[Task, Outcome]]:
    """Each task with what comes of it, as they end; the last is None where an end was asked for.

    A process that dies fails the run that it was at, and another takes its place.
    """
    if jobs == 1:
        for task in tasks:
            yield task, outcome(task, alone=True)
        return
    own, waiting, free = host.cores(), list(tasks), list(range(jobs))
    shares = [own[place::jobs] or own for place in range(jobs)]
    running: dict[Future[Outcome], tuple[Task, int]] = {}
    pools: dict[int, Executor] = {}
    with contextlib.ExitStack() as held:
        while waiting or running:
            try:
                with StopSignal(float("inf")):
                    while waiting and free:
                        place, task = free.pop(), waiting.pop(0)
                        if place not in pools:
                            pools[place] = held.enter_context(processes(1, _begin, shares[place], deterministic))
                        running[pools[place].submit(outcome, task)] = task, place
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt:
                interrupt()
                wait(running)
                yield tasks[-1], None
                return
            for future in done:
                task, place = running.pop(future)
                free.append(place)
                try:
                    yield task, future.result()
                except BrokenProcessPool:
                    del pools[place]
                    yield task, {"error": "its process was killed, as where memory runs out"}
