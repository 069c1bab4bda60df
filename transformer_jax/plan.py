"""RunConfig and a number of devices -> what one of them holds, computes and sends in a step, before any is paid for.

The train step is compiled, without arrays, for a mesh of devices that this machine's CPU plays. What it says is what
any XLA device would do with the same program, up to the choices of its own compiler: the memory of activations is an
estimate, and bytes sent are those of ring algorithms.
"""

import dataclasses
import functools
import math
import os
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax import host
from transformer_jax.axes import MESH_AXES
from transformer_jax.config import ParallelConfig, RunConfig
from transformer_jax.data.objectives import ARRANGEMENTS, room_of
from transformer_jax.describe import measure
from transformer_jax.errors import InputError
from transformer_jax.hlo import Product, read_program
from transformer_jax.partition import Partitioner, mesh_shape, part_bytes
from transformer_jax.roofline import Exchange, Plan
from transformer_jax.run import first_state, step_of
from transformer_jax.step import TrainState
from transformer_jax.tokens import Batch, Tokens

MOST_SIMULATED = 2048  # XLA's CPU client takes no more devices
COPIES_OF_DATA = 2  # data parallel replicas that are compiled: two exchange gradients as any number does


# The program itself is never run, so the last stage, which turns it into machine code, need not try hard: 3 s instead
# of 6 s for a small model. The program, what it keeps in memory and what devices exchange stay the same.
XLA_FLAGS = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")


def simulate(devices: int) -> None:
    """Makes this process's CPU play so many devices. It must not have used JAX's devices before."""
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS])
    host.simulate(devices)


def planned_mesh(run: RunConfig, devices: int | None) -> dict[str, int]:
    """The sizes of all mesh axes, over `devices` or as many as the mesh names.

    Raises:
        InputError: the mesh is not of so many devices, too many of them are needed to simulate it, or the batch cannot
            be split over them.
    """
    named = run.parallel.axes.values()
    if devices is None and -1 in named:
        raise InputError(f"parallel.mesh={run.parallel.mesh!r} takes the rest of the devices: give their --devices N.")
    count = math.prod(named) if devices is None else devices
    mesh = mesh_shape(run.parallel, count)
    if math.prod(mesh.values()) != count:
        raise InputError(
            f"parallel.mesh={run.parallel.mesh!r} is {math.prod(mesh.values())} devices, and there are {count}; make "
            "one axis -1, the rest."
        )
    parts = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    if run.batch_size % (run.optimizer.accumulate * parts):
        raise InputError(
            f"batch_size={run.batch_size} must be a multiple of optimizer.accumulate={run.optimizer.accumulate} times "
            f"the {parts} parts that parallel.mesh={run.parallel.mesh!r} splits rows into (data x fsdp x expert)."
        )
    if simulated(mesh) > MOST_SIMULATED:
        raise InputError(
            f"parallel.mesh={run.parallel.mesh!r}: at most {MOST_SIMULATED} devices besides the repeats along data can "
            f"be simulated, and {simulated(mesh)} are needed; make data larger and fsdp smaller."
        )
    return mesh


def simulated(mesh: dict[str, int]) -> int:
    """The number of devices that a mesh is compiled for: more copies along data have the same program."""
    return math.prod((mesh | {"data": min(mesh["data"], COPIES_OF_DATA)}).values())


def _batch(run: RunConfig, partitioner: Partitioner) -> Batch:
    room = room_of(run.model, run.data)

    def array(length: int, kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        shape = (run.batch_size, length)
        return jax.ShapeDtypeStruct(shape, kind, sharding=partitioner.sharding("BT", shape))

    def tokens(length: int) -> Tokens:
        return Tokens(*(array(length) for _ in range(3)))

    source = tokens(room.source) if ARRANGEMENTS[run.model.mode].has_source else None
    return Batch(tokens(room.target), array(room.target), array(room.target, jnp.float32), source)


def _narrow(run: RunConfig) -> RunConfig:
    """The same run with float16 for bfloat16, which is as large: XLA's CPU widens the one to float32 and not the
    other, in memory and in what devices exchange. Nothing is computed, so the smaller range does no harm."""
    model = dataclasses.replace(run.model)
    for name in ("dtype", "param_dtype"):
        if getattr(model, name) == "bfloat16":
            object.__setattr__(model, name, "float16")  # the config takes no float16, which cannot be trained with
    return dataclasses.replace(run, model=model)


def _compile(run: RunConfig, partitioner: Partitioner) -> tuple[TrainState, Batch, Any]:
    """The abstract state and batch, and the step that is compiled for them."""
    state = partitioner.abstract(functools.partial(first_state, run), jax.random.key(0))
    batch = _batch(run, partitioner)
    return state, batch, partitioner.step(step_of(run), state).compiled(state, batch)


def _along(mesh: dict[str, int], axes: tuple[str, ...]) -> tuple[int, ...]:
    """The ids of the devices that differ from device 0 along these axes alone, itself among them."""
    ids, stride = [0], 1
    for axis in reversed(MESH_AXES):
        if axis in axes:
            ids = [number + stride * place for place in range(mesh[axis]) for number in ids]
        stride *= mesh[axis]
    return tuple(ids)


def _axes_of(group: tuple[int, ...], mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    axes, stride = [], math.prod(mesh.values())
    for axis in MESH_AXES:
        stride //= mesh[axis]
        if len({device // stride % mesh[axis] for device in group}) > 1:
            axes.append(axis)
    return tuple(axes)


def _traffic(products: list[Product], run: RunConfig, state: int) -> float:
    item = jnp.dtype(run.model.dtype).itemsize
    return float(sum(item * product.elements * product.times for product in products)) + 2 * state


def make_plan(run: RunConfig, devices: int | None = None) -> Plan:
    """The plan of a run on so many devices, None for as many as its mesh names. Needs `simulate` before it.

    Raises:
        InputError: see `planned_mesh`.
    """
    mesh = planned_mesh(run, devices)
    copies = min(mesh["data"], COPIES_OF_DATA)
    small = mesh | {"data": copies}
    parallel = ParallelConfig(strategy="mesh", mesh=",".join(f"{axis}={size}" for axis, size in small.items()))
    smaller = dataclasses.replace(run, batch_size=run.batch_size * copies // mesh["data"], parallel=parallel)
    state, batch, program = _compile(_narrow(smaller), Partitioner.create(parallel))

    products, collectives = read_program(program.as_text())
    exchanged: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    for each in collectives:
        exchanged[each.kind, _axes_of(each.group, small)] += each.bytes * each.times
    exchanges = (Exchange(kind, axes, _along(mesh, axes), size) for (kind, axes), size in exchanged.items())
    gradients, temporary = part_bytes(state.params), program.memory_analysis().temp_size_in_bytes
    memory = {
        "parameters": part_bytes((state.params, state.frozen)),
        "optimizer": part_bytes(state.opt_state),
        "average of parameters": part_bytes(state.ema),
        "gradients": gradients,
        "activations": max(temporary - gradients, 0),
        "batch": part_bytes(batch),
    }
    return Plan(
        mesh=mesh,
        simulated=simulated(mesh),
        memory={name: size for name, size in memory.items() if size},
        model_flops=3 * sum(part.flops for part in measure(run, run.batch_size)),
        flops=float(sum(product.flops * product.times for product in products)),
        traffic=_traffic(products, run, part_bytes(state)),
        exchanges=tuple(sorted(exchanges, key=lambda exchange: -exchange.moved())),
    )
