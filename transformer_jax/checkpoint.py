"""Checkpoints: the state and all that it belongs to, one unit, written in the background and known by its hashes.

    checkpoints/500/                  a checkpoint: it gets this name when all of it is on the disk
        facts.json                    step, seed, place in the data, what identifies the data, scores, versions
        config.json, tokenizer.json   the run's
        state/                        parameters, optimizer state, moving average, as Orbax writes them
        MANIFEST.sha256               the hash of every file above, written last
    checkpoints/1000.tmp/             one that is being written
    checkpoints/250.old/              one that is being deleted
    checkpoints/750.damaged/          one that was found damaged and set aside; nobody deletes it

Orbax moves arrays between devices and files; all that the project asks of it is in this file. It finds no flipped bit,
counts any folder with a number for a name, and tells of a failed save at the next one, so the rest is ours.
"""

import contextlib
import errno
import functools
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from transformer_jax import job
from transformer_jax.axes import path_names
from transformer_jax.config import CheckpointConfig
from transformer_jax.errors import CheckpointError, InputError
from transformer_jax.folders import sync, write_synced
from transformer_jax.manifest import damage, seal
from transformer_jax.step import TrainState

for name in ("absl", "asyncio"):  # Orbax and what it waits with log a failed save with tracebacks; we say it in a line
    logging.getLogger(name).setLevel(logging.CRITICAL)

log = logging.getLogger(__name__)

FACTS = "facts.json"
STATE = "state"
STEP = re.compile("0|[1-9][0-9]*")
UNFINISHED, OLD, DAMAGED = ".tmp", ".old", ".damaged"
SAVE_SECONDS = 3600
# validation metric that "best" can go by: whether more of it is better
METRICS = {"loss": False, "accuracy": True, "exact_match": True}


class Rejected(NamedTuple):
    """A checkpoint that cannot be used, and why."""

    step: int
    reason: str


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room to write."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or any(words in str(error) for words in ("No space left", "Disk quota exceeded", "File too large"))


