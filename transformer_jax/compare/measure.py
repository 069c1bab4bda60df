"""What is measured of an arm: before it is trained its speed and memory, afterwards its scores on unseen data."""

import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer_jax.data.corpora import Pairs
from transformer_jax.data.load import Data, prompts_of
from transformer_jax.data.sources import load_all
from transformer_jax.decoding import generate
from transformer_jax.evaluate import check_kind, outputs_of
from transformer_jax.folders import write_whole
from transformer_jax.metrics import read_records
from transformer_jax.model.transformer import Transformer
from transformer_jax.pace import tokens_of
from transformer_jax.partition import Partitioner
from transformer_jax.run import first_state, load_run, step_of
from transformer_jax.tokens import Tokens
from transformer_jax.translation.scores import translation_scores

DECODED = 1000  # pairs whose outputs are scored
LENGTHS = (8, 32, 128)  # tokens that are decoded for the time that it takes
STEPS, TURNS = 10, 5


class Speed(NamedTuple):
    """What a run takes here, with nothing beside it; all times are medians, compiled and warm.

    Attributes:
        seconds: of a training step.
        tokens: real ones that a step reads.
        memory: bytes on a device at the height of a step, in XLA's plan of it.
        latency: seconds to decode so many tokens for one prompt, as far as the model's length goes.
    """

    seconds: float
    tokens: float
    memory: int
    latency: dict[str, float]


def speed_of(data: Data) -> Speed:
    """Trains a few steps and decodes with what comes out: how long that takes does not depend on what is learned."""
    run, batches, partitioner = data.config, data.batches(), Partitioner.create(data.config.parallel)
    state: Any = partitioner.init(lambda key: first_state(run, key), jax.random.key(run.seed))
    program, times, tokens, memory = partitioner.step(step_of(run), state), [], [], 0
    for step in range(STEPS + 1):
        drawn = batches.draw(step).batch
        batch = partitioner.put(drawn, run.batch_size)
        memory = memory or _memory(program.compiled(state, batch))
        since = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - since)
        tokens.append(tokens_of(drawn))
    params = partitioner.for_decoding(state.params)
    return Speed(statistics.median(times[1:]), statistics.fmean(tokens), memory, _latency(data, params))


def _memory(executable: Any) -> int:
    plan = executable.memory_analysis()
    names = ("argument", "output", "temp")
    return sum(getattr(plan, f"{name}_size_in_bytes") for name in names) - plan.alias_size_in_bytes


def _latency(data: Data, params: Any) -> dict[str, float]:
    run, model, found = data.config, Transformer(data.config.model), {}
    source, seen = prompts_of([_prompt(data.held_out, run.model.max_length // 4)], run, data.tokenizer)[0]
    prompt, read = Tokens.from_ids(seen[None]), None if source is None else Tokens.from_ids(np.asarray(source)[None])
    for length in LENGTHS:
        if length > run.model.max_length - len(seen):
            continue
        times = []
        for _ in range(TURNS + 1):
            since = time.perf_counter()
            made = generate(model, params, prompt, source=read, max_new_tokens=length, eos_id=None)
            jax.block_until_ready(made.ids)
            times.append(time.perf_counter() - since)
        found[str(length)] = statistics.median(times[1:])
    return found


def _prompt(corpus: Any, letters: int) -> str:
    """A source of ordinary length, or so much of a text from its start."""
    if isinstance(corpus, Pairs):
        return sorted(corpus.sources, key=len)[len(corpus) // 2]
    return next(iter(corpus.all_texts()))[:letters]


def result_of(folder: Path) -> dict[str, Any]:
    """The scores of a finished run, written beside it so that they are measured once."""
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    run = load_run(folder)
    corpus = check_kind(run, load_all(run.config.data).validation[0])
    names = ("step", "loss", "accuracy", "exact_match")
    records = [record for record in read_records(folder / "metrics.jsonl") if record.get("split") == "validation"]
    curve = [{name: record.get(name) for name in names} for record in records]
    scores = {name: curve[-1][name] for name in ("loss", "accuracy")}  # of all rows, as after a last step
    if isinstance(corpus, Pairs):
        outputs, targets = outputs_of(run, corpus, DECODED)
        scores |= translation_scores(outputs, targets)
    numbers = {name: value for name, value in scores.items() if isinstance(value, (int, float))}
    result = {"scores": numbers, "curve": curve}
    write_whole(path, json.dumps(result, indent=1) + "\n")
    return result
