"""The training loop: batches in, metrics, samples and checkpoints out. It knows nothing of the architecture."""

import errno
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer_jax import job
from transformer_jax.checkpoint import Checkpoints, is_full, restore
from transformer_jax.config import RunConfig
from transformer_jax.data.batches import Drawn
from transformer_jax.data.corpora import Pairs
from transformer_jax.data.sources import BASELINES
from transformer_jax.diagnose import count_nonfinite
from transformer_jax.errors import CheckpointError, StorageError
from transformer_jax.initial import check_model
from transformer_jax.metrics import MetricsWriter, draw_loss, read_records
from transformer_jax.model.attention import describe_attention
from transformer_jax.optimizer import describe_decay
from transformer_jax.pace import Clock, Stopped, StopSignal, ahead
from transformer_jax.resume import Found, find_run, write_papers
from transformer_jax.run import CHECKPOINTS, step_of
from transformer_jax.step import SPIKE, Metrics, TrainState
from transformer_jax.surroundings import surroundings
from transformer_jax.terminal import Terminal
from transformer_jax.trainer import Trainer, digest_of
from transformer_jax.translation.scores import exact_match
from transformer_jax.watchdog import Watchdog
from transformer_jax.workdir import opened
from transformer_jax.writers import check_writers, open_writers

DONE, STOPPED = 0, 75


def train(run: RunConfig, terminal: Terminal) -> int:
    """Trains a run to its end, or goes on with the one that is in its folder. Returns the exit status.

    Raises:
        InputError: the config, the data or the folder cannot be used.
        CheckpointError: no checkpoint of the folder can be used, or the numbers diverged.
        BusyError: another process is training in the folder.
        StorageError: the disk is full, or refuses what has to be written.
    """
    check_writers(run.writers)
    folder = Path(run.workdir)
    try:
        with (
            StopSignal(run.seconds("stop_after")) as stop,
            opened(folder),
            Checkpoints(folder / CHECKPOINTS, run.checkpoint) as checkpoints,
        ):
            found = find_run(run, folder, checkpoints)
            trainer = Trainer(found.data.config, found.data, folder)
            if _is_finished(trainer, found.step):
                terminal.say(f"{folder}: finished already, {found.step} of {run.steps} steps. Nothing to do.")
                return DONE
            return _train(trainer, found, checkpoints, terminal, stop)
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # not of a file: a library that cannot be loaded, a reader that has gone
            raise
        raise StorageError(_cannot_write(folder, error)) from error


def _cannot_write(folder: Path, error: BaseException) -> str:
    what = "the disk is full" if is_full(error) else "it cannot be written"
    return (
        f"{folder}: {what}: {' '.join(str(error).split())[:300]}. The same command goes on from the newest checkpoint."
    )


def _is_finished(trainer: Trainer, step: int | None) -> bool:
    ended = any(record.get("event") == "end" for record in read_records(trainer.folder / "metrics.jsonl")[-1:])
    return ended and step is not None and step >= trainer.config.steps


def _train(trainer: Trainer, found: Found, checkpoints: Checkpoints, terminal: Terminal, stop: StopSignal) -> int:
    run, folder = trainer.config, trainer.folder
    if run.init_from and found.step is None:
        check_model(run)
    abstract = trainer.abstract_state()
    write_papers(folder, trainer.papers)
    moving, staying = (sum(leaf.size for leaf in jax.tree.leaves(each)) for each in (abstract.params, abstract.frozen))
    rows = run.batch_size // (run.optimizer.accumulate * trainer.partitioner.batch_parts)
    attention = describe_attention(run.model, rows, run.data.target_length or run.model.max_length)
    report = [*found.data.report, attention, describe_decay(abstract.params, run.optimizer)]
    if run.model.linear_dtype == "float8" and jax.default_backend() == "cpu":
        report.append("linear layers in float8: a CPU only plays it, and is slower for it")
    if staying:
        report.append(f"tuning: {moving:,} parameters move, {staying:,} stay")
    terminal.introduce(run, folder, moving + staying, report)
    watchdog = Watchdog(folder, run.seconds("stall_after"))
    with watchdog.watching(), job.together(lambda: checkpoints.latest):
        state = trainer.first_state() if found.step is None else restore(checkpoints.unit(found.step), abstract)
        first, start = job.is_first(), found.step or 0
        writers = open_writers(run, folder, start, terminal.say) if first else []
        writer = MetricsWriter(folder if first else None, start, writers)
        try:
            loop = Loop(trainer, state, start, checkpoints, writer, terminal, stop, watchdog)
            loop.tell_start(found, {"parameters": moving + staying, "report": report})
            stop.patient = True
            return loop.run()
        finally:
            writer.close()
            terminal.close()


