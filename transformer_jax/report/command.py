"""`transformer-jax report RUN...`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from transformer_jax.errors import InputError
from transformer_jax.files import check_output, write_output
from transformer_jax.flags import papers, parse
from transformer_jax.page import MOST_LINES

PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folders of runs, finished or not."""
    output: Path | None = None
    """Where the page goes. None: report.html, in the folder of a single run, else here."""
    prompt: str | None = None
    """What runs with a checkpoint answer or continue, for a picture of their attention. None: what their first sample
    was asked."""
    no_attention: bool = False
    """Read no checkpoint, and leave the attention out."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.runs) <= MOST_LINES:
            raise ValueError(f"RUN: give 1 to {MOST_LINES} folders of runs; got {len(self.runs)}.")
        if self.prompt is not None and self.no_attention:
            raise ValueError("--prompt is for the attention, which --no-attention leaves out.")


def _names(runs: tuple[str, ...]) -> dict[str, str]:
    """A name for each folder: its own, or the path where that names several. Raises InputError for a folder twice."""
    places = [Path(run).resolve() for run in runs]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(f"{runs[number]}: the same run is given twice.")
    own = [place.name for place in places]
    return {run: name if own.count(name) == 1 else run for run, name in zip(runs, own, strict=True)}


def command_report(arguments: list[str]) -> int:
    """writes one page about a run, or several beside each other: curves, samples, settings, attention, timings"""
    about = "Writes one HTML page about runs, which needs nothing else: finished ones, or such as still go on."
    args = parse(ReportArguments, "transformer-jax report", arguments, about, switches=True)
    from transformer_jax.report.history import read_history
    from transformer_jax.report.page import page, summary

    histories = {run: read_history(run, name) for run, name in _names(args.runs).items()}
    path = args.output or (Path(args.runs[0]) / PAGE if len(args.runs) == 1 else Path(PAGE))
    kept = [paper for run in args.runs for paper in papers(run) if paper.name != PAGE]
    check_output(path, "--output", *kept)
    looked = {}
    if not args.no_attention:
        from transformer_jax.host import prepare
        from transformer_jax.report.attention import attention_of

        prepare()
        looked = {each.name: attention_of(run, each, args.prompt) for run, each in histories.items()}
    write_output(path, "--output", page(list(histories.values()), looked))
    print(f"{path}: {summary(list(histories.values()))}")
    return 0
