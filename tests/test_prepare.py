"""Laws of token shards: they are a function of the text alone, and a run reads them as it would read the text."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from transformer_jax import folders
from transformer_jax.cli import run_command
from transformer_jax.config import DataConfig, ModelConfig, RunConfig
from transformer_jax.data import prepare as making
from transformer_jax.data.load import load_data
from transformer_jax.data.prepared import PAPER, Prepared, read_prepared
from transformer_jax.data.sources import read
from transformer_jax.data.tokenizer import load_tokenizer
from transformer_jax.errors import InputError

WORDS = ["the", "cat", "saw", "a", "small", "dog", "and", "ran", "over", "two", "old", "bridges;", "nobody", "knew."]
BLOCK, SHARD = 5_000, 10_000  # letters that are encoded at a time, tokens in a shard


def sentence(rng):
    return " ".join(rng.choice(WORDS, rng.integers(3, 30)))


def write_texts(path, count, seed=0):
    rng = np.random.default_rng(seed)
    path.write_text("".join(json.dumps({"text": sentence(rng)}) + "\n" for _ in range(count)), "utf-8")
    return path


def write_pairs(path, count):
    rng = np.random.default_rng(1)
    path.write_text("".join(f"{sentence(rng)}\t{sentence(rng).upper()}\n" for _ in range(count)), "utf-8")
    return path


def prepare(folder, *data, **flags):
    """The exit status of the command."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return run_command(["prepare", str(folder), "--data", *map(str, data), *options])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(the file, the folder that was made of it)."""
    patch = pytest.MonkeyPatch()
    patch.setattr(making, "BLOCK", BLOCK)
    folder = tmp_path_factory.mktemp("texts")
    path = write_texts(folder / "a.jsonl", 3000)
    assert prepare(folder / "made", path, tokenizer_size=300, shard_tokens=SHARD, workers=1) == 0
    yield path, folder / "made"
    patch.undo()


def test_the_tokens_are_those_of_the_text(texts):
    path, folder = texts
    prepared, corpus = read((str(folder),)), read((str(path),))
    assert isinstance(prepared, Prepared)
    (wanted,) = corpus.tokens(load_tokenizer(folder / "tokenizer.json"))
    (found,) = prepared.parts
    assert found.offsets.tolist() == wanted.offsets.tolist()
    assert found.ids[:].tolist() == wanted.ids.tolist()
    assert len(list(folder.glob("*.tokens"))) > 3


def test_any_number_of_processes_writes_the_same(texts, tmp_path):
    path, folder = texts
    assert prepare(tmp_path / "made", path, tokenizer_size=300, shard_tokens=SHARD, workers=3) == 0
    assert contents(tmp_path / "made") == contents(folder)


def test_one_long_text_goes_on_over_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "BLOCK", BLOCK)
    rng = np.random.default_rng(2)
    text = "".join(sentence(rng) + "\n" for _ in range(3000))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    assert prepare(tmp_path / "made", tmp_path / "a.txt", tokenizer="bytes", shard_tokens=50_000) == 0
    prepared = read_prepared(tmp_path / "made")
    assert len(prepared) == 1
    assert len(list((tmp_path / "made").glob("*.tokens"))) > 3
    tokenizer = load_tokenizer(tmp_path / "made" / "tokenizer.json")
    assert prepared.parts[0].ids[:].tolist() == tokenizer.encode([text])[0].tolist()
    left, right = prepared.split(0.25)
    assert left.parts[0].size + right.parts[0].size == prepared.parts[0].size
    assert right.parts[0].size == pytest.approx(0.25 * prepared.parts[0].size, abs=1)


KILLER = """
import os, signal, sys
from transformer_jax import folders
from transformer_jax.data import prepare
left = int(os.environ["LEFT"])
write, at = folders.write_whole, [0]
def dying(*args):
    at[0] += 1
    if at[0] == left:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args)
prepare.write_whole, prepare.BLOCK = dying, 5000
from transformer_jax.cli import main
if __name__ == "__main__":
    main()
"""


@pytest.mark.long
def test_killed_and_started_again_it_writes_the_same(texts, tmp_path):
    """Before each of the papers that it writes: a shard may be there that no paper knows yet."""
    path, folder = texts
    (tmp_path / "killer.py").write_text(KILLER)
    flags = ["--data", str(path), "--tokenizer-size", "300", "--shard-tokens", "10000", "--workers", "2"]
    made, kills = tmp_path / "made", 0
    for left in (1, 2, 3, 2, 1, 4):
        command = [sys.executable, str(tmp_path / "killer.py"), "prepare", str(made), *flags]
        done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"LEFT": str(left)})
        kills += done.returncode == -signal.SIGKILL
    assert kills >= 5, done.stderr[-2000:]
    assert prepare(made, path, tokenizer_size=300, shard_tokens=SHARD, workers=1) == 0
    assert contents(made) == contents(folder)


