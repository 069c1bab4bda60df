"""Laws of bad inputs: each ends soon, with its status and one message that names the culprit, and changes no file."""

import fcntl
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from bad_inputs import BAD, DAMAGE, FILES, GOOD
from jax.experimental.compilation_cache import compilation_cache
from test_cli import ROOT, call, quick  # noqa: F401 - the fixture is for this file too

from transformer_jax.config import RunConfig
from transformer_jax.config_file import differences, read_config, to_json
from transformer_jax.data.sources import read
from transformer_jax.data.tokenizer import TRAINERS, load_tokenizer, make_tokenizer, sentinels
from transformer_jax.errors import InputError

SMALL = """--steps 1 --batch-size 4 --num-samples 0 --eval-every 1 --eval-rows 8 --log-every 1 --model.d-model 16
    --model.d-ff 32 --model.num-layers 1 --model.num-heads 2 --model.max-length 64 --model.mode decoder-only
    --max-new-tokens 4 --data.tokenizer bytes --data.train pairs.tsv"""
MOST_SECONDS, MOST_MEMORY = 10, 1.5e9


def write(files):
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(autouse=True, scope="module")
def folder(quick, tmp_path_factory):  # noqa: F811
    """In a folder with all FILES, with RUN and its damaged copies. RUN is trained, and what is compiled is compiled,
    once for all of pytest's processes."""
    write(FILES)
    root = tmp_path_factory.getbasetemp()
    made = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "a-run-for-bad-inputs"
    jax.config.update("jax_compilation_cache_dir", f"{made}-compiled")
    compilation_cache.reset_cache()
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            status, _, err = call("train pairs", SMALL, "--workdir RUN")
            assert status == 0, err
            shutil.move("RUN", made)
    shutil.copytree(made, "RUN")
    for name, damage in DAMAGE.items():
        damage(Path(shutil.copytree("RUN", f"RUNS/{name}")))


def words_of(line, workdir):
    words = shlex.split(line)
    if words[:2] in (["train", "pairs"], ["train", "text"]):
        words[2:2] = [*SMALL.split(), "--workdir", str(workdir)]
    return words


def tree():
    """What every file here is."""
    paths = [path for path in Path().rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in paths}


def check(row, new, status, out, err):
    said = " ".join(err.split())
    assert (status, out) == (row.status, ""), said
    assert re.search(row.says, said), said
    assert err.count("\n") == 1 or err.count("For full helptext") == 1, err
    assert "Traceback" not in err
    assert not any(path.is_file() for path in new.rglob("*"))


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.line[:80] or "nothing")
def test_a_bad_input_is_answered_with_its_name(row, tmp_path, capfd):
    before, start, used = tree(), time.monotonic(), time.process_time()
    answer = call(words_of(row.line, tmp_path / "new"), stdin=row.stdin)
    assert min(time.monotonic() - start, time.process_time() - used) < MOST_SECONDS  # others may hold the cores
    check(row, tmp_path / "new", *answer)
    assert tree() == before
    assert capfd.readouterr() == ("", "")  # nor did a library print past Python


# What Linux counts as a process's largest memory begins with that of the process that has started it; this does not.
MAIN = """
import atexit, pathlib
status, out = pathlib.Path("/proc/self/status"), pathlib.Path({!r})
atexit.register(lambda: out.write_text(status.read_text() if status.exists() else ""))
from transformer_jax.cli import main
main()
"""
PROCESSES = ("bomb.jsonl", "panic.json", "stdin: byte", "at most 2048 devices", "binary.json")


@pytest.mark.parametrize("part", PROCESSES)
def test_so_is_it_by_a_process(part, tmp_path):
    """With warnings as errors, soon, and in little memory."""
    row = next(row for row in BAD if part in row.line + row.says)
    before, start = tree(), time.monotonic()
    words = [sys.executable, "-W", "error", "-c", MAIN.format(str(tmp_path / "status"))]
    with (
        (tmp_path / "in").open("w+b") as given,
        (tmp_path / "out").open("w+") as out,
        (tmp_path / "err").open("w+") as err,
    ):
        given.write(row.stdin)
        for file in (given, out, err):
            file.seek(0)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*words, *words_of(row.line, tmp_path / "new")], stdin=given, stdout=out, stderr=err, env=env
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    assert min(seconds, time.monotonic() - start) < MOST_SECONDS
    peak = re.search(r"VmHWM:\s+(\d+) kB", (tmp_path / "status").read_text())
    assert peak is None or int(peak[1]) * 1024 < MOST_MEMORY
    check(row, tmp_path / "new", process.returncode, *texts)
    assert tree() == before


# --- what must work


@pytest.mark.parametrize("what", GOOD)
def test_what_people_have_works(what, tmp_path):
    line, files = GOOD[what]
    write(files)
    status, out, err = call(words_of(line, tmp_path / "new"))
    assert (status, out) == (0, ""), err


