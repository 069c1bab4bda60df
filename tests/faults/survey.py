"""Tries every fault and writes the table of docs/reliability.md: `python tests/faults/survey.py [--only WORD]`.

With --only those rows alone whose names hold the word; with --quick a few of each, and the table is only printed. The
whole of it takes more than an hour on two cores.
"""

import argparse
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from runs import EVERY, MODES, ROOT, Tally, kills  # noqa: E402
from surroundings import (  # noqa: E402
    WORLDS,
    full_disk,
    full_tmpfs,
    other_platform,
    other_topologies,
    other_worlds,
    soak,
    two_writers,
)
from test_damage import found_by_hashes, halfway_run, tally  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- survey: start -->\n", "<!-- survey: end -->\n"


def both(fault: Callable[[Path, str], Tally]) -> Callable[[Path], Tally]:
    """A fault in both modes, added up."""

    def run(base: Path) -> Tally:
        total = Tally()
        for mode in MODES:
            (base / mode).mkdir()
            part = fault(base / mode, mode)
            total.survived, total.tried = total.survived + part.survived, total.tried + part.tried
            total.failures += part.failures
            total.notes |= {f"{name} ({mode})": value for name, value in part.notes.items()}
        return total

    return run


def faults(quick: bool, minutes: float) -> dict[str, Callable[[Path], Tally]]:
    """What is tried, by the words that stand in the table."""
    runs, each = (1, 2) if quick else (14, 4)
    worlds = dict(list(WORLDS.items())[: 1 if quick else None])
    some = 60 if quick else 8
    return {
        "SIGKILL at random times, at random steps, and while a checkpoint is written": lambda base: kills(
            base, runs, each, [signal.SIGKILL], seed=1
        ),
        "SIGTERM and SIGINT at the same moments": lambda base: kills(
            base, 1 if quick else 5, 3, [signal.SIGTERM, signal.SIGINT], seed=2
        ),
        "damage to a checkpoint (each file in each way, 100 single bits, whole folders) is found": lambda base: (
            found_by_hashes(halfway_run(base))
        ),
        "the run goes on after such damage, every eighth of it": lambda base: tally(halfway_run(base), every=some),
        "every save fails, then there is room again": both(full_disk),
        "a small disk fills up, then it grows": both(full_tmpfs),
        "two processes start in one folder at once": both(
            lambda base, mode: two_writers(base, mode, 1 if quick else 3)
        ),
        "other hash seed, locale, time zone, threads": both(lambda base, mode: other_worlds(base, mode, worlds)),
        "another number of devices, strategy or mesh": both(other_topologies),
        "from a CPU to a GPU and back": both(other_platform),
        "a long run: memory, files, threads, speed": lambda base: soak(base, MODES[0], minutes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few of each; nothing is written")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the long run")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    args = parser.parse_args()
    page = PAGE.read_text("utf-8")
    before, table, after = page.partition(START)[0], page.partition(START)[2].partition(END)[0], page.partition(END)[2]
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.count(" | ") == 3}
    wrong = []
    for name, fault in faults(args.quick, args.minutes).items():
        if args.only not in name:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = fault(Path(folder))
        if not found.tried:
            print(f"{name}: cannot be tried on this machine")
            continue
        notes = "; ".join(f"{key} {value}" for key, value in found.notes.items())
        rows[name] = f"| {name} | {found.survived} / {found.tried} | {notes} | {time.monotonic() - began:.0f} s |"
        wrong += [f"{name}: {failure}" for failure in found.failures]
        print(rows[name], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    about = f"Python {platform.python_version()}, {versions}, {platform.machine()} CPU."
    head = ["| fault | survived / tried | | time |", "| --- | --- | --- | --- |"]
    ordered = [rows[name] for name in faults(args.quick, args.minutes) if name in rows]
    table = "\n".join([*head, *ordered, "", f"{about} A checkpoint every {EVERY} steps of a run of 30.", ""])
    for failure in wrong:
        print(f"not survived: {failure}")
    if not args.quick:
        PAGE.write_text(before + START + table + END + after, "utf-8")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
