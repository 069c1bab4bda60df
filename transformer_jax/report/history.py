"""A run's folder -> what it has on record: curves, events, samples. Whatever was damaged is left out and counted."""

import dataclasses
import re
import statistics
from array import array
from pathlib import Path
from typing import Any, TypeGuard

from transformer_jax.config import RunConfig
from transformer_jax.config_file import read_config
from transformer_jax.errors import InputError
from transformer_jax.metrics import Record, each_record

Curve = tuple[array, array]  # steps and values, both doubles
MOST = 1e100  # a number beyond is none of ours


@dataclasses.dataclass
class History:
    """A run as its folder has it, at any time of its life.

    Attributes:
        name: what it is called on the page.
        config: its settings.
        curves: steps and values by (split, metric), in the order they came in.
        events: lines that are not numbers: starts, resumes, steps that were left out, ends.
        seconds: of training and evaluation, over all starts, as far as it is on record.
        samples: (step, text) of each evaluation that wrote some.
        damaged: lines of metrics.jsonl that are none.
    """

    name: str
    config: RunConfig
    curves: dict[tuple[str, str], Curve] = dataclasses.field(default_factory=dict)
    events: list[Record] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    samples: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    damaged: int = 0

    @property
    def step(self) -> int:
        """The last step of which there is anything on record."""
        steps = [int(steps[-1]) for steps, _ in self.curves.values()]
        return max([*steps, *(event["step"] for event in self.events)])

    @property
    def state(self) -> str:
        """How it stands, in words."""
        last, steps = self.events[-1] if self.events else {}, self.config.steps
        if last.get("event") == "end":
            return f"finished, {self.step:,} steps"
        if last.get("event") == "preempted" and last["step"] == self.step:
            return f"stopped at step {self.step:,} of {steps:,}"
        return f"at step {self.step:,} of {steps:,}, not finished"

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for split, _ in self.curves))

    def curve(self, split: str, metric: str) -> Curve:
        """Its steps and values, of which there may be none."""
        return self.curves.get((split, metric)) or (array("d"), array("d"))

    def last(self, split: str, metric: str) -> list[float]:
        """The last value of a curve, or none."""
        return list(self.curve(split, metric)[1][-1:])

    def best(self, metric: str, more: bool) -> tuple[float, int] | None:
        """The best value on validation data, and its step."""
        steps, values = self.curve("validation", metric)
        found = [(value, int(step)) for step, value in zip(steps, values, strict=True)]
        return (max if more else min)(found, key=lambda each: each[0], default=None)

    def median(self, split: str, metric: str) -> list[float]:
        """The median of a curve without what is 0, or none."""
        found = [value for value in self.curve(split, metric)[1] if value]
        return [statistics.median(found)] if found else []

    def total(self, metric: str) -> list[float]:
        """The sum of a number of all evaluations, or none."""
        found = [sum(self.curve(split, metric)[1]) for split in self.splits if split != "train"]
        return [sum(found)] if any(found) else []

    def of_kind(self, kind: str) -> list[Record]:
        """The events of a kind."""
        return [event for event in self.events if event["event"] == kind]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST  # which nan is not


def _samples(folder: Path) -> list[tuple[int, str]]:
    path = folder / "samples.txt"
    if not path.is_file():
        return []
    parts = re.split(r"^--- step (\d{1,15})$", path.read_text("utf-8", errors="replace"), flags=re.MULTILINE)
    return [(int(step), text.strip("\n")) for step, text in zip(parts[1::2], parts[2::2], strict=True)]


def read_history(folder: str | Path, name: str = "") -> History:
    """What a run has on record; nothing is written, so it can be called while the run goes on.

    Raises:
        InputError: the folder is no run's, its config cannot be used, or it has no numbers yet.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: not a run's folder: it has no config.json.")
    found = History(name or folder.resolve().name, read_config(folder / "config.json"))
    path, lines, whole, since, scoring = folder / "metrics.jsonl", 0, 0, 0.0, 0.0
    for record in each_record(path):
        whole += 1
        step, split = record.get("step"), record.get("split")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
            whole -= 1
        elif isinstance(split, str):
            for metric, value in record.items():
                if metric != "step" and is_number(value):
                    steps, values = found.curves.setdefault((split, metric), (array("d"), array("d")))
                    steps.append(step)
                    values.append(value)
            if is_number(seconds := record.get("seconds", 0.0)):
                since, scoring = (seconds, 0.0) if split == "train" else (since, scoring + seconds)
        elif isinstance(record.get("event"), str):
            found.events.append(record)
            if record["event"] == "start":
                found.seconds, since, scoring = found.seconds + since + scoring, 0.0, 0.0
    found.seconds += since + scoring
    if path.exists():
        with path.open("rb") as file:
            lines = sum(1 for line in file if line.strip())
    found.damaged = lines - whole
    if not found.curves:
        raise InputError(f"{folder}: there is nothing to report yet: metrics.jsonl has no line with numbers.")
    found.samples = _samples(folder)
    return found
