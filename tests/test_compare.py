"""Laws of comparisons: arms have one budget, each is trained once, one that fails leaves the others."""

import dataclasses
import html.parser
import itertools
import json
import time
import typing

import pytest

from transformer_jax.cli import run_command
from transformer_jax.compare import STUDIES, measure
from transformer_jax.compare.arms import arms_of, count, matched
from transformer_jax.compare.command import PAGE, RESULT, CompareArguments, means_of
from transformer_jax.compare.page import answer, columns_of, page
from transformer_jax.config import DataConfig, ModelConfig, RunConfig
from transformer_jax.errors import InputError
from transformer_jax.metrics import read_records
from transformer_jax.page import Line, chart

ARMS = STUDIES["modes"]


@pytest.mark.parametrize("mode", ["encoder-decoder", pytest.param("decoder-only", marks=pytest.mark.long)])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("layers", [(2, 3), *(pytest.param(each, marks=pytest.mark.long) for each in [(1, 1), (4, 4)])])
def test_arms_have_as_many_parameters(mode, arm, layers):
    model = ModelConfig(
        mode=mode, vocab_size=50, d_model=32, num_heads=2, num_encoder_layers=layers[0], num_layers=sum(layers)
    )
    found = matched(model, ARMS[arm], count(model))
    assert found.mode == ARMS[arm]["mode"]
    assert count(found) == pytest.approx(count(model), rel=0.005)
    assert 0.5 < found.d_ff / model.d_ff < 2


@pytest.mark.long
def test_the_closed_form_is_that_of_the_model():
    """With ff = 4 d and without biases, L = Le + 4/3 Ld but for norms."""
    options = dict(vocab_size=50, d_model=48, num_heads=2, d_ff=192, use_bias=False, position="rope")
    both = ModelConfig(mode="encoder-decoder", num_encoder_layers=3, num_layers=3, **options)
    alone = ModelConfig(mode="decoder-only", num_layers=7, **options)
    assert count(alone) == pytest.approx(count(both), rel=0.005)
    assert matched(both, ARMS["decoder-only"], count(both)).num_layers == 7


def test_a_model_too_small_to_be_matched_is_refused():
    model = ModelConfig(mode="decoder-only", vocab_size=50, d_model=32, num_heads=2, num_layers=1, d_ff=1)
    with pytest.raises(InputError, match="no encoder-decoder model"):
        matched(model, ARMS["encoder-decoder"], count(model))


ARMS_OF_STUDIES = [
    pytest.param(study, arm, marks=[] if study == "path" else pytest.mark.long)
    for study in list(STUDIES)[1:]
    for arm in STUDIES[study]
]


@pytest.mark.parametrize(("study", "arm"), ARMS_OF_STUDIES)
def test_arms_of_a_study_are_of_one_size(study, arm):
    """And each is what its name says, whatever the recipe's own model is."""
    model = ModelConfig(mode="encoder-decoder", vocab_size=50, d_model=64, num_heads=4, num_layers=2)
    found = matched(model, STUDIES[study][arm], count(model))
    assert count(found) == pytest.approx(count(model), rel=0.005)
    for field, value in STUDIES[study][arm].items():
        expected = value(model) if callable(value) else value
        assert getattr(found, field) == (model.num_heads if expected is None else expected)
    assert {field.name for field in dataclasses.fields(found)} >= set(STUDIES[study][arm])


def test_the_path_changes_one_thing_at_a_time():
    arms = list(STUDIES["path"].values())
    changed = [{name for name in now if now[name] != before[name]} for before, now in itertools.pairwise(arms)]
    assert changed == [
        {"norm_placement"},
        {"norm"},
        {"position"},
        {"activation", "gated"},
        {"num_kv_heads"},
        {"mode"},
    ]


def test_studies_are_those_that_can_be_asked_for():
    assert typing.get_args(typing.get_type_hints(CompareArguments)["study"]) == tuple(STUDIES)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(f"{'ab' * (i % 5 + 1)}{i}\t{'ba' * (i % 3 + 1)}{i}\n" for i in range(300)))
    return str(path)


def run_of(path, **data):
    model = ModelConfig(
        mode="encoder-decoder", d_model=16, num_heads=2, num_layers=1, num_encoder_layers=1, max_length=48
    )
    return RunConfig(steps=100, batch_size=4, model=model, data=DataConfig(train=(path,), tokenizer="char", **data))


