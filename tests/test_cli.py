"""Laws of the command line: runs end to end, and resume to the bit. What is wrong is in test_bad_inputs.py."""

import contextlib
import dataclasses
import datetime
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from transformer_jax.cli import COMMANDS, run_command
from transformer_jax.config import RunConfig
from transformer_jax.config_file import flat
from transformer_jax.data.corpora import Pairs
from transformer_jax.data.load import make_rows
from transformer_jax.errors import InputError
from transformer_jax.evaluate import evaluate_run
from transformer_jax.run import load_run

TINY = """--steps 6 --batch-size 4 --num-samples 8 --eval-every 3 --eval-rows 8 --checkpoint.every 3 --log-every 1
    --model.d-model 16 --model.d-ff 32 --model.num-layers 1 --model.num-heads 2 --model.max-length 32
    --data.tokenizer char --max-new-tokens 12 --optimizer.learning-rate 0.03"""
MODES = ("encoder-decoder", "decoder-only")
every_mode = pytest.mark.parametrize("mode", MODES)
one_mode = pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.slow)])
# JAX's settings by default, and those that keep what is compiled
SLOW = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
ROOT = Path(__file__).parent.parent


def dates(count):
    days = [datetime.date(2001, 1, 1) + datetime.timedelta(37 * number) for number in range(count)]
    return [(day.strftime("%d.%m.%Y"), day.isoformat()) for day in days]


LINES = ["\t".join(pair) + "\n" for pair in dates(120)]
FILES = {
    "pairs.tsv": "".join(LINES),
    "held-out.tsv": "".join(LINES[108:]),
    "text.txt": "the cat sat on the mat. a dog saw it. " * 60,
    "emoji.txt": "👋🙂🚀🎉" * 300,
}


@pytest.fixture(autouse=True, scope="module")
def quick(tmp_path_factory):
    """In a folder with the files; what is compiled is kept for the other runs of this file."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("cli")
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    os.chdir(folder)
    finished.cache_clear()  # another file's runs are in its own folder
    settings = dict(zip(SLOW, (str(folder / "compiled"), 0.0, -1)))
    for each in (settings, SLOW):
        for name, value in each.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if each is settings:
            yield settings
    os.chdir(before)


def call(*words, stdin=""):
    """(exit status, stdout, stderr) of a command line in this process; text is cut at spaces, a list is not."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    words = [word for part in words for word in (part if isinstance(part, list) else str(part).split())]
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode()))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run_command(words)
    except SystemExit as error:
        status = error.code
    finally:
        sys.stdin = before
    return status, out.getvalue(), err.getvalue()


def train(workdir, mode, *words, data="pairs"):
    file = {"pairs": "pairs.tsv", "text": "text.txt"}[data]
    return call("train", data, TINY, "--data.train", file, "--workdir", workdir, "--model.mode", mode, *words)


@functools.cache
def finished(mode, data="pairs"):
    """A finished run of a cell of the table of data and modes."""
    workdir = Path(f"{data}-{mode}")
    status, out, err = train(workdir, mode, data=data)
    assert (status, out) == (0, ""), err
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def lines(workdir, name, fields):
    """{step: those fields} of the train or validation lines; each step is there once."""
    chosen = [record for record in records(workdir) if record.get("split") == name]
    found = {record["step"]: [record[field] for field in fields.split()] for record in chosen}
    assert len(found) == len(chosen)
    return found


def same_numbers(one, other):
    """Two runs saw the same batches and rates, and computed the same losses, scores and parameters to the bit."""
    fields = {"train": "loss grad_norm learning_rate batch_sha", "validation": "loss accuracy"}
    assert all(lines(one, name, some) == lines(other, name, some) for name, some in fields.items())
    assert records(one)[-1] == records(other)[-1]


# --- a run


@every_mode
def test_a_run_leaves_its_files(mode):
    run = finished(mode)
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "samples.txt"} <= names
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "6"}
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "samples.txt").read_text().count("expected") == 16
    assert json.loads((run / "config.json").read_text())["steps"] == 6