class Pending(NamedTuple):
    """A step that the devices are at."""

    step: int
    metrics: Metrics
    drawn: Drawn
    vote: Any


class Loop:
    """One run from where it begins to its end, or to where it is asked to stop."""

    def __init__(
        self,
        trainer: Trainer,
        state: TrainState,
        start: int,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        terminal: Terminal,
        stop: StopSignal,
        watchdog: Watchdog,
    ) -> None:
        run = trainer.config
        self.trainer, self.state, self.step, self.saved = trainer, state, start, start
        self.checkpoints, self.writer, self.terminal = checkpoints, writer, terminal
        self.stop, self.watchdog, self.stopping = stop, watchdog, False
        self.end = min(run.steps, run.stop_at or run.steps)
        self.program, self.nonfinite = trainer.partitioner.step(step_of(run), state), jax.jit(count_nonfinite)
        self.clock = Clock()
        # a few steps in flight keep the device busy; more would only hold memory, and simulated devices can lock up
        self.pending: deque[Pending] = deque()
        self.in_flight = 1 if trainer.partitioner.mesh else 2
        self.skipped, self.in_a_row = int(state.skipped), 0

    def tell_start(self, found: Found, facts: dict[str, Any]) -> None:
        """What was found in the folder, and where it is trained, for those who read its metrics or watch."""
        for each in found.rejected:
            self.writer.write({"event": "checkpoint_rejected", "step": each.step, "reason": each.reason})
            self.terminal.say(f"Checkpoint {each.step} is damaged: {each.reason}. It was set aside, not deleted.")
        for change in found.changes:
            self.terminal.say(f"Accepted: {change}")
        if found.step is not None:
            changes = {"changes": found.changes} if found.changes else {}
            self.writer.write({"event": "resume", "step": found.step} | changes)
            self.terminal.say(f"Resumed at step {found.step}.")
        self.writer.write({"event": "start", "step": self.step} | facts | surroundings() | {"processes": job.count()})

    def run(self) -> int:
        """All steps, and what is due after some of them. Returns the exit status."""
        run, trainer, scores = self.trainer.config, self.trainer, {}
        if self.step and self._is_due(run.eval_every) and not job.vote(self._was_evaluated()):
            scores = self._evaluate()
        for drawn in ahead(trainer.draw, self.step, self.end, self.clock.waited, run.data.workers):
            if self.stopping:
                break
            self.watchdog.beat(self.step, "trains")
            self.state, metrics = self.program(self.state, trainer.partitioner.put(drawn.batch, run.batch_size))
            self.step, scores = self.step + 1, {}
            self.pending.append(Pending(self.step, metrics, drawn, job.vote(bool(self.stop))))
            self._settle(self.in_flight)
            if self._is_due(run.eval_every) and not self.stopping:
                scores = self._evaluate()
            if self._is_due(run.checkpoint.every) or self.checkpoints.is_best(scores):
                self._settle(0)
                if not self.in_a_row:  # the checkpoints before steps that go wrong are not pushed out by those of them
                    self._save(scores)
        return self._finish(scores)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.trainer.config.steps

    def _was_evaluated(self) -> bool:
        return any(r["step"] == self.step and r.get("split") == "validation" for r in self.writer.records)

    def _settle(self, most: int) -> None:
        """Writes what is known of the oldest steps until at most so many are in flight."""
        run = self.trainer.config
        while len(self.pending) > most:
            done = self.pending.popleft()
            jax.block_until_ready(done.metrics)
            self.stopping = self.stopping or bool(done.vote)
            self.clock.count(done.drawn)
            numbers = {name: float(value) for name, value in done.metrics.items()}
            left_out = numbers.pop("skipped")
            if done.step % run.log_every == 0 or done.step == self.end:
                numbers["learning_rate"] = float(np.asarray(self.trainer.schedule(done.step - 1 - self.skipped)))
                numbers |= {"tokens_per_second": self.clock.rate, "data_wait": self.clock.data_wait}
                numbers |= {"compiles": self.program.compiles, "seconds": self.clock.seconds}
                record = {"step": done.step, "split": "train"} | numbers | {"batch_sha": done.drawn.sha}
                self.writer.write(record)
                self.terminal.train(record, run.steps)
            self.skipped, self.in_a_row = self.skipped + bool(left_out), self.in_a_row + 1 if left_out else 0
            if left_out:
                self._tell_skipped(done, numbers, left_out == SPIKE)
        if job.count() == 1:
            self.stopping = self.stopping or bool(self.stop)
        self._tell_failures()

    def _tell_skipped(self, done: Pending, numbers: dict[str, float], spike: bool) -> None:
        wrong = [name for name in ("loss", "grad_norm") if not np.isfinite(numbers[name])]
        reason = f"grad_norm {numbers['grad_norm']:.4g} is a spike" if spike else f"{' and '.join(wrong)} not finite"
        self.writer.write({"event": "skipped_step", "step": done.step, "reason": reason})
        self.terminal.say(f"Step {done.step} was left out: {reason}.")
        if self.in_a_row < self.trainer.config.max_skipped:
            return
        self.watchdog.beat(self.step, "looks for what went wrong")
        where = "" if spike else self.trainer.divergence(self.state, done.drawn, done.step)
        first = f" The first values that are not finite are those of {where}." if where else ""
        newest = self.checkpoints.latest
        kept = "Nothing was saved yet" if newest is None else f"The checkpoint of step {newest} stands"
        raise CheckpointError(
            f"{self.trainer.folder}: {self.in_a_row} steps in a row were left out, the last of them step {done.step}: "
            f"{reason}.{first} {kept}. A lower --optimizer.learning-rate or --optimizer.clip-norm may help."
        )

    def _evaluate(self) -> dict[str, Any]:
        """Scores, written down; nothing where an end is asked for meanwhile: then a resume begins with it."""
        self._settle(0)
        began = self.clock.seconds
        try:
            found, samples = self.trainer.evaluate(self.step, self.state, self._pause)
        except Stopped:
            return {}
        found[-1] |= {"seconds": self.clock.seconds - began}
        if samples:
            self.writer.samples(self.step, samples)
        for each in found:
            self.writer.write(each)
            self.terminal.validation(each, self.trainer.config.steps)
        if job.is_first():
            draw_loss(self.trainer.folder)
        self.clock.restart()
        return found[-1]

    def _pause(self) -> None:
        self.watchdog.beat(self.step, "evaluates")
        if job.vote(bool(self.stop)):
            self.stopping = True
            raise Stopped

    def _save(self, scores: dict[str, Any]) -> None:
        """Starts a checkpoint, which is written while training goes on; what it is of is on record before."""
        self._settle(0)
        self.writer.settle()
        self.watchdog.beat(self.step, "saves")
        if self.nonfinite(self.state.params):  # an update that overflowed, which the next step's loss will tell
            self.checkpoints.refuse(self.step, "its parameters are not finite")
        else:
            self.checkpoints.save(self.step, self.state, self.trainer.papers, self.trainer.facts(self.step, scores))
        self.saved = self.step

    def _tell_failures(self) -> bool:
        """Whether the checkpoint of this very step has failed; tells of all that have."""
        failed = False
        for step, error in self.checkpoints.failures():
            reason = ("the disk is full: " if is_full(error) else "") + " ".join(str(error).split())[:160]
            self.writer.write({"event": "checkpoint_failed", "step": step, "reason": reason})
            self.terminal.say(f"The checkpoint of step {step} could not be saved: {reason}. The next one is tried.")
            failed = failed or step == self.step
        return failed

    def _finish(self, scores: dict[str, Any]) -> int:
        run, folder = self.trainer.config, self.trainer.folder
        self._settle(0)
        if self.saved != self.step:
            self._save(scores)
        self.watchdog.beat(self.step, "saves")
        self.checkpoints.wait()
        if job.vote(self._tell_failures()):
            newest = self.checkpoints.latest
            raise StorageError(
                f"{folder}: step {self.step} could not be saved, as said above; the newest checkpoint is "
                f"{'none' if newest is None else f'step {newest}'}. The same command goes on from there."
            )
        if self.step == run.steps and not self.stopping:
            digest = digest_of((self.state.params, self.state.opt_state))
            self.writer.write({"event": "end", "step": self.step, "param_digest": digest})
            self._say_done()
            return DONE
        reason = self.stop.reason or ("another process" if self.stopping else "")
        self.writer.write({"event": "preempted", "step": self.step, "reason": reason or "stop_at"})
        if job.is_first():
            draw_loss(folder)
        self.terminal.say(
            f"Stopped at step {self.step} by {reason or '--stop-at'}, all saved; the same command goes on from here."
        )
        return STOPPED if reason else DONE

    def _say_done(self) -> None:
        run, held_out = self.trainer.config, self.trainer.data.held_out
        rule = BASELINES.get(run.data.embedded) if not run.data.train else None
        if rule is not None and isinstance(held_out, Pairs):
            score = exact_match([rule(source) for source in held_out.sources], held_out.targets)
            self.terminal.say(
                f"For comparison, a rule of five lines: exact match {score:.1%} on all {len(held_out):,} unseen "
                "examples."
            )
        folder = self.trainer.folder
        samples = "samples.txt, " if (folder / "samples.txt").exists() else ""
        self.terminal.say(f"Done. Everything is in {folder}: loss.png, {samples}metrics.jsonl, checkpoints.")
