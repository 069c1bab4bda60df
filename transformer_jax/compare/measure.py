"""What is measured of an arm once it is trained: its scores on unseen data, its curve, and what decoding takes."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax.config import RunConfig
from transformer_jax.data.load import Data, prompts_of
from transformer_jax.data.sources import load_all
from transformer_jax.decoding import generate
from transformer_jax.evaluate import check_kind, evaluate_run
from transformer_jax.folders import write_whole
from transformer_jax.metrics import read_records
from transformer_jax.partition import Partitioner, part_bytes
from transformer_jax.run import Run, first_state, load_run, step_of
from transformer_jax.tokens import Tokens

DECODED = 1000  # pairs whose outputs are scored
LENGTHS = (8, 32, 128)  # tokens that are decoded for the time that it takes
TURNS = 5


def seconds_of(data: Data, steps: int = 10) -> float:
    """The median time of a training step of a run, compiled and warm."""
    run, batches, partitioner = data.config, data.batches(), Partitioner.create(data.config.parallel)
    state: Any = partitioner.init(lambda key: first_state(run, key), jax.random.key(run.seed))
    program, times = partitioner.step(step_of(run), state), []
    for step in range(steps + 1):
        batch = partitioner.put(batches.draw(step).batch, run.batch_size)
        since = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - since)
    return statistics.median(times[1:])


def state_bytes(run: RunConfig) -> int:
    """Of parameters and optimizer."""
    return part_bytes(jax.eval_shape(lambda key: first_state(run, key), jax.random.key(0)))


def latency(run: Run, text: str) -> dict[str, float]:
    """Seconds to decode so many tokens for one prompt, as far as the model's length goes: medians, warm."""
    source, seen = prompts_of([text], run.config, run.tokenizer)[0]
    prompt, found = Tokens.from_ids(seen[None]), {}
    read = None if source is None else Tokens.from_ids(np.asarray(source)[None])
    for length in LENGTHS:
        if length > run.config.model.max_length - len(seen):
            continue

        def decode(length: int = length) -> None:
            found = generate(run.model, run.params, prompt, source=read, max_new_tokens=length, eos_id=None)
            jax.block_until_ready(found.ids)

        decode()
        times = []
        for _ in range(TURNS):
            since = time.perf_counter()
            decode()
            times.append(time.perf_counter() - since)
        found[str(length)] = statistics.median(times)
    return found


def result_of(folder: Path) -> dict[str, Any]:
    """The scores of a finished run, written beside it so that they are measured once."""
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    run = load_run(folder)
    corpus = check_kind(run, load_all(run.config.data).validation[0])
    scores, _ = evaluate_run(run, corpus, limit=DECODED)
    records = [record for record in read_records(folder / "metrics.jsonl") if "split" in record]
    trained = [record for record in records if record["split"] == "train"]
    curve = [
        {name: record.get(name) for name in ("step", "loss", "exact_match")}
        for record in records
        if record["split"] == "validation"
    ]
    result = {
        "scores": {name: value for name, value in scores.items() if isinstance(value, (int, float))},
        "curve": curve,
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in trained),
        "latency": latency(run, _prompt(corpus)),
    }
    write_whole(path, json.dumps(result, indent=1) + "\n")
    return result


def _prompt(corpus: Any) -> str:
    """A source of ordinary length, or the start of a text."""
    texts = sorted(getattr(corpus, "sources", None) or corpus.all_texts(), key=len)
    return texts[len(texts) // 2][:200]
