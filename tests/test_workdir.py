"""Laws of a run's folder: one writer at a time, a lock that no crash leaves behind, papers that are whole."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from transformer_jax.errors import BusyError, InputError
from transformer_jax.folders import LOCK, write_whole
from transformer_jax.workdir import opened

HOLD = """
import sys, time
from pathlib import Path
from transformer_jax.workdir import opened
with opened(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_writer_is_told_of_the_first(tmp_path):
    """Its process and host; the lock's file is gone at the end, and the folder is free."""
    with opened(tmp_path / "new" / "run") as folder:
        with (
            pytest.raises(BusyError, match=rf"run is in use: process {os.getpid()} on \S+ is training there"),
            opened(folder),
        ):
            pass
        assert (folder / LOCK).exists()
    assert list(folder.iterdir()) == []
    with opened(folder):
        pass


def test_a_process_that_is_killed_leaves_no_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {process.pid} on"), opened(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK).exists()
    with opened(tmp_path):
        pass


def test_of_many_at_once_one_writes(tmp_path):
    """Threads open the folder again and again; there are never two inside."""
    inside, most, busy = 0, 0, 0
    counting = threading.Lock()

    def writer():
        nonlocal inside, most, busy
        for _ in range(200):
            try:
                with opened(tmp_path):
                    with counting:
                        inside += 1
                        most = max(most, inside)
                    with counting:
                        inside -= 1
            except BusyError:
                busy += 1

    threads = [threading.Thread(target=writer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert busy < 800


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file: cannot be used as a run's folder"), opened(tmp_path / "file"):
        pass


def test_papers_are_written_whole(tmp_path):
    """Nothing of the old one is left, and nothing beside it."""
    for text in ("long " * 99, "short\u00e9\n"):
        write_whole(tmp_path / "config.json", text)
        assert (tmp_path / "config.json").read_text("utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
