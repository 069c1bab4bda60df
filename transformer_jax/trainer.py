"""What a run's steps, evaluations and checkpoints need, made once from its settings and data."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax import host, job
from transformer_jax.config import RunConfig
from transformer_jax.config_file import to_json
from transformer_jax.data.batches import Drawn, Rows, draw_checked, in_order
from transformer_jax.data.chat import Chats
from transformer_jax.data.corpora import Pairs
from transformer_jax.data.load import Data
from transformer_jax.data.objectives import arrangement_of
from transformer_jax.data.tokenizer import papers_of
from transformer_jax.diagnose import make_diagnosis
from transformer_jax.errors import InputError
from transformer_jax.evaluate import answer, make_evaluator
from transformer_jax.initial import initial_params
from transformer_jax.model.transformer import Transformer
from transformer_jax.objective import make_loss
from transformer_jax.optimizer import make_schedule
from transformer_jax.partition import Partitioner, part_bytes
from transformer_jax.run import CONFIG, first_state, join_of
from transformer_jax.step import TrainState
from transformer_jax.tokens import Batch
from transformer_jax.translation.scores import exact_match


def digest_of(tree: Any) -> str:
    """A digest of all arrays of a tree, by which two states can be compared to the bit."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf if leaf.is_fully_addressable else job.gather(leaf)).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass
