"""`transformer-jax bench train`: training on random tokens, beside PyTorch with torch.compile where it is installed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from transformer_jax.bench import peers
from transformer_jax.bench.measure import compiled_from, interleaved, peak_flops, ratio
from transformer_jax.bench.subject import TINY, Subject
from transformer_jax.config import ModelConfig
from transformer_jax.recipes import find_recipe
from transformer_jax.surroundings import surroundings

OURS = "transformer_jax"
TURN = 2.0  # seconds


class Case(NamedTuple):
    """What is trained, and which model of `peers.MODELS` is the like of it."""

    subject: Subject
    peer: str


TRANSLATION = ModelConfig(
    vocab_size=10_000,
    d_model=128,
    num_layers=4,
    num_heads=4,
    d_ff=256,
    max_length=32,
    position="learned",
    activation="gelu",
    scale_embeddings=False,
    tie_embeddings=False,
    share_source_embedding=False,
    use_bias=False,
    norm_eps=1e-5,
)
GPT2 = find_recipe("gpt2-124m").model.replace(vocab_size=50_304, dtype="float32")
CASES = {
    "tiny": Case(Subject(TINY, 12, 64), "gpt2"),
    "small": Case(Subject(TINY.replace(d_model=384, num_layers=6, num_heads=6, max_length=256), 8, 256), "gpt2"),
    "gpt2-124m": Case(Subject(GPT2, 1, 256), "gpt2"),
    "encoder-decoder": Case(Subject(TRANSLATION, 64, 32), "torch"),
}


def device_bytes() -> int | None:
    """The most memory that has been in use on the first device, where it says so."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def measure(case: Case, repeats: int, say: Callable[[str], None], turn: float = TURN) -> dict[str, Any]:
    """Our step and the peer's, in turn; what ours costs to compile, its FLOPs and its memory."""
    subject = case.subject
    say(OURS)
    state, step = subject.step()
    batch = jax.device_put(subject.draw())
    program, costs = compiled_from(None, step, (state, batch), donate=True)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    memory = program.memory_analysis()

    def ours() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    functions = {OURS: ours}
    say(case.peer)
    if (peer := peers.training(case.peer, subject.config, [peers.arrays(batch)])) is not None:
        functions[peer[0]] = peer[1]
    say("steps")
    times = interleaved(functions, repeats, turn)
    ways: dict[str, dict[str, Any]] = {
        name: {
            "seconds": each.each,
            "seconds_a_step": each.median,
            "spread": each.spread,
            "first_step_seconds": each.first,
            "tokens_per_second": subject.tokens / each.median,
            "ours_is_faster_by": ratio(times[OURS], each),
        }
        for name, each in times.items()
    }
    planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None
    ways[OURS] |= {**costs, "matrix_flops": subject.flops, "planned_bytes": planned, "peak_bytes": device_bytes()}
    sizes = {name: getattr(subject, name) for name in ("batch", "length", "tokens")}
    return {**sizes, "mode": subject.config.mode, "dtype": subject.config.dtype, "parameters": params, "ways": ways}


def run(cases: list[str], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it."""
    result: dict[str, Any] = {"bench": "train", **surroundings("optax", "transformers", "torch"), "repeats": repeats}
    result |= {"peak": peak_flops(), "cases": {}}
    for name in cases:
        result["cases"][name] = measure(CASES[name], repeats, lambda what, name=name: say(f"{name}: {what}"))
    return result


COLUMNS = ("case", "way", "ms a step", "spread", "tokens/s", "ours / it", "MFU", "MB")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS."""
    found, peak = [], result["peak"]["flops_per_second"]
    for name, case in result["cases"].items():
        flops = case["ways"][OURS]["matrix_flops"]
        for way, row in case["ways"].items():
            used = row.get("peak_bytes") or row.get("planned_bytes")
            found.append(
                (
                    name,
                    way,
                    f"{1e3 * row['seconds_a_step']:,.1f}",
                    f"{row['spread']:.0%}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['ours_is_faster_by']:.2f}",
                    f"{flops / row['seconds_a_step'] / peak:.1%}",
                    f"{used / 1e6:,.0f}" if used else "",
                )
            )
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    peak = result["peak"]
    return [
        "Full rows of random tokens, AdamW. MFU, of both sides: FLOPs of the model's matrix products, three times the "
        "forward pass and nothing computed again (Chowdhery et al. 2022, appendix B), a second, of a peak of "
        f"{peak['flops_per_second'] / 1e9:,.0f} GFLOP/s ({peak['source']}).",
        "MB: the most that the device had in use, where it says so, else what XLA plans for our step.",
    ]
