"""Where arrays live and how a pure function runs there: on one device (jit), on all (pmap), on a sharded mesh.

This file alone knows devices; `axes.RULES` says which mesh axis each letter of the alphabet is split over.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from transformer_jax.axes import MESH_AXES, letters_of, map_named, spec, split
from transformer_jax.config import ParallelConfig
from transformer_jax.errors import InputError
from transformer_jax.tokens import ALL, Mine


def mesh_shape(config: ParallelConfig, devices: int) -> dict[str, int]:
    """Sizes of all mesh axes, -1 filled in.

    Raises:
        InputError: the sizes do not multiply to a number of devices that there are.
    """
    shape = dict.fromkeys(MESH_AXES, 1) | config.axes
    fixed = math.prod(size for size in shape.values() if size > 0)
    shape = {axis: devices // fixed if size < 0 else size for axis, size in shape.items()}
    if math.prod(shape.values()) > devices or 0 in shape.values():
        raise InputError(f"parallel.mesh={config.mesh!r} needs {fixed} devices or more; there are {devices}.")
    return shape


def part_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of arrays, which may be abstract."""

    def size(leaf: Any) -> int:
        where = getattr(leaf, "sharding", None)
        return math.prod(leaf.shape if where is None else where.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def compiler_options() -> dict[str, Any] | None:
    """What XLA is told when it compiles a step.

    Its CPU backend of jaxlib 0.10 takes away the barriers around what is to be computed again (`--model.remat`), merges
    it with what was computed first, and so keeps all of it. That pass is left out, as jaxlib 0.12 has done.
    """
    if jax.default_backend() != "cpu" or "xla_disable_hlo_passes" in os.environ.get("XLA_FLAGS", ""):
        return None
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def made_by_cpu(make: Callable[..., Any], *args: Any) -> Any:
    """What `make(*args)` returns, made by the CPU where JAX may use it, and brought to the device.

    For a GPU XLA writes code for each array that is drawn at random: GPT-2's first parameters took it more than 40 s to
    compile for an H200, and takes a few seconds for the CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return jax.jit(make)(*args)
    with jax.default_device(cpu):
        made = jax.jit(make)(*jax.device_put(args, cpu))
    return jax.device_put(made, jax.devices()[0])


class Program:
    """A function that is compiled once for each shape of its arguments, and counts how often."""

    def __init__(self, function: Any, scope: Callable[[], Any]) -> None:
        self._function, self._scope = function, scope
        self._compiled: dict[Any, Any] = {}

    @property
    def compiles(self) -> int:
        """How often it was compiled so far."""
        return len(self._compiled)

    def compiled(self, *args: Any) -> Any:
        """The executable for arguments of these shapes, which may be abstract."""
        leaves, structure = jax.tree.flatten(args)
        key = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            with self._scope():
                self._compiled[key] = self._function.lower(*args).compile(compiler_options())
        return self._compiled[key]

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)(*args)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Runs pure functions under a strategy. `mesh` is None on a single device."""

    strategy: str
    mesh: Mesh | None

    @classmethod
    def create(cls, config: ParallelConfig) -> "Partitioner":
        """The partitioner that a config asks for, over the devices of all processes.

        Raises:
            InputError: there are not enough devices, or the strategy is not for several processes.
        """
        if config.strategy != "mesh" and jax.process_count() > 1:
            raise InputError(
                f"parallel.strategy={config.strategy} runs in one process, and there are {jax.process_count()}. "
                "Several need --parallel.strategy mesh; --parallel.mesh data=-1 replicates parameters as pmap does."
            )
        if config.strategy == "jit":
            return cls("jit", None)
        devices = jax.devices()
        whole = dict.fromkeys(MESH_AXES, 1) | {"data": len(devices)}
        shape = whole if config.strategy == "pmap" else mesh_shape(config, len(devices))
        kinds = (AxisType.Auto,) * len(shape)
        used = devices[: math.prod(shape.values())]
        return cls(config.strategy, jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=kinds, devices=used))

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the mesh axes that arrays are split over by letter."""
        return dict(self.mesh.shape) if self.mesh is not None and self.strategy == "mesh" else {}

    @property
    def batch_parts(self) -> int:
        """The number of parts that a batch's rows are split into."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in ("data", "fsdp", "expert"))

    @property
    def _devices(self) -> list[Any] | None:
        return None if self.mesh is None else list(self.mesh.devices.flat)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Within it, functions are compiled for the mesh."""
        with jax.set_mesh(self.mesh) if self.strategy == "mesh" else contextlib.nullcontext():
            yield

    def sharding(self, letters: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where an array with these axes lives."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, spec(letters, split(dict(zip(letters, shape, strict=False)), self.axes)))

    def shardings(self, tree: Any) -> Any:
        """Where each array of a tree of parameters, or of anything that is shaped like them, lives.

        Vectors over the model's width are whole: gathering them would cost more than they take.
        """

        def place(names: list[str], leaf: Any) -> NamedSharding | None:
            letters = letters_of(names, leaf.ndim)
            return self.sharding("" if letters in ("D", "ND") else letters, leaf.shape)

        return map_named(place, tree)

    def init(self, make: Callable[..., Any], *args: Any) -> Any:
        """What `make(*args)` returns, drawn at random, each array born where it lives."""
        if self.mesh is None and jax.default_backend() == "gpu":
            return made_by_cpu(make, *args)
        return self.made(make, *args)

    def made(self, make: Callable[..., Any], *args: Any) -> Any:
        """What `make(*args)` returns, each array where it lives."""
        where = None if self.mesh is None else self.shardings(jax.eval_shape(make, *args))
        with self.scope():
            return jax.jit(make, out_shardings=where)(*args)

    def mine(self, batch_size: int) -> Mine:
        """The places of a batch that this process's devices read."""
        if self.mesh is None or jax.process_count() == 1:
            return ALL
        where = self.sharding("B", (batch_size,))
        assert where is not None
        parts = where.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts if part is not None]))

    def abstract(self, make: Callable[..., Any], *args: Any) -> Any:
        """What `make(*args)` would return and where each array would live, without making any."""
        shapes = jax.eval_shape(make, *args)
        where = self.shardings(shapes)
        if self.mesh is None:
            return shapes
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)

    def put(self, batch: Any, batch_size: int | None = None) -> Any:
        """A batch, [B, T], on the devices that read it. Of `batch_size` rows, all by default, a process has its own."""
        if self.strategy == "pmap":
            return jax.tree.map(lambda x: x.reshape(self.batch_parts, -1, *x.shape[1:]), batch)
        if self.mesh is None:
            return jax.device_put(batch)
        batch_size = batch_size or len(jax.tree.leaves(batch)[0])
        places = np.arange(batch_size)[self.mine(batch_size)]

        def place(x: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                return x[np.searchsorted(places, np.arange(batch_size)[index[0]])][:, index[1]]

            shape = (batch_size, *x.shape[1:])
            where = self.sharding("BT", shape)
            assert where is not None
            return jax.make_array_from_callback(shape, where, part)

        return jax.tree.map(place, batch)

    def step(self, train_step: Callable[..., Any], state: Any) -> Program:
        """Compile `train_step(state, batch)` for states like this one; it reuses the memory of the state.

        With `pmap` every device runs the step on its part of the batch and sums are added between them. In JAX today
        `pmap` is in maintenance mode: a thin layer on `jit` and `shard_map`. It replicates all state and has no other
        kind of parallelism; it is here for those who know it and to compare with. `mesh` with data=-1 does the same.
        """
        if self.strategy == "pmap":
            reduce = functools.partial(jax.lax.psum, axis_name="data")

            def step_of_part(state: Any, batch: Any) -> Any:
                return train_step(state, batch, reduce=reduce, part=jax.lax.axis_index("data"))

            return Program(self._pmap(step_of_part, donate_argnums=0), self.scope)
        where = None if self.mesh is None else (self.shardings(state), None)
        return Program(jax.jit(train_step, donate_argnums=0, out_shardings=where), self.scope)

    def evaluate(self, sums: Callable[[Any, Any], Any]) -> Program:
        """Compile `sums(params, batch)`, whose results add up over the batch."""
        if self.strategy == "pmap":
            return Program(self._pmap(lambda params, batch: jax.lax.psum(sums(params, batch), "data")), self.scope)
        return Program(jax.jit(sums), self.scope)

    def for_decoding(self, params: Any) -> Any:
        """Parameters as `generate` takes them within `scope`: where they are, but of `pmap` on one device."""
        return jax.device_get(params) if self.strategy == "pmap" else params

    def _pmap(self, function: Callable[[Any, Any], Any], **options: Any) -> Any:
        """Maps over the parts of a batch; the state is one ordinary array everywhere, in and out."""
        return jax.pmap(function, "data", in_axes=(None, 0), out_axes=None, devices=self._devices, **options)
