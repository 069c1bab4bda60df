"""A run does not mind a full disk, a second writer, another machine or other settings around it."""

import pytest
from runs import MODES, differences, flags, records, train, undisturbed, write_pairs
from surroundings import WORLDS, full_disk, full_tmpfs, other_topologies, other_worlds, soak, two_writers

every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.mark.long
def test_a_full_disk_loses_nothing(tmp_path):
    assert not full_disk(tmp_path, MODES[1]).failures


@pytest.mark.slow
@every_mode
def test_a_small_disk_that_grows(tmp_path, mode):
    tally = full_tmpfs(tmp_path, mode)
    if not tally.tried:
        pytest.skip("no right to mount a small disk")
    assert not tally.failures


@pytest.mark.long
def test_of_two_writers_one_trains(tmp_path):
    assert not two_writers(tmp_path, MODES[1]).failures


@pytest.mark.slow
def test_settings_around_a_process_change_no_bit(tmp_path):
    name = list(WORLDS)[1]
    assert not other_worlds(tmp_path, MODES[1], {name: WORLDS[name]}).failures


@pytest.mark.slow
@every_mode
def test_no_settings_change_a_bit(tmp_path, mode):
    assert not other_worlds(tmp_path, mode, WORLDS).failures


@pytest.mark.slow
@every_mode
def test_a_checkpoint_moves_between_topologies(tmp_path, mode):
    assert not other_topologies(tmp_path, mode).failures


@pytest.mark.slow
def test_a_long_run_does_not_grow(tmp_path):
    assert not soak(tmp_path, MODES[0], minutes=3).failures


@pytest.mark.long
def test_parameters_that_overflow_are_not_saved(tmp_path):
    """The update of step 1 is too large for float32; the next steps say so."""
    words = flags(write_pairs(tmp_path / "pairs.tsv"), MODES[1])
    wild = "--optimizer.name sgd --optimizer.learning-rate 3e38 --optimizer.weight-decay 1e4"
    wild += " --optimizer.clip-norm 0 --optimizer.warmup-steps 0"
    status, err = train(tmp_path / "wild", [*words, *wild.split(), "--max-skipped", "3", "--checkpoint.every", "1"])
    assert status == 3, err
    events = [(record.get("event"), record.get("step")) for record in records(tmp_path / "wild")]
    assert ("checkpoint_failed", 1) in events
    assert ("skipped_step", 2) in events
    assert "Nothing was saved yet" in err


@pytest.mark.slow
def test_numbers_that_stay_wrong_end_the_run(tmp_path):
    """Status 3; each step is on record as left out; the module is named; the first checkpoint stands."""
    words = flags(write_pairs(tmp_path / "pairs.tsv"), MODES[0])
    wild = "--optimizer.name sgd --optimizer.learning-rate 1e15 --optimizer.clip-norm 0 --optimizer.warmup-steps 8"
    status, err = train(tmp_path / "wild", [*words, *wild.split(), "--max-skipped", "5", "--checkpoint.every", "1"])
    assert status == 3
    assert "first values that are not finite are those of encoder/block_0/self_attention" in err.splitlines()[-1]
    skipped = [record["step"] for record in records(tmp_path / "wild") if record.get("event") == "skipped_step"]
    assert skipped == list(range(skipped[0], skipped[0] + 5))
    assert max(int(path.name) for path in (tmp_path / "wild" / "checkpoints").iterdir()) == skipped[0] - 1


@pytest.mark.slow
def test_a_run_that_is_accepted_with_changes_goes_on(tmp_path):
    """Another learning rate is refused with the difference, and accepted with the flag; then it is the run."""
    words = flags(write_pairs(tmp_path / "pairs.tsv"), MODES[0])
    undisturbed(tmp_path / "run", [*words, "--stop-at", "8"])
    changed = [*words, "--optimizer.learning-rate", "0.02"]
    status, err = train(tmp_path / "run", changed)
    assert (status, "optimizer.learning_rate: 0.01 -> 0.02" in err) == (2, True)
    status, err = train(tmp_path / "run", [*changed, "--accept-changes", "True"])
    assert status == 0, err
    (resume,) = [record for record in records(tmp_path / "run") if record.get("event") == "resume"]
    assert resume["changes"] == ["optimizer.learning_rate: 0.01 -> 0.02"]
    assert differences(tmp_path / "run", {})
    status, err = train(tmp_path / "run", changed)
    assert (status, "finished already" in err) == (0, True)
