"""`transformer-jax bench strategies`: the same step on one device and over all of them, split in several ways.

A global batch of one size is trained on by each way, so losses are the same. On devices that one CPU plays
(`--devices 8`) times say what splitting and exchanging cost, not what more devices gain.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from transformer_jax.bench.measure import interleaved, ratio
from transformer_jax.bench.subject import TINY, Subject
from transformer_jax.config import ParallelConfig
from transformer_jax.errors import InputError
from transformer_jax.hlo import read_program
from transformer_jax.host import simulate
from transformer_jax.partition import Partitioner, Program, part_bytes
from transformer_jax.step import train_step
from transformer_jax.surroundings import surroundings

TAKES = ("devices",)
TURN = 1.0  # seconds
ROWS = 16
CASES = {
    "decoder-only": Subject(TINY, ROWS, 64),
    "encoder-decoder": Subject(TINY.replace(mode="encoder-decoder"), ROWS, 64),
}
ONE, SHARD_MAP = "jit, one device", "shard_map"


class Way(NamedTuple):
    """How a step is split: by `jit`, `pmap` or `mesh` with the sizes of the mesh, or by hand in a `shard_map`."""

    strategy: str
    mesh: str = "data=-1"


def ways_over(devices: int) -> dict[str, Way]:
    """The ways to use so many devices, by name."""
    meshes = ["data=-1", "fsdp=-1"]
    if devices % 2 == 0:
        meshes += ["data=-1,tensor=2", "data=-1,context=2"]
    if devices % 4 == 0:
        meshes += ["data=-1,fsdp=2,tensor=2"]
    split = {f"mesh {mesh.replace('-1', str(_rest(mesh, devices)))}": Way("mesh", mesh) for mesh in meshes}
    return {ONE: Way("jit"), "pmap": Way("pmap"), SHARD_MAP: Way(SHARD_MAP), **split}


def _rest(mesh: str, devices: int) -> int:
    for size in ParallelConfig(mesh=mesh).axes.values():
        devices //= max(size, 1)
    return devices


def by_hand(step: Callable[..., Any], mesh: Mesh) -> Program:
    """The step in a `shard_map`: parameters on each device, a part of the batch on each, sums added up."""
    whole, part = PartitionSpec(), PartitionSpec("data")
    reduce = functools.partial(jax.lax.psum, axis_name="data")

    def step_of_part(state: Any, batch: Any) -> Any:
        return step(state, batch, reduce=reduce, part=jax.lax.axis_index("data"))

    # what is the same everywhere comes of sums over all devices, which is not checked, as pmap does not check it
    mapped = jax.shard_map(step_of_part, mesh=mesh, in_specs=(whole, part), out_specs=whole, check_vma=False)
    return Program(jax.jit(mapped, donate_argnums=0), contextlib.nullcontext)


def build(subject: Subject, way: Way) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A function that makes a step in a way, and what a device holds and exchanges for it, in bytes."""
    loss, optimizer = subject.parts()
    step = functools.partial(train_step, loss=loss, optimizer=optimizer)
    strategy: Any = "mesh" if way.strategy == SHARD_MAP else way.strategy
    partitioner = Partitioner.create(ParallelConfig(strategy=strategy, mesh=way.mesh))
    state, batch = partitioner.init(subject.first, jax.random.key(0)), partitioner.put(subject.draw())
    if way.strategy == SHARD_MAP:
        assert partitioner.mesh is not None
        program = by_hand(step, partitioner.mesh)
    else:
        program = partitioner.step(step, state)
    executable = program.compiled(state, batch)
    costs = {
        "state_bytes": part_bytes(state),
        "temp_bytes": getattr(executable.memory_analysis(), "temp_size_in_bytes", None),
        "exchanged_bytes": sum(each.bytes * each.times for each in read_program(executable.as_text())[1]),
    }

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    return run, costs


def measure(subject: Subject, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All ways of a case, in turn."""
    functions, costs = {}, {}
    for name, way in ways_over(jax.device_count()).items():
        say(name)
        functions[name], costs[name] = build(subject, way)
    say("steps")
    times = interleaved(functions, repeats, TURN)
    return {
        "batch": subject.batch,
        "length": subject.length,
        "ways": {
            name: {
                "seconds": each.each,
                "seconds_a_step": each.median,
                "spread": each.spread,
                "tokens_per_second": subject.tokens / each.median,
                "faster_than_one_device_by": ratio(each, times[ONE]),
                **costs[name],
            }
            for name, each in times.items()
        },
    }


def run(cases: list[str], repeats: int, say: Callable[[str], None], devices: int | None = None) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it.

    Args:
        devices: that the CPU is to play; None for those of this machine.
    """
    if devices is not None:
        simulate(devices)
    if jax.device_count() < 2 or ROWS % jax.device_count():
        raise InputError(
            f"bench strategies splits {ROWS} rows over all devices, of which there are {jax.device_count()}; "
            "--devices 8 plays so many on the CPU."
        )
    result: dict[str, Any] = {"bench": "strategies", **surroundings(), "repeats": repeats, "cases": {}}
    for name in cases:
        result["cases"][name] = measure(CASES[name], repeats, lambda what, name=name: say(f"{name}: {what}"))
    return result


COLUMNS = ("case", "way", "ms a step", "spread", "tokens/s", "speed-up", "state", "temporary", "exchanged")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS."""
    found = []
    for name, case in result["cases"].items():
        for way, row in case["ways"].items():
            sizes = (row["state_bytes"], row["temp_bytes"], row["exchanged_bytes"])
            time, rate = f"{1e3 * row['seconds_a_step']:,.1f}", f"{row['tokens_per_second']:,.0f}"
            speed = f"{row['faster_than_one_device_by']:.2f}"
            megabytes = ["" if size is None else f"{size / 1e6:,.1f} MB" for size in sizes]
            found.append((name, way, time, f"{row['spread']:.0%}", rate, speed, *megabytes))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    played = f", which one CPU plays: times tell what splitting costs, not what {result['devices']} devices gain"
    return [
        f"{ROWS} rows in all, over {result['devices']} devices{played if result['platform'] == 'cpu' else ''}. State, "
        "temporary and exchanged (the arrays that take part in all-reduce, all-gather and the like in a step): of one "
        "device."
    ]