def test_its_processes_end_with_it(texts, tmp_path):
    path, _ = texts
    code = "from transformer_jax.cli import main; main()"
    arguments = ["prepare", str(tmp_path / "made"), "--data", str(path), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not say which processes another one has started")
    found = []
    while process.poll() is None and len(found) < 3:
        found = children.read_text().split()
        time.sleep(0.01)
    process.kill()
    process.wait()
    for _ in range(500):
        if not any(os.path.exists(f"/proc/{number}") for number in found):
            return
        time.sleep(0.01)
    raise AssertionError(f"processes {found} go on")


def test_it_needs_no_jax():
    """Whose memory would be several times its own, in each process."""
    code = "import sys, transformer_jax.cli, transformer_jax.data.prepare; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what it refuses


def test_a_finished_folder_stays_as_it_is(texts, capsys):
    path, folder = texts
    before = contents(folder)
    assert prepare(folder, path, tokenizer_size=300, shard_tokens=SHARD) == 0
    assert "3,000 text" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (dict(tokenizer_size=301, shard_tokens=SHARD), "--tokenizer and --tokenizer-size was"),
        (dict(tokenizer_size=300, shard_tokens=SHARD + 1), "--shard-tokens was 10000 there and is 10001 here"),
    ],
)
def test_another_preparation_is_refused(flags, says, texts, capsys):
    path, folder = texts
    before = contents(folder)
    assert prepare(folder, path, **flags) == 2
    assert says in capsys.readouterr().err
    assert contents(folder) == before


