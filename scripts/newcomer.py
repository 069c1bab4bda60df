"""How long a newcomer takes from a clone to the first output, by the README alone: `python scripts/newcomer.py`.

Clones this repository to a temporary folder, makes a virtual environment, and runs there the first command line of the
README and then its first `generate`. Nothing is known from before: no packages of pip's cache, no compiled programs.
Prints the seconds of each stage and what was said as JSON. The exit status is 1 where that is not EXPECTED, or where it
took longer than --limit. `--training "--steps 4"` adds words to the training command, to try the script out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXPECTED = "2020-04-02"


def first_commands(readme: str) -> tuple[list[str], str]:
    """The commands of the README's first line of shell, and the first line that generates."""
    lines = [
        line
        for block in re.findall(r"^```\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    generate = next(line for line in lines if re.search(r"transformer-jax generate\b", line))
    return lines[0].split(" && "), generate


def surroundings(folder: Path) -> dict[str, str]:
    """The variables of a shell in which the folder's environment is active, and that has no past."""
    foreign = ("PYTHON", "PIP_", "JAX_", "XLA_", "XDG_", "VIRTUAL_ENV")
    found = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = f"{folder / 'environment' / 'bin'}{os.pathsep}{found.get('PATH', '')}"
    cache = str(folder / "cache")
    return found | {"PATH": path, "VIRTUAL_ENV": str(folder / "environment"), "XDG_CACHE_HOME": cache}


def run(line: str, folder: Path) -> str:
    """What a line of shell says on stdout, in the clone. Raises CalledProcessError."""
    words = ["bash", "-c", line]
    done = subprocess.run(words, cwd=folder / "clone", env=surroundings(folder), stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def walk(folder: Path, training: str = "") -> tuple[dict[str, float], str]:
    """The seconds of each stage, in order, and what the last one says."""
    seconds, since = {}, time.monotonic()

    def ended(stage: str) -> None:
        nonlocal since
        seconds[stage], since = round(time.monotonic() - since, 1), time.monotonic()
        print(f"{stage}: {seconds[stage]} s", file=sys.stderr)

    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
    ended("git clone")
    venv.create(folder / "environment", with_pip=True)
    ended("python -m venv")
    first, generate = first_commands((folder / "clone/README.md").read_text("utf-8"))
    for line in first:
        run(f"{line} {training}" if "train.py" in line else line, folder)
        ended(line)
    said = run(generate, folder)
    ended(generate)
    return seconds, said.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=360.0, help="seconds that all may take")
    parser.add_argument("--training", default="", help="words to add to the training command")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        seconds, said = walk(Path(folder), args.training)
    total = round(sum(seconds.values()), 1)
    result = {"stages": seconds, "seconds": total, "limit": args.limit, "output": said, "expected": EXPECTED}
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return int(said != EXPECTED or total > args.limit)


if __name__ == "__main__":
    sys.exit(main())
