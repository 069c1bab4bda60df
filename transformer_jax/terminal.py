"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere. All on stderr."""

import sys
import time
from pathlib import Path
from typing import Any

from transformer_jax.config import RunConfig

QUIET_SECONDS = 10.0


class Terminal:
    """Tells a person how a run goes. Only the first process of a job has one that speaks."""

    def __init__(self, speaks: bool = True) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=not speaks, highlight=False, soft_wrap=True)
        self.has_bar, self._bar = sys.stderr.isatty(), None
        self._spoke = 0.0

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def introduce(self, run: RunConfig, folder: Path, parameters: int, report: list[str]) -> None:
        """What is about to be trained, on what, and where."""
        import jax

        devices = jax.devices()
        self.say(f"{run.recipe}: {run.model.mode}, {parameters:,} parameters, {run.data.objective}, in {folder}")
        self.say(f"devices: {len(devices)} x {devices[0].device_kind}, strategy {run.parallel.strategy}")
        for line in report:
            self.say(line)

    def _open_bar(self, steps: int) -> Any:
        from rich import progress

        bar = progress.Progress(
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = bar.add_task("", total=steps)
        bar.start()
        return bar

    def train(self, record: dict[str, Any], steps: int) -> None:
        """A line of training metrics: on the bar, or in print now and then."""
        text = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if self.has_bar:
            if self._bar is None:
                self._bar = self._open_bar(steps)
            self._bar.update(self._task, completed=record["step"], description=text)
        elif time.monotonic() - self._spoke > QUIET_SECONDS:
            self._spoke = time.monotonic()
            self.say(f"step {record['step']}/{steps}  {text}")

    def validation(self, record: dict[str, Any], steps: int) -> None:
        """A line of validation scores."""
        text = f"step {record['step']}/{steps}  {record['split']} loss {record['loss']:.4f}"
        text += f"  accuracy {record['accuracy']:.1%}"
        if "exact_match" in record:
            text += f"  exact match {record['exact_match']:.1%} of {record['exact_match_sample']}"
        self.say(text)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
