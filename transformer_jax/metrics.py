"""What a run tells about itself: metrics.jsonl, TensorBoard, loss.png, samples.txt and lines on the terminal."""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl; one that a crash cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def rewind(path: Path, step: int) -> None:
    """Leaves out the lines after `step`, which a resumed run writes again, and what a crash cut short."""
    records = [record for record in read_records(path) if record.get("step", 0) <= step]
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class MetricsWriter:
    """Appends records to metrics.jsonl and their numbers to TensorBoard, from `step` on. Close it after use.

    Without a folder it writes nothing.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self._file = self._board = None
        if folder is None:
            return
        import logging

        from tensorboardX import SummaryWriter

        logging.getLogger("tensorboardX").setLevel(logging.ERROR)
        self._path = folder / "metrics.jsonl"
        rewind(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Record) -> None:
        """One line; floats keep all their bits."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if "split" in record and name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def close(self) -> None:
        for each in (self._board, self._file):
            if each is not None:
                each.close()


def draw_loss(folder: Path) -> None:
    """loss.png: the loss of training and validation by step, and the share of exact matches where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record in read_records(folder / "metrics.jsonl") if "split" in record]
    scored = [record for record in records if "exact_match" in record]
    figure, axes = pyplot.subplots(1, 2 if scored else 1, figsize=(10 if scored else 6, 4), squeeze=False)
    panel = axes[0][0]
    for split, style in (("train", {"linewidth": 1}), ("validation", {"marker": "o", "markersize": 4})):
        chosen = [record for record in records if record["split"] == split]
        panel.plot([r["step"] for r in chosen], [r["loss"] for r in chosen], label=split, **style)
    panel.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", title="Loss")
    if scored:
        axes[0][1].plot([r["step"] for r in scored], [100 * r["exact_match"] for r in scored], marker="o", markersize=4)
        axes[0][1].set(
            xlabel="step", ylabel="exact match (%)", ylim=(0, 105), title="Validation outputs equal to target"
        )
    for each in axes[0]:
        each.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=110)
    pyplot.close(figure)
