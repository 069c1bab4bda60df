"""Laws of the tokenizers: text comes back, special tokens never come from text, a saved one gives the same ids."""

import json

import numpy as np
import pytest
import tokenizers as tk
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transformer_jax.data.tokenizer import (
    ROLES,
    SPECIAL,
    TRAINERS,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    sentinels,
)
from transformer_jax.errors import InputError

law = settings(derandomize=True, deadline=None, max_examples=150)
KINDS = tuple(TRAINERS)
TEXTS = [
    "Der kleine Hund läuft über die Straße und bellt.",
    "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    "a cat sat on the mat, and the other cat sat on the first cat",
    "日本語の文章 2020年4月2日 👋",
    "cat",
    "the cat",
] * 5
SPELLED = " ".join([*SPECIAL, "<extra_id_0>", "<extra_id_12>", *SPECIAL])
MADE = {kind: make_tokenizer(kind, 300, lambda: TEXTS, sentinels(3)) for kind in KINDS}
every_kind = pytest.mark.parametrize("kind", KINDS)


def encode(tokenizer, text):
    return tokenizer.encode([text])[0]


def special_ids(tokenizer):
    """All but <unk>, which letters that a tokenizer has never seen become."""
    return {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id, *tokenizer.sentinel_ids}


# --- text and back


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@law
@given(st.text(max_size=40))
@example(" two  spaces,\ttabs\n\nand line ends \r\n")
@example(SPELLED)
def test_bytes_bring_every_text_back(kind, text):
    ids = encode(MADE[kind], text)
    assert MADE[kind].decode(ids) == text
    assert ids.dtype == np.int32
    assert not special_ids(MADE[kind]) & set(ids.tolist())


@every_kind
@law
@given(st.text(max_size=60) | st.lists(st.text("aäЖ \n.7", max_size=3)).map(" ".join))
def test_words_encoded_one_by_one_have_the_ids_of_the_text(kind, text):
    assert encode(MADE[kind], text).tolist() == MADE[kind].inner.encode(text, add_special_tokens=False).ids


@every_kind
@law
@given(st.lists(st.sampled_from([*"".join(TEXTS).split(), "\n\n", "  ", "7", "."]), min_size=40, max_size=90))
def test_parts_of_a_text_have_the_ids_of_the_whole(kind, words):
    text, tokenizer = " ".join(words), MADE[kind]
    parts = list(tokenizer.parts_of([text], 100))
    assert len(parts) > 1
    assert all(0 < len(part) <= 100 for part in parts)
    assert list(tokenizer.parts_of([text[:7], "", text[7:150], text[150:]], 100)) == parts
    assert np.concatenate(tokenizer.encode(parts)).tolist() == encode(tokenizer, text).tolist()


@law
@given(st.text("".join(sorted(set("".join(TEXTS)))), max_size=40))
def test_characters_bring_their_texts_back(text):
    """Of the characters that the training data has, one token each."""
    ids = encode(MADE["char"], text)
    assert MADE["char"].decode(ids) == text
    assert len(ids) == len(text)
    assert not (special_ids(MADE["char"]) | {MADE["char"].unk_id}) & set(ids.tolist())


def test_a_new_character_is_unknown():
    ids = encode(MADE["char"], "aЖa")
    assert ids.tolist() == [ids[0], MADE["char"].unk_id, ids[0]]
    assert MADE["char"].decode(ids) == "aa"


WORDS = make_tokenizer("word", 300, lambda: [" the cat sat_on 2 mats, …!\n\n\tthe  cat\u3000日本 ,,, "] * 2)


