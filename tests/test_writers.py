"""Laws of the services that a run's numbers go to: each number is there once, and none of them disturbs the run.

Those that are not installed are played by stand-ins with what is used of them."""

import importlib.machinery
import importlib.util
import json
import struct
import sys
import threading
import types
from collections import defaultdict
from pathlib import Path

import pytest
from test_cli import quick, same_numbers, train  # noqa: F401 - the fixture is for this file too

from transformer_jax import writers
from transformer_jax.cli import run_command
from transformer_jax.config import RunConfig
from transformer_jax.config_file import differences
from transformer_jax.metrics import MetricsWriter, read_records
from transformer_jax.writers import KEPT, WRITERS, open_writers

SERVICES = ("wandb", "mlflow", "aim")


class Store:
    """What a service has: {name: {step: values}} and {(name, step): text} by run."""

    def __init__(self):
        self.numbers = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        self.texts, self.settings = defaultdict(dict), {}


def module(name, **members):
    found = types.ModuleType(name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(found).update(members)
    return found


def wandb(store):
    class Run:
        def __init__(self, name):
            self.name, self.config = name, self
            self.last = max((step + 1 for each in store.numbers[name].values() for step in each), default=0)

        def update(self, settings, allow_val_change):
            store.settings[self.name] = settings

        def log(self, data, step):
            if step < self.last:  # as the service has it
                return
            self.last = step
            for key, value in data.items():
                if isinstance(value, str):
                    store.texts[self.name][key, step] = value
                else:
                    store.numbers[self.name][key][step].append(value)

        def finish(self):
            pass

    options = dict(Html=lambda text, inject: text, Settings=lambda **_: None, init=lambda id, **_: Run(id))
    return {"wandb": module("wandb", **options)}


def mlflow(store):
    class Client:
        def __init__(self, tracking_uri):
            assert tracking_uri.startswith("sqlite:////")

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name, artifact_location):
            return "0"

        def create_run(self, experiment, run_name):
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run {len(store.settings)}"))

        def update_run(self, run, status):
            assert run in store.settings

        def log_batch(self, run, metrics=(), params=()):
            assert len(params) <= 100
            store.settings.setdefault(run, {}).update(params)
            for name, value, _, step in metrics:
                store.numbers[run][name][step].append(value)

        def get_metric_history(self, run, name):
            return [types.SimpleNamespace(step=step) for step in store.numbers[run][name]]

        def log_text(self, run, text, path):
            store.texts[run]["samples", int(Path(path).stem)] = text

        def set_terminated(self, run):
            pass

    entities = module("mlflow.entities", Metric=lambda *fields: fields, Param=lambda *fields: fields)
    return {"mlflow": module("mlflow", MlflowClient=Client, entities=entities), "mlflow.entities": entities}


def aim(store):
    class Run:
        def __init__(self, name=None, repo="", **_):
            self.hash = name or f"run {len(store.settings)}"

        def __setitem__(self, key, value):
            store.settings[self.hash] = value

        def track(self, value, name, step, context=None):
            if context is None:
                store.texts[self.hash][name, step] = value
            else:
                store.numbers[self.hash][f"{context['subset']}/{name}"][step] = [value]

        def close(self):
            pass

    return {"aim": module("aim", Run=Run, Text=str)}


STAND_INS = {"wandb": wandb, "mlflow": mlflow, "aim": aim}


@pytest.fixture
def store(monkeypatch):
    """One that all stand-ins share, as each run is one service's."""
    found = Store()
    for make in STAND_INS.values():
        for name, each in make(found).items():
            monkeypatch.setitem(sys.modules, name, each)
    return found


def write(folder, names, step, steps, said):
    """A part of a run, from a checkpoint on."""
    folder.mkdir(exist_ok=True)
    run = RunConfig(writers=names)
    writer = MetricsWriter(folder, step, open_writers(run, folder, step, said.append))
    for number in steps:
        writer.write({"step": number, "split": "train", "loss": 1 / number, "sha": "text"})
        if number % 2 == 0:
            writer.samples(number, f"<b> {number}")
            writer.write({"step": number, "split": "validation/x+y", "loss": float("nan"), "accuracy": number / 10})
    writer.close()


PARTS = ((0, range(1, 6)), (2, range(3, 9)))  # the first was killed after 5 steps, its checkpoint is of step 2
WANTED = {"train/loss": {n: [pytest.approx(1 / n)] for n in range(1, 9)}}
WANTED["validation/x_y/accuracy"] = {n: [pytest.approx(n / 10)] for n in range(2, 9, 2)}


@pytest.mark.parametrize("name", SERVICES)
def test_each_number_is_there_once(name, store, tmp_path):
    """In one run, however often it was begun; with the settings, the texts, and nothing that is no finite number."""
    said = []
    for step, steps in PARTS:
        write(tmp_path, (name,), step, steps, said)
    assert said == []
    (run,) = store.settings
    found = {key.replace("+", "_"): dict(each) for key, each in store.numbers[run].items() if each}
    assert found == WANTED
    assert dict(store.settings[run])["model.d_model"] in (128, "128", 512, "512")
    assert set(store.texts[run]) == {("samples", step) for step in range(2, 9, 2)}
    assert len(read_records(tmp_path / "metrics.jsonl")) == 8 + 4


