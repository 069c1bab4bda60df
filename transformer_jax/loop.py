"""The training loop: batches in, metrics, samples and checkpoints out. It knows nothing of the architecture."""

import dataclasses
import functools
import hashlib
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax import job
from transformer_jax.checkpoint import Checkpoints
from transformer_jax.config import RunConfig
from transformer_jax.config_file import differences, read_config, to_json
from transformer_jax.data.batches import in_order
from transformer_jax.data.load import Data, load_data
from transformer_jax.data.sources import BASELINES, Pairs
from transformer_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from transformer_jax.errors import InputError
from transformer_jax.evaluate import answer, exact_match, make_evaluator
from transformer_jax.metrics import MetricsWriter, draw_loss
from transformer_jax.model.transformer import Transformer
from transformer_jax.optimizer import describe_decay, make_schedule
from transformer_jax.pace import Clock, StopSignal, ahead
from transformer_jax.partition import Partitioner, part_bytes
from transformer_jax.run import CHECKPOINTS, CONFIG, TOKENIZER, first_state, step_of
from transformer_jax.step import TrainState
from transformer_jax.terminal import Terminal

DONE, STOPPED = 0, 75


def digest_of(tree: Any) -> str:
    """A digest of all arrays of a tree, by which two states can be compared to the bit."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf if leaf.is_fully_addressable else job.gather(leaf)).tobytes())
    return digest.hexdigest()


def check_memory(run: RunConfig, partitioner: Partitioner, state: TrainState) -> None:
    """Raises InputError where the state and the gradients alone are more than a device's memory."""
    need = part_bytes(state) + part_bytes(state.params)
    device = jax.local_devices()[0]
    have = (device.memory_stats() or {}).get("bytes_limit", 0)
    if not have and device.platform == "cpu":
        have = _host_memory() // (1 if partitioner.mesh is None else jax.local_device_count())
    if have and need > have:
        count = sum(int(np.prod(leaf.shape, dtype=object)) for leaf in jax.tree.leaves(state.params))
        raise InputError(
            f"A model with {count:,} parameters (d_model={run.model.d_model}, num_layers={run.model.num_layers}, "
            f"vocab_size={run.model.vocab_size}) needs {need / 1e9:,.1f} GB of memory on each device for "
            f"parameters, gradients and optimizer; there are {have / 1e9:,.1f} GB."
        )


def _host_memory() -> int:
    import os

    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
    return os.sysconf(names[0]) * os.sysconf(names[1]) if known else 0


