"""What `--deterministic True` costs and gives: `python tests/faults/measure_deterministic.py [flags of a run]`.

It trains the same run `--repeats` times with and without it, in turn, and prints of each the median of tokens a second
over its later steps, how many different weights the runs ended with, and the device. Without flags it is `dates`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def one(words: list[str], folder: str) -> tuple[float, str]:
    """Tokens a second, and the digest of the weights in the end."""
    command = [sys.executable, str(ROOT / "train.py"), *words, "--workdir", folder]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} ended with status {ended.returncode}: {ended.stderr[-500:]}")
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if line.get("split") == "train"]
    return statistics.median(rates[len(rates) // 2 :]), lines[-1]["param_digest"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args, words = parser.parse_known_args()
    words = words or ["dates"]
    found: dict[str, list[tuple[float, str]]] = {"False": [], "True": []}
    for _ in range(args.repeats):
        for value, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                runs.append(one([*words, "--deterministic", value], folder))
    import jax

    device = jax.devices()[0].device_kind
    print(f"`{' '.join(words)}`, {args.repeats} runs each in turn, {device}, jax {jax.__version__}\n")
    print("| --deterministic | tokens a second | different weights in the end |\n| --- | --- | --- |")
    for value, runs in found.items():
        rate, kinds = statistics.median(rate for rate, _ in runs), len({digest for _, digest in runs})
        print(f"| {value} | {rate:,.0f} | {kinds} of {args.repeats} |")


if __name__ == "__main__":
    main()
