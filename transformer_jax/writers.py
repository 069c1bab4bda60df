"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Aim, behind one interface.

Numbers come in by (step, split), texts by (step, name). A resumed run says again what came after its checkpoint; each
service then has it once, as far as it allows. Nothing here computes anything that
training reads, and nothing is sent over a network unless the service's own variable names a place.
"""

import importlib.util
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformer_jax.config import RunConfig
from transformer_jax.config_file import flat
from transformer_jax.errors import InputError
from transformer_jax.folders import write_whole

KEPT = "writers.json"  # what each service calls the run
PROJECT = "transformer_jax"
LAST_SECONDS = 60.0  # that a service has at the end, to take what it has not taken yet
MLFLOW_PARAMS, MLFLOW_LETTERS = 100, 6000  # in one call, and in a value


class Writer(Protocol):
    """What a service can be told. It is made of (run, folder, step): what comes is of later steps than that one."""

    def __init__(self, run: RunConfig, folder: Path, step: int) -> None: ...

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        """Finite numbers by name."""

    def text(self, step: int, name: str, text: str) -> None:
        """Lines of plain text."""

    def close(self) -> None:
        """The last call."""


_keeping = threading.Lock()


def _name_of(folder: Path, service: str, make: Callable[[], str]) -> tuple[str, bool]:
    """What a service calls the run, and whether it did so before; `make` names a new one there."""
    path = folder / KEPT
    with _keeping:
        try:
            names = dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            names = {}
        known = service in names
        if not known:
            names[service] = make()
            write_whole(path, json.dumps(names, indent=1) + "\n")
        return str(names[service]), known


def _event(**fields: Any) -> Any:
    """One event of TensorBoard's."""
    from tensorboardX.proto import event_pb2

    return vars(event_pb2)["Event"](wall_time=time.time(), **fields)


