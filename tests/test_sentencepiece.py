"""SentencePiece models encode here as their library encodes; what a folder's files make of them."""

import json
import re

import jax
import numpy as np
import pytest

from transformer_jax import ModelConfig, Transformer, load_huggingface, load_run
from transformer_jax.cli import run_command
from transformer_jax.data.load import prompts_of
from transformer_jax.data.sentencepiece import read_pieces, tokenizer_of_pieces
from transformer_jax.data.sources import load
from transformer_jax.data.tokenizer import Tokenizer, load_tokenizer, sentinels
from transformer_jax.errors import InputError
from transformer_jax.evaluate import decoding_options
from transformer_jax.huggingface.folder import write_pretrained
from transformer_jax.huggingface.tokenizer import language_token, tokenizer_json, with_language
from transformer_jax.run import example_inputs

library = pytest.importorskip("sentencepiece", reason="SentencePiece models are made by its library")

ODD = [
    "",
    " ",
    "  two  spaces ",
    "tab\there",
    "new\nline",
    "é ﬁ ½ ①",
    "日本語 👋🙂",
    "\u00a0wide\u3000",
    "\u2581x",
    "ABC" * 30,
]
KINDS = {
    "unigram": dict(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
    "bpe": dict(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "symbols": dict(model_type="unigram", user_defined_symbols=["<sep>", "||"], add_dummy_prefix=False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The files of models by kind, and lines of what they were trained on."""
    folder, pairs = tmp_path_factory.mktemp("pieces"), load((), (), "dates", 0.1)[0]
    lines = [" ".join(pair) for pair in zip(pairs.sources[:3000], pairs.targets[:3000])]
    (folder / "lines.txt").write_text("\n".join(lines))
    for kind, options in KINDS.items():
        path = folder / kind
        options = options | dict(input=str(folder / "lines.txt"), model_prefix=str(path), vocab_size=900, minloglevel=2)
        library.SentencePieceTrainer.train(**options)
    return folder, lines


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_the_librarys(kind, models):
    folder, lines = models
    path = folder / f"{kind}.model"
    theirs = library.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer(tokenizer_of_pieces(read_pieces(path)), ids={"unk": theirs.unk_id()})
    assert ours.size == theirs.get_piece_size()
    texts = lines[:300] + ODD
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids.tolist() == theirs.encode(text), text
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids.tolist()), text


def test_text_that_spells_a_special_token_is_spelled_out(models):
    tokenizer = load_tokenizer(models[0] / "unigram.model", special={"eos": 1, "pad": 0, "unk": 2})
    ids = tokenizer.encode(["</s> 1 <pad>"])[0]
    assert not {0, 1} & set(ids.tolist())


def test_a_model_is_a_tokenizer_to_train_with(models):
    """As a tokenizer.json is: roles that it lacks are added, and what is written is read again."""
    tokenizer = load_tokenizer(models[0] / "bpe.model", sentinels(3))
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id, tokenizer.unk_id}) == 5
    (models[0] / "again.json").write_text(tokenizer.to_json())
    again = load_tokenizer(models[0] / "again.json")
    for one, other in zip(tokenizer.encode(models[1][:50]), again.encode(models[1][:50])):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x80\x80\x80\x80\x08ab", b"\x00" * 100, None])
def test_what_is_no_model_is_refused(content, models, tmp_path):
    path = tmp_path / "broken.model"
    if content is None:
        content = (models[0] / "bpe.model").read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken.model: "):
        load_tokenizer(path)


# --- folders of published models


def folder_of(models, tmp_path, kind, name, **settings):
    (tmp_path / name).write_bytes((models[0] / f"{kind}.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_sentinels_of_t5_count_down_from_the_end(models, tmp_path):
    text = tokenizer_json(folder_of(models, tmp_path, "unigram", "spiece.model"), "t5")
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", special={"eos": 1, "pad": 0, "unk": 2})
    assert tokenizer.sentinel_ids == [999 - number for number in range(100)]
    assert tokenizer.encode_as_published(["1. Mai"])[0][-1] == 1


def test_a_language_takes_the_place_of_the_other(models, tmp_path):
    codes = ["de_DE", "en_XX"]
    folder = folder_of(
        models, tmp_path, "symbols", "sentencepiece.bpe.model", src_lang="en_XX", additional_special_tokens=codes
    )
    text = tokenizer_json(folder, "mbart")

    def last(text):
        (tmp_path / "t.json").write_text(text)
        tokenizer = load_tokenizer(tmp_path / "t.json", special={"eos": 2})
        return tokenizer.tokens(tokenizer.encode_as_published(["1"])[0])[-2:], tokenizer.inner.get_vocab()

    assert last(text)[0] == ["</s>", "en_XX"]
    turned = with_language(text, language_token(last(text)[1], "de_DE", "--source-language"), False)
    assert last(turned)[0] == ["</s>", "de_DE"]
    with pytest.raises(InputError, match=r"--source-language de_D: .* Did you mean"):
        language_token(last(text)[1], "de_D", "--source-language")


@pytest.mark.parametrize(
    ("kind", "name", "settings", "vocabulary", "says"),
    [
        ("t5", "spiece.model", dict(extra_ids=10**9), None, "extra_ids=1000000000 must be a whole number from 0"),
        ("t5", "spiece.model", dict(extra_ids="all"), None, "extra_ids='all' must be a whole number"),
        ("mbart", "sentencepiece.bpe.model", dict(additional_special_tokens={"a": 1}), None, "must name the tokens"),
        ("mbart", "sentencepiece.bpe.model", dict(additional_special_tokens=["de_DE"]), None, "no token 'en_XX'"),
        (
            "m2m_100",
            "sentencepiece.bpe.model",
            dict(additional_special_tokens=["__en__"]),
            {"a": "b", "c": 0},
            "vocab.json",
        ),
        ("marian", "source.spm", {}, {"a": 0}, "target.spm: no such file"),
    ],
)
def test_settings_that_are_not_understood_are_refused(kind, name, settings, vocabulary, says, models, tmp_path):
    folder = folder_of(models, tmp_path, "unigram", name, **settings)
    if vocabulary is not None:
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match=re.escape(says)):
        tokenizer_json(folder, kind)


def test_a_folder_without_languages_is_refused(models, tmp_path):
    with pytest.raises(InputError, match="additional_special_tokens must name the tokens of the languages"):
        tokenizer_json(folder_of(models, tmp_path, "symbols", "sentencepiece.bpe.model"), "mbart")


# --- runs of such folders


def test_a_folder_with_a_model_is_imported_and_speaks(models, tmp_path):
    """Its languages are those that are asked for, it may end in several ways, and it goes back as tokenizer.json."""
    codes = ["de_DE", "en_XX"]
    folder = tmp_path / "mbart"
    folder.mkdir()
    folder_of(models, folder, "symbols", "sentencepiece.bpe.model", src_lang="en_XX", additional_special_tokens=codes)
    config = ModelConfig(
        vocab_size=904,
        d_model=16,
        num_layers=1,
        num_heads=2,
        max_length=40,
        position="learned",
        position_offset=2,
        embedding_norm=True,
        output_bias=True,
        norm_eps=1e-5,
        activation="gelu",
        scan_layers=False,
    )
    key, (target, source) = jax.random.key(0), example_inputs(config)
    params = Transformer(config).init(key, target, source)["params"]
    ids = dict(pad_token_id=1, eos_token_id=[2, 9], bos_token_id=0, decoder_start_token_id=2)
    write_pretrained(folder, "mbart", config, params, **ids)
    words = ["import", str(folder), str(tmp_path / "run"), "--source-language", "de_DE", "--target-language", "en_XX"]
    assert run_command(words) == 0
    run = load_run(tmp_path / "run")
    special = run.config.data.special
    names = run.tokenizer.tokens([special.first, special.eos, special.bos, *special.stops])
    assert names[:3] == ["en_XX", "</s>", "</s>"]
    assert special.stops == (9,)
    assert decoding_options(run.config, run.tokenizer)["eos_id"] == [2, 9]
    source, target = prompts_of(["1. Mai"], run.config, run.tokenizer)[0]
    assert run.tokenizer.tokens(source)[-2:] == ["</s>", "de_DE"]
    assert target.tolist() == [2]
    assert run_command(["generate", str(tmp_path / "run"), "--prompt", "1. Mai", "--max-new-tokens", "3"]) == 0
    assert run_command(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (found["eos_token_id"], found["forced_bos_token_id"]) == ([2, 9], special.first)
    again = load_huggingface(tmp_path / "out")
    np.testing.assert_array_equal(again.tokenizer.encode_as_published(["1. Mai"])[0], source)
    assert again.config.data.special == special