@pytest.mark.parametrize("match", ["parameters", "flops"])
def test_the_budget_is_one(match, pairs):
    arms = arms_of(run_of(pairs), "modes", tuple(ARMS), match)
    cost = {"parameters": lambda arm: arm.examples, "flops": lambda arm: arm.flops}[match]
    budgets = [arm.run.steps * cost(arm) for arm in arms.values()]
    assert budgets == pytest.approx([budgets[0]] * 3, rel=0.02)
    assert arms["encoder-decoder"].run.steps == 100


def test_of_running_text_all_predict_the_same_part(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 400)
    arms = arms_of(run_of(str(tmp_path / "text.txt")), "modes", tuple(ARMS), "parameters")
    assert {arm.run.data.objective for arm in arms.values()} == {"prefix-lm"}


def test_arms_that_would_leave_out_other_pairs_are_refused(pairs, tmp_path):
    """A pair that fits the rows of an encoder-decoder, and not those of a decoder-only model, which hold both sides."""
    path = tmp_path / "long.tsv"
    path.write_text("ab\tba\n" * 200 + f"{'ab' * 16}\t{'ba' * 16}\n")
    run = run_of(str(path), too_long="drop", validation=(pairs,))
    with pytest.raises(InputError, match=r"for encoder-decoder 201 and 300, for decoder-only 200 and 300\. Raise"):
        arms_of(run, "modes", ("encoder-decoder", "decoder-only"), "parameters")
    longer = dataclasses.replace(run, model=run.model.replace(max_length=80))
    assert arms_of(longer, "modes", ("encoder-decoder", "decoder-only"), "parameters")["decoder-only"].kept == (
        201,
        300,
    )


# --- the command

SMALL = ["--model.d-model=16", "--model.num-heads=2", "--model.num-layers=1", "--model.num-encoder-layers=1"]
SMALL += ["--model.max-length=48", "--batch-size=4", "--steps=4", "--eval-every=2", "--num-samples=4", "--log-every=1"]
SMALL += [
    "--max-new-tokens=8",
    "--data.tokenizer=char",
    "--seeds=1",
    "--jobs=2",
    "--arms",
    "encoder-decoder",
    "decoder-only",
]


