"""Laws of partitioning: letters and splits here; numbers on several devices in `on_devices.py`, run from here."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from transformer_jax.axes import axes_of, letters_of, spec, split
from transformer_jax.config import ModelConfig, ParallelConfig
from transformer_jax.errors import InputError
from transformer_jax.model.transformer import Transformer
from transformer_jax.partition import Partitioner, compiler_options, mesh_shape
from transformer_jax.tokens import Tokens

HERE = Path(__file__).parent
EIGHT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_ENABLE_X64": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


@pytest.mark.long
@pytest.mark.parametrize("laws", ["encoder-decoder", "not encoder-decoder"])
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_laws_of_eight_devices(laws, marks):
    """Every law of `on_devices.py` holds, in processes of their own as this one has one device."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-k", laws, "-m", marks]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "on_devices.py")]
    run = subprocess.run(command, env=os.environ | EIGHT, capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("has_cpu", [True, False])
def test_what_the_cpu_makes_for_a_gpu_is_what_the_gpu_would_make(monkeypatch, has_cpu):
    """Random arrays and others, by whichever may make them; a key stays a key."""

    def make(key, n):
        return {"w": jax.random.truncated_normal(key, -2, 2, (3, 4)), "n": n + 1, "key": jax.random.fold_in(key, 1)}

    if not has_cpu:

        def local_devices(backend=None):
            raise RuntimeError(f"Unknown backend {backend}")

        monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got, wanted = Partitioner("jit", None).init(make, jax.random.key(5), 2), jax.jit(make)(jax.random.key(5), 2)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        assert x.devices() == y.devices()
        assert jax.numpy.array_equal(x, y)


def test_what_is_computed_again_is_not_kept_on_a_cpu(monkeypatch):
    """The option is one that this version of XLA heeds or needs not: what it does not know it passes over in silence.

    A list of passes that the user leaves out is not replaced.
    """
    tokens = jax.ShapeDtypeStruct((4, 128), "int32")
    target = Tokens(tokens, tokens, tokens)

    def temporary(remat):
        model = Transformer(
            ModelConfig(mode="decoder-only", vocab_size=16, d_model=64, num_heads=4, num_layers=8, remat=remat)
        )
        params = jax.eval_shape(model.init, jax.random.key(0), target)

        def loss(params, target):
            return jax.numpy.sum(model.apply(params, target))

        program = Partitioner("jit", None).evaluate(jax.grad(loss)).compiled(params, target)
        return program.memory_analysis().temp_size_in_bytes

    assert temporary("full") < 0.4 * temporary("none")
    monkeypatch.setenv("XLA_FLAGS", "--xla_disable_hlo_passes=cse")
    assert compiler_options() is None


@pytest.mark.parametrize(
    ("path", "ndim", "letters"),
    [
        ("encoder block_0 self_attention query w_DHK", 3, "DHK"),
        ("encoder layers block_0 self_attention query w_DHK", 4, "NDHK"),
        ("encoder layers block_0 self_attention query w_DHK", 3, ""),
        ("embedding table_VD", 2, "VD"),
        ("decoder position_LD", 2, "LD"),
        ("final_norm scale_D", 1, "D"),
        ("opt_state 0 mu output w_DV", 2, "DV"),
        ("opt_state 0 v_row output w_DV", 1, ""),
        ("opt_state 0 w_DV inner count", 0, ""),
        ("step", 0, ""),
        ("w_dhk", 3, ""),
        ("scale", 1, ""),
        ("w_", 0, ""),
    ],
)
def test_letters_are_read_off_the_path(path, ndim, letters):
    assert letters_of(path.split(), ndim) == letters


MESH = {"data": 2, "fsdp": 2, "expert": 1, "context": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("lengths", "given", "wanted"),
    [
        (dict(B=8, T=16, D=32), None, dict(B=("data", "fsdp"), T=("context",))),  # D finds fsdp taken
        (dict(D=32, H=4, K=8), None, dict(D=("fsdp",), H=("tensor",))),
        (dict(D=32, H=6, K=8), None, dict(D=("fsdp",))),  # 6 heads do not go into 4 parts
        (dict(V=96, D=32), None, dict(V=("tensor",), D=("fsdp",))),
        (dict(B=6, T=16), None, dict(T=("context",))),
        (dict(B=8, T=16, S=16), None, dict(B=("data", "fsdp"), T=("context",))),  # S finds context taken
        (dict(D=31), None, {}),
        (
            dict(D=32, F=64),
            dict(B=("data", "fsdp"), T=("context",)),
            dict(B=("data", "fsdp"), T=("context",), F=("tensor",)),
        ),
        (dict(V=96, D=32), dict(T=("context",)), dict(T=("context",), V=("tensor",), D=("fsdp",))),
    ],
)
def test_each_mesh_axis_splits_one_letter(lengths, given, wanted):
    found = split(lengths, MESH, given)
    assert found == wanted
    assert len(set(axes_of(found, found))) == len(axes_of(found, found))
    assert all(length % (2 if letter in "TSD" else 4) == 0 for letter, length in lengths.items() if letter in found)


def test_a_mesh_of_one_splits_nothing():
    assert split(dict(B=8, T=16, D=32, V=96), dict.fromkeys(MESH, 1)) == {}
    assert split(dict(B=8, T=16, D=32, V=96), {}) == {}


def test_spec_follows_the_letters():
    where = dict(B=("data", "fsdp"), H=("tensor",))
    assert spec("BTHK", where) == PartitionSpec(("data", "fsdp"), None, "tensor", None)
    assert spec("B.", where) == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        ("data=-1", 8, {"data": 8}),
        ("fsdp=2,tensor=-1", 8, {"fsdp": 2, "tensor": 4}),
        ("data=-1,tensor=2", 7, {"data": 3, "tensor": 2}),
    ],
)
def test_the_rest_of_the_devices(mesh, devices, sizes):
    shape = mesh_shape(ParallelConfig(mesh=mesh), devices)
    assert {axis: size for axis, size in shape.items() if size > 1} == sizes


@pytest.mark.parametrize(("mesh", "devices"), [("data=9", 8), ("data=-1,tensor=4", 2)])
def test_a_mesh_that_needs_more_devices_is_an_error(mesh, devices):
    with pytest.raises(InputError, match=f"there are {devices}"):
        mesh_shape(ParallelConfig(mesh=mesh), devices)
