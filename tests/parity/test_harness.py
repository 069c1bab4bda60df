"""The adapter for lm-evaluation-harness, by the real package: its evaluation of local tasks, and its questions."""

import datetime
import json
import os

import numpy as np
import pytest

from transformer_jax import load_run
from transformer_jax.cli import run_command
from transformer_jax.scoring import score

lm_eval = pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "transformer_jax[harness]"')
MODES = ("encoder-decoder", "decoder-only")
TINY = """--steps 2 --batch-size 4 --num-samples 0 --eval-every 2 --eval-rows 4 --log-every 2 --model.d-model 16
    --model.d-ff 32 --model.num-layers 1 --model.num-heads 2 --model.max-length 32 --data.tokenizer char"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two steps: of text, and of pairs in both modes."""
    folder = tmp_path_factory.mktemp("harness")
    days = [datetime.date(2001, 1, 1) + datetime.timedelta(37 * number) for number in range(60)]
    (folder / "pairs.tsv").write_text("".join(f"{day:%d.%m.%Y}\t{day.isoformat()}\n" for day in days))
    (folder / "text.txt").write_text("the cat sat on the mat. a dog saw it. " * 60)
    found = {}
    for name, words in {
        "text": ["text", "--data.train", str(folder / "text.txt"), "--model.mode", MODES[1]],
        **{mode: ["pairs", "--data.train", str(folder / "pairs.tsv"), "--model.mode", mode] for mode in MODES},
    }.items():
        assert run_command(["train", *words, *TINY.split(), "--workdir", str(folder / name)]) == 0
        found[name] = load_run(folder / name)
    return found


def asked(model, kind, *arguments):
    from lm_eval.api.instance import Instance

    instances = [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]
    return getattr(model, kind)(instances, disable_tqdm=True)


@pytest.mark.parametrize("name", ["text", *MODES])
def test_continuations_have_their_scores(runs, name):
    """Those that the whole model gives, the end of a context's space aside; of a long context the end is read."""
    from transformer_jax.harness import HarnessModel

    run, model = runs[name], HarnessModel(runs[name], batch_size=2)
    tokenizer, pairs = run.tokenizer, name != "text"
    contexts = ["0", "01.0", "0" * 50] if pairs else ["the ", "a cat", "the mat. " * 9]
    said = ["1", "2001", "-"] if pairs else ["dog", " sat", "a"]
    found = asked(model, "loglikelihood", *zip(contexts, said))
    questions = []
    for context, answer in zip(contexts, said):
        if context.endswith(" "):
            context, answer = context[:-1], " " + answer
        ids, new = tokenizer.encode([context, answer])
        if name == MODES[0]:
            seen = (np.append(ids[-31:], tokenizer.eos_id), np.array([tokenizer.bos_id]))
        else:
            ids = ids[-(32 - len(new) - pairs) :]
            seen = (None, np.array([tokenizer.bos_id, *ids, *([tokenizer.sep_id] if pairs else [])]))
        questions.append((seen, new))
    wanted = score(run.model, run.params, questions)
    np.testing.assert_allclose([log_prob for log_prob, _ in found], [w.log_prob for w in wanted], rtol=0, atol=1e-5)
    assert [greedy for _, greedy in found] == [w.greedy for w in wanted]


def test_greedy_continuations_are_told(runs):
    from transformer_jax.harness import HarnessModel

    model = HarnessModel(runs["text"])
    (text,) = asked(model, "generate_until", ("the cat", {"until": ["#"], "max_gen_toks": 6}))
    ((log_prob, greedy),) = asked(model, "loglikelihood", ("the cat", text))
    assert greedy
    assert log_prob < 0
    ((_, other),) = asked(model, "loglikelihood", ("the cat", "zzzzz"))
    assert not other
    (cut,) = asked(model, "generate_until", ("the cat", {"until": [text[2]], "max_gen_toks": 6}))
    assert cut == text.split(text[2])[0]
    drawn = [
        asked(
            model,
            "generate_until",
            ("the cat", {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 9.0}),
        )
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] != [text]


@pytest.mark.parametrize("name", ["text", *MODES])
def test_texts_of_any_length_have_a_score(runs, name):
    from transformer_jax.harness import HarnessModel

    model = HarnessModel(runs[name])
    short, long = asked(model, "loglikelihood_rolling", ("0 cat.",), ("the cat sat. " * 12,))
    assert long < short < 0


@pytest.mark.parametrize("name", ["text", MODES[0]])
def test_it_is_evaluated_on_local_tasks(runs, tmp_path, name):
    """A task of choices and one of generation, from files, without a network."""
    from lm_eval.tasks import TaskManager

    from transformer_jax.harness import HarnessModel

    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"q": f"0{n}.01.2001", "a": n % 2, "t": "2001"}) + "\n" for n in range(6))
    )
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    metric = {"aggregation": "mean", "higher_is_better": True}
    choices = dict(output_type="multiple_choice", doc_to_target="a", doc_to_choice=["2001", "1999"])
    answers = dict(output_type="generate_until", doc_to_target="{{t}}")
    answers["generation_kwargs"] = {"until": ["-"], "max_gen_toks": 8}
    tasks = {
        "local_choices": common | choices | {"metric_list": [{"metric": "acc", **metric}]},
        "local_answers": common | answers | {"metric_list": [{"metric": "exact_match", **metric}]},
    }
    for task, settings in tasks.items():
        (tmp_path / f"{task}.yaml").write_text(json.dumps({"task": task, **settings}))  # JSON is YAML
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    found = lm_eval.simple_evaluate(
        HarnessModel(runs[name]),
        tasks=["local_choices", "local_answers"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        cache_requests=False,
    )
    assert 0 <= found["results"]["local_choices"]["acc,none"] <= 1
    assert 0 <= found["results"]["local_answers"]["exact_match,none"] <= 1
