"""What a run tells about itself: metrics.jsonl, samples.txt, loss.png, and what `writers.py` passes on."""

import errno
import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformer_jax.folders import write_whole
from transformer_jax.writers import Writer

Record = dict[str, Any]


def each_record(path: Path) -> Iterator[Record]:
    """The lines of a metrics.jsonl, one after the other; one that a crash cut short is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def read_records(path: Path) -> list[Record]:
    """All of them."""
    return list(each_record(path))


KEPT = ("checkpoint_rejected", "checkpoint_failed")  # events that no resume takes back


def rewind(folder: Path, step: int) -> None:
    """Leaves out what was written after `step`, which a resumed run writes again, and what a crash cut short."""
    path = folder / "metrics.jsonl"
    records = [r for r in read_records(path) if r.get("step", 0) <= step or r.get("event") in KEPT]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    samples = folder / "samples.txt"
    if samples.exists():
        scored = {record["step"] for record in records if record.get("split") == "validation"}
        parts = re.split(r"^(?=--- step \d+$)", samples.read_text("utf-8"), flags=re.MULTILINE)
        known = [part for part in parts if part and int(part.split(maxsplit=3)[2]) in scored]
        write_whole(samples, "".join(known))


class MetricsWriter:
    """Appends records to metrics.jsonl and samples to samples.txt, from `step` on, and passes their numbers and text
    on to the writers. Close it after use.

    Without a folder it writes nothing.
    """

    def __init__(self, folder: Path | None, step: int = 0, writers: Sequence[Writer] = ()) -> None:
        self.records: list[Record] = []  # what was written before
        self._folder, self._file, self._writers = folder, None, writers
        if folder is None:
            return
        rewind(folder, step)
        path = folder / "metrics.jsonl"
        self.records = read_records(path)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """One line, whole or not at all; floats keep all their bits, and one that is not finite is null."""
        if self._file is None:
            return
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        bad = {name: None for name, value in numbers.items() if not math.isfinite(value)}
        line = (json.dumps(record | bad) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) != len(line):
            os.ftruncate(self._file.fileno(), size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        if "split" in record:
            numbers = {name: value for name, value in numbers.items() if name != "step" and name not in bad}
            for writer in self._writers:
                writer.scalars(record["step"], record["split"], numbers)

    def samples(self, step: int, text: str) -> None:
        """Outputs for a few examples, before the scores of that step are written: those without scores are no more."""
        if self._folder is None:
            return
        with (self._folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")
        for writer in self._writers:
            writer.text(step, "samples", text)

    def settle(self) -> None:
        """Until all that was written is on the disk itself."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        for each in (*self._writers, self._file):
            if each is not None:
                each.close()


class Curve:
    """Points of a line, and what it looks like. A long one is thinned out as it is drawn, not as it is kept."""

    POINTS = 2000

    def __init__(self, **style: Any) -> None:
        self.style, self._x, self._y = style, array("d"), array("d")

    def add(self, x: float, y: float | None) -> None:
        if y is not None:
            self._x.append(x)
            self._y.append(y)

    def __len__(self) -> int:
        return len(self._x)

    def draw(self, panel: Any) -> None:
        every = slice(None, None, -(-len(self._x) // self.POINTS) or 1)
        panel.plot(self._x[every], self._y[every], **self.style)


def draw_loss(folder: Path) -> None:
    """loss.png: the loss of training and validation by step, and the share of exact matches where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dots = {"marker": "o", "markersize": 4}
    curves = {"train": Curve(linewidth=1, label="train"), "validation": Curve(label="validation", **dots)}
    exact = Curve(**dots)
    for record in each_record(folder / "metrics.jsonl"):  # few of its numbers are kept: it can be long
        if "split" in record:
            curve = curves.setdefault(record["split"], Curve(label=record["split"].removeprefix("validation/"), **dots))
            curve.add(record["step"], record["loss"])
            if "exact_match" in record:
                exact.add(record["step"], 100 * record["exact_match"])
    scored = len(exact) > 0
    figure, axes = pyplot.subplots(1, 2 if scored else 1, figsize=(10 if scored else 6, 4), squeeze=False)
    panel = axes[0][0]
    for curve in curves.values():
        curve.draw(panel)
    panel.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", title="Loss")
    if scored:
        exact.draw(axes[0][1])
        axes[0][1].set(
            xlabel="step", ylabel="exact match (%)", ylim=(0, 105), title="Validation outputs equal to target"
        )
    for each in axes[0]:
        each.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=110)
    pyplot.close(figure)
