"""Over an epoch of packed rows out of token shards, on several hosts and with kills in between, every document is read
once: what each process gave its steps is on record, row by row, and is put together here."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transformer_jax.cli import run_command

ROOT = Path(__file__).parents[2]
DOCUMENTS, KILLS, BATCH = 600, 3, 8
# As train.py, with a record of what each step is given: of each of this process's rows its epoch and its documents.
WITNESS = """
import functools, json, os, sys
import numpy as np
from transformer_jax import loop
from transformer_jax.cli import main
ahead = loop.ahead

def documents(tokens, row, tokenizer):
    ids, segments = np.asarray(tokens.ids[row]), np.asarray(tokens.segments[row])
    return [tokenizer.decode(ids[segments == s]) for s in range(1, int(segments.max(initial=0)) + 1)]

def seen(trainer, step):
    drawn = trainer.batches.draw(step)
    epochs, batch = trainer.batches.places(step)[trainer.mine][:, 1], drawn.batch
    sides = [batch.target] if batch.source is None else [batch.source, batch.target]
    rows = [["".join(parts) for parts in zip(*(documents(side, row, trainer.data.tokenizer) for side in sides))]
            for row in range(len(epochs))]
    line = {"step": step + 1, "sha": drawn.sha, "rows": [[int(e), texts] for e, texts in zip(epochs, rows)]}
    with open(os.environ["WITNESS"], "a") as file:
        file.write(json.dumps(line) + chr(10))
    return drawn

def watched(draw, start, stop, *more):
    return ahead(functools.partial(seen, watched.trainer), start, stop, *more)

class Loop(loop.Loop):
    def run(self):
        watched.trainer = self.trainer
        return super().run()

loop.Loop, loop.ahead = Loop, watched
main(["train", *sys.argv[1:]])
"""


def write_shards(folder):
    """Documents that say their number first."""
    rng = random.Random(0)
    lines = [f"{number}:" + "".join(rng.choices("abcdefgh ", k=rng.randint(3, 20))) for number in range(DOCUMENTS)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    words = ["prepare", str(folder / "shards"), "--data", str(folder / "texts.jsonl"), "--tokenizer", "char"]
    assert run_command([*words, "--shard-tokens", "3000"]) == 0
    return folder / "shards"


def start(folder, words, hosts):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    job = ["--parallel.coordinator", f"localhost:{port}", "--parallel.num-processes", str(hosts)] if hosts > 1 else []
    processes = []
    for host in range(hosts):
        own = [*job, "--parallel.process-id", str(host)] if job else []
        command = [sys.executable, str(folder / "witness.py"), *words, *own]
        environment["WITNESS"] = str(folder / f"witness-{host}.jsonl")
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


def finish(processes):
    said = [process.communicate(timeout=240)[1].decode() for process in processes]
    return [process.returncode for process in processes], said


def lines_of(path):
    """The whole ones: a kill may cut the last one short."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}"):
            found.append(json.loads(line))
    return found


def steps_of(folder):
    return {r["step"]: r["batch_sha"] for r in lines_of(folder / "run" / "metrics.jsonl") if r.get("split") == "train"}


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])
def test_every_document_is_read_once(mode, hosts, tmp_path):
    (tmp_path / "witness.py").write_text(WITNESS)
    shards, rng = write_shards(tmp_path), random.Random(hosts)
    words = f"""text --data.train {shards} --data.validation {shards} --data.objective prefix-lm --model.mode {mode}
        --model.d-model 8 --model.num-layers 1 --model.num-heads 2 --model.max-length 48 --batch-size {BATCH}
        --checkpoint.every 3 --log-every 1 --eval-every 1000 --eval-rows 8 --max-new-tokens 2 --steps 60
        --parallel.strategy {"mesh" if hosts > 1 else "jit"} --workdir {tmp_path / "run"}""".split()
    killed, due = 0, 0
    while killed < KILLS:
        due += rng.randint(4, 9)
        processes = start(tmp_path, words, hosts)
        while max(steps_of(tmp_path), default=0) < due:
            assert all(process.poll() is None for process in processes), finish(processes)
            time.sleep(0.01)
        for process in processes:
            process.kill()
        finish(processes)
        killed += 1
    statuses, said = finish(start(tmp_path, words, hosts))
    assert statuses == [0] * hosts, said
    steps = steps_of(tmp_path)
    assert sorted(steps) == list(range(1, 61))
    given = {}  # of each step and host, what it was given; however often, it is the same
    for host in range(hosts):
        for line in lines_of(tmp_path / f"witness-{host}.jsonl"):
            if line["step"] <= 60:
                assert line["sha"] == steps[line["step"]]
                assert given.setdefault((line["step"], host), line["rows"]) == line["rows"]
    assert len(given) == 60 * hosts
    rows = [row for each in given.values() for row in each]
    assert len(rows) == 60 * BATCH
    for epoch in range(max(epoch for epoch, _ in rows)):  # those that are over
        numbers = [int(text.split(":")[0]) for e, texts in rows if e == epoch for text in texts]
        assert sorted(numbers) == list(range(DOCUMENTS))
    assert max(epoch for epoch, _ in rows) >= 1