class TensorBoard:
    """Files of events in the run's folder. A full disk is an OSError."""

    def __init__(self, run: RunConfig, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        (folder / "tensorboard").mkdir(exist_ok=True)
        # written here rather than in SummaryWriter's thread, where a full disk would go unnoticed
        self._board = EventsWriter(str(folder / "tensorboard" / "events"))
        # from here on: what earlier files say of later steps does not count
        self._board.write_event(_event(step=step + 1 if step else 0, session_log={"status": "START"}))
        if not step:
            self.text(0, "config", json.dumps(flat(run), indent=1))

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            summary = {"value": [{"tag": f"{split}/{name}", "simple_value": value}]}
            self._board.write_event(_event(step=step, summary=summary))
        self._board.flush()

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboardX.summary import text as summary_of

        indented = "".join(f"    {line}\n" for line in text.splitlines())  # which Markdown leaves as it is
        self._board.write_event(_event(step=step, summary=summary_of(name, indented)))
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """Weights & Biases: kept in the run's folder for `wandb sync`, or sent at once with WANDB_MODE=online.

    It takes steps in rising order only, so those that it has do not come again.
    """

    def __init__(self, run: RunConfig, folder: Path, step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._html: Any = wandb.Html
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            mode=os.environ.get("WANDB_MODE", "offline"),  # pyright: ignore[reportArgumentType]
            id=_name_of(folder, "wandb", lambda: uuid.uuid4().hex)[0],
            resume="allow",
            name=folder.name,
            dir=str(folder),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self._run.config.update(flat(run), allow_val_change=True)

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        self._run.log({f"{split}/{name}": value for name, value in numbers.items()}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        from html import escape

        self._run.log({name: self._html(f"<pre>{escape(text)}</pre>", inject=False)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _plain(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. /`, with nothing that a path would leave out."""
    parts = (re.sub(r"[^\w. -]", "_", part).strip(".") for part in name.split("/"))
    return "/".join(part for part in parts if part)


class MLflow:
    """MLflow: a database in the run's folder, or what MLFLOW_TRACKING_URI names. What it has is not given again."""

    def __init__(self, run: RunConfig, folder: Path, step: int) -> None:
        import logging

        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._metric, self._last = Metric, {}
        place = folder.resolve()
        own = f"sqlite:///{place / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or own)
        local = {} if "MLFLOW_TRACKING_URI" in os.environ else {"artifact_location": (place / "mlflow").as_uri()}

        def create() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name, **local)
            return self._client.create_run(experiment, run_name=folder.name).info.run_id

        self._id, known = _name_of(folder, "mlflow", create)
        if known:
            self._client.update_run(self._id, status="RUNNING")
            return
        params = [Param(name, str(value)[:MLFLOW_LETTERS]) for name, value in flat(run).items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_PARAMS])

    def _is_new(self, step: int, split: str, name: str) -> bool:
        """Whether a step comes after all that it has of a split, which it is asked for once."""
        if split not in self._last:
            history = self._client.get_metric_history(self._id, name)
            self._last[split] = max((each.step for each in history), default=-1)
        return step > self._last[split]

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        named = {_plain(f"{split}/{name}"): value for name, value in numbers.items()}
        if not named or not self._is_new(step, split, min(named)):
            return
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in named.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{_plain(name)}/{step}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Aim:
    """Aim: a repository in the run's folder, which `aim up --repo FOLDER` shows. A step that comes again replaces the
    one that was there."""

    def __init__(self, run: RunConfig, folder: Path, step: int) -> None:
        import aim  # pyright: ignore[reportMissingImports]

        options = dict(log_system_params=False, capture_terminal_logs=False, system_tracking_interval=None)
        opened: list[Any] = []

        def create() -> str:
            opened.append(aim.Run(repo=str(folder), experiment=PROJECT, **options))  # pyright: ignore[reportArgumentType]
            return opened[0].hash

        name, known = _name_of(folder, "aim", create)
        self._text: Any = aim.Text
        self._run: Any = aim.Run(name, repo=str(folder), **options) if known else opened[0]  # pyright: ignore
        self._run.name = folder.name
        self._run["config"] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in flat(run).items()
        }

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._run.track(value, name=name, step=step, context={"subset": split})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.track(self._text(text), name=name, step=step)

    def close(self) -> None:
        self._run.close()


class Apart:
    """A service in a thread of its own: what it waits for or fails at leaves training as it is. A failure is told in a
    line, and the service is told nothing more."""

    def __init__(self, name: str, make: Callable[[], Writer], say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._calls: queue.SimpleQueue[Callable[[Writer], None] | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[], Writer]) -> None:
        try:
            writer = make()
            while (call := self._calls.get()) is not None:
                call(writer)
            writer.close()
        except (Exception, SystemExit) as error:
            self._failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._say(f"{self._name} gets no more of this run ({reason}); metrics.jsonl has all of it.")

    def _put(self, call: Callable[[Writer], None]) -> None:
        if not self._failed:
            self._calls.put(call)

    def scalars(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
        self._put(lambda writer: writer.scalars(step, split, numbers))

    def text(self, step: int, name: str, text: str) -> None:
        self._put(lambda writer: writer.text(step, name, text))

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join(LAST_SECONDS)
        if self._thread.is_alive():
            self._say(f"{self._name} has not taken all of this run within {LAST_SECONDS:.0f} s; metrics.jsonl has it.")


# the values of --writers; those but the first are packages of their own, which the extra of that name installs
WRITERS: dict[str, type[Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "aim": Aim,
}


def check_writers(names: Sequence[str]) -> None:
    """Raises InputError that names the extra where a service's package is not installed."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise InputError(f"--writers {name}: it is not installed. pip install 'transformer_jax[{name}]'")


def open_writers(run: RunConfig, folder: Path, step: int, say: Callable[[str], None]) -> list[Any]:
    """The services that a run names, from a step on. TensorBoard's files are written at once, as metrics.jsonl is."""

    def make(kind: type[Writer]) -> Callable[[], Writer]:
        return lambda: kind(run, folder, step)

    return [
        make(kind)() if kind is TensorBoard else Apart(name, make(kind), say)
        for name, kind in WRITERS.items()
        if name in run.writers
    ]
