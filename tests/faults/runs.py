"""Training processes that faults happen to, and what must be true of them afterwards.

A run is a folder; its reference is the same command that nobody disturbed. `flags` is the run that all faults here
meet: dropout, accumulation, packed rows, checkpoints every few steps, one compiled shape.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EVERY = 4  # steps between checkpoints
STEPS = 30
MODES = ("encoder-decoder", "decoder-only")
LIMIT = 300.0  # seconds that any process here may take


@dataclasses.dataclass
class Tally:
    """How many faults were survived of those tried, and what went wrong with the others."""

    survived: int = 0
    tried: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, what: str, wrong: list[str]) -> None:
        """One more fault, and the reasons why it was not survived."""
        self.tried += 1
        self.survived += not wrong
        self.failures += [f"{what}: {reason}" for reason in wrong]


def write_pairs(path: Path, count: int = 200) -> Path:
    """A small file of pairs."""
    days = [datetime.date(2001, 1, 1) + datetime.timedelta(37 * number) for number in range(count)]
    path.write_text("".join(f"{day:%d.%m.%Y}\t{day.isoformat()}\n" for day in days))
    return path


def flags(data: Path, mode: str, steps: int = STEPS, every: int = EVERY) -> list[str]:
    """The command line of a run, without its folder."""
    text = f"""pairs --data.train {data} --data.tokenizer char --steps {steps} --log-every 1 --eval-every {steps // 2}
        --checkpoint.every {every} --batch-size 4 --optimizer.accumulate 2 --optimizer.learning-rate 0.01
        --num-samples 0 --eval-rows 4 --model.mode {mode} --model.d-model 16 --model.d-ff 32 --model.num-layers 1
        --model.num-heads 2 --model.max-length 48 --model.dropout-rate 0.1"""
    return text.split()


def start(
    folder: Path, words: list[str], prefix: Sequence[str] = (sys.executable,), **environment: str
) -> subprocess.Popen[bytes]:
    """`python train.py` as a process; what is compiled is shared by all processes beside this folder."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [*prefix, str(ROOT / "train.py"), *words, "--workdir", str(folder)]
    return subprocess.Popen(
        command, env=os.environ | cache | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit status and what was said on stderr."""
    try:
        _, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return -99, f"did not end within {LIMIT:.0f} s: {process.communicate()[1].decode()[-500:]}"
    return process.returncode, err.decode()


def train(
    folder: Path, words: list[str], prefix: Sequence[str] = (sys.executable,), **environment: str
) -> tuple[int, str]:
    """A process from start to end."""
    return finish(start(folder, words, prefix, **environment))


def records(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics."""
    path, found = folder / "metrics.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def last_step(folder: Path) -> int:
    """The last step that a run has on record, 0 for none."""
    return max((record["step"] for record in records(folder) if record.get("split") == "train"), default=0)


def numbers(folder: Path) -> dict[str, Any]:
    """What two runs that are the same have in common to the bit; a step that is there twice is an error."""
    fields, found = ("loss", "learning_rate", "batch_sha", "grad_norm", "accuracy"), {}
    for record in records(folder):
        if "split" in record:
            key = f"{record['split']} {record['step']}"
            assert key not in found, f"{key} is there twice"
            found[key] = [record.get(field) for field in fields]
        elif record["event"] == "end":
            found["end"] = record["param_digest"]
    return found


def differences(folder: Path, reference: dict[str, Any]) -> list[str]:
    """How a finished run differs from the one that nobody disturbed."""
    try:
        found = numbers(folder)
    except AssertionError as error:
        return [str(error)]
    wrong = [f"{key}: {found.get(key)} != {value}" for key, value in reference.items() if found.get(key) != value]
    wrong += [f"{key} is not in the reference" for key in found if key not in reference]
    left = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.isdigit()]
    return wrong[:3] + [f"left behind: {name}" for name in left if not name.endswith(".damaged")]


Moment = Callable[[Path, float], bool]


def moments(rng: random.Random, seconds: float, steps: int) -> Iterator[tuple[str, Moment]]:
    """For ever, in turn: a random time, a random step on record, and a checkpoint that is being written."""
    while True:
        when = rng.uniform(0.0, seconds)
        yield f"after {when:.2f} s", lambda folder, passed, when=when: passed > when
        ahead = rng.randint(1, max(1, steps // 4))
        begun: dict[str, int] = {}

        def reached(folder: Path, _: float, ahead: int = ahead, begun: dict[str, int] = begun) -> bool:
            return last_step(folder) >= begun.setdefault("step", last_step(folder)) + ahead

        yield f"{ahead} steps on", reached
        delay = rng.uniform(0, 0.02)
        seen: dict[str, float] = {}

        def writing(folder: Path, passed: float, delay: float = delay, seen: dict[str, float] = seen) -> bool:
            if not seen and any((folder / "checkpoints").glob("*.tmp")):
                seen["at"] = passed
            return bool(seen) and passed >= seen["at"] + delay

        yield "while a checkpoint is written", writing


def interrupt(process: subprocess.Popen[bytes], folder: Path, moment: Moment, number: int = signal.SIGKILL) -> bool:
    """Sends a signal when the moment has come; whether it came before the process ended."""
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < LIMIT:
        if moment(folder, time.monotonic() - began):
            process.send_signal(number)
            return True
        time.sleep(0.002)
    return False


def disturb(
    folder: Path,
    words: list[str],
    reference: dict[str, Any],
    rng: random.Random,
    faults: int,
    signals: list[int],
    seconds: float,
) -> tuple[int, list[str]]:
    """One run that is interrupted so often, then left to end. Returns how often it was, and what is wrong with it."""
    done, chosen = 0, moments(rng, seconds, STEPS)
    for _ in range(rng.randrange(3)):
        next(chosen)
    while done < faults:
        what, moment = next(chosen)
        number = rng.choice(signals)
        before = last_step(folder)
        process = start(folder, words)
        # a run that would end before its moment comes is interrupted just before its end
        sent = interrupt(process, folder, lambda f, t, m=moment: m(f, t) or last_step(f) >= STEPS - 2, number)
        if number != signal.SIGKILL and rng.random() < 0.5:  # people press Ctrl-C more than once
            for _ in range(3):
                interrupt(process, folder, lambda _, passed: passed > 0.05, number)
        status, err = finish(process)
        if not sent:
            if status != 0:
                return done, [f"exit status {status}: {err[-300:]}"]
            break
        done += 1
        allowed = (-signal.SIGKILL,) if number == signal.SIGKILL else (75, 0, -number)
        if status not in allowed:
            return done, [f"{signal.Signals(number).name} {what}: exit status {status}: {err[-300:]}"]
        if number != signal.SIGKILL and status == 75 and last_step(folder) > before:
            saved = max((int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()), default=0)
            if saved != last_step(folder):
                return done, [f"{signal.Signals(number).name} {what}: step {last_step(folder)} was not saved"]
    status, err = train(folder, words)
    if status != 0:
        return done, [f"the last start ended with {status}: {err[-300:]}"]
    return done, differences(folder, reference)


def undisturbed(folder: Path, words: list[str]) -> tuple[dict[str, Any], float]:
    """The numbers of a run that is left alone, and about how long one takes that finds its functions compiled."""
    began = time.monotonic()
    status, err = train(folder, words)
    assert status == 0, err
    return numbers(folder), 0.6 * (time.monotonic() - began)


def kills(
    base: Path, runs: int, faults: int, signals: list[int], modes: tuple[str, ...] = MODES, seed: int = 0
) -> Tally:
    """So many runs of each mode, each with so many signals at random moments, against runs that were left alone."""
    data, tally = write_pairs(base / "pairs.tsv"), Tally()
    for mode in modes:
        words = flags(data, mode)
        reference, seconds = undisturbed(base / f"reference-{mode}", words)
        for run in range(runs):
            rng = random.Random(f"{seed} {mode} {run}")
            done, wrong = disturb(base / f"{mode}-{run}", words, reference, rng, faults, signals, seconds)
            tally.add(f"{mode} run {run}", wrong)
            tally.notes["signals"] = tally.notes.get("signals", 0) + done
    return tally
