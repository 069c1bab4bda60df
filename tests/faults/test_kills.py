"""A run that is killed anywhere, and started again, is the run that nobody disturbed, to the bit."""

import signal

import pytest
from runs import MODES, kills


@pytest.mark.long
@pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.slow)])
def test_five_kills_change_nothing(tmp_path, mode):
    tally = kills(tmp_path, runs=1, faults=5, signals=[signal.SIGKILL], modes=(mode,))
    assert not tally.failures
    assert tally.notes["signals"] == 5


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tmp_path):
    """At random times, at given steps, and while a checkpoint is being written; at least 25 runs."""
    tally = kills(tmp_path, runs=14, faults=4, signals=[signal.SIGKILL], seed=1)
    assert not tally.failures
    assert tally.notes["signals"] >= 100


@pytest.mark.slow
def test_signals_redo_nothing(tmp_path):
    """SIGTERM and SIGINT: exit status 75, and the last step that was taken is saved."""
    tally = kills(tmp_path, runs=5, faults=3, signals=[signal.SIGTERM, signal.SIGINT], seed=2)
    assert not tally.failures
