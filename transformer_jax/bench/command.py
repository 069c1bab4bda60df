"""`transformer-jax bench WHAT`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from transformer_jax.config_checks import nearest
from transformer_jax.errors import InputError
from transformer_jax.files import check_output, write_output
from transformer_jax.flags import parse


@dataclasses.dataclass(frozen=True)
class GenerateBench:
    case: tuple[str, ...] = ()
    """Those that are measured. None given: all."""
    repeats: int = 5
    """Turns of each way."""
    json: Path | None = None
    """Where the result goes as JSON, besides the table on stdout."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1.")


def bench_generate(arguments: list[str]) -> int:
    """decoding without a cache, with one, and by `transformers` where it is installed"""
    args = parse(GenerateBench, "transformer-jax bench generate", arguments, "Measures decoding.")
    check_output(args.json, "--json")
    from rich.console import Console

    from transformer_jax.bench import generate

    for name in args.case:
        if name not in generate.CASES:
            raise InputError(f"--case {name}: one of {', '.join(generate.CASES)}.{nearest(name, generate.CASES)}")
    progress, console = Console(stderr=True, highlight=False), Console(highlight=False)
    with progress.status("bench generate") as status:
        result = generate.bench_generate(list(args.case or generate.CASES), args.repeats, status.update)
    console.print(generate.table(result))
    if "time_of_1024_tokens_over_128" in result:
        console.print(f"1,024 tokens take {result['time_of_1024_tokens_over_128']:.2f} times as long as 128.")
    about = {name: found for name, found in result["versions"].items() if found}
    console.print(f"{result['device']}, {', '.join(f'{name} {number}' for name, number in about.items())}.")
    if args.json is not None:
        write_output(args.json, "--json", json.dumps(result, indent=2) + "\n")
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