@pytest.fixture
def copied(texts, tmp_path):
    """A folder like that of `texts`, to be spoilt."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name, raw in contents(texts[1]).items():
        (folder / name).write_bytes(raw)
    return folder


def unfinish(folder):
    paper = json.loads((folder / PAPER).read_text())
    paper["shards"], paper["done"] = paper["shards"][:2], False
    folders.write_whole(folder / PAPER, json.dumps(paper))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "where"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"), "has other bytes than were written"),
    ],
    ids=["missing", "short", "changed"],
)
@pytest.mark.parametrize("name", ["text-00001.tokens", "text-00000.ends", "tokenizer.json"])
def test_damage_is_found(spoil, says, name, copied, texts, capsys):
    spoil(copied / name)
    with pytest.raises(InputError, match=f"{name} .*{says}"):
        read((str(copied),))
    assert prepare(copied, texts[0], tokenizer_size=300, shard_tokens=SHARD) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda paper: paper.pop("kind"),
        lambda paper: paper.update(format=2),
        lambda paper: paper.update(dtype="<u8"),
        lambda paper: paper["shards"].pop(),
        lambda paper: paper["shards"][0]["files"].pop("text-00000.ends"),
        lambda paper: paper["shards"].append(7),
        lambda paper: paper.update(shards=[]),
    ],
)
def test_a_broken_paper_is_refused(spoil, copied):
    paper = json.loads((copied / PAPER).read_text())
    spoil(paper)
    (copied / PAPER).write_text(json.dumps(paper))
    with pytest.raises(InputError, match=PAPER):
        read((str(copied),))


def test_what_is_not_finished_is_refused_and_finished(copied, texts, capsys):
    unfinish(copied)
    with pytest.raises(InputError, match="not prepared to its end"):
        read((str(copied),))
    assert prepare(copied, texts[0], tokenizer_size=300, shard_tokens=SHARD) == 0
    assert contents(copied) == contents(texts[1])


def test_text_that_has_changed_meanwhile_is_refused(copied, texts, tmp_path, monkeypatch, capsys):
    unfinish(copied)
    other = write_texts(tmp_path / "a.jsonl", 3000, seed=9)
    paper = json.loads((copied / PAPER).read_text())
    (copied / PAPER).write_text(json.dumps(paper | {"data": [str(other)]}))
    assert prepare(copied, other, tokenizer_size=300, shard_tokens=SHARD) == 2
    assert "has other text than the shards" in capsys.readouterr().err


def test_a_folder_with_other_files_is_left_alone(tmp_path, texts, capsys):
    (tmp_path / "mine.tmp").write_text("mine")
    assert prepare(tmp_path, texts[0]) == 2
    assert "has other files in it (mine.tmp): give a new folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.tmp": b"mine"}


def test_conversations_are_refused(tmp_path, capsys):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert prepare(tmp_path / "made", tmp_path / "a.jsonl") == 2
    assert "conversations are not prepared" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "says"), [(b"", "empty"), (b"ab\n\xff", r"byte 3 (line 2)"), (b"\n \n", "blank")])
def test_bad_text_is_refused(content, says, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(content)
    assert prepare(tmp_path / "made", tmp_path / "a.txt") == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message


# --- runs


def run_of(mode, tokenizer, *paths, **data):
    model = ModelConfig(mode=mode, d_model=8, num_heads=2, max_length=64)
    return RunConfig(
        model=model, batch_size=8, data=DataConfig(train=tuple(map(str, paths)), tokenizer=tokenizer, **data)
    )


@pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])
@pytest.mark.parametrize("objective", ["auto", "prefix-lm", "ul2"])
def test_a_run_reads_what_it_would_read_of_the_text(mode, objective, texts):
    path, folder = texts
    held_out = dict(validation=(str(path),), objective=objective)
    ours = load_data(run_of(mode, "bpe", folder, **held_out))
    theirs = load_data(run_of(mode, str(folder / "tokenizer.json"), path, **held_out))
    assert ours.config.data.tokenizer == str(folder / "tokenizer.json")
    assert ours.report == theirs.report
    for step in (0, 1, 60):
        one, other = ours.batches().draw(step), theirs.batches().draw(step)
        assert one.sha == other.sha
        np.testing.assert_array_equal(one.batch.target.ids, other.batch.target.ids)
        np.testing.assert_array_equal(one.batch.labels, other.batch.labels)


@pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])
def test_so_it_is_with_pairs(mode, tmp_path):
    path = write_pairs(tmp_path / "a.tsv", 3000)
    assert prepare(tmp_path / "made", path, tokenizer_size=300, shard_tokens=20_000) == 0
    options = dict(validation=(str(path),), too_long="drop")
    ours = load_data(run_of(mode, "bpe", tmp_path / "made", **options))
    theirs = load_data(run_of(mode, str(tmp_path / "made" / "tokenizer.json"), path, **options))
    assert [line.partition(";")[0] for line in ours.report] == [line.partition(";")[0] for line in theirs.report]
    one, other = ours.batches().draw(3).batch, theirs.batches().draw(3).batch
    np.testing.assert_array_equal(one.labels, other.labels)


def test_some_of_it_is_held_out(texts):
    path, folder = texts
    data = load_data(run_of("decoder-only", "bpe", folder, validation_fraction=0.2))
    whole = read((str(folder),)).parts[0].size
    corpus = read((str(folder),))
    left, right = corpus.split(0.2)
    assert (len(left) + len(right), left.parts[0].size + right.parts[0].size) == (len(corpus), whole)
    assert right.parts[0].size / whole == pytest.approx(0.2, abs=0.001)
    assert len(data.held_out) == 256
    assert data.held_out.documents[0] == read((str(path),)).documents[len(left)]


def test_another_tokenizer_is_refused(texts, tmp_path):
    path, folder = texts
    run = run_of("decoder-only", "bpe", path)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer_size=280))
    (tmp_path / "tokenizer.json").write_text(load_data(run).tokenizer.to_json())
    with pytest.raises(InputError, match="its tokens are of another tokenizer than"):
        load_data(run_of("decoder-only", str(tmp_path / "tokenizer.json"), folder))


@pytest.mark.long
def test_evaluate_wants_the_text(texts, tmp_path, capsys):
    _, folder = texts
    small = ["--model.d-model=8", "--model.num-heads=2", "--model.num-layers=1", "--model.max-length=32"]
    flags = ["--data.train", str(folder), "--workdir", str(tmp_path / "run"), "--steps=2", "--batch-size=2", *small]
    assert run_command(["train", "text", *flags, "--eval-rows=4", "--max-new-tokens=4"]) == 0
    assert run_command(["train", "text", *flags, "--eval-rows=4", "--max-new-tokens=4"]) == 0
    assert "finished already" in capsys.readouterr().err
    assert run_command(["evaluate", str(tmp_path / "run"), "--data", str(folder)]) == 2
    assert "holds tokens; give the text" in capsys.readouterr().err
