"""Laws of what is around translation: averaged checkpoints, Moses's tokens, scores, sweeps, n-best, significance."""

import dataclasses
import functools
import io
import json
import os
import random
import shutil
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from test_cli import MODES, call, quick  # noqa: F401 - the fixture is for this file too

from transformer_jax import run as run_module
from transformer_jax.average import average, moved
from transformer_jax.checkpoint import Checkpoints
from transformer_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TuningConfig
from transformer_jax.config_file import differences, to_json
from transformer_jax.data.tokenizer import make_tokenizer, papers_of
from transformer_jax.errors import CheckpointError, InputError
from transformer_jax.files import lines_of
from transformer_jax.initial import based_on, initial_params
from transformer_jax.resume import write_papers
from transformer_jax.run import CHECKPOINTS, CONFIG, first_state, load_run
from transformer_jax.translation.moses import convert, detokenizing, tokenizing
from transformer_jax.translation.scores import TOKENIZED_BLEU, measures, translation_scores
from transformer_jax.translation.significance import paired_bootstrap
from transformer_jax.translation.sweep import best_of, ways


def ok(*words, **options):
    """stdout of a command that works."""
    status, out, err = call(*words, **options)
    assert status == 0, err
    return out


def leaves(run):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(run.params)]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


MULTI30K = Path(__file__).parents[2] / "shared/data/multi30k/test_2016_flickr.de.gz"

# --- averaged checkpoints

TYPES = ("float32", "bfloat16", "float16")


def mean_of(trees):
    return functools.reduce(lambda mean, each: moved(mean, each[1], each[0]), enumerate(trees, 1), None)


def drawn(seed, dtype):
    draw = np.random.default_rng(seed)
    return {"a": jnp.asarray(draw.normal(size=(3, 2)), dtype), "b": {"c": jnp.asarray(draw.normal(size=5), dtype)}}


@settings(derandomize=True, deadline=None, max_examples=25)
@given(count=st.integers(1, 12), seed=st.integers(0, 999), dtype=st.sampled_from(TYPES))
def test_a_mean_is_one(count, seed, dtype):
    """Of equal trees that tree, to the bit; else that of float64 to a rounding, in any order; and linear."""
    same = drawn(seed, dtype)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == np.asarray(y)).all(), mean_of([same] * count), same))
    trees = [drawn(seed + number, dtype) for number in range(count)]
    mean = mean_of(trees)
    for name, x in (("a", mean["a"]), ("c", mean["b"]["c"])):
        found = [np.asarray(tree["a"] if name == "a" else tree["b"]["c"], np.float64) for tree in trees]
        np.testing.assert_allclose(x, np.mean(found, 0), atol=1e-6)
        assert x.dtype == np.float32
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    jax.tree.map(close, mean_of(trees[::-1]), mean)
    doubled = mean_of([jax.tree.map(lambda x: -2 * x, tree) for tree in trees])
    jax.tree.map(lambda x, y: close(x, -2 * y), doubled, mean)


@functools.cache
def made(mode, lora=(), ema_decay=0.0):
    """A run's folder with checkpoints of steps 3 and 6, whose parameters are drawn at random."""
    folder = Path(f"{mode}-{bool(lora)}-{ema_decay}")
    tokenizer = make_tokenizer("char", 0, lambda: Path("pairs.tsv").read_text().split(), {})
    config = RunConfig(
        recipe="pairs",
        workdir=str(folder),
        max_new_tokens=6,
        model=ModelConfig(
            mode=mode, d_model=16, d_ff=32, num_heads=2, num_layers=1, num_encoder_layers=1, max_length=32
        ).replace(vocab_size=tokenizer.size),
        data=DataConfig(tokenizer="char", objective="sequence-to-sequence"),
        optimizer=OptimizerConfig(ema_decay=ema_decay),
        tuning=TuningConfig(lora=lora),
    )
    papers = papers_of(tokenizer) | {CONFIG: to_json(config)}
    state_of = jax.jit(functools.partial(first_state, config))
    with Checkpoints(folder / CHECKPOINTS, config.checkpoint) as checkpoints:
        checkpoints.open()
        for step in (3, 6):
            state = state_of(jax.random.key(step))
            if ema_decay:
                state = state.replace(ema=jax.tree.map(lambda x: x + 0.1, state.params))
            checkpoints.save(step, state, papers, {"data": {}, "scores": {}})
    write_papers(folder, papers)
    return folder


def is_mean(mean, *runs):
    return all(
        np.allclose(x, np.mean([each.astype(np.float64) for each in found], 0), rtol=1e-6, atol=1e-9)
        for x, *found in zip(*map(leaves, (mean, *runs)), strict=True)
    )


@pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.long)])
def test_average_makes_a_run(mode):
    """Of one checkpoint it is that one, of several their mean; and what reads a run reads it."""
    run, out = made(mode), f"averaged-{mode}"
    one, two = load_run(run, "3"), load_run(run, "6")
    assert equal(average(run, last=1), two)
    assert ok("average", run, out, "--last 2") == f"{out}: the mean of 2 checkpoints, 3, 6, of {run}.\n"
    mean = load_run(out)
    assert is_mean(mean, one, two)
    assert not equal(mean, two)
    assert mean.step == 6
    assert differences(mean.config, two.config) == []
    assert mean.tokenizer.to_json() == two.tokenizer.to_json()
    assert equal(average(run, checkpoints=(6, 3)), mean)
    assert equal(initial_params_of(out), mean)


def initial_params_of(folder):
    """What a run starts from, with --init-from."""
    params = initial_params(based_on(RunConfig(), str(folder)))
    return dataclasses.replace(load_run(folder), params=params)


@pytest.mark.long
@pytest.mark.parametrize("how", [dict(lora=("w_=2",)), dict(ema_decay=0.5)], ids=["lora", "ema"])
def test_averages_are_of_what_evaluation_uses(how, monkeypatch):
    """Adapters are in their weights; of a run with a moving average it is what is averaged. A checkpoint is let go of
    before the next is read."""
    folder, held = made("decoder-only", **how), []
    runs = [load_run(folder, step) for step in ("3", "6")]

    def load(*args):
        assert not any(each() is not None for each in held)
        found = load_run(*args)
        held.extend(map(weakref.ref, jax.tree.leaves(found.params)))
        return found

    monkeypatch.setattr(run_module, "load_run", load)
    mean = average(folder, last=2)
    monkeypatch.undo()
    assert held
    assert is_mean(mean, *runs)
    ok("average", folder, f"{folder}-mean --last 2")
    assert equal(load_run(f"{folder}-mean"), mean)
    assert load_run(f"{folder}-mean").adapters is None


def test_what_is_not_there_or_damaged_is_not_averaged(tmp_path):
    run = made("encoder-decoder")
    with pytest.raises(InputError, match=r"5 checkpoints are to be averaged, and it has 2\. There are 3, 6; .*keep N"):
        average(run)
    with pytest.raises(InputError, match=r"there is no checkpoint 4\. There are 3, 6"):
        average(run, checkpoints=(3, 4))
    copy = shutil.copytree(run, tmp_path / "damaged")
    paper = copy / "checkpoints/3/config.json"
    paper.write_text(paper.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"checkpoints/3: the checkpoint is damaged: config\.json has changed"):
        average(copy, last=2)
    status, out, err = call("average", copy, tmp_path / "out", "--last 2")
    assert (status, out, (tmp_path / "out").exists()) == (3, "", False), err


# --- Moses's tokens

TEXTS = {
    "en": [
        ("It's 5,300 men, isn't it?", "It 's 5,300 men , isn 't it ?"),
        ("Mr. Smith (No. 7) waits.", "Mr. Smith ( No. 7 ) waits ."),
        ("A well-known man & a dog...", "A well-known man & a dog ..."),
    ],
    "de": [("Ein Mann, z.B. Dr. Weiß, geht.", "Ein Mann , z.B. Dr. Weiß , geht ."), ("Wo?", "Wo ?")],
    "fr": [("L'homme qu'on voit, là.", "L' homme qu' on voit , là .")],
}


@pytest.mark.parametrize("language", TEXTS)
def test_tokens_are_those_of_moses_and_go_back(language):
    for text, tokens in TEXTS[language]:
        assert tokenizing(language)(text) == tokens
        assert detokenizing(language)(tokens) == text
        assert tokenizing(language, lowercase=True)(text) == tokenizing(language)(text.lower())
        written = tokenizing(language, escape=True, aggressive=True)(text)
        assert detokenizing(language, escape=True)(written) == text
    assert tokenizing("en", escape=True)("isn't <b> & co") == "isn &apos;t &lt; b &gt; &amp; co"
    assert tokenizing("en", aggressive=True)("well-known") == "well @-@ known"
    assert tokenizing("de", normalize=True)("„Ja“ – gut") == '" Ja " - gut'


@pytest.mark.skipif(not MULTI30K.exists(), reason="needs Multi30k, which is not part of the project")
def test_the_test_of_multi30k_has_as_many_tokens_as_published():
    """Wu et al. 2021 (their README-baseline) score 12,103 tokens of reference."""
    change = tokenizing("de", lowercase=True)
    assert sum(len(change(line).split()) for line in lines_of(MULTI30K)) == 12_103


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=30))
def test_a_line_stays_a_line(text):
    for normalize in (False, True):
        tokens = tokenizing("en", normalize=normalize)(text)
        assert not set("\n\r\u2028\x85") & set(tokens)
        assert tokens == " ".join(tokens.split())


