"""`transformer-jax bench jit`: the same train step operation by operation, in compiled functions, and compiled whole.

Every way computes the same update of the same model from the same batch; each variant of the whole step changes one
thing of the step with its state donated. What compiling costs is told apart from what a step takes: tracing (Python
to a jaxpr, and that to StableHLO), compiling by XLA, and the same with XLA's result in the persistent cache.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer_jax.bench.measure import compiled_from, interleaved, peak_flops, ratio
from transformer_jax.bench.subject import TINY, Subject
from transformer_jax.hlo import read_program
from transformer_jax.step import TrainState, apply_gradients, gradient_sums, step_key
from transformer_jax.surroundings import surroundings

CASES = {
    "decoder-only": Subject(TINY, batch=12, length=64),
    "encoder-decoder": Subject(TINY.replace(mode="encoder-decoder"), batch=12, length=64),
}
STEPS = 8  # in one call of the way that makes several
TURN = 1.0  # seconds


class Whole(NamedTuple):
    """A way to compile the whole step."""

    changes: Mapping[str, Any] = MappingProxyType({})
    donate: bool = True
    steps: int = 1


NO_JIT, BY_FUNCTION, PLAIN = "no jit", "jit of gradient and update apart", "jit of the step, donated"
WHOLE = {
    "jit of the step": Whole(donate=False),
    PLAIN: Whole(),
    "donated, scan over layers": Whole({"scan_layers": True}),
    "donated, remat": Whole({"remat": "full"}),
    f"donated, {STEPS} steps a call": Whole(steps=STEPS),
}


def _eager(subject: Subject) -> Callable[[], Any]:
    (state, step), batch = subject.step(), jax.device_put(subject.draw())

    def run() -> Any:
        with jax.disable_jit():
            return step(state, batch)[1]

    return run


def _by_function(subject: Subject) -> Callable[[], Any]:
    """The gradient is one compiled function and the update another; Python is between them."""
    (loss, optimizer), state = subject.parts(), subject.state()
    batch = jax.device_put(subject.draw())
    gradients = jax.jit(lambda state, batch: gradient_sums(loss, state.params, batch, step_key(state), 1))
    update = jax.jit(functools.partial(apply_gradients, optimizer=optimizer))
    return lambda: update(state, *gradients(state, batch))[1]


def _several(step: Callable[[Any, Any], Any], state: TrainState, batches: Any) -> tuple[TrainState, Any]:
    return jax.lax.scan(step, state, batches)


def _whole(subject: Subject, way: Whole, folder: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    subject = subject._replace(config=subject.config.replace(**way.changes))
    state, step = subject.step()
    batch: Any = subject.draw()
    if way.steps > 1:
        step = functools.partial(_several, step)
        batch = jax.tree.map(lambda *each: jnp.stack(each), *[subject.draw(seed) for seed in range(way.steps)])
    batch = jax.device_put(batch)
    program, costs = compiled_from(folder, step, (state, batch), donate=way.donate)
    costs["matrix_flops"] = sum(each.flops * each.times for each in read_program(program.as_text())[0]) / way.steps

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    return run, costs


def ways(
    subject: Subject, say: Callable[[str], None]
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """Functions that make a step, or several, by name, and what those that are compiled whole cost to compile."""
    functions: dict[str, Callable[[], Any]] = {NO_JIT: _eager(subject), BY_FUNCTION: _by_function(subject)}
    costs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in WHOLE.items():
            say(name)
            functions[name], costs[name] = _whole(subject, way, folder)
    return functions, costs


def measure(subject: Subject, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All ways of a case, in turn, and what each costs to compile."""
    functions, costs = ways(subject, say)
    say("steps")
    times = interleaved(functions, repeats, TURN)
    flops, rows = costs[PLAIN]["matrix_flops"], {}
    for name, each in times.items():
        steps = WHOLE[name].steps if name in WHOLE else 1
        row: dict[str, Any] = {
            "seconds_a_step": each.median / steps,
            "seconds": each.each,
            "steps": steps,
            "spread": each.spread,
            "faster_than_no_jit_by": ratio(each, times[NO_JIT]) * steps,
            "matrix_flops_per_second": flops / (each.median / steps),
            **costs.get(name, {}),
        }
        if name in costs:
            saved = times[NO_JIT].median - each.median / steps
            row["steps_until_paid"] = row["trace_seconds"] + row["compile_seconds"]
            row["steps_until_paid"] = max(1, -int(-row["steps_until_paid"] // saved)) if saved > 0 else None
        rows[name] = row
    return {**{name: getattr(subject, name) for name in ("batch", "length", "tokens")}, "ways": rows}


def run(cases: list[str], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it."""
    start, peak = time.perf_counter(), peak_flops()
    result: dict[str, Any] = {"bench": "jit", **surroundings("optax"), "repeats": repeats, "peak": peak, "cases": {}}
    for name in cases:
        result["cases"][name] = measure(CASES[name], repeats, lambda what, name=name: say(f"{name}: {what}"))
    return result | {"seconds": time.perf_counter() - start}


COLUMNS = ("case", "way", "ms a step", "spread", "speed-up", "trace", "compile", "cached", "paid at", "MB", "MFU")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS."""
    found, peak = [], result["peak"]["flops_per_second"]
    for name, case in result["cases"].items():
        for way, row in case["ways"].items():
            cells = ["", "", "", "", ""]
            if "trace_seconds" in row:
                seconds = [row[each] for each in ("trace_seconds", "compile_seconds", "cached_seconds")]
                paid = row["steps_until_paid"]
                cells = [*(f"{each:.2f} s" for each in seconds), f"step {paid}" if paid else "never"]
                cells.append(f"{row['bytes_accessed'] / 1e6:,.0f}" if row["bytes_accessed"] else "")
            mfu = f"{row['matrix_flops_per_second'] / peak:.1%}"
            speed = f"{row['faster_than_no_jit_by']:.1f}"
            found.append((name, way, f"{1e3 * row['seconds_a_step']:,.1f}", f"{row['spread']:.0%}", speed, *cells, mfu))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    found = []
    for name, case in result["cases"].items():
        row = case["ways"][PLAIN]
        cost = row["trace_seconds"] + row["compile_seconds"]
        found.append(
            f"{name}: the compiled step is {row['faster_than_no_jit_by']:.1f} times as fast as without jit; its "
            f"{cost:.1f} s of tracing and compiling are paid back at step {row['steps_until_paid']}."
        )
    peak = result["peak"]
    found.append("MB: what XLA counts as read and written in a step; it counts what a loop repeats once.")
    found.append(
        "MFU: FLOPs of the step's matrix products a second, of a peak of "
        f"{peak['flops_per_second'] / 1e9:,.0f} GFLOP/s ({peak['source']})."
    )
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """A PNG of the time of a step, by way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(result["cases"]), 3.6), layout="constrained")
    panels = figure.subplots(1, len(result["cases"]), squeeze=False, sharex=True)[0]
    for panel, (name, case) in zip(panels, result["cases"].items(), strict=True):
        ways = list(case["ways"])[::-1]
        values = [1e3 * case["ways"][way]["seconds_a_step"] for way in ways]
        bars = panel.barh(ways, values, color=["tab:gray" if way == NO_JIT else "tab:blue" for way in ways])
        labels = [
            f"{value:,.1f} ({case['ways'][way]['faster_than_no_jit_by']:.1f}x)"
            for way, value in zip(ways, values, strict=True)
        ]
        panel.bar_label(bars, labels, padding=3, fontsize=8)
        panel.set(title=name, xlabel="ms a step, logarithmic", xscale="log")
        panel.margins(x=0.75)
    figure.suptitle(f"One train step on {result['device']}", fontsize=11)
    figure.savefig(path, dpi=110)
