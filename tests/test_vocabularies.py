"""Laws of pairs whose sources have a vocabulary of their own: an embedding table each, and each side its own tokens."""

import json

import jax
import numpy as np
import pytest

from transformer_jax.cli import run_command
from transformer_jax.config import DataConfig, ModelConfig, RunConfig
from transformer_jax.data.load import load_data, prompts_of
from transformer_jax.data.tokenizer import read_tokenizer
from transformer_jax.errors import InputError
from transformer_jax.run import load_run

SMALL = ["--model.d-model=16", "--model.num-heads=2", "--model.num-layers=1", "--model.max-length=32", "--batch-size=4"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    lines = [f"{'abcdefgh'[n % 8] * (1 + n % 7)}\t{'XYZ'[n % 3] * (1 + n % 5)}\n" for n in range(200)]
    path.write_text("".join(lines))
    return str(path)


def run_of(path, mode="encoder-decoder", **data):
    model = ModelConfig(mode=mode, d_model=8, num_heads=2, max_length=32)
    options = {"tokenizer": "char", "source_tokenizer": "char"} | data
    return RunConfig(model=model, batch_size=4, data=DataConfig(train=(path,), **options))


def test_each_side_has_its_own_tokens(pairs):
    data = load_data(run_of(pairs))
    ours, theirs = data.tokenizer, data.tokenizer.source
    assert (ours.size, theirs.size) == (5 + 3, 5 + 8)
    assert (data.config.model.vocab_size, data.config.model.source_vocab_size) == (8, 13)
    assert not data.config.model.share_source_embedding
    batch = data.batches().draw(0).batch
    assert set(theirs.decode(batch.source.ids.ravel())) <= set("abcdefgh")
    assert set(ours.decode(batch.target.ids.ravel())) <= set("XYZ")
    source, seen = prompts_of(["abc"], data.config, ours)[0]
    assert theirs.tokens(source) == ["a", "b", "c", "<eos>"]
    assert ours.tokens(seen) == ["<bos>"]


def test_one_tokenizer_serves_both_where_nothing_is_given(pairs):
    data = load_data(run_of(pairs, source_tokenizer=""))
    assert data.tokenizer.source is data.tokenizer
    assert data.config.model.source_vocab_size is None


@pytest.mark.parametrize("mode", ["decoder-only", "encoder-decoder"])
def test_it_is_for_an_encoder_and_pairs(mode, pairs, tmp_path):
    (tmp_path / "text.txt").write_text("abc " * 99)
    path = pairs if mode == "decoder-only" else str(tmp_path / "text.txt")
    with pytest.raises(InputError, match=r"data\.source_tokenizer is for pairs"):
        load_data(run_of(path, mode))


def test_a_size_needs_a_table():
    with pytest.raises(ValueError, match=r"source_vocab_size=7 needs an embedding table of its own"):
        ModelConfig(vocab_size=9, source_vocab_size=7)


@pytest.mark.long
def test_a_run_of_two_vocabularies(pairs, tmp_path, capsys):
    """It trains, goes on, answers, is evaluated, refuses other tokens, and another run starts from it."""
    folder = tmp_path / "run"
    flags = ["--data.train", pairs, "--data.tokenizer=char", "--data.source-tokenizer=bpe", "--data.tokenizer-size=300"]
    flags += [*SMALL, "--max-new-tokens=4", "--num-samples=4"]
    assert run_command(["train", "pairs", *flags, "--steps=4", "--stop-at=2", "--workdir", str(folder)]) == 0
    assert run_command(["train", "pairs", *flags, "--steps=4", "--workdir", str(folder)]) == 0
    run = load_run(folder)
    tables = {name: table.shape for name, table in flat(run.params).items() if "embedding" in name}
    assert sorted(tables.values()) == [(8, 16), (run.tokenizer.source.size, 16)]
    assert run.tokenizer.source.size > 256
    assert run.tokenizer.source.to_json() == read_tokenizer(folder).source.to_json()
    capsys.readouterr()
    assert run_command(["generate", str(folder), "--prompt", "aaa"]) == 0
    assert run_command(["evaluate", str(folder), "--data", pairs, "--limit=4"]) == 0
    assert '"loss"' in capsys.readouterr().out
    assert run_command(["describe", str(folder), "--examples=1"]) == 0
    assert "source" in capsys.readouterr().out
    assert run_command(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "source_vocab_size" in capsys.readouterr().err
    other = ["--data.train", pairs, "--batch-size=4", "--steps=2", "--max-new-tokens=4", "--num-samples=4"]
    other += ["--workdir", str(tmp_path / "tuned")]
    assert run_command(["train", "pairs", "--init-from", str(folder), *other]) == 0
    tuned = load_run(tmp_path / "tuned")
    assert tuned.tokenizer.source.to_json() == run.tokenizer.source.to_json()
    path = folder / "source_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    assert run_command(["train", "pairs", *flags, "--steps=4", "--workdir", str(folder)]) == 2
    assert "tokenizer" in capsys.readouterr().err


def flat(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