def test_lines_go_through_as_they_come(capsys, monkeypatch):
    class Slow(io.BytesIO):
        def readline(self, size=-1):
            said.append(capsys.readouterr().out)
            return super().readline(size)

    said = []
    stdin = io.TextIOWrapper(Slow("\ufeffEin Hund.\r\n\nEine Katze.".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    convert(None, None, tokenizing("de"))
    assert said == ["", "Ein Hund .\n", "\n", "Eine Katze .\n"] or said == ["", "Ein Hund .\n", "\n", ""]


def test_moses_is_a_filter_and_makes_files(tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("Ein Mann, zwei Frauen.\n\n" * 3)
    words = "moses --language de --lowercase"
    out = ok(words, stdin=source.read_bytes())
    assert out == "ein mann , zwei frauen .\n\n" * 3
    assert ok(words, "--input", source, "--output", target) == ""
    assert target.read_text() == out
    back = ok("moses --language de --detokenize --input", target)
    assert back == "ein mann, zwei frauen.\n\n" * 3
    assert ok(words, stdin="") == ""
    source.write_bytes(b"gut\n\xff\n")
    assert call(words, "--input", source, "--output", target)[0] == 2
    assert target.read_text() == out  # what was there
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    for words in ("moses --language de", "evaluate nowhere --data a b --tokenized-bleu de"):
        status, out, err = call(words)
        assert (status, out) == (2, "")
        assert 'pip install "transformer_jax[moses]"' in err
    assert TOKENIZED_BLEU in translation_scores(["a"], ["a"], "none")


# --- scores

TARGETS = ["Ein Mann, der geht.", 'Sie sagt: "Nein!"', "Zwei rote Hunde laufen am Strand."] * 3
OUTPUTS = ["Ein Mann der geht.", 'sie sagt: "nein!"', "Zwei Hunde laufen am Strand."] * 3


def test_each_bleu_has_its_name():
    plain, both = translation_scores(OUTPUTS, TARGETS), translation_scores(OUTPUTS, TARGETS, "de")
    assert {name: value for name, value in both.items() if TOKENIZED_BLEU not in name} == plain
    tokens = [[tokenizing("de", lowercase=True)(text) for text in each] for each in (OUTPUTS, TARGETS)]
    by_hand = BLEU(tokenize="none", force=True).corpus_score(tokens[0], [tokens[1]]).score
    assert both[TOKENIZED_BLEU] == pytest.approx(by_hand)
    assert both[TOKENIZED_BLEU] > both["bleu"]
    given = translation_scores(*tokens, "none")
    assert given[TOKENIZED_BLEU] == pytest.approx(by_hand)
    import sacremoses

    signature = both[f"{TOKENIZED_BLEU}_signature"]
    for part in ("case:lc", f"tok:moses-de-sacremoses-{sacremoses.__version__}", "not comparable with bleu"):
        assert part in signature.split("|")
    assert {"tok:none", "not comparable with bleu"} <= set(given[f"{TOKENIZED_BLEU}_signature"].split("|"))
    same = translation_scores([text.upper() for text in TARGETS], TARGETS, "de")
    assert same[TOKENIZED_BLEU] == pytest.approx(100)
    assert same["bleu"] < 50


# --- ways to decode


def test_ways_are_each_once_and_the_first_of_equals_is_best():
    found = ways((5, 1, 4, 5), (1.0, 0.6))
    assert found[0] == {"beam_size": 1}
    assert found[1:] == [dict(beam_size=beam, length_penalty=penalty) for beam in (4, 5) for penalty in (0.6, 1.0)]
    assert best_of([{"bleu": 1.0}, {"bleu": 2.0}, {"bleu": 2.0}], "bleu") == 1


@pytest.mark.long
def test_a_sweep_scores_as_evaluate_does():
    run, words = made("encoder-decoder"), "--data held-out.tsv --limit 5 --tokenized-bleu en"
    status, out, err = call("sweep", run, words, "--beam-size 3 1 --length-penalty 2 --metric chrf")
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [(each["beam_size"], each.get("length_penalty")) for each in found] == [(1, None), (3, 2.0)]
    scores = json.loads(ok("evaluate", run, words, "--beam-size 3 --length-penalty 2"))
    assert all(scores[name] == found[1][name] for name in ("bleu", "chrf", "exact_match", TOKENIZED_BLEU, "decoded"))
    best = max(found, key=lambda each: each["chrf"])
    flags = "--beam-size 1" if best == found[0] else "--beam-size 3 --length-penalty 2.0"
    assert err.rstrip().endswith(f"Best by chrf: {flags}")
    assert err.count("best") == 1


@pytest.mark.long
def test_n_best_lists_say_which_input_they_answer():
    run, stdin = made("encoder-decoder"), "01.02.2001\n03.04.2001\n"
    words = ["generate", run, "--beam-size 3 --num-return 2"]
    lines = [line.split(" ||| ") for line in ok(*words, "--n-best", stdin=stdin).splitlines()]
    objects = [json.loads(line) for line in ok(*words, "--json", stdin=stdin).splitlines()]
    wanted = [(each["line"] - 1, one["text"], one["score"]) for each in objects for one in each["outputs"]]
    assert [(int(number), text) for number, text, _ in lines] == [each[:2] for each in wanted]
    np.testing.assert_allclose([float(score) for *_, score in lines], [each[2] for each in wanted], atol=1e-6)
    assert ok(*words, stdin=stdin).splitlines() == [text for _, text, _ in lines]


# --- significance

WORDS = "a the red blue man woman dog cat sits runs on under near chair tree beach quickly slowly".split()  # noqa: SIM905


def sentences(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(6, 12))) for _ in range(count)]


def spoiled(texts, share, seed):
    """Texts in which that share of the words is another."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) if draw.random() < share else word for word in t.split()) for t in texts]


@pytest.mark.parametrize("name", ["bleu", "chrf", TOKENIZED_BLEU])
def test_the_better_output_is_named(name):
    targets = sentences(60)
    good, bad = spoiled(targets, 0.1, 1), spoiled(targets, 0.4, 2)
    measure = measures("en")[name]
    one, other = (paired_bootstrap(*each, targets, measure, 200, seed=7) for each in ((good, bad), (bad, good)))
    assert (one["better"], other["better"]) == (1, 2)
    assert one["scores"] == other["scores"][::-1]
    assert one["p_value"] == other["p_value"] <= 0.05
    assert one["scores"] == pytest.approx([translation_scores(each, targets, "en")[name] for each in (good, bad)])
    for score, (low, high) in zip(one["scores"], one["intervals"]):
        assert low < score < high
    assert {"bs:200", "seed:7"} <= set(one["signature"].split("|"))
    again = paired_bootstrap(good, bad, targets, measure, 200, seed=7)
    assert again == one
    assert paired_bootstrap(good, bad, targets, measure, 200, seed=8)["intervals"] != one["intervals"]


def test_nothing_is_said_of_equals_or_of_a_few_lines():
    targets = sentences(50)
    outputs = spoiled(targets, 0.3, 1)
    measure = measures()["bleu"]
    same = paired_bootstrap(outputs, outputs, targets, measure, 100)
    assert (same["p_value"], same["better"]) == (1, None)
    for count in (1, 3, 5):  # of so few lines either could be the other's
        few = targets[:count] + outputs[count:]
        assert paired_bootstrap(few, outputs, targets, measure, 100)["better"] is None
    lone = paired_bootstrap(targets[:1], ["no word of it"], targets[:1], measure, 100)
    assert (lone["p_value"], lone["better"]) == (1, None)
    louder = [text.upper() for text in outputs]
    assert paired_bootstrap(outputs, louder, targets, measures("none")[TOKENIZED_BLEU], 100)["p_value"] == 1


def test_equally_good_outputs_are_seldom_told_apart():
    named = 0
    for seed in range(40):
        targets = sentences(40, seed)
        one, other = (spoiled(targets, 0.3, 1000 + 2 * seed + n) for n in range(2))
        named += paired_bootstrap(one, other, targets, measures()["bleu"], 100, seed + 1)["better"] is not None
    assert named <= 8  # 2 are expected; more than 8 of 40 come about once in 10,000 times


def test_significance_prints_one_object(tmp_path, monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "99")
    targets = sentences(60)
    paths = [tmp_path / name for name in ("reference", "a", "b")]
    for path, texts in zip(paths, (targets, spoiled(targets, 0.4, 1), spoiled(targets, 0.1, 2))):
        path.write_text("".join(text + "\n" for text in texts))
    words = ["significance --reference", paths[0], "--outputs", *paths[1:], "--samples 200 --tokenized-bleu en"]
    found = json.loads(ok(*words))
    assert found["outputs"] == [str(path) for path in paths[1:]]
    assert found["lines"] == 60
    assert all(found[name]["better"] == str(paths[2]) for name in ("bleu", "chrf", TOKENIZED_BLEU))
    assert json.loads(ok(*words)) == found
    assert os.environ["SACREBLEU_SEED"] == "99"
    monkeypatch.setattr("transformer_jax.host.memory", lambda: 10**6)
    status, _, err = call(*words)
    assert status == 2
    assert "give fewer --samples" in err
    Path(paths[2]).write_text("one\n")
    status, _, err = call(*words)
    assert status == 2
    assert f"{paths[2]}: 1 lines, and {paths[0]} has 60" in err
