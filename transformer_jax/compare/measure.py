"""What is measured of an arm: before it is trained its speed and memory, afterwards its scores on unseen data."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer_jax.data.corpora import Pairs
from transformer_jax.data.load import Data, make_rows, prompts_of
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

RESULT = "result.json"
DECODED = 1000  # pairs whose outputs are scored
LENGTHS = (8, 32, 128)  # tokens that are decoded for the time that it takes
ROUNDS, BATCHES = 4, 4
TURNS, SECONDS = 2, 0.5  # of a step, or of decoding so many tokens, in a round: at least so many, and for so long


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


def seconds_of(turn: Callable[[int], Any]) -> list[float]:
    """Times of turns, each of which is given its number; the first one may compile, and does not count."""
    times: list[float] = []
    while len(times) <= TURNS or sum(times[1:]) < SECONDS:
        since = time.perf_counter()
        jax.block_until_ready(turn(len(times)))
        times.append(time.perf_counter() - since)
    return times[1:]


class Watch:
    """Measures a run, a round at a time: it trains a few steps and decodes with what comes out.

    How long that takes does not depend on what is learned.
    """

    def __init__(self, data: Data) -> None:
        run = data.config
        self._data, self._partitioner = data, Partitioner.create(run.parallel)
        self._first = functools.partial(first_state, run)
        self._program: Any = None
        self._memory, self._tokens = 0, 0.0
        self._steps: list[float] = []
        self._decoding: dict[str, list[float]] = {}

    def measure(self) -> None:
        """A round, of which nothing stays on the devices but what is compiled."""
        run, partitioner = self._data.config, self._partitioner
        state: Any = partitioner.init(self._first, jax.random.key(run.seed))
        batches = self._data.batches()
        drawn = [batches.draw(step).batch for step in range(BATCHES)]
        ready = [partitioner.put(batch, run.batch_size) for batch in drawn]
        if self._program is None:
            self._program = partitioner.step(step_of(run), state)
            self._memory = _memory(self._program.compiled(state, ready[0]))
            self._tokens = statistics.fmean(map(tokens_of, drawn))

        def step(turn: int) -> Any:
            nonlocal state
            state, metrics = self._program(state, ready[turn % BATCHES])
            return metrics

        self._steps += seconds_of(step)
        with partitioner.scope():
            self._decode(partitioner.for_decoding(state.params))

    def _decode(self, params: Any) -> None:
        run, model = self._data.config, Transformer(self._data.config.model)
        asked = _prompt(self._data.held_out, run.model.max_length // 4)
        source, seen = prompts_of([asked], run, self._data.tokenizer)[0]
        prompt = Tokens.from_ids(seen[None])
        read = None if source is None else Tokens.from_ids(np.asarray(source)[None])
        for length in LENGTHS:
            if length > run.model.max_length - len(seen):
                continue

            def decode(_: int, length: int = length) -> Any:
                return generate(model, params, prompt, source=read, max_new_tokens=length, eos_id=None).ids

            self._decoding.setdefault(str(length), []).extend(seconds_of(decode))

    @property
    def speed(self) -> Speed | None:
        """Of the rounds so far; None before the first."""
        if not self._steps:
            return None
        latency = {length: statistics.median(times) for length, times in self._decoding.items()}
        return Speed(statistics.median(self._steps), self._tokens, self._memory, latency)


def take_turns(watches: Sequence[Watch]) -> None:
    """Measures some runs in rounds, so that a machine that slows down does so for all of them alike."""
    for _ in range(ROUNDS):
        for watch in watches:
            watch.measure()


def _memory(executable: Any) -> int:
    plan = executable.memory_analysis()
    names = ("argument", "output", "temp")
    return sum(getattr(plan, f"{name}_size_in_bytes") for name in names) - plan.alias_size_in_bytes


def _prompt(corpus: Any, letters: int) -> str:
    """A source of ordinary length, or so much of a text from its start."""
    if isinstance(corpus, Pairs):
        return sorted(corpus.sources, key=len)[len(corpus) // 2]
    return next(iter(corpus.all_texts()))[:letters]


def result_of(folder: Path) -> dict[str, Any]:
    """The scores of a finished run, measured and written beside it."""
    run = load_run(folder)
    corpus = check_kind(run, load_all(run.config.data).validation[0])
    corpus = make_rows("validation", corpus, run.config, run.tokenizer).text  # without what is too long
    names = ("step", "loss", "accuracy", "exact_match")
    records = [record for record in read_records(folder / "metrics.jsonl") if record.get("split") == "validation"]
    curve = [{name: record.get(name) for name in names} for record in records]
    scores = {name: curve[-1][name] for name in ("loss", "accuracy")}  # of all rows, as after a last step
    if isinstance(corpus, Pairs):
        outputs, targets = outputs_of(run, corpus, DECODED)
        scores |= translation_scores(outputs, targets)
    numbers = {name: value for name, value in scores.items() if isinstance(value, (int, float))}
    result = {"scores": numbers, "curve": curve}
    write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result