@law
@given(st.text(max_size=40))
@example(" two  spaces,\ttabs\n\nand line ends \r\n")
@example(SPELLED)
def test_words_put_together_are_the_text(text):
    """However it is cut: no letter is lost or in two words, and a word is space or has one only in front."""
    words = [word for word, _ in WORDS.inner.pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(words) == text
    assert all(word.isspace() or not set(" \t\n\r") & set(word[1:]) for word in words)


def test_a_word_is_a_token():
    """With the space in front of it; a new one is unknown, and stays away from the text."""
    ids = encode(WORDS, " the cat sat_on 2 mats, …!")
    assert WORDS.tokens(ids) == [" the", " cat", " sat_on", " 2", " mats", ",", " …!"]
    assert WORDS.decode(ids) == " the cat sat_on 2 mats, …!"
    ids = encode(WORDS, "the dog, the  cat\n\n\tthe")
    assert WORDS.tokens(ids) == ["the", "<unk>", ",", " the", " ", " cat", "\n\n", "\t", "the"]
    assert WORDS.decode(ids) == "the, the  cat\n\n\tthe"


def test_bpe_of_words_ends_at_spaces_alone():
    """A frequent word is one token whatever its letters are, the first of a text too; a new letter is none."""
    texts = ["ein t-shirt , ein t-shirt .", "t-shirt ein"] * 9
    tokenizer = make_tokenizer("bpe-words", 60, lambda: texts)
    first, second = (tokenizer.tokens(ids) for ids in tokenizer.encode(texts[:2]))
    assert first == ["▁ein", "▁t-shirt", "▁,", "▁ein", "▁t-shirt", "▁."]
    assert second == ["▁t-shirt", "▁ein"]
    assert tokenizer.tokens(encode(tokenizer, "eins Ж"))[-2:] == ["▁", "<unk>"]


def test_the_most_frequent_words_are_kept():
    texts = ["a b a c a b d", "a b", "a d"] * 3
    small = make_tokenizer("word", len(SPECIAL) + 3, lambda: texts)
    assert small.size == len(SPECIAL) + 3
    assert set(small.tokens(small.word_ids)) == {" b", " a", "a"}


@every_kind
def test_the_training_text_comes_back(kind):
    for text in TEXTS:
        assert MADE[kind].decode(encode(MADE[kind], text)) == text


@every_kind
def test_several_texts_are_encoded_one_by_one(kind):
    texts = [*TEXTS[:6], "", "a"]
    for ids, text in zip(MADE[kind].encode(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, encode(MADE[kind], text))
    assert len(encode(MADE[kind], "")) == 0


# --- special tokens


# the pieces of a unigram model include its special tokens, and the likeliest: "<sep>" is read as one piece


@every_kind
def test_text_never_turns_into_a_special_token(kind):
    for text in (SPELLED, "a<eos>b", *SPECIAL, "<extra_id_0>"):
        assert not special_ids(MADE[kind]) & set(encode(MADE[kind], text).tolist()), text


@every_kind
def test_training_text_full_of_special_names_teaches_none(kind):
    """Neither in the way of merges nor of pieces."""
    names = [*SPECIAL, "<extra_id_0>"]
    texts = ["".join(names), *(f"the {name} of{name}{name} the {number}" for number in range(40) for name in names)]
    tokenizer = make_tokenizer(kind, 320, lambda: texts, sentinels(2))
    for name in names:
        assert not special_ids(tokenizer) & set(encode(tokenizer, f"of{name}{name} {name}").tolist()), name
    assert tokenizer.decode(encode(tokenizer, texts[-1])) == texts[-1]


@every_kind
def test_roles_have_ids_of_their_own(kind):
    """Ids are below the size, special tokens decode to nothing; where text has no pieces of its own, <pad> is 0."""
    tokenizer = MADE[kind]
    ids = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id, tokenizer.unk_id]
    assert kind == "unigram" or ids == [0, 1, 2, 3, 4]
    assert len(tokenizer.sentinel_ids) == 3
    assert len({*ids, *tokenizer.sentinel_ids}) == 8
    assert max(*ids, *tokenizer.sentinel_ids) < tokenizer.size
    assert tokenizer.decode(ids) == ""
    middle = encode(tokenizer, "cat sat")
    assert tokenizer.decode([tokenizer.bos_id, *middle, tokenizer.eos_id, tokenizer.pad_id]) == "cat sat"


@every_kind
def test_sentinels_stand_for_themselves_when_asked(kind):
    tokenizer = MADE[kind]
    ids = tokenizer.encode_with_sentinels("the cat<extra_id_1> sat<extra_id_0><extra_id_7>")
    assert [token for token in ids if token in tokenizer.sentinel_ids] == [tokenizer.sentinel_ids[i] for i in (1, 0)]
    assert ids.dtype == np.int32
    if kind not in ("unigram", "bpe-words"):  # they put a space before each part, and may know no 7
        assert tokenizer.decode(tokenizer.encode_with_sentinels("the cat<extra_id_1> sat<extra_id_0>")) == (
            "the cat<extra_id_1> sat<extra_id_0>"
        )
    np.testing.assert_array_equal(tokenizer.encode_with_sentinels("the cat"), encode(tokenizer, "the cat"))
    assert tokenizer.encode_with_sentinels("").tolist() == []


@every_kind
def test_size_covers_all_ids(kind):
    tokenizer = MADE[kind]
    used = np.concatenate([*tokenizer.encode([*TEXTS, SPELLED]), tokenizer.sentinel_ids])
    assert used.min() >= 0
    assert used.max() < tokenizer.size
    if kind in ("bpe", "bpe-words", "unigram", "word"):
        assert tokenizer.size <= 300 + 3


# --- saved and published ones


@every_kind
@pytest.mark.parametrize("count", [0, 3])
def test_a_saved_tokenizer_gives_the_same_ids(kind, count, tmp_path):
    """Also with a name for `make_tokenizer`; sentinels come with it, asked for or not."""
    path = tmp_path / "tokenizer.json"
    path.write_text(MADE[kind].to_json(), "utf-8")
    for loaded in (load_tokenizer(path, sentinels(count)), make_tokenizer(str(path), 0, list, sentinels(count))):
        for text in [*TEXTS, SPELLED, "new Жtext\n"]:
            np.testing.assert_array_equal(encode(loaded, text), encode(MADE[kind], text))
        for name in ("size", "sentinel_ids", "pad_id", "bos_id", "eos_id", "sep_id", "unk_id"):
            assert getattr(loaded, name) == getattr(MADE[kind], name), name


@every_kind
def test_a_saved_tokenizer_saves_as_the_same_text(kind, tmp_path):
    (tmp_path / "tokenizer.json").write_text(MADE[kind].to_json(), "utf-8")
    assert load_tokenizer(tmp_path / "tokenizer.json").to_json() == MADE[kind].to_json()


# not unigram: the library orders pieces of equal score by chance, so a run keeps the tokenizer that it was trained with
@pytest.mark.parametrize("kind", ["bpe", "bpe-words", "word", "char", "bytes"])
def test_training_again_gives_the_same_tokenizer(kind):
    assert make_tokenizer(kind, 300, lambda: TEXTS, sentinels(3)).to_json() == MADE[kind].to_json()


def test_published_names_play_their_roles(tmp_path):
    """Those of another tokenizer are found, what is missing is added at the end, padding and cutting are off."""
    vocabulary = {"</s>": 0, "<s>": 1, "[UNK]": 2, "[PAD]": 3, "cat": 4, "sat": 5}
    inner = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>", "<s>", "[UNK]", "[PAD]"])
    inner.enable_padding(length=9, pad_id=3, pad_token="[PAD]")
    inner.enable_truncation(1)
    inner.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert [getattr(found, f"{role}_id") for role in ROLES] == [3, 1, 0, 6, 2]
    assert found.size == 7
    assert encode(found, "cat sat <s>").tolist()[:2] == [4, 5]
    assert not special_ids(found) & set(encode(found, "cat </s> <s> [PAD] <sep>").tolist())


# --- complaints


def test_an_unknown_kind_gets_the_nearest():
    with pytest.raises(InputError, match=r"data.tokenizer='unigramm' .*bpe, bpe-words, unigram, .*bytes.*'unigram'"):
        make_tokenizer("unigramm", 100, lambda: TEXTS)


BROKEN = {
    "missing": (None, "no such file"),
    "empty": (b"", "not a tokenizer.json"),
    "cut": (MADE["char"].to_json().encode()[:-20], "not a tokenizer.json"),
    "not UTF-8": (b'{"\xff": 1}', r"byte 2 \(line 1\) is not valid UTF-8"),
    "another JSON": (json.dumps({"a": 1}).encode(), "not a tokenizer.json"),
    "a list": (b"[]", "not a tokenizer.json"),
    "a number": (b"5", "not a tokenizer.json"),
    "a model of nothing": (b'{"version": "1.0", "model": {"type": "BPE"}}', "not a tokenizer.json"),
    "deep": (b"[" * 20_000, "not a tokenizer.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(case, tmp_path):
    content, says = BROKEN[case]
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    for load in (lambda: load_tokenizer(path), lambda: make_tokenizer(str(path), 100, lambda: TEXTS)):
        with pytest.raises(InputError, match=f"(?s)tokenizer.json: {says}"):
            load()


def test_a_folder_is_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        make_tokenizer(str(tmp_path), 100, lambda: TEXTS)


@pytest.mark.parametrize("size", [16, 260])
def test_bpe_needs_all_bytes(size):
    with pytest.raises(InputError, match=f"data.tokenizer_size={size} is too small for bpe: 261"):
        make_tokenizer("bpe", size, lambda: TEXTS)
    assert make_tokenizer("bpe", 261, lambda: TEXTS).size == 261


def test_bpe_of_words_needs_its_letters():
    letters = len({*"".join(TEXTS)} - {" "}) + 1  # and the sign of a space
    size = len(SPECIAL) + letters
    with pytest.raises(InputError, match=f"data.tokenizer_size={size - 1} is too small for bpe-words: {size} are"):
        make_tokenizer("bpe-words", size - 1, lambda: TEXTS)
    assert make_tokenizer("bpe-words", size, lambda: TEXTS).size == size


def test_unigram_needs_its_letters():
    """Fewer entries than letters: the size is named, as it cannot be kept."""
    with pytest.raises(InputError, match=r"data.tokenizer_size=16 is too small for unigram"):
        make_tokenizer("unigram", 16, lambda: TEXTS)


def test_a_tokenizer_is_made_from_the_library_without_a_file():
    inner = tk.Tokenizer(tk.models.WordLevel({"a": 0}, unk_token="a"))
    assert Tokenizer(inner, sentinels(2)).sentinel_ids == [6, 7]


GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
GPT4 += r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def built(before, normalizer=None):
    inner = tk.Tokenizer(tk.models.BPE())
    inner.pre_tokenizer, inner.normalizer = before, normalizer
    trainer = tk.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>"],
        initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    return Tokenizer(inner)


def bytes_by(**options):
    return tk.pre_tokenizers.ByteLevel(**options)


BUILT = {
    "prefix": built(bytes_by(add_prefix_space=True)),
    "composed": built(bytes_by(add_prefix_space=False), tk.normalizers.NFC()),
    "lowercase": built(bytes_by(add_prefix_space=False), tk.normalizers.Lowercase()),
    "gpt-4": built(
        tk.pre_tokenizers.Sequence(
            [
                tk.pre_tokenizers.Split(tk.Regex(GPT4), "isolated"),
                bytes_by(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "digits": built(
        tk.pre_tokenizers.Sequence([tk.pre_tokenizers.Digits(individual_digits=True), bytes_by(add_prefix_space=False)])
    ),
    "spaces": built(tk.pre_tokenizers.Metaspace(prepend_scheme="always")),
    "llama": built(None, tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])),
}


@pytest.mark.parametrize("tokenizer", BUILT.values(), ids=BUILT)
@law
@given(
    st.text(max_size=60)
    | st.lists(st.text("aäe\u0301Ж \n.,'s7\t)", max_size=4)).map(" ".join)
    | st.text("ae\u0301 .\n'st7,")
)
def test_so_it_is_with_published_ways_to_cut_text(tokenizer, text):
    assert encode(tokenizer, text).tolist() == tokenizer.inner.encode(text, add_special_tokens=False).ids
