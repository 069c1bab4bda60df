"""`transformer-jax bench WHAT`."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from transformer_jax.config_checks import at_least, at_most, nearest
from transformer_jax.errors import InputError
from transformer_jax.files import check_output, write_output


def as_table(columns: Sequence[str], rows: list[tuple[str, ...]]) -> Any:
    """A table for a terminal, with a line between cases."""
    from rich.box import SIMPLE
    from rich.table import Table

    table, before = Table(box=SIMPLE, padding=(0, 1, 0, 0)), ""
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in rows:
        if before not in ("", row[0]):
            table.add_section()
        table.add_row("" if row[0] == before else row[0], *row[1:])
        before = row[0]
    return table


def as_markdown(
    name: str, command: str, columns: Sequence[str], rows: list[tuple[str, ...]], remarks: list[str]
) -> str:
    """The same for a page, between marks by which it is found again."""
    lines = [f"| {' | '.join(row)} |" for row in [tuple(columns), ("---",) * len(columns), *rows]]
    about = f"`{command}`: {' '.join(remarks)}"
    return "\n".join([f"<!-- {name}: start -->", *lines, "", about, f"<!-- {name}: end -->"])


def placed(page: Path, name: str, text: str) -> str:
    """A page's text with the part between a name's marks replaced, or with that added at its end."""
    before = page.read_text("utf-8") if page.exists() else ""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    if start in before and end in before:
        return before[: before.index(start)] + text + before[before.index(end) + len(end) :]
    return before + ("\n" if before else "") + text + "\n"


class Benchmark(Protocol):
    """A module of a benchmark; one with a chart has `draw(result, path)`, one with own flags TAKES, their names."""

    CASES: Mapping[str, Any]
    COLUMNS: Sequence[str]

    def run(self, cases: list[str], repeats: int, say: Callable[[str], None], **extra: Any) -> dict[str, Any]: ...
    def rows(self, result: dict[str, Any]) -> list[tuple[str, ...]]: ...
    def remarks(self, result: dict[str, Any]) -> list[str]: ...


# What is measured by the benchmark of a name, which is a module beside this one.
BENCHES = {
    "attention": "every way to compute attention that fits the device, by length",
    "generate": "decoding without a cache, with one, and by `transformers` where it is installed",
    "jit": "the train step operation by operation, in compiled functions, and compiled whole in several ways",
    "data": "the input pipeline alone, steps alone, and training, which waits for batches or does not",
    "train": "training beside PyTorch with torch.compile, where that is installed",
    "pairs": "training on pairs in packed rows, beside PyTorch with padded batches where that is installed",
    "strategies": "the train step by jit, pmap, shard_map and meshes over all devices",
    "memory": "what a train step needs besides its state, with the logits of all tokens and in parts",
    "compile": "compile time and step time by depth, layers one by one or in a loop",
}
WIDTH = 120  # letters, of a table in a file


@dataclasses.dataclass(frozen=True)
class BenchFlags:
    case: tuple[str, ...] = ()
    """Those that are measured. None given: all."""
    repeats: int = 5
    """Turns of each way."""
    json: Path | None = None
    """Where the result goes as JSON, besides the table on stdout."""
    markdown: Path | None = None
    """A page whose table of this benchmark is made anew, such as docs/benchmarks.md."""
    plot: Path | None = None
    """Where the chart goes, a .png, of a benchmark that has one."""

    data: tuple[Path, ...] = ()
    """For `pairs`: parallel files, or one file of pairs, as --data.train of `train`. None given: dates."""
    devices: int | None = None
    """For `strategies`: play so many devices on the CPU. None: those of this machine."""

    def __post_init__(self) -> None:
        at_least(self, 1, "repeats", "devices")
        at_most(self, 64, "devices")
        if len(self.data) > 2:
            raise ValueError(f"--data takes one path, or two parallel files; got {len(self.data)}.")


def benchmark(name: str) -> Benchmark:
    """The module of a name; JAX is imported with it."""
    from transformer_jax.bench import attention, data, generate, jit, memory, pairs, strategies, train
    from transformer_jax.bench import compile as depth

    modules: dict[str, Any] = {"attention": attention, "compile": depth, "data": data, "generate": generate, "jit": jit}
    modules |= {"memory": memory, "pairs": pairs, "strategies": strategies, "train": train}
    return cast(Benchmark, modules[name])


def bench(name: str, arguments: list[str]) -> int:
    """Measures, prints the table, and writes what is asked for."""
    from transformer_jax.flags import parse

    args = parse(BenchFlags, f"transformer-jax bench {name}", arguments, f"Measures {BENCHES[name]}.")
    outputs = {"--json": args.json, "--markdown": args.markdown, "--plot": args.plot}
    for flag, path in outputs.items():
        check_output(path, flag)
    from rich.console import Console

    from transformer_jax.host import prepare

    prepare(keep=False)
    what = benchmark(name)
    draw = getattr(what, "draw", None)
    if args.plot is not None and draw is None:
        raise InputError(f"--plot {args.plot}: bench {name} has no chart.")
    if args.plot is not None and args.plot.suffix != ".png":
        raise InputError(f"--plot {args.plot}: the chart is a .png.")
    for case in args.case:
        if case not in what.CASES:
            raise InputError(f"--case {case}: one of {', '.join(what.CASES)}.{nearest(case, what.CASES)}")
    extra = {flag: value for flag, value in (("data", args.data), ("devices", args.devices)) if value}
    for flag in extra:
        if flag not in getattr(what, "TAKES", ()):
            raise InputError(f"--{flag}: bench {name} takes none.")
    progress, console = Console(stderr=True, highlight=False), Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    with progress.status(f"bench {name}") as status:
        result = what.run(list(args.case or what.CASES), args.repeats, status.update, **extra)
    rows, remarks = what.rows(result), [*what.remarks(result), about(result)]
    console.print(as_table(what.COLUMNS, rows))
    for line in remarks:
        console.print(line)
    if args.json is not None:
        write_output(args.json, "--json", json.dumps(result, indent=2) + "\n")
    if args.markdown is not None:
        command = " ".join(["transformer-jax bench", name, *_words(args, result["repeats"])])
        text = as_markdown(name, command, what.COLUMNS, rows, remarks)
        write_output(args.markdown, "--markdown", placed(args.markdown, name, text))
    if args.plot is not None and draw is not None:
        draw(result, args.plot)
    return 0


def _words(args: BenchFlags, repeats: int) -> list[str]:
    """The flags that matter to a result; a file by its name alone."""
    words = ["--case", *map(shlex.quote, args.case)] if args.case else []
    words += ["--repeats", str(repeats)] if repeats else []
    words += ["--data", *(path.name for path in args.data)] if args.data else []
    return words + (["--devices", str(args.devices)] if args.devices else [])


def about(result: dict[str, Any]) -> str:
    """What a result's figures depend on, in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    turns = f"medians of {result['repeats']} turns; " if result["repeats"] else ""
    return f"{result['device']}; {versions}; {turns}{result['date']}."


def command_bench(arguments: list[str]) -> int:
    """measures speed: bench WHAT, such as generate"""
    name, rest = (arguments or [""])[0], arguments[1:]
    if name in ("-h", "--help"):
        print("usage: transformer-jax bench WHAT [flags]\n\n" + "\n".join(f"  {k:10} {v}" for k, v in BENCHES.items()))
        return 0
    if name not in BENCHES:
        what = f"Unknown benchmark {name!r}.{nearest(name, BENCHES)}" if name else "WHAT is missing."
        raise InputError(f"bench: {what} One of {', '.join(BENCHES)}.")
    return bench(name, rest)
