"""What the world around a run does to it: a full disk, a second writer, another machine, other settings, time."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from runs import (
    ROOT,
    Tally,
    differences,
    finish,
    flags,
    records,
    start,
    train,
    undisturbed,
    write_pairs,
)


def _failed(folder: Path) -> list[int]:
    return [record["step"] for record in records(folder) if record.get("event") == "checkpoint_failed"]


def full_disk(base: Path, mode: str) -> Tally:
    """No file may grow beyond 40 kB, as on a full disk; then there is room again, and the same command ends the run."""
    words, tally = [*flags(write_pairs(base / "pairs.tsv"), mode), "--model.d-model", "64"], Tally()
    reference, _ = undisturbed(base / "reference", words)
    limited = ["bash", "-c", f'ulimit -f 40; exec {sys.executable} "$@"', "bash"]
    status, err = train(base / "full", words, prefix=limited)
    wrong = [] if status == 5 and "disk is full" in err else [f"exit status {status}: {err[-300:]}"]
    wrong += ["a traceback"] if "Traceback" in err else []
    wrong += [] if _failed(base / "full") else ["no word about the checkpoints that failed"]
    tally.add(f"{mode}: every save fails", wrong)
    status, err = train(base / "full", words)
    tally.add(f"{mode}: room again", differences(base / "full", reference) if status == 0 else [err[-300:]])
    return tally


def full_tmpfs(base: Path, mode: str, size_kb: int = 600) -> Tally:
    """A small disk that fills up while training goes on; then it grows. It needs the right to mount."""
    words, tally = flags(write_pairs(base / "pairs.tsv"), mode), Tally()
    reference, _ = undisturbed(base / "reference", words)
    disk = base / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return tally
    try:
        (disk / "filler").write_bytes(bytes(450 * 1024))
        status, err = train(disk / "run", words)
        wrong = [] if status == 5 and "full" in err else [f"exit status {status}: {err[-300:]}"]
        tally.add(f"{mode}: a disk of {size_kb} kB", wrong + (["a traceback"] if "Traceback" in err else []))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        status, err = train(disk / "run", words)
        tally.add(f"{mode}: it grows", differences(disk / "run", reference) if status == 0 else [err[-300:]])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return tally


def two_writers(base: Path, mode: str, trials: int = 1) -> Tally:
    """The same command twice at once: one trains as if it were alone, the other exits with 4 and says who does."""
    words, tally = flags(write_pairs(base / "pairs.tsv"), mode), Tally()
    reference, _ = undisturbed(base / "reference", words)
    for trial in range(trials):
        folder = base / f"both-{trial}"
        ended = [finish(process) for process in [start(folder, words), start(folder, words)]]
        said = next((err for status, err in ended if status == 4), "")
        wrong = [] if sorted(status for status, _ in ended) == [0, 4] else [f"exit statuses {[s for s, _ in ended]}"]
        wrong += [] if "is in use: process" in said and said.count("\n") == 1 else [f"the message is {said!r}"]
        tally.add(f"trial {trial}", wrong or differences(folder, reference))
    return tally


# Settings of the world around a process that must not change a bit.
WORLDS: dict[str, dict[str, str]] = {
    "hash seed 1": {"PYTHONHASHSEED": "1"},
    "hash seed 2, C locale, Kiritimati": {"PYTHONHASHSEED": "2", "LC_ALL": "C", "TZ": "Pacific/Kiritimati"},
    "UTF-8 mode off, Turkish": {"PYTHONUTF8": "0", "LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8"},
    "one thread": {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
}


def other_worlds(base: Path, mode: str, worlds: dict[str, dict[str, str]]) -> Tally:
    """The same numbers, tokenizer and weights to the bit, whatever the hash seed, the locale or the time zone."""
    data, tally = write_pairs(base / "pairs.tsv"), Tally()
    words = [*flags(data, mode), "--data.tokenizer", "bpe", "--data.tokenizer-size", "300"]
    reference, _ = undisturbed(base / "reference", words)
    for number, (name, world) in enumerate(worlds.items()):
        status, err = train(base / f"world-{number}", words, **world)
        wrong = differences(base / f"world-{number}", reference) if status == 0 else [err[-300:]]
        papers = [base / folder / "tokenizer.json" for folder in ("reference", f"world-{number}")]
        wrong += [] if papers[0].read_bytes() == papers[1].read_bytes() else ["tokenizer.json differs"]
        tally.add(f"{mode}: {name}", wrong)
    return tally


MESH = ["--parallel.strategy", "mesh", "--parallel.mesh"]
TOPOLOGIES = {
    "data=2,fsdp=2,tensor=2 on 8": (8, [*MESH, "data=2,fsdp=2,tensor=2"]),
    "jit on 1": (1, []),
    "pmap on 4": (4, ["--parallel.strategy", "pmap"]),
    "fsdp=8 on 8": (8, [*MESH, "fsdp=8"]),
}
RESTORE = """
import sys
from pathlib import Path
import jax
from transformer_jax.checkpoint import restore
from transformer_jax.cli import parse_run
from transformer_jax.config_file import read_config
from transformer_jax.run import first_state
from transformer_jax.partition import Partitioner
from transformer_jax.trainer import digest_of
unit = Path(sys.argv[1])
parallel = parse_run(sys.argv[2:]).parallel
run = read_config(unit / "config.json")
state = Partitioner.create(parallel).abstract(lambda key: first_state(run, key), jax.random.key(0))
state = restore(unit, state)
print(digest_of((state.params, state.opt_state)), int(state.step))
"""


def other_topologies(base: Path, mode: str) -> Tally:
    """Saved on a mesh over 8 devices, restored elsewhere: parameters to the bit, batches the same, losses to 1e-5."""
    data, tally = write_pairs(base / "pairs.tsv"), Tally()
    # under pmap each device drops out in a way of its own, so nothing drops out here
    words = [*flags(data, mode, steps=16), "--batch-size", "16", "--model.dropout-rate", "0"]
    stop, found = 8, {}
    first, digests = next(iter(TOPOLOGIES)), {}
    for name, (devices, parallel) in TOPOLOGIES.items():
        world = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        folder = base / name.replace(" ", "-").replace(",", "-")
        if name == first:
            status, err = train(folder, [*words, *parallel, "--stop-at", str(stop)], **world)
            assert status == 0, err
            shutil.copytree(folder, base / "saved")
        else:
            shutil.copytree(base / "saved", folder)
        digests[name] = _digest(folder / "checkpoints" / str(stop), parallel, world)
        status, err = train(folder, [*words, *parallel], **world)
        rows = [r for r in records(folder) if r.get("split") == "train" and r["step"] > stop]
        found[name] = {r["step"]: (r["batch_sha"], r["tokens"], r["loss"]) for r in rows}
        wrong = [] if status == 0 else [err[-300:]]
        wrong += [] if digests[name] and digests[name] == digests[first] else [f"parameters differ: {digests}"]
        wrong += [] if sorted(found[name]) == list(range(stop + 1, 17)) else [f"steps {sorted(found[name])}"]
        for step, (sha, tokens, loss) in found[name].items():
            one = found[first][step]
            same = (sha, tokens) == one[:2] and abs(loss - one[2]) <= 1e-5 * abs(one[2])
            wrong += [] if same else [f"step {step}: {(sha, tokens, loss)} != {one}"]
        tally.add(f"{mode}: {name}", wrong[:3])
    return tally


def _digest(unit: Path, parallel: list[str], world: dict[str, str]) -> str:
    """The digest of a checkpoint's state and its step, as a process in that world restores them."""
    command = [sys.executable, "-c", RESTORE, str(unit), "pairs", *parallel]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | world
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def other_platform(base: Path, mode: str) -> Tally:
    """Saved on a CPU, gone on with on a GPU, and the other way round; nothing is tried where there is no GPU."""
    data, tally = write_pairs(base / "pairs.tsv"), Tally()
    words = [*flags(data, mode, steps=16), "--model.dropout-rate", "0"]
    probe = [sys.executable, "-c", "import jax; print(jax.devices('cuda')[0].device_kind, jax.__version__)"]
    gpu = subprocess.run(probe, capture_output=True, text=True)
    if gpu.returncode:
        return tally
    tally.notes["on"] = "an {} with jax {}".format(*gpu.stdout.strip().rsplit(" ", 1))
    platforms = ("cpu", "cuda")
    # a GPU's own way to multiply float32 keeps 10 bits of each factor
    worlds = {name: {"JAX_PLATFORMS": name, "JAX_DEFAULT_MATMUL_PRECISION": "highest"} for name in platforms}
    for name, other in (platforms, platforms[::-1]):
        saved, folder = base / f"saved-{name}", base / f"{name}-to-{other}"
        status, err = train(saved, [*words, "--stop-at", "8"], **worlds[name])
        assert status == 0, err
        shutil.copytree(saved, folder)
        digests = [_digest(saved / "checkpoints" / "8", [], world) for world in worlds.values()]
        wrong = [] if digests[0] and digests[0] == digests[1] else [f"parameters differ: {digests}"]
        found = {}
        for where, world in ((saved, worlds[name]), (folder, worlds[other])):
            status, err = train(where, words, **world)
            wrong += [] if status == 0 else [err[-300:]]
            rows = [r for r in records(where) if r.get("split") == "train" and r["step"] > 8]
            found[where] = [(r["step"], r["batch_sha"], r["tokens"], r["loss"]) for r in rows]
        wrong += [] if len(found[saved]) == len(found[folder]) == 8 else ["steps are missing"]
        for one, two in zip(found[saved], found[folder]):
            same = one[:3] == two[:3] and abs(one[3] - two[3]) <= 1e-5 * abs(one[3])
            wrong += [] if same else [f"{two} != {one}"]
        tally.add(f"{mode}: {name} to {other}", wrong[:3])
    return tally


