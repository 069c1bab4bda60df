"""`transformer-jax bench compile`: what depth costs to compile and to run, layer by layer or as one block in a loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from transformer_jax.bench.measure import compiled_from, interleaved
from transformer_jax.bench.subject import TINY, Subject
from transformer_jax.surroundings import surroundings

LAYERS = (4, 12, 48)
TURN = 0.5  # seconds
CASES = {
    "narrow": Subject(TINY, batch=12, length=64),
    "wide": Subject(TINY.replace(d_model=384, num_heads=6, max_length=256), batch=4, length=256),
}
WAYS = {"unrolled": False, "scan": True}


def measure(subject: Subject, layers: int, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Both ways at one depth."""
    functions, costs = {}, {}
    for name, scan in WAYS.items():
        say(f"{layers} layers, {name}")
        deep = subject._replace(config=subject.config.replace(num_layers=layers, scan_layers=scan))
        state, step = deep.step()
        batch = jax.device_put(deep.draw())
        program, costs[name] = compiled_from(None, step, (state, batch))
        functions[name] = functools.partial(program, state, batch)
    times = interleaved(functions, repeats, TURN)
    return {
        name: {**costs[name], "seconds": each.each, "seconds_a_step": each.median, "spread": each.spread}
        for name, each in times.items()
    }


def run(cases: list[str], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it."""
    result: dict[str, Any] = {"bench": "compile", **surroundings(), "repeats": repeats, "cases": {}}
    for name in cases:
        found = {str(layers): measure(CASES[name], layers, repeats, say) for layers in LAYERS}
        result["cases"][name] = found
    return result


COLUMNS = ("case", "layers", "way", "trace", "compile", "module", "ms a step", "spread")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS."""
    found = []
    for name, case in result["cases"].items():
        for layers, ways in case.items():
            for way, row in ways.items():
                cost = [f"{row[each]:.2f} s" for each in ("trace_seconds", "compile_seconds")]
                size, step = f"{row['module_bytes'] / 1e3:,.0f} kB", f"{1e3 * row['seconds_a_step']:,.1f}"
                found.append((name, layers, way, *cost, size, step, f"{row['spread']:.0%}"))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    found, first, last = [], str(LAYERS[0]), str(LAYERS[-1])
    for name, case in result["cases"].items():
        for way in WAYS:
            cost = {
                layers: case[layers][way]["trace_seconds"] + case[layers][way]["compile_seconds"] for layers in case
            }
            found.append(f"{name}, {way}: {last} layers take {cost[last] / cost[first]:.2f} times as long as {first}.")
        slower = [
            f"{case[n]['scan']['seconds_a_step'] / case[n]['unrolled']['seconds_a_step']:.2f} at {n}" for n in case
        ]
        found.append(f"{name}: a step with scan takes so many times as long as unrolled: {', '.join(slower)} layers.")
    return found