@every_mode
def test_metrics_are_as_promised(mode):
    """A line for each step and each evaluation, the fields of each kind, one compilation, and an end."""
    run = finished(mode)
    found = lines(run, "train", "compiles loss tokens learning_rate grad_norm tokens_per_second data_wait batch_sha")
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert all(compiles == 1 and loss > 0 and tokens > 0 for compiles, loss, tokens, *_ in found.values())
    assert len({values[-1] for values in found.values()}) == 6
    scores = lines(run, "validation", "loss tokens perplexity accuracy exact_match exact_match_sample")
    assert [(step, values[-1]) for step, values in scores.items()] == [(3, 8), (6, 8)]
    assert records(run)[-1] == {"event": "end", "step": 6, "param_digest": records(run)[-1]["param_digest"]}


@every_mode
def test_a_finished_run_is_left_alone(mode):
    """The same command again exits 0 and changes no file."""

    def state():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}

    run = finished(mode)
    before = state()
    status, _, err = train(run, mode)
    assert status == 0
    assert "finished already" in err
    assert state() == before


@pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.long)])
def test_a_stopped_run_goes_on_to_the_bit(mode):
    """Stopped at step 3, and at 4, where no checkpoint was due; the same command gives the uninterrupted run."""
    run = Path(f"stopped-{mode}")
    for step in (3, 4):
        assert train(run, mode, "--stop-at", step)[0] == 0
        assert records(run)[-1] == {"event": "preempted", "step": step, "reason": "stop_at"}
    assert train(run, mode)[0] == 0
    assert [record["step"] for record in records(run) if record.get("event") == "resume"] == [3, 4]
    same_numbers(run, finished(mode))


def test_a_saved_config_reruns():
    """In another folder: the same numbers to the bit, the same config but for the folder."""
    run = finished("decoder-only")
    assert call("train --workdir again --config", run / "config.json")[0] == 0
    same_numbers(Path("again"), run)
    first, second = (json.loads((path / "config.json").read_text()) for path in (run, Path("again")))
    assert first | {"workdir": "again"} == second


def test_a_metrics_line_cut_short_is_healed():
    """After a crash within a line, and lines that no checkpoint knows of, each step is there once again."""
    train("healed", "decoder-only --stop-at 3")
    with Path("healed/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "train", "loss": 9}\n{"step": 5, "spl')
    assert train("healed", "decoder-only --stop-at 5")[0] == 0
    found = lines(Path("healed"), "train", "loss")
    assert list(found) == [1, 2, 3, 4, 5]
    assert found[4] != [9]


def test_the_time_limit_saves_and_exits_75():
    assert train("late", "decoder-only --stop-after 0.01s")[0] == 75
    last = records(Path("late"))[-1]
    assert last["event"] == "preempted"
    assert Path("late/checkpoints", str(last["step"])).is_dir()


def start(settings, flags):
    """`python train.py` as a process with warnings as errors, which shares compiled functions with this one."""
    env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}  # as in conftest.py
    env |= {name.upper(): str(value) for name, value in settings.items()}
    words = [sys.executable, "-W", "error", str(ROOT / "train.py"), *flags.split()]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_of(run):
    path = run / "metrics.jsonl"
    return path.read_text().count('"batch_sha"') if path.exists() else 0


def test_signals_save_and_exit_75(quick):
    """SIGINT, then SIGTERM to the same command that went on from there."""
    run, done = Path("signalled"), 0
    endless = "--steps 100000 --eval-every 100000 --checkpoint.every 100000 --model.mode decoder-only"
    for number in (signal.SIGINT, signal.SIGTERM):
        with start(quick, f"pairs {TINY} --data.train pairs.tsv --workdir {run} {endless}") as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None and steps_of(run) < done + 3:
                time.sleep(0.1)
            process.send_signal(number)
            _, err = process.communicate(timeout=120)
        assert process.returncode == 75, err
        last = records(run)[-1]
        assert (last["event"], last["reason"]) == ("preempted", number.name)
        done = last["step"]
        assert list(lines(run, "train", "loss")) == list(range(1, done + 1))
    events = [record["event"] for record in records(run) if "event" in record]
    assert events == ["start", "preempted", "resume", "start", "preempted"]


def test_train_py_reads_dates(quick):
    """`python train.py` with nothing but sizes: the embedded data, as pairs, in a folder of its own name."""
    sizes = (
        "--model.d-model 16 --steps 2 --batch-size 32 --eval-every 2 --num-samples 4 --log-every 1 --model.num-layers 1"
    )
    with start(quick, sizes) as process:
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, ""), err
    assert "a rule of five lines" in err
    assert list(lines(Path("runs/dates"), "train", "loss")) == [1, 2]
    assert list(lines(Path("runs/dates"), "validation", "exact_match")) == [2]