def soak(base: Path, mode: str, minutes: float) -> Tally:
    """A long run: resident memory, open files and threads do not grow, steps do not get slower."""
    words, tally = flags(write_pairs(base / "pairs.tsv"), mode, steps=10_000_000, every=1000), Tally()
    folder, samples = base / "long", []
    process = start(folder, [*words, "--stop-after", f"{minutes:g}m", "--log-every", "100", "--eval-every", "1000"])
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            samples.append((int(fields["VmRSS"].split()[0]) / 1024, files, int(fields["Threads"])))
        except (OSError, KeyError):
            break
        time.sleep(1)
    status, err = finish(process)
    tally.add(f"{mode}: it ends", [] if status == 75 else [f"exit status {status}: {err[-300:]}"])
    quarter = max(len(samples) // 4, 1)
    for place, (name, limit) in enumerate((("MB of memory", 30), ("open files", 2), ("threads", 2))):
        early, late = (
            statistics.median(s[place] for s in part) for part in (samples[quarter : 2 * quarter], samples[-quarter:])
        )
        tally.notes[name] = f"{early:.0f} -> {late:.0f}"
        tally.add(f"{mode}: {name}", [f"{early} -> {late}"] if late > early + limit else [])
    lines = [record for record in records(folder) if record.get("split") == "train"]
    rates, quarter = [record["tokens_per_second"] for record in lines], max(len(lines) // 4, 1)
    early, late = statistics.median(rates[quarter : 2 * quarter]), statistics.median(rates[-quarter:])
    tally.add(f"{mode}: tokens a second", [f"{early:.0f} -> {late:.0f}"] if late < early / 1.2 else [])
    tally.add(f"{mode}: compiled once", [] if {record["compiles"] for record in lines} == {1} else ["more than once"])
    tally.notes |= {"minutes": f"{minutes:g}", "steps": lines[-1]["step"], "tokens/s": f"{early:.0f} -> {late:.0f}"}
    return tally
