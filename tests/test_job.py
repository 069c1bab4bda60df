"""Laws of several processes: who started them, what they agree on, and how they end when one of them dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transformer_jax.config import ParallelConfig
from transformer_jax.job import HEARTBEAT_SECONDS, LOST, launcher

ROOT = Path(__file__).parent.parent
SLURM = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS="4", SLURM_PROCID="1", SLURM_LOCALID="1")


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, ""),
        (SLURM, "Slurm"),
        (SLURM | dict(SLURM_NTASKS="1"), ""),
        (SLURM | dict(SLURM_STEP_NUM_TASKS="1"), ""),  # a shell within an allocation
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, ""),
        (dict(OMPI_COMM_WORLD_SIZE="8"), "Open MPI"),
        (dict(OMPI_COMM_WORLD_SIZE="1"), ""),
        (dict(TPU_WORKER_HOSTNAMES="a,b,c,d"), "TPU pod"),
        (dict(TPU_WORKER_HOSTNAMES="a", MEGASCALE_NUM_SLICES="2"), "TPU pod"),
        (dict(TPU_WORKER_HOSTNAMES="localhost"), ""),
        (dict(SLURM, SLURM_NTASKS="many"), ""),
        (dict(KUBERNETES_SERVICE_HOST="10.0.0.1"), ""),
    ],
)
def test_launchers_are_known_by_their_variables(environment, name):
    assert launcher(environment) == name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(coordinator="host:1"), "give all three"),
        (dict(num_processes=2, process_id=0), "give all three"),
        (dict(coordinator="host", num_processes=2, process_id=0), "HOST:PORT"),
        (dict(coordinator="host:1", num_processes=2, process_id=2), "process_id=2 must be below num_processes=2"),
        (dict(coordinator="host:1", num_processes=0, process_id=0), "num_processes=0"),
    ],
)
def test_half_a_job_is_refused(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ParallelConfig(**fields)


# --- whole runs

TINY = "--model.mode decoder-only --model.num-layers 1 --model.d-model 32 --model.num-heads 2 --model.d-ff 64"
DATA = "--data.tokenizer char --model.max-length 32 --batch-size 8"
RUN = f"pairs {TINY} {DATA} --log-every 1 --num-samples 0 --eval-rows 16 --optimizer.warmup-steps 1"


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A small file of pairs of unequal lengths."""
    file = tmp_path_factory.mktemp("data") / "pairs.tsv"
    file.write_text("".join(f"{'ab' * (i % 5 + 1)}{i}\t{'ba' * (i % 3 + 1)}{i}\n" for i in range(200)))
    return file


def start(folder, words, devices, *more):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "train.py"), *RUN.split(), *words.split(), "--workdir", str(folder), *more]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_two(folder, words):
    """Two processes with two devices each."""
    job = ["--parallel.coordinator", f"localhost:{free_port()}", "--parallel.num-processes", "2"]
    return [start(folder, words, 2, *job, "--parallel.process-id", str(number)) for number in range(2)]


def finish(*processes):
    """Exit statuses, and what the processes said on stderr."""
    said = [process.communicate(timeout=240)[1].decode() for process in processes]
    return [process.returncode for process in processes], said


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line.get("split") == "train"}


def assert_same_run(one, other, steps):
    one, other = records(one), records(other)
    assert sorted(one) == sorted(other) == list(range(1, steps + 1))
    for step, record in one.items():
        assert record["batch_sha"] == other[step]["batch_sha"]
        assert record["tokens"] == other[step]["tokens"]
        assert other[step]["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert record["compiles"] == other[step]["compiles"] == 1


@pytest.mark.long
def test_two_processes_are_one(tmp_path, pairs):
    """Two processes train to the losses of one with as many devices, 1e-5; one speaks; the step is compiled once. Each
    goes on from the other's checkpoint on another mesh."""
    words = f"--data.train {pairs} --steps 6 --eval-every 3 --parallel.strategy mesh --parallel.mesh"
    statuses, said = finish(*start_two(tmp_path / "two", f"{words} data=2,tensor=2 --stop-at 3 --num-samples 4"))
    assert statuses == [0, 0], said
    assert "Stopped at step 3" in said[0]
    assert "step" not in said[1].replace("[Gloo]", "")
    alone = finish(start(tmp_path / "one", f"{words} fsdp=4 --stop-at 3", 4))
    assert alone[0] == [0], alone[1]
    assert_same_run(tmp_path / "one", tmp_path / "two", 3)
    # each goes on where the other stopped
    (tmp_path / "two").rename(tmp_path / "swap")
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "swap").rename(tmp_path / "one")
    statuses, said = finish(
        *start_two(tmp_path / "two", f"{words} data=4"), start(tmp_path / "one", f"{words} data=4", 4)
    )
    assert statuses == [0, 0, 0], said
    assert_same_run(tmp_path / "one", tmp_path / "two", 6)


def wait_for_step(folder, step, processes):
    for _ in range(1200):
        if (folder / "metrics.jsonl").exists() and step in records(folder):
            return
        assert all(process.poll() is None for process in processes), finish(*processes)
        time.sleep(0.1)
    raise AssertionError("the run did not start")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_dies_ends_the_other(tmp_path, pairs, victim):
    """Non-zero exit, and a clear last line, within a minute."""
    words = f"--data.train {pairs} --steps 100000 --eval-every 100000 --parallel.strategy mesh --checkpoint.every 5"
    processes = start_two(tmp_path, words)
    wait_for_step(tmp_path, 12, processes)
    processes[victim].kill()
    since = time.monotonic()
    _, said = finish(processes[1 - victim])
    assert time.monotonic() - since < 2 * HEARTBEAT_SECONDS <= 60
    assert processes[1 - victim].returncode == LOST
    last = said[0].splitlines()[-1]
    assert re.search(rf"process {1 - victim} of 2: another process has ended.*they go on from step \d+", last), last
    finish(processes[victim])


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step(tmp_path, pairs):
    processes = start_two(tmp_path, f"--data.train {pairs} --steps 100000 --eval-every 100000 --parallel.strategy mesh")
    wait_for_step(tmp_path, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, said = finish(*processes)
    assert statuses == [75, 75], said
    assert "by another process" in said[0]


def test_pmap_and_jit_refuse_several_processes(tmp_path, pairs):
    statuses, said = finish(*start_two(tmp_path, f"--data.train {pairs} --steps 2 --parallel.strategy pmap"))
    assert 2 in statuses, said
    assert "--parallel.strategy mesh" in said[0] + said[1]
