"""SentencePiece models of published folders: the ids are those of the tokenizers of `transformers`."""

import json

import pytest

from transformer_jax.data.chat import DEFAULT, MARKS, Template, Turn
from transformer_jax.data.sources import load
from transformer_jax.data.tokenizer import make_tokenizer
from transformer_jax.huggingface.tokenizer import tokenizer_json

transformers = pytest.importorskip("transformers", reason="parity with transformers needs it")
sentencepiece = pytest.importorskip("sentencepiece", reason="SentencePiece models are made by its library")
tk = pytest.importorskip("tokenizers")

PAIRS = load((), (), "dates", 0.1)[0]
LINES = [" ".join(pair) for pair in zip(PAIRS.sources[:3000], PAIRS.targets[:3000])]
# with spaces at the ends, and letters that are normalized, some of theirs differ from the library
TEXTS = [*LINES[:200], "a", "xyz 日本", "1. Mai"]
T5_IDS = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def train(path, **options):
    """A small SentencePiece model."""
    path.parent.joinpath("lines.txt").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path.parent / "lines.txt"),
        model_prefix=str(path.with_suffix("")),
        vocab_size=800,
        minloglevel=2,
        **options,
    )
    if path.suffix != ".model":
        path.with_suffix(".model").rename(path)


def t5(folder):
    train(folder / "spiece.model", **T5_IDS)
    return "t5", transformers.T5Tokenizer, {}


def mt5(folder):
    train(folder / "spiece.model", **T5_IDS)
    return "mt5", transformers.T5Tokenizer, {"extra_ids": 0}


def pegasus(folder):
    train(folder / "spiece.model", **T5_IDS)
    return "pegasus", transformers.PegasusTokenizer, {}


def mbart(folder):
    train(folder / "sentencepiece.bpe.model")
    return "mbart", transformers.MBartTokenizer, {"src_lang": "de_DE"}


def nllb(folder):
    train(folder / "sentencepiece.bpe.model", model_type="bpe")
    return "m2m_100", transformers.NllbTokenizer, {"src_lang": "eng_Latn"}


def vocabulary(folder, *models):
    pieces = []
    for model in models:
        found = sentencepiece.SentencePieceProcessor(model_file=str(model))
        pieces += [found.id_to_piece(number) for number in range(3, found.get_piece_size())]
    names = ["<s>", "<pad>", "</s>", "<unk>", *dict.fromkeys(sorted(pieces))]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))


def m2m_100(folder):
    train(folder / "sentencepiece.bpe.model", model_type="bpe")
    vocabulary(folder, folder / "sentencepiece.bpe.model")
    return "m2m_100", transformers.M2M100Tokenizer, {"src_lang": "de"}


def marian(folder):
    train(folder / "source.spm")
    train(folder / "target.spm", character_coverage=0.98)
    vocabulary(folder, folder / "source.spm", folder / "target.spm")
    return "marian", transformers.MarianTokenizer, {"source_lang": "de", "target_lang": "en"}


def llama(folder):
    train(
        folder / "tokenizer.model",
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return "llama", transformers.LlamaTokenizer, {"add_bos_token": True}


@pytest.mark.parametrize("make", [t5, mt5, pegasus, mbart, nllb, m2m_100, marian, llama], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_ids_are_the_same(make, tmp_path):
    kind, theirs, settings = make(tmp_path)
    settings |= {"tokenizer_class": theirs.__name__}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    oracle, codes = theirs.from_pretrained(tmp_path), theirs.__init__.__globals__.get("FAIRSEQ_LANGUAGE_CODES", [])
    if codes:  # theirs has the list of languages in its code, and published folders in a file
        codes = [f"__{code}__" for code in codes["m2m100"]] if make is m2m_100 else codes
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": codes}))
    ours = tk.Tokenizer.from_str(tokenizer_json(tmp_path, kind))
    for each in TEXTS:
        if make is nllb:  # where the mask is not saved, theirs puts it before the languages
            assert (ours.encode(each).ids[1:], ours.encode(each).tokens[0]) == (oracle(each).input_ids[1:], "eng_Latn")
        else:
            assert ours.encode(each).ids == oracle(each).input_ids, each
    for token in [
        *(codes if make is not nllb else []),
        *(token for token in oracle.get_vocab() if token.startswith("<extra_id")),
    ]:
        assert oracle.convert_tokens_to_ids(token) in (ours.token_to_id(token), oracle.unk_token_id), token


@pytest.mark.filterwarnings("ignore")
def test_conversations_have_the_same_ids(tmp_path):
    """The ids of `apply_chat_template`, with and without the request for an answer."""
    tokenizer = make_tokenizer("bpe", 600, lambda: LINES, MARKS)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<eos>")
    theirs.chat_template, template = DEFAULT, Template(DEFAULT, tokenizer)
    turns = [Turn("system", "dates"), *(Turn(*each) for each in zip(["user", "assistant"] * 3, LINES))]
    messages = [turn._asdict() for turn in turns]
    for asks, ours in ((False, template.encode(turns)[0]), (True, template.prompt(turns))):
        text = theirs.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
        assert ours.tolist() == theirs(text, add_special_tokens=False).input_ids
