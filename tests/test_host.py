"""The process's own settings: what it keeps compiled is the user's alone, and the user's flags stay."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from transformer_jax import host
from transformer_jax.surroundings import surroundings

TRAIN = Path(__file__).parent.parent / "train.py"
NAME = "jax_compilation_cache_dir"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder of its own, and JAX without one."""
    before = jax.config.values[NAME]
    jax.config.update(NAME, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "transformer_jax"
    jax.config.update(NAME, before)


def test_programs_are_kept_where_only_the_user_reads(fresh):
    assert host.keep_programs() == ""
    folder = Path(jax.config.values[NAME])
    assert folder.parent == fresh
    assert fresh.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_the_user_has_named_stays(fresh, tmp_path):
    jax.config.update(NAME, str(tmp_path / "mine"))
    assert host.keep_programs() == ""
    assert jax.config.values[NAME] == str(tmp_path / "mine")
    assert not fresh.exists()


@pytest.mark.parametrize("kind", ["open", "link", "file", "no folder"])
def test_a_folder_that_is_open_to_others_is_not_used(fresh, tmp_path, kind, monkeypatch):
    if kind == "open":
        fresh.mkdir()
        fresh.chmod(0o770)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        fresh.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        fresh.write_text("")
    else:
        (tmp_path / "a file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    said = host.keep_programs()
    assert said.startswith("Compiled programs are not kept: ")
    assert jax.config.values[NAME] is None


def test_what_was_kept_first_goes_first(fresh, monkeypatch):
    monkeypatch.setattr(host, "MOST_KEPT", 25)
    folder = fresh / "kind"
    folder.mkdir(parents=True)
    for number in range(4):
        path = folder / f"{number}-cache"
        path.write_bytes(b"x" * 10)
        os.utime(path, (number, number))
    host._thin_out(fresh)
    assert sorted(path.name for path in folder.iterdir()) == ["2-cache", "3-cache"]


def test_flags_of_the_user_stay(monkeypatch, capsys):
    monkeypatch.setattr(host, "has_gpu", lambda: True)
    monkeypatch.setattr(host, "keep_memory", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_triton_gemm_any=false")
    host.prepare(deterministic=True, keep=False)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_gpu_triton_gemm_any=false", "--xla_gpu_enable_latency_hiding_scheduler=true"]
    assert "--xla_gpu_deterministic_ops=true" in flags
    assert "for a GPU: XLA_FLAGS=" in capsys.readouterr().err
    host.prepare(deterministic=True, keep=False)
    assert capsys.readouterr().err == ""


def test_this_jaxlib_knows_the_flags():
    """XLA ends a process that is given one that it does not know."""
    flags = " ".join(f"{name}={value}" for name, value in (host.FAST_ON_GPU | host.DETERMINISTIC).items())
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env, check=True, timeout=120)


def _train(folder, cache):
    small = "--model.d-model 16 --model.num-heads 2 --model.d-ff 16 --eval-rows 8 --num-samples 1"
    words = f"dates --steps 2 --batch-size 4 {small} --log-every 1 --workdir {folder}".split()
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run([sys.executable, str(TRAIN), *words], env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][-1]["param_digest"]


@pytest.mark.slow
def test_a_run_with_kept_programs_has_the_same_bits(tmp_path):
    """Nothing is compiled anew; and where all that was kept is damaged, it is compiled again."""
    cache = tmp_path / "cache"
    digest = _train(tmp_path / "first", cache)
    kept = sorted((cache / "transformer_jax").glob("*/*-cache"))
    assert any("train_step" in path.name for path in kept)
    assert _train(tmp_path / "second", cache) == digest
    assert sorted((cache / "transformer_jax").glob("*/*-cache")) == kept
    for path in kept:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert _train(tmp_path / "third", cache) == digest


def test_cores_are_counted_where_the_system_numbers_none(monkeypatch):
    """As macOS: prepare, compare and what a figure depends on ask for them."""
    assert host.cores() == sorted(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert host.cores() == list(range(os.cpu_count() or 1))
    assert f", {os.cpu_count()} cores" in surroundings()["device"]
