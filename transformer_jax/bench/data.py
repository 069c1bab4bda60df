"""`transformer-jax bench data`: how fast batches are made, how fast steps use them up, and whether training waits.

All are of the same run: its data, tokenizer, packing and model. The data is what every machine has, dates and the
Python standard library, as token shards that are read from the disk.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from transformer_jax.bench.measure import interleaved, ratio
from transformer_jax.config import RunConfig
from transformer_jax.data import sources
from transformer_jax.data.batches import draw_checked
from transformer_jax.data.corpora import Pairs, Texts
from transformer_jax.data.load import load_data
from transformer_jax.data.prepare import Wanted, prepare
from transformer_jax.data.tokenizer import TOKENIZER
from transformer_jax.pace import ahead, tokens_of
from transformer_jax.partition import Partitioner
from transformer_jax.recipes import find_recipe
from transformer_jax.run import first_state, step_of
from transformer_jax.surroundings import surroundings


def _recipe(name: str, objective: Any = "auto", **changes: Any) -> RunConfig:
    run = find_recipe(name)
    data = dataclasses.replace(run.data, objective=objective)
    return dataclasses.replace(run, data=data, model=run.model.replace(**changes))


CASES = {
    "dates": _recipe("dates"),
    "dates-decoder-only": _recipe("dates", mode="decoder-only"),
    "code": _recipe("code"),
    "code-packed": _recipe("code", "prefix-lm"),
    "code-span-corruption": _recipe("code", "span-corruption", mode="encoder-decoder"),
    "code-ul2": _recipe("code", "ul2", mode="encoder-decoder"),
}
STEPS = 4  # of a turn
DRAWN = 100  # batches of a turn of the pipeline alone
PROCESSES = 2
PIPELINE, ALONE, TRAINING = "pipeline alone", "steps alone", "training"
SEVERAL = f"pipeline, {PROCESSES} processes"


def on_disk(run: RunConfig, folder: Path) -> RunConfig:
    """The run with its embedded data prepared in a folder."""
    found, fields = {}, {"text": ("text",), "pairs": ("source", "target")}
    corpora = sources.load((), (), run.data.embedded, run.data.validation_fraction)
    tokenizer, size = run.data.tokenizer, run.data.tokenizer_size
    for name, corpus in zip(("train", "validation"), corpora, strict=True):
        assert isinstance(corpus, (Texts, Pairs))
        sides = (corpus.documents,) if isinstance(corpus, Texts) else (corpus.sources, corpus.targets)
        records = (dict(zip(fields[corpus.kind], each, strict=True)) for each in zip(*sides, strict=True))
        path, shards = folder / f"{name}.jsonl", folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        shards.mkdir()
        wanted = Wanted((str(path),), tokenizer, size, 2**20)
        prepare(shards, wanted, 1, path.stat().st_size, lambda _: None, lambda *_: None)
        tokenizer, found[name] = str(shards / TOKENIZER), (str(shards),)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **found))


def measure(run: RunConfig, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The ways of a run, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        say("prepares the data")
        return _measure(on_disk(run, Path(folder)), repeats, say)


def _measure(run: RunConfig, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    data = load_data(run)
    run, batches, partitioner = data.config, data.batches(), Partitioner.create(data.config.parallel)
    state = partitioner.init(lambda key: first_state(run, key), jax.random.key(run.seed))
    program, place = partitioner.step(step_of(run), state), 0
    waited: list[float] = []
    draw = functools.partial(draw_checked, batches, run.model)
    ready = [draw(step) for step in range(STEPS)]

    def pipeline() -> None:
        nonlocal place
        place, start = place + DRAWN, place
        for step in range(start, place):
            draw(step)

    def steps(drawn: Any) -> Any:
        nonlocal state
        metrics = None
        for each in drawn:
            state, metrics = program(state, partitioner.put(each.batch, run.batch_size))
            jax.block_until_ready(metrics)
        return metrics

    def training() -> Any:
        nonlocal place
        place, start = place + STEPS, place
        return steps(ahead(draw, start, place, waited.append))

    feed = ahead(draw, 0, sys.maxsize, workers=PROCESSES)

    def several() -> None:
        for _ in range(DRAWN):
            next(feed)

    say("measures")
    functions = {PIPELINE: pipeline, SEVERAL: several, ALONE: lambda: steps(ready), TRAINING: training}
    with contextlib.closing(feed):
        times = interleaved(functions, repeats)
    tokens = sum(tokens_of(each.batch) for each in ready) / STEPS
    counts = {PIPELINE: DRAWN, SEVERAL: DRAWN, ALONE: STEPS, TRAINING: STEPS}
    rows = {
        name: {
            "tokens_per_second": tokens * counts[name] / each.median,
            "seconds": each.each,
            "spread": each.spread,
            "faster_than_steps_by": ratio(each, times[ALONE]) * counts[name] / STEPS,
        }
        for name, each in times.items()
    }
    turns = [sum(waited[turn * STEPS + 1 : (turn + 1) * STEPS]) for turn in range(1, repeats + 1)]  # but for the first
    share = sum(turns) / sum(times[TRAINING].each)
    return {"tokens_a_batch": tokens, "batch": run.batch_size, "ways": rows, "data_wait": share}


def run(cases: list[str], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All that the benchmark finds, as JSON has it."""
    result: dict[str, Any] = {"bench": "data", **surroundings(), "repeats": repeats, "cases": {}}
    for name in cases:
        result["cases"][name] = measure(CASES[name], repeats, lambda what, name=name: say(f"{name}: {what}"))
    return result


COLUMNS = ("case", "way", "tokens/s", "spread", "it / steps", "waits for data")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result as rows of COLUMNS."""
    found = []
    for name, case in result["cases"].items():
        for way, row in case["ways"].items():
            share = f"{case['data_wait']:.2%} of the time" if way == TRAINING else ""
            rate, times = f"{row['tokens_per_second']:,.0f}", f"{row['faster_than_steps_by']:,.2f}"
            found.append((name, way, rate, f"{row['spread']:.0%}", times, share))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What else is to be said of the result."""
    return []
