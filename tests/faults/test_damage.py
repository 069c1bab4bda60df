"""A checkpoint that is damaged in any way is never restored: the run goes on from an older one, or refuses."""

import shutil

import pytest
from damage import damages, files_of
from runs import EVERY, MODES, Tally, differences, flags, numbers, records, train, undisturbed, write_pairs

from transformer_jax.checkpoint import find

HALF = 5 * EVERY


def halfway_run(base):
    """A run that has stopped, the command that goes on with it, and the numbers of one that was left alone."""
    words = flags(write_pairs(base / "pairs.tsv"), MODES[1])
    reference, _ = undisturbed(base / "reference", words)
    status, err = train(base / "half", [*words, "--stop-at", str(HALF)])
    assert status == 0, err
    return base / "half", words, reference


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    return halfway_run(tmp_path_factory.mktemp("damage"))


def found_by_hashes(halfway, flips=100):
    """Each damage by the files alone, without a training process: the older checkpoint is the one that is used."""
    result, run = Tally(), halfway[0]
    for what, act in damages(run / "checkpoints", str(HALF), str(HALF - EVERY), flips):
        copy = run.with_name("copy")
        shutil.copytree(run / "checkpoints", copy)
        act(copy)
        step, rejected = find(copy)
        wrong = [] if step == HALF - EVERY else [f"step {step} is used"]
        wrong += [] if [each.step for each in rejected] == ([] if what == "deleted" else [HALF]) else ["it is not told"]
        result.add(what, wrong)
        shutil.rmtree(copy)
    return result


@pytest.mark.long
def test_every_damage_is_found(halfway):
    result = found_by_hashes(halfway, flips=30)
    assert not result.failures
    assert result.tried > 6 * len(files_of(halfway[0] / "checkpoints" / str(HALF)))


def survive(halfway, what, act):
    """What is wrong with a run that goes on after its newest checkpoint was damaged."""
    run, words, reference = halfway
    copy = run.with_name("survivor")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    act(copy / "checkpoints")
    status, err = train(copy, words)
    if status != 0:
        return [] if (status, str(HALF) in err, "Traceback" in err) == (3, True, False) else [f"{status}: {err[-300:]}"]
    told = [record["step"] for record in records(copy) if record.get("event") == "checkpoint_rejected"]
    wrong = differences(copy, reference)
    return wrong if told == [HALF] or what == "deleted" else [*wrong, f"checkpoint_rejected names {told}"]


def tally(halfway, every=1):
    """Each `every`-th damage, in a training process."""
    found, run = Tally(), halfway[0]
    for what, act in list(damages(run / "checkpoints", str(HALF), str(HALF - EVERY), flips=100))[::every]:
        found.add(what, survive(halfway, what, act))
    return found


@pytest.mark.long
def test_a_damaged_run_goes_on_from_the_older_one(halfway):
    assert not tally(halfway, every=90).failures


@pytest.mark.slow
def test_every_damaged_run_goes_on(halfway):
    assert not tally(halfway).failures


@pytest.mark.long
def test_when_all_are_damaged_it_refuses(halfway):
    """Status 3, now and when it is started again; the numbers that were written stay."""
    run, words, _ = halfway
    copy = run.with_name("refused")
    shutil.copytree(run, copy)
    for unit in (copy / "checkpoints").iterdir():
        (unit / "facts.json").write_text("{}")
    before = numbers(copy)
    for _ in range(2):
        status, err = train(copy, words)
        assert (status, "Traceback" in err, err.count("\n")) == (3, False, 1), err
        assert f"{HALF}.damaged" in err or f"{HALF}: facts.json" in err
    assert numbers(copy) == before