# --- what one does with a run


@one_mode
def test_generate_answers_line_by_line(mode):
    """From --prompt, stdin or a file, to stdout or a file, in batches of any size: the same lines in order."""
    run, prompts = finished(mode), ["", *(source for source, _ in dates(5))]
    whole = call("generate", run, stdin="\n".join(prompts))
    assert (whole[0], whole[1].count("\n"), whole[2]) == (0, 6, "")
    assert len(whole[1]) > 12
    assert whole == call("generate", run, "--batch-size", 2, stdin="\n".join(prompts) + "\n")
    for prompt, line in zip(prompts, whole[1].splitlines()):
        assert call("generate", run, "--prompt", [prompt]) == (0, line + "\n", "")
    Path("in.txt").write_text("\n".join(prompts) + "\n")
    assert call("generate", run, "--input in.txt --output out.txt") == (0, "", "")
    assert Path("out.txt").read_text() == whole[1]


def test_sampling_is_its_seed():
    def drawn(*words):
        return call("generate", finished("decoder-only"), "--prompt 01.02.2003 --temperature 3", *words)

    assert drawn("--seed 1") == drawn("--seed 1")
    assert len({drawn("--seed", seed)[1] for seed in range(4)}) > 1
    assert drawn("--top-k 1") == call("generate", finished("decoder-only"), "--prompt 01.02.2003")
    assert len(drawn("--max-new-tokens 2")[1].strip()) <= 2


@one_mode
def test_beams_objects_and_prefixes(mode):
    """Several outputs for a prompt stand one after the other, the best first; as objects they have ids and scores."""
    run = finished(mode)
    prompts = [source for source, _ in dates(3)]
    words = "--beam-size 3 --num-return 2 --max-new-tokens 8"
    status, out, err = call("generate", run, words, stdin="\n".join(prompts))
    assert (status, out.count("\n"), err) == (0, 6, "")
    status, found, err = call("generate", run, words, "--json", stdin="\n".join(prompts))
    objects, tokenizer = [json.loads(line) for line in found.splitlines()], load_run(run).tokenizer
    assert [(o["line"], o["prompt"]) for o in objects] == [*enumerate(prompts, 1)]
    assert [answer["text"] for o in objects for answer in o["outputs"]] == out.splitlines()
    for answers in (o["outputs"] for o in objects):
        assert answers[0]["score"] >= answers[1]["score"]
        assert all(tokenizer.decode(answer["ids"]) == answer["text"] for answer in answers)
        assert all(len(answer["ids"]) == len(answer["tokens"]) for answer in answers)
    status, out, err = call("generate", run, "--prefix 19 --prompt", prompts[:1])
    assert (status, out[:2], err) == (0, "19", "")


@pytest.mark.long
@one_mode
def test_a_draft_changes_nothing(mode):
    """A run proposes for itself, in batches; drawn outputs come from its own seed."""
    run, prompts = finished(mode), "\n".join(source for source, _ in dates(4))
    words = "--max-new-tokens 8 --batch-size 2"
    wanted = call("generate", run, words, stdin=prompts)
    assert call("generate", run, words, "--draft", run, "--draft-tokens 3", stdin=prompts) == wanted
    drawn = call("generate", run, words, "--temperature 2 --draft", run, stdin=prompts)
    assert drawn[0] == 0
    assert drawn == call("generate", run, words, "--temperature 2 --draft", run, stdin=prompts)


def test_on_a_terminal_tokens_appear_as_they_come(monkeypatch):
    """In more than one part, which together are the output."""
    parts = []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            parts.append(text)
            return super().write(text)

    words = ["generate", str(finished("decoder-only")), "--prompt", "01.02.2003", "--max-new-tokens", "8"]
    wanted = call("generate", finished("decoder-only"), "--prompt 01.02.2003 --max-new-tokens 8")[1]
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        assert run_command(words) == 0
    assert terminal.getvalue() == wanted
    assert len([part for part in parts if part]) > 2


