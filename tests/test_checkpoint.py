"""Laws of checkpoints: what is saved comes back to the bit, what is damaged is found, what is needed is kept."""

import errno
import json
import math
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer_jax import checkpoint
from transformer_jax.checkpoint import (
    Checkpoints,
    best_step,
    facts_of,
    find,
    is_full,
    restore,
    restore_params,
    sound_unit,
    steps_in,
)
from transformer_jax.config import CheckpointConfig
from transformer_jax.errors import CheckpointError, InputError
from transformer_jax.step import TrainState

PAPERS = {"config.json": "{}\n", "tokenizer.json": "{}\n"}


def state_of(step, width=4, ema=False, norms=False):
    key = jax.random.key(step)
    params = {"linear": {"w_DF": jax.random.normal(key, (width, 8)), "b_F": jnp.ones(8, jnp.bfloat16)}}
    state = TrainState.create(params, optax.adam(1e-3), 3, ema, norms)
    return state.replace(step=jnp.asarray(step, jnp.int32))


def save(folder, *steps, loss=None, **options):
    """Checkpoints of these steps; `loss` is that of each."""
    with Checkpoints(folder, CheckpointConfig(**options)) as checkpoints:
        checkpoints.open()
        for step in steps:
            scores = {} if loss is None else {"loss": loss[step]}
            checkpoints.save(step, state_of(step), PAPERS, {"scores": scores, "data": {}})
        checkpoints.wait()
        assert checkpoints.failures() == []


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def payload(unit):
    """A file with arrays in it."""
    return max((unit / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_a_state_comes_back_to_the_bit(tmp_path, ema, norms):
    state = state_of(7, ema=ema, norms=norms)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.open()
        checkpoints.save(7, state, PAPERS, {"data": {}})
    unit = sound_unit(tmp_path, "newest", "loss")
    template = jax.eval_shape(lambda: state_of(7, ema=ema, norms=norms))
    again = restore(unit, template)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    best, _ = restore_params(unit, template.params)
    np.testing.assert_array_equal(best["linear"]["w_DF"], state.best_params["linear"]["w_DF"])
    assert {name: (unit / name).read_text() for name in PAPERS} == PAPERS
    assert facts_of(unit)["step"] == 7


def test_the_state_that_is_saved_is_the_one_that_was_given(tmp_path):
    """Also where a step reuses its memory before it is written."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = state_of(1, width=4096)
    wanted = np.array(state.params["linear"]["w_DF"])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.open()
        checkpoints.save(1, state, PAPERS, {"data": {}})
        for _ in range(20):
            state = step(state)
    found = restore(tmp_path / "1", jax.eval_shape(lambda: state_of(1, width=4096)))
    np.testing.assert_array_equal(found.params["linear"]["w_DF"], wanted)


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        (dict(keep=2, best="none"), [25, 30]),
        (dict(keep=1, best="none", keep_every=10), [10, 20, 30]),
        (dict(keep=2), [15, 25, 30]),
        (dict(keep=1, best="accuracy"), [30]),
    ],
)
def test_newest_every_and_best_stay(tmp_path, options, stay):
    """The best is kept besides the newest; of equals the earlier; without scores there is none."""
    save(tmp_path, *range(5, 35, 5), loss={5: 3.0, 10: 2.0, 15: 1.0, 20: 2.0, 25: 1.0, 30: 4.0}, **options)
    assert steps_in(tmp_path) == stay
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, stay))
    if options == dict(keep=2):
        assert best_step(tmp_path, "loss") == 15
        assert sound_unit(tmp_path, "best", "loss").name == "15"
        assert sound_unit(tmp_path, "25", "loss").name == "25"
        with pytest.raises(InputError, match="no checkpoint '7'; there are 15, 25, 30"):
            sound_unit(tmp_path, "7", "loss")


def test_only_plain_numbers_are_steps(tmp_path):
    save(tmp_path, 5)
    for name in ("0007", "7.tmp", "8.damaged", "x9", "1e3", "-4", "\u0663"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [5]


def rename(folder):
    shutil.rmtree(folder / "10")
    (folder / "5").rename(folder / "10")
    shutil.copytree(folder / "10", folder / "5")


def link(folder):
    shutil.rmtree(folder / "10")
    (folder / "10").symlink_to("/etc")


DAMAGE = {
    "a flipped bit": (lambda folder: flip(payload(folder / "10")), "has changed since it was written"),
    "a file of an older step": (
        lambda folder: shutil.copy(folder / "5" / "facts.json", folder / "10" / "facts.json"),
        "facts.json has changed",
    ),
    "no manifest": (lambda folder: (folder / "10" / "MANIFEST.sha256").unlink(), "MANIFEST.sha256 is missing"),
    "an older step renamed": (rename, "it is the checkpoint of step 5 under another name"),
    "a link": (link, "not a folder of its own"),
    "an empty folder": (lambda folder: (shutil.rmtree(folder / "10"), (folder / "10").mkdir()), "MANIFEST"),
    "a file": (lambda folder: (shutil.rmtree(folder / "10"), (folder / "10").write_text("")), "not a folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_newest_sound_one_is_used_and_damage_is_set_aside(tmp_path, name):
    """A reader passes damage over and touches nothing; a writer sets it aside, and can save that step again."""
    break_it, says = DAMAGE[name]
    save(tmp_path, 5, 10)
    break_it(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert sound_unit(tmp_path, "newest", "loss").name == "5"
    with pytest.raises(CheckpointError, match="10: the checkpoint is damaged"):
        sound_unit(tmp_path, "10", "loss")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        step, rejected = checkpoints.open()
        assert (step, [each.step for each in rejected]) == (5, [10])
        assert says in rejected[0].reason
        checkpoints.save(10, state_of(10), PAPERS, {"data": {}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "10.damaged", "5"]
    assert find(tmp_path) == (10, [])


def test_without_a_sound_one_nothing_starts_over(tmp_path):
    """The error names each, now and at the next start, for a writer and a reader."""
    save(tmp_path, 5, 10)
    flip(payload(tmp_path / "5"))
    flip(payload(tmp_path / "10"))
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used \(10: state.*; 5: state"):
        sound_unit(tmp_path, "newest", "loss")
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"no checkpoint can be used.*10.*5.*to start over"):
                checkpoints.open()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10.damaged", "5.damaged"]


def test_papers_are_known_to_be_sound_before_they_are_read(tmp_path):
    """Arrays are hashed beside the reading, which is done again with an older step where they are damaged."""
    save(tmp_path, 5, 10, 15, keep=3)
    flip(tmp_path / "15" / "config.json")
    flip(payload(tmp_path / "10"))
    seen = []
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        found, rejected = checkpoints.open(lambda step: seen.append(step) or f"read {step}")
    assert (found, seen, [each.step for each in rejected]) == ("read 5", [10, 5], [15, 10])


def test_a_second_damage_of_a_step_has_a_name_of_its_own(tmp_path):
    for _ in range(2):
        save(tmp_path, 5, 10)
        flip(payload(tmp_path / "10"))
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            assert checkpoints.open()[0] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10.damaged", "10.damaged-2", "5"]


def test_what_was_left_half_done_goes(tmp_path):
    save(tmp_path, 5)
    for name in ("10.tmp", "0.old", "notes.tmp"):
        (tmp_path / name / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.open() == (5, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "notes.tmp"]


def test_a_failed_save_is_told_once_and_the_next_one_works(tmp_path, monkeypatch):
    """Too little room, an error while it is written, an error while it is sealed: nothing is left of it."""

    def broken(folder: Path):
        raise OSError(errno.EIO, "Input/output error")

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    faults = [(checkpoint.shutil, "disk_usage", lambda _: usage), (checkpoint, "seal", broken)]
    with Checkpoints(tmp_path, CheckpointConfig(keep=9)) as checkpoints:
        checkpoints.open()
        for number, (where, name, fault) in enumerate(faults):
            with monkeypatch.context() as patch:
                patch.setattr(where, name, fault)
                checkpoints.save(2 * number, state_of(0), PAPERS, {"data": {}})
                checkpoints.wait()
            ((step, error),) = checkpoints.failures()
            assert (step, is_full(error)) == (2 * number, name == "disk_usage")
            assert checkpoints.failures() == []
            assert not list(tmp_path.glob("*.tmp"))
            checkpoints.save(2 * number + 1, state_of(2 * number + 1), PAPERS, {"data": {}})
            checkpoints.wait()
    assert steps_in(tmp_path) == [1, 3]
    assert find(tmp_path) == (3, [])


@pytest.mark.parametrize("fails", [False, True])
def test_arrays_that_come_late_show_nothing(tmp_path, monkeypatch, fails):
    """TensorStore may be at some when a save has failed, and end with them when the run has; other errors are shown."""

    def broken(folder):
        raise OSError(errno.EFBIG, "File too large")

    def show(text):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))

    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(str(unraisable.exc_value)))
    before = sys.unraisablehook
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.open()
        if fails:
            monkeypatch.setattr(checkpoint, "seal", broken)
        checkpoints.save(1, state_of(1), PAPERS, {"data": {}})
        show("Event loop is closed")
        show("within")
    assert len(checkpoints.failures()) == fails
    show("after")
    if fails:
        show("Event loop is closed")
    else:
        assert sys.unraisablehook is before
    assert shown == ["within", "after"]


def test_another_model_is_an_error_that_names_the_checkpoint(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(
        CheckpointError, match=r"5: .*another model.*params/linear/w_DF is float32\[4, 8\], not float32\[3, 8\]"
    ):
        restore(tmp_path / "5", jax.eval_shape(lambda: state_of(5, width=3)))


def test_scores_say_which_is_best(tmp_path):
    save(tmp_path, 5, loss={5: 2.0})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.open()
        assert [checkpoints.is_best({"loss": loss}) for loss in (1.9, 2.0, 2.1)] == [True, False, False]
        assert not checkpoints.is_best({})
    assert json.loads((tmp_path / "5" / "facts.json").read_text())["scores"] == {"loss": 2.0}


def test_a_loss_that_is_no_number_is_never_best(tmp_path):
    """And those after it are still compared, as they come and when they are looked for."""
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        checkpoints.open()
        for step, loss in enumerate([math.nan, 3.0, 2.0, math.nan], 1):
            assert checkpoints.is_best({"loss": loss}) is not math.isnan(loss)
            checkpoints.save(step, state_of(step), PAPERS, {"data": {}, "scores": {"loss": loss}})
    assert (steps_in(tmp_path), best_step(tmp_path, "loss")) == ([3, 4], 3)
