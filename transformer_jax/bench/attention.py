"""`transformer-jax bench attention`: every way to compute attention that fits the device, by length.

Causal self-attention of full rows with its backward pass: gradients with respect to queries, keys and values. The
number of tokens is the same at every length, so what grows is the work for each token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer_jax.bench.measure import compiled_from, interleaved, ratio
from transformer_jax.model.backends import BACKENDS, Shape, Sight, choose
from transformer_jax.surroundings import surroundings

Array = jax.Array
TURN = 0.5  # seconds


class Case(NamedTuple):
    """Rows of `length` tokens, `heads` of width `head_dim`."""

    rows: int
    length: int
    heads: int = 8
    head_dim: int = 64

    def shape(self, dtype: str) -> Shape:
        size = (self.rows, self.length, self.length, self.heads, self.head_dim)
        return Shape(jax.default_backend(), dtype, *size, segments=True, causal=True)


CASES = {str(length): Case(4096 // length, length) for length in (128, 512, 1024, 2048, 4096)}


def _gradients(name: str, q_BTHK: Array, k_BTHK: Array, v_BTHK: Array) -> tuple[Array, ...]:
    """Of the sum of what attention gives, with masks made as the model makes them."""
    B, T = q_BTHK.shape[:2]
    places, segments = jnp.arange(T), jnp.ones((B, T), jnp.int32)
    mask_BTS = (places[:, None] >= places) & (segments[:, :, None] == segments[:, None])
    sight = Sight(mask_BTS, None, (segments, segments), causal=True)

    def total(q: Array, k: Array, v: Array) -> Array:
        return jnp.sum(BACKENDS[name].attend(q, k, v, sight, None, None).astype(jnp.float32))

    return jax.grad(total, (0, 1, 2))(q_BTHK, k_BTHK, v_BTHK)


def measure(case: Case, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The backends that fit a case, in turn, and why the others don't."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    shape = case.shape(dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    size = (case.rows, case.length, case.heads, case.head_dim)
    inputs = tuple(jax.random.normal(key, size, dtype) * case.head_dim**-0.25 for key in keys)
    functions, costs, unfit = {}, {}, {}
    for name, backend in BACKENDS.items():
        say(name)
        if (reason := backend.why_not(shape)) is not None:
            unfit[name] = reason
            continue
        program, costs[name] = compiled_from(None, functools.partial(_gradients, name), inputs)
        functions[name] = functools.partial(program, *inputs)
    times = interleaved(functions, repeats, TURN)
    ways = {
        name: {
            "seconds": each.each,
            "seconds_a_call": each.median,
            "spread": each.spread,
            "faster_than_reference_by": ratio(each, times["reference"]),
            "temp_bytes": costs[name]["temp_bytes"],
        }
        for name, each in times.items()
    }
    return {**case._asdict(), "dtype": dtype, "auto": choose("auto", shape), "ways": ways, "unfit": unfit}


def run(cases: list[str], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it."""
    result: dict[str, Any] = {"bench": "attention", **surroundings(), "repeats": repeats, "cases": {}}
    for name in cases:
        result["cases"][name] = measure(CASES[name], repeats, lambda what, name=name: say(f"{name}: {what}"))
    return result


COLUMNS = ("length", "backend", "ms", "spread", "speed-up", "MB", "auto")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS."""
    found = []
    for name, case in result["cases"].items():
        for way, row in case["ways"].items():
            speed, auto = f"{row['faster_than_reference_by']:.2f}", "auto" if case["auto"][0] == way else ""
            memory = "" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 1e6:,.0f}"
            found.append(
                (name, way, f"{1e3 * row['seconds_a_call']:,.1f}", f"{row['spread']:.0%}", speed, memory, auto)
            )
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    cases = list(result["cases"].values())
    reasons = {f"{name}: {why}." for case in cases for name, why in case["unfit"].items()}
    head = f"{cases[0]['heads']} heads of width {cases[0]['head_dim']}, {cases[0]['dtype']}, forward and backward."
    return [head, "MB: what XLA sets aside while it computes.", *(f"Left out, {reason}" for reason in sorted(reasons))]
