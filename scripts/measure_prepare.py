"""What preparing much text takes: `python scripts/measure_prepare.py FOLDER [--gigabytes 5] [--kills 3] [--workers 2]`.

Writes a synthetic text of that size to FOLDER and prepares it twice: left alone, with the memory of all its processes
looked at meanwhile, and killed by SIGKILL at random moments and started again. Prints both as JSON, and whether the two
wrote the same bytes. FOLDER needs about three times the size of the text; the text stays there.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def write_text(path: Path, size: int) -> None:
    """Sentences of words as frequent as those of a language are (Zipf), in one text."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = np.array(["".join(rng.choice(letters[: rng.integers(8, 27)], rng.integers(2, 11))) for _ in range(100_000)])
    chance = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(words, (200_000, 14), p=chance / chance.sum())
    sentences = [" ".join(row[: 4 + number % 11]).capitalize() + ".\n" for number, row in enumerate(drawn)]
    with path.open("w") as file:
        while file.tell() < size:
            file.write("".join(sentences[i] for i in rng.integers(len(sentences), size=20_000)))


def start(folder: Path, text: Path, workers: int) -> subprocess.Popen[bytes]:
    code = "from transformer_jax.cli import main; main()"
    words = ["prepare", str(folder), "--data", str(text), "--workers", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stderr=subprocess.DEVNULL)


def memory_of(process: int) -> int:
    """Bytes that a process and those that it has started hold; a page that several share counts for each."""
    total, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            status = Path(f"/proc/{number}/status").read_text()
            waiting += map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    return total


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    text, alone, killed = (args.folder / name for name in ("text.txt", "alone", "killed"))
    if not text.exists():
        write_text(text, int(args.gigabytes * 1e9))
    since, most = time.monotonic(), 0
    process = start(alone, text, args.workers)
    while process.poll() is None:
        most = max(most, memory_of(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0, process.returncode
    seconds, rng, kills = time.monotonic() - since, random.Random(0), 0
    while kills < args.kills:
        process = start(killed, text, args.workers)
        time.sleep(rng.uniform(0.05, 0.95) * seconds / args.kills)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    again = time.monotonic()
    assert start(killed, text, args.workers).wait() == 0
    paper = json.loads((alone / "prepared.json").read_text())
    result = {
        "bytes": text.stat().st_size,
        "tokens": paper["tokens"],
        "shards": len(paper["shards"]),
        "workers": args.workers,
        "seconds": round(seconds, 1),
        "megabytes_per_second": round(text.stat().st_size / seconds / 1e6, 2),
        "most_memory_megabytes": round(most / 1e6),
        "kills": kills,
        "seconds_of_the_last_start": round(time.monotonic() - again, 1),
        "same_bytes": digests(alone) == digests(killed),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
