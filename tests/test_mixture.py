"""Laws of mixtures: exact shares over any stretch, each source once an epoch of its own, a score for each set."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.checkpoint import facts_of
from transformer_jax.cli import run_command
from transformer_jax.config import DataConfig, ModelConfig, RunConfig
from transformer_jax.config_file import read_config
from transformer_jax.data.batches import Batches
from transformer_jax.data.load import load_data
from transformer_jax.data.mixture import Mixture
from transformer_jax.data.sources import shares_of
from transformer_jax.errors import InputError
from transformer_jax.metrics import read_records

law = settings(derandomize=True, deadline=None, max_examples=100)
shares = st.lists(st.integers(1, 60), min_size=1, max_size=5).map(tuple)


class Counted:
    """So many rows."""

    used = 1.0

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def mixture(parts, counts=None):
    return Mixture(tuple(Counted(count) for count in counts or [7] * len(parts)), parts)


@law
@given(shares, st.integers(0, 400), st.integers(1, 400))
def test_any_stretch_has_the_shares(parts, first, length):
    """But for less than two of each; from the first on but for less than one; a whole round has them exactly."""
    which, _ = mixture(parts).deal(np.arange(first, first + length))
    found, wanted = np.bincount(which, minlength=len(parts)), length * np.array(parts) / sum(parts)
    assert (abs(found - wanted) < (1 if first == 0 else 2)).all()
    which, _ = mixture(parts).deal(np.arange(first, first + sum(parts)))
    assert np.bincount(which, minlength=len(parts)).tolist() == list(parts)


@law
@given(shares, st.integers(0, 300))
def test_each_source_is_dealt_from_its_first_row_on(parts, length):
    made = mixture(parts)
    which, turns = made.deal(np.arange(length))
    for part in range(len(parts)):
        assert turns[which == part].tolist() == list(range(int((which == part).sum())))
    assert made.counts(length) == np.bincount(which, minlength=len(parts)).tolist()


@law
@given(shares, st.data())
def test_every_row_of_a_source_comes_once_an_epoch(parts, data):
    """Of each source's own epochs, whose orders differ from each other and from those of other sources."""
    counts = [data.draw(st.integers(1, 9)) for _ in parts]
    batches = Batches(mixture(parts, counts), 4, 3)
    places = np.concatenate([batches.places(step) for step in range(30)])
    for part, count in enumerate(counts):
        _, epochs, rows = places[places[:, 0] == part].T
        for epoch in range(len(rows) // count):
            assert sorted(rows[epochs == epoch]) == list(range(count))
    again = np.concatenate([Batches(mixture(parts, counts), 4, 3).places(step) for step in reversed(range(30))])
    assert sorted(map(tuple, again)) == sorted(map(tuple, places))


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["a=0.7", "b=0.3"], {"a": 7, "b": 3}),
        (["x/y=z.txt=2", "b=6"], {"x/y=z.txt": 1, "b": 3}),
        (["a=1/3", "b=2/3"], {"a": 1, "b": 2}),
        (["a=5"], {"a": 1}),
    ],
)
def test_weights_are_proportions(texts, wanted):
    assert shares_of(texts) == wanted


@pytest.mark.parametrize(
    "texts",
    [["a"], ["a="], ["=1"], ["a=0"], ["a=-1"], ["a=x"], ["a=1", "a=2"], ["a=1/0"], ["a=1", "b=99999"], ["b=nan"]],
)
def test_weights_that_are_none_are_refused(texts):
    with pytest.raises(InputError, match=r"data\.mixture"):
        shares_of(texts)


def write_texts(path, letters, count):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(letters), rng.integers(5, 40))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run_of(mode, mixture, **data):
    model = ModelConfig(mode=mode, d_model=8, num_heads=2, max_length=32)
    return RunConfig(model=model, batch_size=10, data=DataConfig(mixture=tuple(mixture), tokenizer="char", **data))


@pytest.mark.parametrize("mode", ["encoder-decoder", "decoder-only"])
def test_a_batch_has_the_rows_of_each(mode, tmp_path):
    """Of a large source and of a small one, that comes again and again; on one host and on two."""
    first, second = write_texts(tmp_path / "a.jsonl", "ab", 900), write_texts(tmp_path / "b.jsonl", "yz", 90)
    data = load_data(run_of(mode, [f"{first}=0.7", f"{second}=0.3"]))
    late = {data.tokenizer.encode(["yz"])[0][number] for number in (0, 1)}
    for step in (0, 1, 99):
        drawn = data.batches().draw(step)
        rows = np.isin(drawn.batch.labels, list(late)).any(-1)
        assert rows.sum() == 3
        assert (np.isin(drawn.batch.labels, list(data.tokenizer.encode(["ab"])[0])).any(-1) == ~rows).all()
        halves = [data.batches(np.arange(start, start + 5)).draw(step) for start in (0, 5)]
        assert {half.sha for half in halves} == {drawn.sha}
        np.testing.assert_array_equal(np.concatenate([half.batch.labels for half in halves]), drawn.batch.labels)
    assert list(data.named) == [first, second]
    assert len(data.validation) == sum(map(len, data.named.values()))


def test_sources_of_two_kinds_are_refused(tmp_path):
    first = write_texts(tmp_path / "a.jsonl", "ab", 90)
    (tmp_path / "b.tsv").write_text("a\tb\n" * 20)
    with pytest.raises(InputError, match="must be of one kind; this is pairs and text"):
        load_data(run_of("decoder-only", [f"{first}=1", f"{tmp_path / 'b.tsv'}=1"]))


@pytest.mark.long
def test_a_run_of_a_mixture_scores_each_and_goes_on(tmp_path, capsys):
    paths = [write_texts(tmp_path / f"{name}.jsonl", letters, 300) for name, letters in (("a", "ab"), ("b", "yz"))]
    flags = ["--data.mixture", f"{paths[0]}=3", f"{paths[1]}=1", "--data.tokenizer=char", "--eval-every=2", "--steps=4"]
    flags += ["--data.validation-sets", f"other={paths[1]}", "--model.d-model=8", "--model.num-heads=2"]
    flags += ["--model.num-layers=1", "--model.max-length=32", "--max-new-tokens=4", "--checkpoint.every=2"]
    flags += ["--batch-tokens=150", "--log-every=1", "--workdir", str(tmp_path / "run")]
    assert run_command(["train", "text", *flags, "--stop-at=2"]) == 0
    assert run_command(["train", "text", *flags]) == 0
    records = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if "split" in record]
    splits = [record["split"] for record in records if record["step"] == 4]
    assert splits == ["train", "validation/other", *(f"validation/{path}" for path in paths), "validation"]
    assert len({(record["step"], record["split"]) for record in records}) == len(records)
    scores = {record["split"]: record for record in records if record["step"] == 4}
    assert scores["validation"]["tokens"] == sum(scores[f"validation/{path}"]["tokens"] for path in paths)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch_size"] == 4
    following = facts_of(tmp_path / "run" / "checkpoints" / "4")["next"]
    rows = [len(part) for part in load_data(read_config(tmp_path / "run" / "config.json")).train.parts]
    assert [each["epoch"] * count + each["row"] for each, count in zip(following, rows, strict=True)] == [12, 4]
    assert run_command(["train", "text", *flags, "--data.mixture", f"{paths[0]}=2", f"{paths[1]}=1", "--steps=6"]) == 2
    assert "data.mixture" in capsys.readouterr().err
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
