"""Timing: functions that take turns, the device synchronised after each, and what the machine can do at best."""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

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


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Each is called once to warm up, and then in turn with the others, so that noise hits all of them alike."""
    first = {name: seconds(function) for name, function in functions.items()}
    each: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            each[name].append(seconds(function))
    return {name: Times(first[name], tuple(each[name])) for name in functions}


def ratio(of: Times, to: Times) -> float:
    """How many times as fast as `to` `of` is: the median over the turns."""
    return statistics.median(b / a for a, b in zip(of.each, to.each, strict=True))


def read_bandwidth() -> float:
    """Bytes a second that a product of a matrix and a vector reads, which is what decoding one token does."""
    rows = READ_BYTES // 4 // 4096
    matrix, vector = jnp.ones((rows, 4096), jnp.float32), jnp.ones(4096, jnp.float32)
    product = jax.jit(lambda matrix, vector: matrix @ vector)
    times = interleaved({"read": lambda: product(matrix, vector)}, 7)["read"]
    return READ_BYTES / min(times.each)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is in."""
    git = ROOT / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        return (git / head.removeprefix("ref: ")).read_text().strip() if head.startswith("ref: ") else head
    except OSError:
        return None


def surroundings(*packages: str) -> dict[str, Any]:
    """What a figure depends on: device, system, versions, commit."""
    device = jax.devices()[0]
    names = ("transformer_jax", "jax", "jaxlib", "flax", *packages)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
