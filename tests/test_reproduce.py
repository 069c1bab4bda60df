"""Laws of reproductions: what is published stays as it is, each stage is made once, and less than all is said so."""

import dataclasses
import json
from pathlib import Path

import pytest

from transformer_jax.cli import run_command
from transformer_jax.config import CheckpointConfig
from transformer_jax.metrics import read_records
from transformer_jax.recipes import find_recipe
from transformer_jax.reproduce import PUBLISHED, pipeline
from transformer_jax.reproduce.command import RESULT, about, overview, verdict

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_can_be_asked_for(name, capsys):
    """Without data the command says what it takes."""
    published = PUBLISHED[name]
    assert find_recipe(published.recipe).steps >= 1000
    assert run_command(["reproduce", name]) == 0
    said = capsys.readouterr().out
    assert f"{published.value:g} ({published.source})" in said
    assert f"transformer-jax reproduce {name} --data F" in said
    assert ("was not run for this project" in said) is (not published.measured)
    assert name in overview()


def test_the_recipe_of_multi30k_is_that_of_the_paper():
    run = find_recipe("multi30k-tiny")
    model, published = run.model, PUBLISHED["multi30k-tiny"]
    assert (model.d_model, model.d_ff, model.num_heads) == (128, 256, 4)
    assert (model.num_layers, model.num_encoder_layers) == (4, 4)
    assert (model.norm_placement, model.dropout_rate, run.loss.label_smoothing) == ("post", 0.3, 0.1)
    assert model.initializer == "xavier"  # fairseq's
    assert (run.steps, run.batch_size * model.max_length) == (8000, 7168)
    assert (run.data.tokenizer, run.data.tokenizer_size) == ("bpe-words", 10_000)  # subword-nmt's
    optimizer = run.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (0.005, "inverse-sqrt", 2000)
    assert (published.averaged, published.beam_size, published.value) == (10, 5, 41.02)
    assert published.early_stopping  # fairseq's
    assert run.checkpoint.keep >= published.averaged + 2  # the last evaluated, and that of the last step


def test_what_is_averaged_are_ends_of_epochs(tmp_path):
    """fairseq's --num-epoch-checkpoints; the run's end and its evaluations are saved too and are none."""
    for step in (54, 108, 162, 200, 216, 250):
        (tmp_path / str(step)).mkdir()
    assert pipeline.averaged_steps(tmp_path, 3, 54) == [108, 162, 216]
    assert pipeline.averaged_steps(tmp_path, 10, 54) == [54, 108, 162, 216]
    assert pipeline.averaged_steps(tmp_path, 3, 1000) == [250]


def test_what_was_measured_is_what_the_docs_say():
    published = PUBLISHED["multi30k-tiny"]
    found = json.loads((ROOT / "docs/reproduce-multi30k-tiny.json").read_text())
    assert (found["trained"], found["steps"]) == (8000, 8000)
    assert (round(found["scores"][published.metric], 2),) == published.measured
    assert "gave 40.91, which does not reach it." in about("multi30k-tiny", published)
    two = dataclasses.replace(published, measured=(40.96, 40.61))
    assert "gave 40.96 and 40.61 with the seeds 0 and 1, 40.785 on average, which does not reach it." in about("x", two)
    loss = PUBLISHED["shakespeare-char-cpu"]
    assert f"validation loss {loss.measured[0]} over the whole" in (ROOT / "README.md").read_text()
    assert f"gave {loss.measured[0]}.\n" in about("shakespeare-char-cpu", loss)


def test_the_verdict_is_that_of_the_band():
    loss, bleu = PUBLISHED["shakespeare-char-cpu"], PUBLISHED["multi30k-tiny"]

    def said(published, measured, trained=10):
        found = {"scores": {published.metric: measured}, "trained": trained, "steps": 10}
        return verdict(published, found)

    assert "1.85 measured, 1.88 published" in said(loss, 1.85)
    assert said(loss, 1.88).endswith(": reached (at most 1.88).")
    assert "NOT reached" in said(loss, 1.881)
    assert said(bleu, 41.0).endswith(": reached (at least 41).")
    assert "NOT reached" in said(bleu, 40.9)
    assert "after 9 of 10 steps, so this is no reproduction yet" in said(bleu, 60.0, trained=9)
    assert "at most 1.88 counts as reached" in about("shakespeare-char-cpu", loss)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["multi30k-tiny", "--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["multi30k-tiny", "--data", "."], "has no train.en, plain or .gz"),
        (["multi30k-tiny", "--data", "text.txt"], "is no folder"),
        (["shakespeare", "--data", "."], "'shakespeare' is none of"),
        (["--data", "."], "NAME is missing"),
        (["multi30k-tiny", "--data", ".", "--stop-after", "soon"], "stop_after='soon' must be a time"),
    ],
)
def test_a_wrong_flag_is_answered(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    try:
        status = run_command(["reproduce", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    captured = capsys.readouterr()
    assert says in " ".join((captured.err + captured.out).replace("│", " ").split())


def shrunk(name):
    """The recipe with a small model and few steps."""
    run = find_recipe(name)
    model = run.model.replace(d_model=16, num_heads=2, num_layers=1, d_ff=16)
    return dataclasses.replace(
        run,
        steps=6,
        batch_size=4,
        eval_every=3,
        num_samples=2,
        max_new_tokens=4,
        model=model,
        data=dataclasses.replace(run.data, tokenizer_size=300),
        optimizer=dataclasses.replace(run.optimizer, warmup_steps=2),
        checkpoint=CheckpointConfig(every=1, keep=10),
    )


@pytest.mark.long
def test_less_than_all_steps_is_no_reproduction_and_the_rest_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "find_recipe", shrunk)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    words = ["reproduce", "shakespeare-char-cpu", "--data", str(tmp_path / "text.txt")]
    words += ["--workdir", str(tmp_path / "run")]
    assert run_command([*words, "--stop-at", "2"]) == 0
    assert "after 2 of 6 steps, so this is no reproduction yet" in capsys.readouterr().out
    assert run_command(words) == 1  # a model as small as that does not get there
    assert "NOT reached (at most 1.88)" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / RESULT).read_text())
    assert (found["trained"], found["steps"]) == (6, 6)
    assert found["published"]["value"] == 1.88
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record.get("split") == "validation"]
    assert found["scores"]["loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.long
def test_pairs_become_tokens_of_moses_and_their_last_checkpoints_one_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "find_recipe", shrunk)
    for number, names in enumerate(PUBLISHED["multi30k-tiny"].files.values()):
        for name in names:
            lines = [f"It's the {n}th Dog (of {number}), isn't it?\n" for n in range(300)]
            (tmp_path / name).write_text("".join(lines))
    words = ["reproduce", "multi30k-tiny", "--data", str(tmp_path), "--workdir", str(tmp_path / "run")]
    assert run_command(words) == 1
    assert "NOT reached (at least 41)" in capsys.readouterr().out
    line = (tmp_path / "run" / "tokens" / "train.en").read_text().splitlines()[7]
    assert line == "it 's the 7th dog ( of 0 ) , isn 't it ?"
    found = json.loads((tmp_path / "run" / RESULT).read_text())
    assert found["of"] == "the mean of 6 checkpoints, 1 to 6"
    assert "case:lc" in found["scores"]["tokenized_bleu_lowercased_signature"]
    assert (tmp_path / "run" / "averaged-6" / "config.json").exists()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run_command([*words[:-1], str(tmp_path / "moved")]) == 1
    assert (tmp_path / "moved" / "metrics.jsonl").read_text() == before
