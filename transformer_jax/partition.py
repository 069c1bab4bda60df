"""Where arrays live and how a pure function runs there: on one device (jit), on all (pmap), on a sharded mesh.

This file alone knows devices. One table says which mesh axis each letter of the alphabet is split over.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer_jax.axes import letters_of, map_named
from transformer_jax.config import ParallelConfig
from transformer_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
# letter: the mesh axes that it is split over. A letter that is not here is whole everywhere.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "D": ("fsdp",),
    "V": ("tensor",),
    "H": ("tensor",),
    "G": ("tensor",),
    "F": ("tensor",),
}
ACTIVATION_RULES = tuple((letter, axes) for letter, axes in RULES.items() if letter != "D")


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


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Runs pure functions under a strategy. `mesh` is None on a single device."""

    strategy: str
    mesh: Mesh | None

    @classmethod
    def create(cls, config: ParallelConfig) -> "Partitioner":
        """The partitioner that a config asks for, over this machine's devices."""
        if config.strategy == "jit":
            return cls("jit", None)
        devices = jax.devices()
        whole = {"data": len(devices), "fsdp": 1, "tensor": 1}
        shape = whole if config.strategy == "pmap" else mesh_shape(config, len(devices))
        kinds = (AxisType.Auto,) * len(shape)
        used = devices[: math.prod(shape.values())]
        return cls(config.strategy, jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=kinds, devices=used))

    @property
    def batch_parts(self) -> int:
        """The number of parts that a batch's rows are split into."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def _devices(self) -> list[Any] | None:
        return None if self.mesh is None else list(self.mesh.devices.flat)

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        if self.strategy == "mesh":
            with jax.set_mesh(self.mesh), nn.logical_axis_rules(ACTIVATION_RULES):
                yield
        else:
            yield

    def _sharding(self, letters: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where an array with these axes lives. An axis that cannot be split evenly is whole."""
        if self.mesh is None:
            return None
        parts = []
        for letter, size in zip(letters, shape, strict=False):
            axes = RULES.get(letter, ()) if self.strategy == "mesh" else ()
            parts.append(axes if axes and size % math.prod(self.mesh.shape[axis] for axis in axes) == 0 else None)
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    def shardings(self, tree: Any) -> Any:
        """Where each array of a tree of parameters, or of anything that is shaped like them, lives."""
        return map_named(lambda names, leaf: self._sharding(letters_of(names, leaf.ndim), leaf.shape), tree)

    def init(self, make: Callable[..., Any], *args: Any) -> Any:
        """What `make(*args)` returns, each array born where it lives."""
        with self._scope():
            where = self.shardings(jax.eval_shape(make, *args))
            return jax.jit(make, out_shardings=where if self.mesh is not None else None)(*args)

    def put(self, batch: Any) -> Any:
        """A batch's arrays on the devices that read them."""
        if self.strategy == "pmap":
            return jax.tree.map(lambda x: x.reshape(self.batch_parts, -1, *x.shape[1:]), batch)
        if self.mesh is None:
            return jax.device_put(batch)
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(("data", "fsdp"))))

    def step(self, train_step: Callable[..., Any], state: Any) -> Callable[[Any, Any], Any]:
        """Compile `train_step(state, batch)` for states like this one; it reuses the memory of the state."""
        if self.strategy == "pmap":
            reduce = functools.partial(jax.lax.psum, axis_name="data")
            run = jax.pmap(
                functools.partial(train_step, reduce=reduce),
                "data",
                in_axes=(None, 0),
                out_axes=None,
                devices=self._devices,
                donate_argnums=0,
            )
        else:
            where = None if self.mesh is None else (self.shardings(state), None)
            run = jax.jit(train_step, donate_argnums=0, out_shardings=where)
        return self._within(run)

    def _within(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with self._scope():
                return run(*args)

        return call

    def evaluate(self, sums: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Compile `sums(params, batch)`, whose results add up over the batch."""
        if self.strategy == "pmap":
            run = jax.pmap(
                lambda params, batch: jax.lax.psum(sums(params, batch), "data"),
                "data",
                in_axes=(None, 0),
                out_axes=None,
                devices=self._devices,
            )
        else:
            run = jax.jit(sums)
        return self._within(run)
