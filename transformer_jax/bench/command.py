"""`transformer-jax bench WHAT`."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformer_jax.config_checks import nearest
from transformer_jax.errors import InputError
from transformer_jax.files import check_output, write_output
from transformer_jax.flags import parse


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


@dataclasses.dataclass(frozen=True)
class GenerateBench:
    case: tuple[str, ...] = ()
    """Those that are measured. None given: all."""
    repeats: int = 5
    """Turns of each way."""
    json: Path | None = None
    """Where the result goes as JSON, besides the table on stdout."""
    markdown: Path | None = None
    """A page whose table of this benchmark is made anew, such as docs/benchmarks.md."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1.")


def bench_generate(arguments: list[str]) -> int:
    """decoding without a cache, with one, and by `transformers` where it is installed"""
    args = parse(GenerateBench, "transformer-jax bench generate", arguments, "Measures decoding.")
    check_output(args.json, "--json")
    check_output(args.markdown, "--markdown")
    from rich.console import Console

    from transformer_jax.bench import generate

    for name in args.case:
        if name not in generate.CASES:
            raise InputError(f"--case {name}: one of {', '.join(generate.CASES)}.{nearest(name, generate.CASES)}")
    progress, console = Console(stderr=True, highlight=False), Console(highlight=False)
    with progress.status("bench generate") as status:
        result = generate.bench_generate(list(args.case or generate.CASES), args.repeats, status.update)
    console.print(as_table(generate.COLUMNS, generate.rows(result)))
    for line in generate.remarks(result):
        console.print(line)
    if args.json is not None:
        write_output(args.json, "--json", json.dumps(result, indent=2) + "\n")
    if args.markdown is not None:
        command = f"transformer-jax bench generate --repeats {args.repeats}"
        text = as_markdown("generate", command, generate.COLUMNS, generate.rows(result), generate.remarks(result))
        write_output(args.markdown, "--markdown", placed(args.markdown, "generate", text))
    return 0


BENCHES: dict[str, Callable[[list[str]], int]] = {"generate": bench_generate}


def command_bench(arguments: list[str]) -> int:
    """measures speed: bench WHAT, such as generate"""
    name, rest = (arguments or [""])[0], arguments[1:]
    if name in ("-h", "--help"):
        lines = [f"  {name:10} {function.__doc__}" for name, function in BENCHES.items()]
        print("usage: transformer-jax bench WHAT [flags]\n\n" + "\n".join(lines))
        return 0
    if name not in BENCHES:
        what = f"Unknown benchmark {name!r}.{nearest(name, BENCHES)}" if name else "WHAT is missing."
        raise InputError(f"bench: {what} One of {', '.join(BENCHES)}.")
    return BENCHES[name](rest)