def steps_in(folder: Path) -> list[int]:
    """The steps whose names are in a folder of checkpoints, ascending: digits and nothing else."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if STEP.fullmatch(name))


def find(folder: Path, hashed: Callable[[str], bool] = lambda _: True) -> tuple[int | None, list[Rejected]]:
    """The newest step whose checkpoint is sound, None where there is none, and what was rejected on the way to it.

    Of its files those are hashed whose names `hashed` picks.
    """
    rejected: list[Rejected] = []
    for step in reversed(steps_in(folder)):
        reason = _flaw(folder, step, hashed)
        if not reason:
            return step, rejected
        if (folder / str(step)).exists():  # else a run that goes on has just deleted it
            rejected.append(Rejected(step, reason))
    return None, rejected


def _is_paper(name: str) -> bool:
    return not name.startswith(f"{STATE}/")


def _is_array(name: str) -> bool:
    return not _is_paper(name)


def _flaw(folder: Path, step: int, hashed: Callable[[str], bool] = lambda _: True) -> str:
    unit = folder / str(step)
    if reason := damage(unit, hashed):
        return reason
    found = facts_of(unit).get("step")
    return "" if found == step else f"it is the checkpoint of step {found} under another name"


def facts_of(unit: Path) -> dict[str, Any]:
    """What a sound checkpoint says about itself."""
    return json.loads((unit / FACTS).read_text("utf-8"))


def score_of(unit: Path, metric: str) -> float | None:
    """How good a checkpoint is by a validation metric, more is better; None where it was not evaluated."""
    try:
        return _worth(facts_of(unit).get("scores") or {}, metric)
    except (OSError, ValueError):
        return None


def _worth(scores: Mapping[str, Any], metric: str) -> float | None:
    """One of the scores so that more is better; None where there is none, or it is no number that compares."""
    value = scores.get(metric)
    return None if value is None or not math.isfinite(value) else value if METRICS[metric] else -value


def best_step(folder: Path, metric: str) -> int | None:
    """The step whose checkpoint is best by a metric, the earlier of equals; None where none was evaluated."""
    scores = {step: score for step in steps_in(folder) if (score := score_of(folder / str(step), metric)) is not None}
    return max(scores, key=lambda step: (scores[step], -step), default=None)


def sound_unit(folder: Path, which: str, metric: str) -> Path:
    """The checkpoint to read: the `newest` sound one, the `best` by a metric, or that of a step.

    Raises:
        InputError: there is none of that name.
        CheckpointError: it is damaged, or none is sound.
    """
    if which == "newest":
        step, rejected = find(folder)
        if step is None:
            raise nothing_left(folder, rejected)
        for each in rejected:
            log.warning("%s is damaged (%s); the run is read at step %d instead.", each.step, each.reason, step)
        return folder / str(step)
    step = str(best_step(folder, metric)) if which == "best" and metric in METRICS else which
    if step not in map(str, steps_in(folder)):
        known = ", ".join(map(str, steps_in(folder))) or "none"
        raise InputError(f"{folder}: there is no checkpoint {which!r}; there are {known}, newest and best.")
    if reason := _flaw(folder, int(step)):
        raise CheckpointError(f"{folder / step}: the checkpoint is damaged: {reason}.")
    return folder / step


def nothing_left(folder: Path, rejected: list[Rejected]) -> CheckpointError:
    """The error for a folder of checkpoints none of which is sound."""
    aside = sorted(path.name for path in folder.glob(f"*{DAMAGED}*"))
    told = [f"{step}: {reason}" for step, reason in rejected] + [f"{name}: set aside" for name in aside]
    if not told:
        return CheckpointError(f"{folder}: there is no checkpoint in it.")
    return CheckpointError(
        f"{folder}: no checkpoint can be used ({'; '.join(told)}). Put a sound copy in its place, or remove "
        f"{folder.parent} to start over."
    )


def restore_tree(unit: Path, **templates: Any) -> dict[str, Any]:
    """Parts of the state in a sound checkpoint, in the shapes and places of their templates.

    Raises:
        CheckpointError: they are of another model or optimizer.
    """
    saved, wanted = facts_of(unit).get("arrays", {}), _layout(templates)
    other = [
        f"{name} is {saved.get(name, 'not there')}, not {wanted.get(name, 'there')}"
        for name in sorted({name for name in saved if name.partition("/")[0] in templates} | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if other:
        raise CheckpointError(f"{unit}: the checkpoint is of another model or optimizer: {'; '.join(other[:3])}.")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    items = {name: ocp.args.StandardRestore(jax.tree.map(place, tree)) for name, tree in templates.items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return dict(reader.restore((unit / STATE).absolute(), args=ocp.args.Composite(**items)))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{unit}: the checkpoint cannot be restored: {reason}") from error


def restore(unit: Path, state: TrainState) -> TrainState:
    """The state in a sound checkpoint, in the shapes and places of `state`, which may be abstract.

    Raises:
        CheckpointError: it is of another model or optimizer.
    """
    restored = restore_tree(unit, **_items(state))
    apart = {name: restored.get(name) for name in ("ema", "frozen")}
    return state.replace(params=restored["params"], **apart, **restored["training"])


def restore_params(unit: Path, template: Any, frozen: Any = None) -> tuple[Any, Any]:
    """The parameters alone, the moving average where the run keeps one; and those that no step changes, or None."""
    name = "ema" if (unit / STATE / "ema").exists() else "params"
    found = restore_tree(unit, **{name: template}, **({} if frozen is None else {"frozen": frozen}))
    return found[name], found.get("frozen")


def _items(state: TrainState) -> dict[str, Any]:
    """The state in parts that can be read one without the other, as plain dicts."""
    rest = {"step": state.step, "opt_state": state.opt_state, "seed": state.seed, "skipped": state.skipped}
    if state.norms is not None:
        rest["norms"] = state.norms
    apart = {name: getattr(state, name) for name in ("ema", "frozen") if getattr(state, name) is not None}
    return {"params": state.params, "training": rest} | apart


def _layout(items: Mapping[str, Any]) -> dict[str, str]:
    """`{"params/output/w_DV": "float32[128, 221]", ...}`."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    return {"/".join(path_names(path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _without_late_arrays(hook: Callable[[Any], Any], unraisable: Any) -> None:
    """TensorStore shows this error for every array that it was at when a save had failed, which we told of."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


class Checkpoints:
    """The checkpoints of a run that this process may write. Use it in a `with`, which waits for the save in flight.

    Of several processes the first decides and renames; all of them write their parts.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self._config = folder, config
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=SAVE_SECONDS)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._failures: list[tuple[int, BaseException]] = []
        self._best: float | None = None
        self._arrays_may_be_late = False

    def __enter__(self) -> "Checkpoints":
        self._hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(_without_late_arrays, self._hook)
        return self

    def __exit__(self, *_: Any) -> None:
        """Waits for the save in flight, whatever ends the run."""
        self.wait()
        self._thread.shutdown()
        self._writer.close()
        if not self._arrays_may_be_late:  # else for the rest of the process: it may end first, and nothing tells
            sys.unraisablehook = self._hook

    @property
    def latest(self) -> int | None:
        """The newest step on disk by its name, None where there is none."""
        return max(steps_in(self.folder), default=None)

    def unit(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    def open(self, read: Callable[[int | None], Any] = lambda step: step) -> tuple[Any, list[Rejected]]:
        """What `read` makes of the newest sound step, None at the very start, and what was set aside as damaged.

        Large files are hashed while it reads; it is called again with an older step where they turn out damaged. The
        run's papers are known to be sound before. What was left half written or half deleted is removed.

        Raises:
            CheckpointError: there are checkpoints and none is sound.
        """
        rejected: list[Rejected] = []
        if job.is_first():
            self._clean()
        while True:
            step, more, self._best, error = self._shared(lambda: self._newest(rejected))
            rejected.extend(Rejected(*each) for each in more)
            if error:
                raise CheckpointError(error)
            if step is None:
                return read(None), rejected
            hashing = self._thread.submit(damage, self.unit(step), _is_array) if job.is_first() else Future[str]()
            found = read(step)
            reason = self._shared(hashing.result)
            if not reason:
                return found, rejected
            rejected.append(Rejected(step, reason))
            if job.is_first():
                self._set_aside(step)

    @staticmethod
    def _shared(find: Callable[[], Any]) -> Any:
        """What the first of several processes finds."""
        return json.loads(job.shared(json.dumps(find()) if job.is_first() else None))

    def _clean(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if STEP.fullmatch(path.stem) and path.suffix in (UNFINISHED, OLD):
                shutil.rmtree(path)

    def _newest(self, before: list[Rejected]) -> tuple[int | None, list[Rejected], float | None, str]:
        """The newest step whose papers are sound, what was set aside, the best score; or why there is none."""
        step, rejected = find(self.folder, _is_paper)
        for each in rejected:
            self._set_aside(each.step)
        if step is None and any(self.folder.glob(f"*{DAMAGED}*")):
            return None, [], None, str(nothing_left(self.folder, before + rejected))
        best = best_step(self.folder, self._config.best) if self._config.best in METRICS else None
        return step, rejected, None if best is None else score_of(self.unit(best), self._config.best), ""

    def _set_aside(self, step: int) -> None:
        names = [f"{step}{DAMAGED}", *(f"{step}{DAMAGED}-{number}" for number in range(2, 1000))]
        name = next(name for name in names if not (self.folder / name).exists())
        self.unit(step).rename(self.folder / name)

    def is_best(self, scores: Mapping[str, Any]) -> bool:
        """Whether validation scores are better than those of all that was saved."""
        score = _worth(scores, self._config.best)
        return score is not None and (self._best is None or score > self._best)

    def save(self, step: int, state: TrainState, papers: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Starts to save the state after `step` updates with the run's papers, texts by file name, and facts.

        Waits for the save before. What goes wrong, now or later, `failures` tells.
        """
        self.wait()
        if self.unit(step).exists():
            return
        work, failure = self.folder / f"{step}{UNFINISHED}", None
        try:
            if job.is_first():
                facts = {"step": step, **facts, "arrays": _layout(_items(state))}
                self._prepare(work, state, {**papers, FACTS: json.dumps(facts, indent=2) + "\n"})
        except OSError as error:
            failure = error
        if job.vote(failure is not None):
            self._failures.append((step, failure or OSError("process 0 could not begin it")))
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        try:
            self._writer.save((work / STATE).absolute(), args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds; training goes on without this checkpoint
            self._arrays_may_be_late = True
            self._failures.append((step, error))
            return
        if self.is_best(scores := facts.get("scores") or {}):
            self._best = _worth(scores, self._config.best)
        self._saving = step, self._thread.submit(self._commit, work, self.unit(step))

    def refuse(self, step: int, reason: str) -> None:
        """Counts the save of a step as one that failed."""
        self._failures.append((step, ValueError(reason)))

    def _prepare(self, work: Path, state: TrainState, papers: Mapping[str, str]) -> None:
        need = int(1.05 * sum(map(_bytes, _items(state).values()))) + sum(map(len, papers.values())) + 2**18
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(errno.ENOSPC, f"a checkpoint takes {need / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free")
        work.mkdir()
        for name, text in papers.items():
            write_synced(work / name, text)

    def _commit(self, work: Path, unit: Path) -> None:
        """In a thread of its own: all of it on the disk, then its name, then those deleted that nobody needs."""
        try:
            self._writer.wait_until_finished()
            if not job.is_first():
                return
            seal(work)
            work.rename(unit)
            sync(self.folder)
        except BaseException:
            if job.is_first():
                shutil.rmtree(work, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):  # what is not deleted now is deleted after the next save
            self._delete_others()

    def _delete_others(self) -> None:
        steps = steps_in(self.folder)
        stay: set[int | None] = set(steps[-self._config.keep :])
        if self._config.keep_every:
            stay |= {step for step in steps if step % self._config.keep_every == 0}
        if self._config.best in METRICS:
            stay.add(best_step(self.folder, self._config.best))
        for step in steps:
            if step not in stay:
                old = self.folder / f"{step}{OLD}"
                self.unit(step).rename(old)
                shutil.rmtree(old)

    def wait(self) -> None:
        """Until no save is in flight."""
        if self._saving is not None:
            step, future = self._saving
            if failure := future.exception():
                self._arrays_may_be_late = True
                self._failures.append((step, failure))
            self._saving = None

    def failures(self) -> list[tuple[int, BaseException]]:
        """(step, why) of the saves that failed since this was last asked. It does not wait."""
        if self._saving is not None and self._saving[1].done():
            self.wait()
        failures, self._failures = self._failures, []
        return failures
