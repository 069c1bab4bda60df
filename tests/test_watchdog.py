"""Laws of the watchdog: a process that lives is left alone, one in which no step ends says where it is and ends."""

import json
import subprocess
import sys

import pytest

from transformer_jax.config_checks import as_time
from transformer_jax.watchdog import STALLED, Watchdog

RUN = """
import sys, time
from pathlib import Path
from transformer_jax.watchdog import Watchdog

def the_function_that_hangs():
    time.sleep(60)

with Watchdog(Path(sys.argv[1]), 3.0).watching() as watchdog:
    for step in range(8):
        watchdog.beat(step, "trains")
        time.sleep(0.5)
    if sys.argv[2] == "hang":
        the_function_that_hangs()
print("lived")
"""


def run(folder, how):
    """A process in which steps end every half a second for four seconds, more than the watchdog waits for one."""
    words = [sys.executable, "-c", RUN, str(folder), how]
    return subprocess.run(words, capture_output=True, text=True, timeout=100)


def test_one_that_hangs_says_where_and_ends(tmp_path):
    """Status 7; stderr has each thread's calls and one last line with the step and the flag."""
    done = run(tmp_path, "hang")
    assert done.returncode == STALLED
    assert "the_function_that_hangs" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "no step has ended for 3s (--stall-after): the run trains after step 7" in last


@pytest.mark.long
def test_one_that_lives_is_left_alone(tmp_path):
    """And leaves nothing behind; without a limit nobody watches."""
    done = run(tmp_path, "live")
    assert (done.returncode, done.stdout, done.stderr) == (0, "lived\n", "")
    with Watchdog(tmp_path, float("inf")).watching():
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ({0: 7, 1: 7, 2: 6}, "Behind are: process 2 trains at step 6; the others are at step 7."),
        ({0: 7, 1: 7, 2: 7}, "All 3 processes are at step 7."),
        ({0: 7, 1: 7}, "Process 2 of 3 has not been heard of."),
    ],
)
def test_the_process_that_is_behind_is_named(tmp_path, monkeypatch, steps, says):
    monkeypatch.setattr("transformer_jax.job.count", lambda: 3)
    for number, step in steps.items():
        (tmp_path / f"progress-{number}").write_text(json.dumps([step, "trains"]))
    watchdog = Watchdog(tmp_path, 1.0)
    watchdog.beat(7, "trains")
    assert watchdog._behind().strip() == says


def test_times_are_written_as_people_do():
    assert [as_time(x) for x in (90, 120, 3600, 5400, 0.5)] == ["90s", "2m", "1h", "1h30m", "0.5s"]
