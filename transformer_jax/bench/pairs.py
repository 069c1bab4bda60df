"""`transformer-jax bench pairs`: training on pairs of texts in packed rows, beside PyTorch with padded batches.

Both sides read the same pairs, tokenised alike, and rates are of real tokens: padding does not count. The peer's
batches are pairs at random, padded to the longest of them, which is what most PyTorch code does; torch.compile makes
one program for all their shapes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer_jax.bench import peers
from transformer_jax.bench.measure import interleaved, ratio
from transformer_jax.bench.subject import ADAMW
from transformer_jax.bench.train import OURS, TRANSLATION
from transformer_jax.config import DataConfig, RunConfig
from transformer_jax.data.batches import PackedRows
from transformer_jax.data.corpora import Pairs
from transformer_jax.data.examples import generator
from transformer_jax.data.load import load_data
from transformer_jax.data.ragged import Ragged
from transformer_jax.errors import InputError
from transformer_jax.pace import tokens_of
from transformer_jax.partition import Partitioner
from transformer_jax.run import first_state, step_of
from transformer_jax.surroundings import surroundings

TAKES = ("data",)
PAIRS = 64  # in a batch, on average
STEPS = 16  # of a turn, each with a batch of its own
WIDTH = 64  # places of a row, on either side; half a model's longest sequence


class Case(NamedTuple):
    """How the pairs are trained on, and which model of `peers.MODELS` is the like of it."""

    run: RunConfig
    peer: str


def _run(**changes: Any) -> RunConfig:
    data = DataConfig(tokenizer_size=10_000, too_long="drop", source_length=WIDTH, target_length=WIDTH)
    model = TRANSLATION.replace(vocab_size=None, max_length=2 * WIDTH, **changes)
    return RunConfig(model=model, data=data, optimizer=ADAMW, steps=1000)


CASES = {
    "encoder-decoder": Case(_run(), "torch"),
    "decoder-only": Case(_run(mode="decoder-only", tie_embeddings=True), "gpt2"),
}


class Padded(NamedTuple):
    """A batch of pairs, each in a row of its own."""

    arrays: list[np.ndarray]  # source where there is one, target, labels: int32[B, T] each
    tokens: int


def padded(rows: PackedRows, pairs: np.ndarray) -> Padded:
    """The pairs of these numbers, padded to their longest."""
    source, read, predicted, learned, _ = rows.arrangement.arrange(*rows.examples.make(pairs, 0), rows.tokenizer)
    labels = Ragged(np.where(learned.ids, predicted.ids, peers.PADDING), predicted.offsets)
    parts = [part for part in (source, read, labels) if part is not None]
    sides = [[part[index] for index in range(len(part))] for part in parts]
    tokens = sum(len(ids) for side in sides[:-1] for ids in side)
    return Padded([_filled(side) for side in sides], tokens)


def _filled(sequences: list[np.ndarray]) -> np.ndarray:
    filled = np.full((len(sequences), max(map(len, sequences))), peers.PADDING, np.int32)
    for row, ids in zip(filled, sequences, strict=True):
        row[: len(ids)] = ids
    return filled


def measure(case: Case, files: tuple[str, ...], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Both sides of a case, in turn."""
    say("reads the data")
    run = case.run
    data = load_data(dataclasses.replace(run, batch_size=1, data=dataclasses.replace(run.data, train=files)))
    rows = data.train
    if not isinstance(data.held_out, Pairs) or not isinstance(rows, PackedRows):
        raise InputError(f"--data {' '.join(files)} holds {data.held_out.kind}: bench pairs takes pairs.")
    assert data.tokenizer.pad_id == peers.PADDING
    batch_size = max(1, round(PAIRS * len(rows) / len(rows.members.ids)))
    run = dataclasses.replace(data.config, batch_size=batch_size)
    data = dataclasses.replace(data, config=run)
    partitioner = Partitioner.create(run.parallel)
    state = partitioner.init(lambda key: first_state(run, key), jax.random.key(run.seed))
    program = partitioner.step(step_of(run), state)
    batches = data.batches()
    packed = [batches.draw(step).batch for step in range(STEPS)]
    order = generator(0).permutation(len(rows.members.ids))
    apart = [padded(rows, part) for part in np.array_split(order[: STEPS * PAIRS], STEPS)]

    def ours() -> Any:
        nonlocal state
        metrics = None
        for batch in packed:
            state, metrics = program(state, batch)
        return metrics

    tokens, shares = {OURS: sum(map(tokens_of, packed))}, {OURS: rows.used}
    functions: dict[str, Callable[[], Any]] = {OURS: ours}
    say(case.peer)
    if (peer := peers.training(case.peer, run.model, [each.arrays for each in apart])) is not None:
        functions[peer[0]] = functools.partial(_each, peer[1])
        tokens[peer[0]] = sum(each.tokens for each in apart)
        shares[peer[0]] = tokens[peer[0]] / sum(side.size for each in apart for side in each.arrays[:-1])
    say("steps")
    times = interleaved(functions, repeats)
    ways = {
        name: {
            "seconds": each.each,
            "steps": STEPS,
            "spread": each.spread,
            "tokens": tokens[name],
            "tokens_per_second": tokens[name] / each.median,
            "share_of_places": shares[name],
            "ours_is_faster_by": ratio(times[OURS], each) * tokens[OURS] / tokens[name],
        }
        for name, each in times.items()
    }
    return {"rows": batch_size, "width": WIDTH, "pairs": PAIRS, "vocabulary": run.model.vocab_size, "ways": ways}


def _each(step: Callable[[], Any]) -> Any:
    """A step with each batch."""
    for _ in range(STEPS - 1):
        step()
    return step()


def run(cases: list[str], repeats: int, say: Callable[[str], None], data: Sequence[Path] = ()) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it."""
    files = tuple(map(str, data))
    result: dict[str, Any] = {"bench": "pairs", **surroundings("transformers", "torch"), "repeats": repeats}
    result |= {"data": " and ".join(Path(name).name for name in files) or "dates", "cases": {}}
    for name in cases:
        result["cases"][name] = measure(CASES[name], files, repeats, lambda what, name=name: say(f"{name}: {what}"))
    return result


COLUMNS = ("case", "way", "real tokens/s", "spread", "of all places", "ours / it")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS."""
    return [
        (
            name,
            way,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['spread']:.0%}",
            f"{row['share_of_places']:.0%}",
            f"{row['ours_is_faster_by']:.2f}",
        )
        for name, case in result["cases"].items()
        for way, row in case["ways"].items()
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    sizes = {f"{case['rows']} rows of {case['width']} places" for case in result["cases"].values()}
    return [
        f"Data: {result['data']}. Packed here, {' or '.join(sorted(sizes))} on a side; there {PAIRS} pairs at random, "
        "padded to the longest of them. Both about as many pairs a step."
    ]
