"""`transformer-jax reproduce NAME --data PATH`."""

import dataclasses
import json
import shlex
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import tyro

from transformer_jax.config import ParallelConfig, RunConfig
from transformer_jax.config_checks import at_least, nearest
from transformer_jax.errors import InputError
from transformer_jax.flags import parse
from transformer_jax.folders import write_whole
from transformer_jax.reproduce import PUBLISHED, Published

RESULT = "reproduce.json"


@dataclasses.dataclass(frozen=True)
class ReproduceArguments:
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = ""
    """Which result. None given: a table of all."""
    data: Path | None = None
    """What it is trained and scored on, as the table says; nothing is downloaded. None given: says what it takes."""
    workdir: str = ""
    """Folder of the run. None given: runs/reproduce-NAME. The same command on it goes on."""
    seed: int = 0
    """Of parameters, data order and dropout."""
    stop_at: int = 0
    """Stop at this step and score what there is; 0 is the end. The same command without it goes on from there."""
    stop_after: str = ""
    """Stop, with everything saved, after this much time, such as 3h50m or 90s."""
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", "stop_at")
        RunConfig(stop_after=self.stop_after)
        if self.name and self.name not in PUBLISHED:
            raise ValueError(f"{self.name!r} is none of {', '.join(PUBLISHED)}.{nearest(self.name, PUBLISHED)}")
        if not self.name and (self.data is not None or self.workdir):
            raise ValueError(f"NAME is missing: one of {', '.join(PUBLISHED)}.")


def command_of(name: str, published: Published) -> str:
    """The command that reproduces a result."""
    return f"transformer-jax reproduce {name} --data {'FOLDER' if published.files else 'FILE'}"


def overview() -> str:
    """All results, a line each."""
    rows = [("NAME", "METRIC", "REACHED", "TIME")]
    rows += [(name, each.metric, each.wanted, each.takes) for name, each in PUBLISHED.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def about(name: str, published: Published) -> str:
    """What a result is, and what it takes, in lines."""
    lines = [
        f"{name}: {published.metric} {published.value:g} ({published.source}); {published.wanted} counts as reached.",
        published.means,
        f"Recipe {published.recipe}; {published.takes}.",
        _measured(published),
        f"Data: {published.data}.",
        f"Command: {command_of(name, published)}",
    ]
    return "\n".join(lines)


def _measured(published: Published) -> str:
    """What the whole of it gave, one run a seed: their mean is what reaches it or not."""
    if not published.measured:
        return "The whole of it was not run for this project."
    gave = " and ".join(f"{each:g}" for each in published.measured)
    if len(published.measured) > 1:
        seeds = " and ".join(map(str, range(len(published.measured))))
        gave += f" with the seeds {seeds}, {round(fmean(published.measured), 4):g} on average"
    short = "" if published.reached(fmean(published.measured)) else ", which does not reach it"
    return f"Run for this project, the whole of it gave {gave}{short}."


def verdict(published: Published, found: dict[str, Any]) -> str:
    """Measured beside published, in a sentence."""
    measured = found["scores"][published.metric]
    beside = f"{published.metric} {measured:.4g} measured, {published.value:g} published ({published.source})"
    if found["trained"] < found["steps"]:
        return f"{beside}: after {found['trained']:,} of {found['steps']:,} steps, so this is no reproduction yet."
    return f"{beside}: {'reached' if published.reached(measured) else 'NOT reached'} ({published.wanted})."


def command_reproduce(arguments: list[str]) -> int:
    """trains and scores a published result, and says whether it was reached: reproduce [NAME] --data PATH"""
    usage = f"Trains and scores a published result, one of {', '.join(PUBLISHED)}."
    args = parse(ReproduceArguments, "transformer-jax reproduce", arguments, usage)
    if not args.name:
        print(overview())
        return 0
    published = PUBLISHED[args.name]
    if args.data is None:
        print(about(args.name, published))
        return 0
    if not args.data.exists():
        raise InputError(f"--data {args.data}: no such file or folder. It must be {published.data}.")
    from transformer_jax import host, job
    from transformer_jax.reproduce.pipeline import measure, settings
    from transformer_jax.surroundings import surroundings
    from transformer_jax.terminal import Terminal

    host.prepare()
    job.join(args.parallel)
    terminal, workdir = Terminal(speaks=job.is_first()), Path(args.workdir or f"runs/reproduce-{args.name}")
    terminal.say(about(args.name, published))
    run, test = settings(published, args.data, workdir, args.seed, args.parallel, terminal.say)
    found = measure(
        published, dataclasses.replace(run, stop_at=args.stop_at, stop_after=args.stop_after), test, terminal
    )
    if found is None:
        return 75
    command = shlex.join(["transformer-jax", "reproduce", *arguments])
    result = {"name": args.name, "published": dataclasses.asdict(published), "command": command, **found}
    if job.is_first():
        write_whole(workdir / RESULT, json.dumps(result | surroundings(), indent=1) + "\n")
        print(verdict(published, found))
        print(f"Of {found['of']}. {workdir / RESULT} has all scores, {workdir / 'loss.png'} the curve.")
    whole = found["trained"] >= found["steps"]
    return int(whole and not published.reached(found["scores"][published.metric]))