@every_mode
def test_evaluate_prints_one_object(mode):
    """Of the data that the run held out itself, its scores are those of the last evaluation, to 1e-6."""
    status, out, err = call("evaluate", finished(mode), "--data held-out.tsv")
    assert (status, err) == (0, "")
    scores, fields = json.loads(out), "loss perplexity accuracy tokens"
    wanted = f"{fields} bits_per_byte exact_match bleu bleu_signature chrf chrf_signature"
    assert set(wanted.split()) <= set(scores)
    last = lines(finished(mode), "validation", fields)[6]
    assert [scores[field] for field in fields.split()] == pytest.approx(last, rel=1e-6)
    assert (scores["examples"], scores["decoded"], scores["step"]) == (12, 12, 6)
    limited = json.loads(call("evaluate", finished(mode), "--data held-out.tsv --limit 5")[1])
    assert (limited["loss"], limited["decoded"]) == (scores["loss"], 5)


@one_mode
def test_what_is_left_out_of_a_score_is_told(mode):
    """A pair that is too long for a row is refused, or counted where the run leaves such pairs out."""
    run, day = load_run(finished(mode)), "2003-05-01"
    pairs = Pairs(["1.5.2003", "1.5.2003 " * 9], [day, day], ["line 1", "line 2"])
    with pytest.raises(InputError, match=r"^--data: 1 of 2 pairs .* the first is line 2"):
        evaluate_run(run, pairs)
    data = dataclasses.replace(run.config.data, too_long="drop")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    scores, outputs = evaluate_run(run, pairs)
    assert (scores["examples"], scores["left_out"], scores["decoded"], len(outputs)) == (1, 1, 1, 1)
    assert "left_out" not in evaluate_run(run, pairs.take(slice(1)))[0]


@one_mode
def test_pairs_are_scored_that_are_longer_than_rows_in_training(mode):
    """In training the settings that are too small are named; what is scored may be as long as the model takes."""
    run, day = load_run(finished(mode)), "2003-05-01"
    wide, pairs = run.config, Pairs(["1.5.2003", "1.5.2003.."], [day, day], ["line 1", "line 2"])
    narrow = dataclasses.replace(wide, data=dataclasses.replace(wide.data, source_length=10, target_length=11))
    says = "11 [+] 11 tokens, .* room for 10 [+] 11" if mode == MODES[0] else "22 tokens, .* room for 21"
    with pytest.raises(InputError, match=rf"{says}. Raise --data.source-length, --data.target-length or --model"):
        make_rows("train", pairs, narrow, run.tokenizer)
    assert evaluate_run(dataclasses.replace(run, config=narrow), pairs) == evaluate_run(run, pairs)


@one_mode
@pytest.mark.long
def test_scores_of_given_targets_add_up_to_the_loss(mode):
    """One line a pair, in order; their sum is the loss of `evaluate` times its tokens, to 1e-5."""
    status, out, err = call("evaluate", finished(mode), "--data held-out.tsv --score")
    assert (status, err) == (0, "")
    scores = [float(line) for line in out.splitlines()]
    whole = json.loads(call("evaluate", finished(mode), "--data held-out.tsv")[1])
    assert len(scores) == 12
    assert -sum(scores) == pytest.approx(whole["loss"] * whole["tokens"], rel=1e-5)
    Path("three.tsv").write_text("".join(LINES[110:113]))
    some = call("evaluate", finished(mode), "--data three.tsv --score --batch-size 2")[1]
    assert [float(line) for line in some.splitlines()] == pytest.approx(scores[2:5], abs=1e-4)
    beams = json.loads(call("evaluate", finished(mode), "--data held-out.tsv --beam-size 3 --int8-cache")[1])
    assert (beams["loss"], beams["decoded"]) == (whole["loss"], 12)
    rounded = json.loads(call("evaluate", finished(mode), "--data held-out.tsv --int8-weights")[1])
    assert 0 < abs(rounded["loss"] - whole["loss"]) < 0.02
    assert call("generate", finished(mode), "--int8-weights --prompt", ["1 May 2003"])[0] == 0


@pytest.mark.long
@one_mode
def test_plain_text_works_in_both_modes(mode):
    """Span corruption with an encoder, causal without: bits a byte are given where all is predicted."""
    run = finished(mode, "text")
    assert list(lines(run, "train", "loss")) == [1, 2, 3, 4, 5, 6]
    assert list(lines(run, "validation", "perplexity")) == [3, 6]
    status, out, err = call("evaluate", run, "--data text.txt")
    assert (status, err) == (0, "")
    assert ("bits_per_byte" in json.loads(out)) == (mode == "decoder-only")
    status, out, err = call("evaluate", run, "--data text.txt --score")
    if mode == "decoder-only":
        assert (status, out.count("\n"), err) == (0, 1, "")
        assert float(out) < -1000
    else:
        assert (status, out) == (2, "")
        assert "span-corruption gives a text no probability" in err
    prompt = "the cat <extra_id_0> mat" if mode == "encoder-decoder" else "the cat"
    status, out, err = call("generate", run, "--max-new-tokens 8 --prompt", [prompt])
    assert (status, out.count("\n"), err) == (0, 1, "")