class Reader(html.parser.HTMLParser):
    """Whether every tag is closed, and what is fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "line"):
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.fetched == []
    return reader.text


@pytest.mark.long
def test_a_comparison_is_made_once_and_goes_on(pairs, tmp_path, capsys):
    """A run that is damaged beyond use fails alone; all that is done is not done again."""
    words = ["compare", "pairs", "--data.train", pairs, *SMALL, "--workdir", str(tmp_path)]
    assert run_command(words) == 0
    assert "has the better exact match" in capsys.readouterr().out
    result = json.loads((tmp_path / RESULT).read_text())
    for each in result["arms"].values():
        (run,) = each["runs"].values()
        assert run["scores"]["loss"] > 0
        assert each["mean"] == run["scores"]
        assert len(run["curve"]) == 2
        assert run["curve"][-1]["step"] == each["steps"]
        assert set(each["latency"]) == {"8", "32"}
        assert each["memory"] > 3 * 4 * each["parameters"]
        assert each["parameters"] == pytest.approx(result["arms"]["encoder-decoder"]["parameters"], rel=0.01)
    text = read((tmp_path / PAGE).read_text())
    assert "With equal parameters" in text
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    for path in (tmp_path / "decoder-only-0" / "checkpoints").rglob("MANIFEST.sha256"):
        path.write_text("no manifest")
    (tmp_path / "decoder-only-0" / "result.json").unlink()
    assert run_command([*words, "--jobs=1"]) == 1
    assert {path: path.stat().st_mtime_ns for path in before if "encoder" in str(path)} == {
        path: time for path, time in before.items() if "encoder" in str(path)
    }
    assert "What failed" in read((tmp_path / PAGE).read_text())
    assert run_command([*words, "--match", "flops"]) == 2
    assert "holds another comparison: match: parameters -> flops" in capsys.readouterr().err
    records = read_records(tmp_path / "encoder-decoder-0" / "metrics.jsonl")
    assert len({(r["step"], r["split"]) for r in records if "split" in r}) == sum("split" in r for r in records)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arms", "decoder-only"], "give two or more, each once"),
        (["--arms", "decoder-only", "encoder-decodr"], "Did you mean 'encoder-decoder'?"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
        (["--match", "speed"], "speed"),
    ],
)
def test_a_wrong_flag_is_answered(words, says, capsys):
    try:
        status = run_command(["compare", "dates", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    captured = capsys.readouterr()
    assert says in " ".join((captured.err + captured.out).split())


# --- the page


def made(first, second):
    """A comparison of two arms with these exact matches."""

    def arm(values):
        runs = {
            str(seed): {
                "scores": {"loss": 1.0, "exact_match": value},
                "curve": [
                    {"step": 10, "loss": 2.0, "exact_match": 0.0},
                    {"step": 20, "loss": 1.0, "exact_match": value},
                ],
            }
            for seed, value in enumerate(values)
        }
        numbers = dict.fromkeys(("parameters", "steps", "flops_per_step", "memory", "tokens_per_second"), 1000)
        shape = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 3, "d_ff": 4, "seconds_per_step": 0.1}
        costs = {"training_flops": 1000.0, "latency": {"8": 0.01}}
        return numbers | shape | costs | {"choices": {"mode": "x"}, "runs": runs}

    return {
        "recipe": "a <b>",
        "study": "modes",
        "match": "parameters",
        "seeds": [0, 1],
        "command": "transformer-jax compare",
        "device": "a & b",
        "versions": {"transformer_jax": "1", "jax": "2"},
        "arms": {"decoder-only": arm(first), "encoder-decoder": arm(second)},
    }


def test_arms_are_measured_in_turns_and_without_what_compiles(monkeypatch):
    """So that a machine that slows down does so for all; the first turn of a round is no time of a step."""

    class Counting(measure.Watch):
        def __init__(self, name):
            self.name = name

        def measure(self):
            order.append(self.name)

    order = []
    measure.take_turns([Counting("a"), Counting("b")])
    assert order == ["a", "b"] * measure.ROUNDS
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    turns = []
    times = measure.seconds_of(lambda turn: turns.append(turn) or (time.sleep(0.2) if turn == 0 else None))
    assert turns == list(range(measure.TURNS + 1))
    assert len(times) == measure.TURNS
    assert max(times) < 0.2


def test_means_are_of_the_runs_that_came_to_their_end():
    runs: dict = {seed: {"scores": {"loss": loss}} for seed, loss in (("0", 1.0), ("1", 3.0))}
    assert means_of(runs | {"2": {"error": "the disk is full"}}) == {"loss": 2.0}
    assert means_of({"0": {"error": "the disk is full"}}) == {}


def test_the_answer_says_whether_seeds_overlap():
    clear, close = made([0.9, 0.8], [0.5, 0.6]), made([0.5, 0.8], [0.9, 0.6])
    assert "decoder-only has the better exact match: 85.0% against 55.0%" in answer(clear, columns_of(clear))
    assert "every seed of it is ahead of every seed of the next. " in answer(clear, columns_of(clear))
    assert "encoder-decoder has the better exact match: 75.0% against 65.0%" in answer(close, columns_of(close))
    assert "but the seeds of both overlap. " in answer(close, columns_of(close))


@pytest.mark.parametrize("failed", [("decoder-only",), ("decoder-only", "encoder-decoder")])
def test_where_arms_failed_there_is_no_answer(failed):
    result = made([0.9, 0.8], [0.5, 0.6])
    for arm in failed:
        result["arms"][arm]["runs"] = {"0": {"error": "the disk is full"}}
    assert answer(result, columns_of(result)).startswith("Fewer than two arms were trained to their end")
    assert "the disk is full" in read(page(result))


def test_the_page_is_whole_and_quotes_what_it_shows():
    result = made([0.9, 0.8], [0.5, 0.6])
    result["arms"]["decoder-only"]["runs"]["1"] = {"error": "the disk <is> full"}
    text = read(page(result))
    assert "a <b>" in text
    assert "decoder-only, seed 1: the disk <is> full" in text
    assert "90.0%" in text


def test_a_chart_of_one_point_is_one():
    assert "<polyline" in chart("t", "x", "y", [Line("a", [(5.0, [1.0])])])
    assert chart("t", "x", "y", [Line("a", [])]) == ""