class Trainer:
    """One run: everything that its steps, evaluations and checkpoints need."""

    config: RunConfig
    data: Data
    folder: Path

    def __post_init__(self) -> None:
        run = self.config
        self.partitioner = Partitioner.create(run.parallel)
        if run.batch_size % (run.optimizer.accumulate * self.partitioner.batch_parts):
            raise InputError(
                f"batch_size={run.batch_size} must be a multiple of optimizer.accumulate={run.optimizer.accumulate} "
                f"times the {self.partitioner.batch_parts} parts that parallel.strategy={run.parallel.strategy} needs."
            )
        self.model = Transformer(run.model)
        self.schedule = make_schedule(run.optimizer, run.steps)
        self.evaluator = make_evaluator(self.model, self.partitioner, run.batch_size)
        self.mine = self.partitioner.mine(run.batch_size)
        self.batches = self.data.batches(self.mine)
        self.draw = functools.partial(draw_checked, self.batches, run.model)
        self.papers = papers_of(self.data.tokenizer) | {CONFIG: to_json(run)}
        self.make = functools.partial(first_state, run)
        # compiled where it computes; where it only puts together, compiled it would copy
        self.join = jax.jit(join_of(run)) if run.tuning.lora else join_of(run)

    def abstract_state(self) -> TrainState:
        """The state's shapes and where each array lives, without memory.

        Raises:
            InputError: the state and the gradients alone are more than a device's memory.
        """
        run, state = self.config, self.partitioner.abstract(self.make, jax.random.key(self.config.seed))
        need = part_bytes(state) + part_bytes(state.params)
        device = jax.local_devices()[0]
        have = (device.memory_stats() or {}).get("bytes_limit", 0)
        if not have and device.platform == "cpu":
            have = host.memory() // (1 if self.partitioner.mesh is None else jax.local_device_count())
        if have and need > have:
            count = sum(int(np.prod(leaf.shape, dtype=object)) for leaf in jax.tree.leaves(state.params))
            raise InputError(
                f"A model with {count:,} parameters (d_model={run.model.d_model}, num_layers={run.model.num_layers}, "
                f"vocab_size={run.model.vocab_size}) needs {need / 1e9:,.1f} GB of memory on each device for "
                f"parameters, gradients and optimizer; there are {have / 1e9:,.1f} GB."
            )
        return state

    def first_state(self) -> TrainState:
        """The state before the first step."""
        key, config = jax.random.key(self.config.seed), self.config
        if not config.init_from:
            return self.partitioner.init(self.make, key)
        return self.partitioner.made(self.make, key, initial_params(config, self.partitioner))

    def facts(self, step: int, scores: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint says about itself besides the run's papers."""
        following = self.batches.following(step)
        return {
            "seed": self.config.seed,
            "next": following[0] if len(following) == 1 else following,
            "data": self.data.fingerprint,
            "scores": scores,
            "versions": {name: version(name) for name in ("transformer_jax", "jax", "flax", "optax")},
        }

    def divergence(self, state: TrainState, drawn: Drawn, step: int) -> str:
        """Where the numbers of a step that was left out went wrong; its parameters are still those of `state`."""
        loss = make_loss(self.model, self.config.loss)
        key = jax.random.fold_in(jax.random.key(self.config.seed), step - 1)
        batch = self.partitioner.put(drawn.batch, self.config.batch_size)
        params = self.join(state.params, state.frozen)
        return make_diagnosis(self.model, loss, self.partitioner, key)(params, batch)

    def evaluate(self, step: int, state: TrainState, pause: Callable[[], None]) -> tuple[list[dict[str, Any]], str]:
        """Scores on each set of validation data, the run's own last, and sample outputs. All rows are read after the
        last step.

        `pause` is called between parts of the work and may raise to give it up.
        """
        run = self.config

        def batches(rows: Rows) -> Iterator[Batch]:
            for batch in in_order(rows, run.batch_size, 0 if step == run.steps else run.eval_rows, self.mine):
                pause()
                yield batch

        with self.partitioner.scope():
            params = self.join(state.best_params, state.frozen)
        sets = {f"validation/{name}": rows for name, rows in self.data.named.items()}
        sets["validation"] = self.data.validation
        found = [{"step": step, "split": name} | self.evaluator(params, batches(rows)) for name, rows in sets.items()]
        scores, samples = self._sample(params, pause)
        return [*found[:-1], found[-1] | scores], samples

    def _start_of(self, document: str) -> str:
        """The first letters of a document, few enough to leave half of the model's length for what follows."""
        most = self.config.model.max_length
        start = document[: most // 4]
        while len(start) > 1 and len(self.data.tokenizer.encode([start])[0]) > most // 2:
            start = start[: len(start) // 2]
        return start

    def _sample(self, params: Any, pause: Callable[[], None]) -> tuple[dict[str, Any], str]:
        run, held_out = self.config, self.data.held_out
        if not arrangement_of(run.data.objective, run.model.mode).answers:
            return {}, ""
        params = self.partitioner.for_decoding(params)

        def respond(texts: list[str], **options: Any) -> list[str]:
            with self.partitioner.scope():
                return answer(texts, self.model, params, run, self.data.tokenizer, pause=pause, **options)

        if isinstance(held_out, Pairs):
            chosen = held_out.take(slice(run.num_samples))
            if not len(chosen):
                return {}, ""
            outputs = respond(chosen.sources)
            lines = [f"{s}\n  expected {t}\n  output   {o}" for s, t, o in zip(*_few(chosen, outputs), strict=True)]
            scores = {"exact_match": exact_match(outputs, chosen.targets), "exact_match_sample": len(chosen)}
        elif isinstance(held_out, Chats):
            asked = [turns[0].content for turns in held_out.turns[:3]]
            lines = [f"{q}\n  output   {o}" for q, o in zip(asked, respond(asked), strict=True)]
            scores = {}
        else:
            starts = [self._start_of(document) for document in held_out.documents[:3]]
            outputs = respond(starts, key=jax.random.key(run.seed), batch_size=len(starts))
            lines = [f"{s}|{o}" for s, o in zip(starts, outputs, strict=True)]
            scores = {}
        return scores, "\n".join(lines)


def _few(pairs: Pairs, outputs: list[str], count: int = 8) -> tuple[list[str], list[str], list[str]]:
    return pairs.sources[:count], pairs.targets[:count], outputs[:count]