@dataclasses.dataclass
class Trainer:
    """One run: everything that its steps, evaluations and checkpoints need."""

    config: RunConfig
    data: Data
    folder: Path
    terminal: Terminal
    checkpoints: Checkpoints

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
        self.facts = {"fingerprint": self.data.fingerprint, "seed": run.seed}

    def check_facts(self) -> None:
        """Raises InputError where the newest checkpoint was made with other data."""
        step = self.checkpoints.latest
        if step is not None and (found := self.checkpoints.facts(step)) != self.facts:
            raise InputError(
                f"{self.folder}: its checkpoint was made with other data: {found} -> {self.facts}. {ELSEWHERE}"
            )

    def start(self) -> TrainState:
        """The newest checkpoint's state, or the first one.

        Raises:
            CheckpointError: it cannot be read.
        """
        key, step = jax.random.key(self.config.seed), self.checkpoints.latest
        make = functools.partial(first_state, self.config)
        if step is None:
            return self.partitioner.init(make, key)
        return self.checkpoints.restore(step, self.partitioner.abstract(make, key))

    def save(self, step: int, state: TrainState) -> None:
        """Starts a checkpoint; it is written while training goes on."""
        self.checkpoints.save(step, state, self.facts)

    def evaluate(self, step: int, state: TrainState, last: bool) -> dict[str, Any]:
        """Scores on validation data, with sample outputs written to samples.txt."""
        rows = in_order(self.data.validation, self.config.batch_size, 0 if last else self.config.eval_rows, self.mine)
        scores = self.evaluator(state.best_params, rows)
        return {"step": step, "split": "validation"} | scores | self._sample(step, state)

    def _start_of(self, document: str) -> str:
        """The first letters of a document, few enough to leave half of the model's length for what follows."""
        most = self.config.model.max_length
        start = document[: most // 4]
        while len(start) > 1 and len(self.data.tokenizer.encode([start])[0]) > most // 2:
            start = start[: len(start) // 2]
        return start

    def _sample(self, step: int, state: TrainState) -> dict[str, Any]:
        run, held_out = self.config, self.data.held_out
        params = self.partitioner.for_decoding(state.best_params)

        def respond(texts: list[str], **options: Any) -> list[str]:
            with self.partitioner.scope():
                return answer(texts, self.model, params, run, self.data.tokenizer, **options)

        if isinstance(held_out, Pairs):
            chosen = held_out.take(slice(run.num_samples))
            if not len(chosen):
                return {}
            outputs = respond(chosen.sources)
            lines = [f"{s}\n  expected {t}\n  output   {o}" for s, t, o in zip(*_few(chosen, outputs), strict=True)]
            scores = {"exact_match": exact_match(outputs, chosen.targets), "exact_match_sample": len(chosen)}
        else:
            starts = [self._start_of(document) for document in held_out.documents[:3]]
            outputs = respond(starts, key=jax.random.key(run.seed), batch_size=len(starts))
            lines = [f"{s}|{o}" for s, o in zip(starts, outputs, strict=True)]
            scores = {}
        if job.is_first():
            with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n" + "\n".join(lines) + "\n\n")
        return scores


def _few(pairs: Pairs, outputs: list[str], count: int = 8) -> tuple[list[str], list[str], list[str]]:
    return pairs.sources[:count], pairs.targets[:count], outputs[:count]


ELSEWHERE = "Give another --workdir, or remove this one to start over."


def open_folder(run: RunConfig) -> tuple[Path, RunConfig | None]:
    """The run's folder, made where there is none, and the config of the run that is in it.

    Raises:
        InputError: the folder cannot be made or written.
    """
    folder = Path(run.workdir)
    probe = folder / f".writable-{job.number()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--workdir {folder}: cannot be used as a run's folder ({error.strerror}).") from None
    return folder, read_config(folder / CONFIG) if (folder / CONFIG).exists() else None


def train(run: RunConfig, terminal: Terminal) -> int:
    """Trains a run to its end, or goes on with the one that is in its folder. Returns the exit status.

    Raises:
        InputError: the config, the data or the folder cannot be used.
        CheckpointError: the folder's checkpoint cannot be read.
    """
    folder, before = open_folder(run)
    data = read_together(run, load_tokenizer(folder / TOKENIZER) if before else None)
    run = data.config
    if before and (changed := differences(before, run)):
        raise InputError(f"{folder} holds a run with another config: {'; '.join(changed)}. {ELSEWHERE}")
    with Checkpoints(folder / CHECKPOINTS, run.checkpoint.keep) as checkpoints:
        trainer = Trainer(run, data, folder, terminal, checkpoints)
        if (checkpoints.latest or 0) >= run.steps:
            terminal.say(f"{folder}: finished already, {checkpoints.latest} of {run.steps} steps. Nothing to do.")
            return DONE
        trainer.check_facts()
        state = trainer.partitioner.abstract(functools.partial(first_state, run), jax.random.key(run.seed))
        check_memory(run, trainer.partitioner, state)
        if job.is_first():
            (folder / TOKENIZER).write_text(data.tokenizer.to_json(), "utf-8")
            (folder / CONFIG).write_text(to_json(run), "utf-8")
        job.wait("config written")
        if not (folder / CONFIG).exists():
            raise InputError(
                f"--workdir {folder}: process {job.number()} does not see what process 0 wrote there; all "
                "processes need one shared folder."
            )
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        terminal.introduce(run, folder, count, data.report, describe_decay(state.params, run.optimizer))
        stop = StopSignal(run.stop_seconds)
        try:
            with job.together(lambda: checkpoints.latest):
                return _steps(trainer, trainer.start(), stop)
        finally:
            stop.restore()


def read_together(run: RunConfig, tokenizer: Tokenizer | None) -> Data:
    """The run's data. Of several processes the first makes the tokenizer, and all must read the same."""
    if job.count() == 1:
        return load_data(run, tokenizer)
    data = load_data(run, tokenizer) if job.is_first() else None
    text = job.shared(data.tokenizer.to_json() if data else None)
    data = data or load_data(run, tokenizer or tokenizer_of(text))
    job.check_same("The data", data.fingerprint)
    return data


def _steps(trainer: Trainer, state: TrainState, stop: StopSignal) -> int:
    run, terminal, start = trainer.config, trainer.terminal, int(state.step)
    end = min(run.steps, run.stop_at or run.steps)
    step_fn = trainer.partitioner.step(step_of(run), state)
    writer = MetricsWriter(trainer.folder if job.is_first() else None, start)
    # a few steps in flight keep the device busy; more would only hold memory, and simulated devices can lock up
    pending, in_flight = deque(), 1 if trainer.partitioner.mesh else 2
    clock, stopping = Clock(), False
    if start:
        writer.write({"event": "resume", "step": start})
        terminal.say(f"Resumed at step {start}.")

    def settle(most: int) -> None:
        """Writes what is known of the oldest steps until at most so many are in flight."""
        nonlocal stopping
        while len(pending) > most:
            step, metrics, drawn, vote = pending.popleft()
            jax.block_until_ready(metrics)
            stopping = stopping or bool(vote)
            clock.count(drawn)
            if step % run.log_every == 0 or step == end:
                numbers = {name: float(value) for name, value in metrics.items()}
                numbers["learning_rate"] = float(np.asarray(trainer.schedule(step - 1)))
                numbers |= {"tokens_per_second": clock.rate, "compiles": step_fn.compiles}
                record = {"step": step, "split": "train"} | numbers | {"batch_sha": drawn.sha}
                writer.write(record)
                terminal.train(record, run.steps)

    step, saved = start, start
    try:
        for step, drawn in enumerate(ahead(trainer.data.batches(trainer.mine), start, end), start + 1):
            state, metrics = step_fn(state, trainer.partitioner.put(drawn.batch, run.batch_size))
            pending.append((step, metrics, drawn, job.vote(bool(stop))))
            settle(in_flight)
            last = step == run.steps
            if step % run.eval_every == 0 or last:
                settle(0)
                scores = trainer.evaluate(step, state, last)
                writer.write(scores)
                terminal.validation(scores, run.steps)
                if job.is_first():
                    draw_loss(trainer.folder)
                clock.restart()
            if step % run.checkpoint.every == 0 or last:
                trainer.save(step, state)
                saved = step
            if stopping or (stop and job.count() == 1):
                break
        settle(0)
        if saved != step:
            trainer.save(step, state)
        trainer.checkpoints.wait()
        if step == run.steps:
            writer.write({"event": "end", "step": step, "param_digest": digest_of((state.params, state.opt_state))})
            _finish(trainer, state)
            return DONE
        reason = stop.reason or ("another process" if stopping else "")
        writer.write({"event": "preempted", "step": step, "reason": reason or "stop_at"})
        if job.is_first():
            draw_loss(trainer.folder)
        terminal.say(
            f"Stopped at step {step} by {reason or '--stop-at'}, all saved; the same command goes on from here."
        )
        return STOPPED if reason else DONE
    finally:
        writer.close()
        terminal.close()


def _finish(trainer: Trainer, state: TrainState) -> None:
    run, terminal, held_out = trainer.config, trainer.terminal, trainer.data.held_out
    rule = BASELINES.get(run.data.embedded) if not run.data.train else None
    if rule is not None and isinstance(held_out, Pairs):
        score = exact_match([rule(source) for source in held_out.sources], held_out.targets)
        terminal.say(
            f"For comparison, a rule of five lines: exact match {score:.1%} on all {len(held_out):,} unseen examples."
        )
    terminal.say(f"Done. Everything is in {trainer.folder}: loss.png, samples.txt, metrics.jsonl, checkpoints.")
