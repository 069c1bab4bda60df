"""Timing: functions that take turns, the device synchronised after each, and what the machine can do at best."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from transformer_jax.accelerators import match_device_kind
from transformer_jax.partition import compiler_options

ROOT = Path(__file__).parents[2]
READ_BYTES = 2**29  # far beyond every cache


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a function took, warm, in each of its turns, and in the first one, when it was compiled."""

    first: float
    each: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    @property
    def spread(self) -> float:
        """The range from the quickest to the slowest turn, relative to the median."""
        return (max(self.each) - min(self.each)) / self.median


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int, turn: float = 0.0) -> dict[str, Times]:
    """Each is warmed up, and then called in turn with the others, so that noise hits all of them alike.

    A turn is as many calls as fit into `turn` seconds, one at least, back to back; its time is that of one call.
    """
    first = {name: seconds(function) for name, function in functions.items()}
    calls = {name: max(1, int(turn / seconds(function))) if turn else 1 for name, function in functions.items()}
    each: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            each[name].append(seconds(functools.partial(_repeated, function, calls[name])) / calls[name])
    return {name: Times(first[name], tuple(each[name])) for name in functions}


def _repeated(function: Callable[[], Any], calls: int) -> Any:
    for _ in range(calls - 1):
        function()
    return function()


def ratio(of: Times, to: Times) -> float:
    """How many times as fast as `to` `of` is: the median over the turns."""
    return statistics.median(b / a for a, b in zip(of.each, to.each, strict=True))


def read_bandwidth() -> float:
    """Bytes a second that a product of a matrix and a vector reads, which is what decoding one token does."""
    rows = READ_BYTES // 4 // 4096
    matrix, vector = jnp.ones((rows, 4096), jnp.float32), jnp.ones(4096, jnp.float32)
    product = jax.jit(lambda matrix, vector: matrix @ vector)
    # many calls in a turn, or what it takes to start one would count on an accelerator
    times = interleaved({"read": lambda: product(matrix, vector)}, 7, turn=0.02)["read"]
    return READ_BYTES / min(times.each)


MATRIX = 2048


@functools.cache
def peak_flops() -> dict[str, Any]:
    """FLOP/s at best: the data sheet's of a known accelerator (bfloat16), else what a large product reaches here."""
    known = match_device_kind(jax.devices()[0].device_kind)
    if known is not None:
        return {"flops_per_second": known.flops, "source": f"{known.name}, bfloat16, its data sheet"}
    x = jnp.ones((MATRIX, MATRIX), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    times = interleaved({"product": lambda: product(x)}, 9)["product"]
    return {
        "flops_per_second": 2 * MATRIX**3 / min(times.each),
        "source": f"a float32 product of {MATRIX} squared here",
    }


@contextlib.contextmanager
def _cached_in(folder: str | None) -> Iterator[None]:
    """Compiles with the persistent cache in a folder, or with none."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (folder, 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def compiled_from(
    folder: str | None, function: Callable[..., Any], args: tuple[Any, ...], donate: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The compiled function, and what that took in seconds: tracing, compiling, and where there is a cache in a folder,
    compiling again with it. Also what XLA counts of it, and the size of the module that it was given."""

    def build() -> tuple[Any, float, float, int]:
        start = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=0 if donate else ()).lower(*args)
        middle = time.perf_counter()
        program = lowered.compile(compiler_options())
        end = time.perf_counter()
        return program, middle - start, end - middle, len(lowered.as_text())

    with _cached_in(folder):
        program, trace, compiling, size = build()
        costs = {"trace_seconds": trace, "compile_seconds": compiling, "module_bytes": size}
        if folder is not None:
            jax.clear_caches()
            costs["cached_seconds"] = build()[2]
    counted = program.cost_analysis() or {}
    counted = counted[0] if isinstance(counted, list) else counted
    memory = program.memory_analysis()
    costs |= {"flops": counted.get("flops"), "bytes_accessed": counted.get("bytes accessed")}
    return program, costs | {"temp_bytes": getattr(memory, "temp_size_in_bytes", None)}