def events(files):
    """What TensorBoard shows of files: a START takes back what earlier ones have from its step on."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in files:
        raw, place = path.read_bytes(), 0
        while place < len(raw):
            (size,) = struct.unpack_from("<Q", raw, place)
            event = Event.FromString(raw[place + 12 : place + 12 + size])
            place += size + 16
            if event.HasField("session_log"):
                found = [each for each in found if each.step < event.step]
            found.append(event)
    return found


@pytest.mark.parametrize("first", [0, 2])
def test_each_number_is_on_the_board_once(first, tmp_path):
    """Also where there was no checkpoint yet and all is written again."""
    for number, (step, steps) in enumerate(((0, range(1, 6)), (first, range(first + 1, 9)))):
        write(tmp_path / str(number), ("tensorboard",), step, steps, [])
    files = [path for number in range(2) for path in (tmp_path / str(number) / "tensorboard").iterdir()]
    found, texts = defaultdict(lambda: defaultdict(list)), []
    for event in events(files):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[value.tag.replace("+", "_")][event.step].append(value.simple_value)
            else:
                texts.append((value.tag.partition("/")[0], event.step))
    assert {name: dict(each) for name, each in found.items()} == WANTED
    assert sorted(texts) == [("config", 0), *(("samples", step) for step in range(2, 9, 2))]


def test_no_writer_is_one_choice(tmp_path):
    write(tmp_path, (), 0, range(1, 4), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.txt"]
    assert differences(RunConfig(), RunConfig(writers=())) == []


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_service_that_fails_is_told_of_once(when, store, tmp_path, monkeypatch):
    """And the others have all of it."""

    def fails(*_, **__):
        raise ConnectionError("no\nroute")

    wandb = sys.modules["wandb"]
    monkeypatch.setattr(wandb if when == "init" else type(wandb.init("x")), when, fails)
    said = []
    write(tmp_path, ("wandb", "aim"), 0, range(1, 9), said)
    assert said == ["wandb gets no more of this run (ConnectionError: no route); metrics.jsonl has all of it."]
    (run,) = (run for run in store.settings if run.startswith("run"))
    assert len(store.numbers[run]["train/loss"]) == 8
    assert len(read_records(tmp_path / "metrics.jsonl")) == 8 + 4


def test_a_service_that_hangs_is_left_behind(store, tmp_path, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(type(sys.modules["wandb"].init("x")), "log", lambda *_, **__: free.wait(60))
    monkeypatch.setattr(writers, "LAST_SECONDS", 0.05)
    said = []
    write(tmp_path, ("wandb",), 0, range(1, 4), said)
    free.set()
    assert said == ["wandb has not taken all of this run within 0 s; metrics.jsonl has it."]


@pytest.mark.parametrize("name", SERVICES)
def test_one_that_is_not_installed_is_named_before_anything_is_made(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert run_command(["train", "dates", "--workdir", str(tmp_path / "run"), "--writers", name]) == 2
    assert f"--writers {name}: it is not installed. pip install 'transformer_jax[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"aim": "older"}'])
def test_names_that_are_damaged_are_given_again(text, store, tmp_path):
    (tmp_path / KEPT).write_text(text)
    write(tmp_path, ("wandb",), 0, range(1, 3), [])
    names = json.loads((tmp_path / KEPT).read_text())
    assert names["wandb"] in store.settings
    assert ("aim" in names) == ("aim" in text)


@pytest.mark.long
def test_writers_change_no_bit_of_training(store):
    """Nor does it matter that a run goes on with others than it began with."""
    parts = (["--stop-at", "3", "--writers", "wandb", "aim"], ["--writers", "mlflow"])
    for name, words in (("plain", []), *(("written", part) for part in parts)):
        status, _, err = train(name, "decoder-only", words)
        assert status == 0, err
    same_numbers(Path("plain"), Path("written"))
    assert len(store.settings) == 3
    assert not Path("written/tensorboard").exists()


# --- the services themselves


def kept(name, folder):
    """{name: {step: values}} of the one run that a service has in a folder."""
    found = defaultdict(lambda: defaultdict(list))
    if name == "mlflow":
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        client, run = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}"), json.loads((folder / KEPT).read_text())[name]
        for key in client.get_run(run).data.metrics:
            for each in client.get_metric_history(run, key):
                found[key][each.step].append(each.value)
    if name == "aim":
        from aim import Run  # pyright: ignore[reportMissingImports]
        from aim.storage.context import Context  # pyright: ignore[reportMissingImports]

        run = Run(json.loads((folder / KEPT).read_text())[name], repo=str(folder), system_tracking_interval=None)
        for each in run.collect_sequence_info(sequence_types=("metric",))["metric"]:
            steps, (values, *_) = run.get_metric(each["name"], Context(each["context"])).data.items_list()
            for step, value in zip(steps, values, strict=True):
                found[f"{each['context']['subset']}/{each['name']}"][step].append(value)
        run.close()
    return {key.replace("+", "_"): dict(each) for key, each in found.items()}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", SERVICES)
def test_the_real_one_takes_it(name, tmp_path, monkeypatch):
    """Each number once, in the run's folder; of wandb there is a file for each start, of one run."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    said = []
    for step, steps in PARTS:
        write(tmp_path, (name,), step, steps, said)
    assert said == []
    if name == "wandb":
        run = json.loads((tmp_path / KEPT).read_text())[name]
        assert len(list(tmp_path.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb"))) >= 1
    else:
        assert kept(name, tmp_path) == WANTED


def test_all_of_them_are_tried():
    assert set(WRITERS) == {"tensorboard", *SERVICES}