@every_mode
def test_describe_counts_the_parameters(mode):
    total = sum(leaf.size for leaf in jax.tree.leaves(load_run(finished(mode)).params))
    status, out, err = call("describe", finished(mode))
    assert (status, err) == (0, "")
    assert re.search(rf"total\W+{total:,}\D", out)
    assert "60,506,624" in call("describe t5-small")[1]


def test_help_names_every_flag():
    status, out, _ = call("train --help")
    assert status == 0
    for name in flat(RunConfig()):
        assert f"--{name.replace('_', '-')} " in out, name
    assert all(call(name, "--help")[0] == 0 and name in call("--help")[1] for name in COMMANDS)


@pytest.mark.long
@pytest.mark.parametrize("data", ["bytes --data.train emoji.txt", "unigram --data.train text.txt"])
def test_runs_stop_and_go_on_with_any_tokenizer(tmp_path, data):
    """Also where a letter of the samples is four tokens, and where the library rounds what it saves."""
    flags = ("--data.tokenizer-size 60 --workdir", tmp_path, "--data.tokenizer", data)
    for stop in (2, 4):
        assert call("train text", TINY, *flags, "--stop-at", stop)[0] == 0


# --- objectives of plain text


@pytest.mark.parametrize(
    ("mode", "objective", "prompts"),
    [
        pytest.param("encoder-decoder", "ul2", ["the cat", "the <extra_id_0> sat"], marks=pytest.mark.long),
        pytest.param("decoder-only", "ul2", ["the cat", "the <extra_id_0> sat"], marks=pytest.mark.slow),
        pytest.param("decoder-only", "prefix-lm", ["the cat"], marks=pytest.mark.slow),
        ("decoder-only", "fill-in-the-middle", ["the cat", "the <|fim_hole|> sat"]),
    ],
)
def test_every_objective_trains_and_answers(mode, objective, prompts):
    """The loss falls; a prompt is gone on with, and one with a gap is answered; the examples can be looked at."""
    run, words = (
        Path(f"{objective}-{mode}"),
        f"--data.objective {objective} --model.max-length 48 --steps 6 --eval-every 3",
    )
    status, _, err = train(run, mode, words, data="text")
    assert status == 0, err
    losses = [found[0] for found in lines(run, "train", "loss").values()]
    assert losses[-1] < losses[0]
    for prompt in prompts:
        status, out, err = call("generate", run, "--max-new-tokens 5 --prompt", [prompt])
        assert (status, err) == (0, "")
    status, out, err = call("describe", run, "--examples 3")
    assert (status, err) == (0, "")
    assert out.count("\nexample ") == 3
    assert out.count("  learned ") >= 3
    assert out.count("  source ") == (3 if mode == "encoder-decoder" else 0)


@pytest.mark.long
def test_masked_tokens_are_learned_in_place():
    """Training, evaluation and examples; a prompt is refused, and so is a model that cannot see both sides."""
    run, words = Path("masked-lm"), "--data.objective masked-lm --model.max-length 48 --steps 6 --eval-every 3"
    for mode, says in (("decoder-only", "needs --model.prefix-attention"), ("encoder-decoder", "has no source")):
        assert says in train(run, mode, words, data="text")[2]
    status, _, err = train(run, "decoder-only", words, "--model.prefix-attention bidirectional", data="text")
    assert status == 0, err
    losses = [found[0] for found in lines(run, "train", "loss").values()]
    assert losses[-1] < losses[0]
    status, out, err = call("evaluate", run, "--data text.txt")
    assert (status, err) == (0, "")
    assert json.loads(out)["tokens"] == pytest.approx(0.15 * len(Path("text.txt").read_text()), rel=0.2)
    status, out, err = call("generate", run, "--prompt a")
    assert (status, out) == (2, "")
    assert "data.objective='masked-lm' continues and answers no prompts" in err
    status, out, err = call("describe", run, "--examples 3")
    assert (status, err) == (0, "")
    assert out.count("  given ") == out.count("  learned ") == 3
    assert "|<mask>|" in out