def test_prompts_of_any_kind_work():
    """Empty, blank between others, with a byte order mark and CRLF, or spelling a special token."""

    def answers(*words, stdin=b""):
        status, out, err = call("generate RUN", *words, stdin=stdin)
        assert (status, err) == (0, "")
        return out.splitlines()

    plain = answers(stdin=b"01.02.2001\n\n03.04.2001\n")
    assert len(plain) == 3
    assert answers(stdin=b"\xef\xbb\xbf01.02.2001\r\n\r\n03.04.2001") == plain
    Path("prompts.txt").write_bytes(b"\n\n01.02.2001\n")
    assert answers("--input prompts.txt --batch-size 99999999") == [plain[1], plain[1], plain[0]]
    assert answers("--prompt", [""]) == [plain[1]]
    assert len(answers("--prompt <eos><pad>")) == 1
    assert answers("--input prompts.txt --output /dev/null") == []
    os.symlink("answers.txt", "link.txt")
    for _ in range(2):
        assert answers("--input prompts.txt --output link.txt") == []
    assert Path("answers.txt").read_text().splitlines() == [plain[1], plain[1], plain[0]]
    assert Path("link.txt").is_symlink()


def test_evaluation_takes_any_batch(tmp_path):
    status, out, err = call("evaluate RUN --data ./pairs.tsv --batch-size 99999999 --limit 2")
    assert (status, err) == (0, "")
    assert json.loads(out)["decoded"] == 2


def test_a_run_goes_on_with_the_same_data_by_another_path():
    """Only what it holds is compared, and before there is a checkpoint, what a path means."""
    text = Path("pairs.tsv").read_text("utf-8")
    Path("moved.tsv").write_text(text, "utf-8")
    Path("fewer.tsv").write_text(text[: text.rindex("\n", 0, -1) + 1], "utf-8")
    for path in ("./pairs.tsv", Path("pairs.tsv").absolute(), "RUN/../pairs.tsv", "moved.tsv"):
        status, _, err = call("train pairs", SMALL, "--workdir RUN --data.train", path)
        assert status == 0, err
        assert "finished already" in err
    status, _, err = call("train pairs", SMALL, "--workdir RUN --data.train fewer.tsv")
    assert status == 2
    assert re.search(r"another config, data or tokenizer: data.train: \d+ pairs, .* -> \d+ pairs", err)
    run = read_config("RUN/config.json")
    assert not differences(run, run)
    Path("other.json").write_text(to_json(run).replace("pairs.tsv", "other.tsv").replace('"bytes"', '"./bytes"'))
    for moved, names in (False, ["data.train", "data.tokenizer"]), (True, ["data.tokenizer"]):
        changes = differences(run, read_config("other.json"), moved)
        assert [line.partition(":")[0] for line in changes] == names


# --- random damage

TRIES = 300


def mutated(raw, draw):
    """Some bytes changed, left out, put in twice or cut off."""
    raw = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place, size = draw.randrange(len(raw) + 1), draw.choice((0, 1, 1, 2, 20))
        new = (bytes([draw.randrange(256)]), b"", raw[place : place + 9], b"null", b"1e999", b"-1", b'"', b"[", b"{}")
        raw[place : place + size] = draw.choice(new)
    return bytes(raw[: draw.randrange(len(raw) + 1)] if draw.random() < 0.1 else raw)


def fuzzed(name, raw, reader):
    """The reader either reads what becomes of a file, or raises InputError with its name; the number of each."""
    draw, refused = random.Random(0), []
    for _ in range(TRIES):
        Path(name).write_bytes(mutated(raw, draw))
        try:
            reader(name)
        except InputError as error:
            refused.append(str(error))
    assert all(name in message and len(message) < 1000 for message in refused)
    return TRIES - len(refused), len(refused)


def test_configs_of_random_bytes():
    assert min(fuzzed("fuzzed.json", to_json(RunConfig()).encode(), read_config)) > 3


@pytest.mark.parametrize("kind", TRAINERS)
def test_tokenizers_of_random_bytes(kind, capfd):
    """Also what was read encodes and decodes, and no panic of the library reaches the terminal."""

    def use(path):
        tokenizer = load_tokenizer(path, sentinels(2))
        for text in (*texts, "\0<pad> \ue000", ""):
            tokenizer.decode(tokenizer.encode([text])[0])
        assert tokenizer.size < 10_000

    texts = ["Der kleine Hund bellt.", "a cat sat on the mat", "日本語 👋"] * 3
    raw = make_tokenizer(kind, 300, lambda: texts, sentinels(1)).to_json().encode()
    assert min(fuzzed("fuzzed.json", raw, use)) > 5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["fuzzed.jsonl", "fuzzed-pairs.jsonl", "fuzzed.tsv", "fuzzed.txt.gz"])
def test_data_of_random_bytes(name):
    raw = {
        "fuzzed.jsonl": b'{"text": "caf\xc3\xa9 \\u00e9"}\n{"text": "b", "n": 1}\n',
        "fuzzed-pairs.jsonl": b'{"source": "a", "target": "b"}\r\n' * 3,
        "fuzzed.tsv": "ä\tb\nc\td\n".encode(),
        "fuzzed.txt.gz": FILES["cut.txt.gz"] + b"\0" * 9,
    }[name]
    fuzzed(name, raw, lambda path: read((path,)))
