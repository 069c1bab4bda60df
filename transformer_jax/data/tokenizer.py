"""Text <-> token ids, by the `tokenizers` library: trained on the spot, or read from a `tokenizer.json`."""

import contextlib
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_jax.config_checks import nearest
from transformer_jax.data import sentencepiece
from transformer_jax.errors import InputError
from transformer_jax.files import decode, read_whole

if TYPE_CHECKING:  # who only trains on arrays does without the library
    import tokenizers as tk

# The roles that the data and decoding need, and the names that published tokenizers give them.
ROLES = {
    "pad": ("<pad>", "[PAD]", "<|padding|>"),
    "bos": ("<bos>", "<s>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
    "sep": ("<sep>",),
    "unk": ("<unk>", "[UNK]"),
}
SPECIAL = [names[0] for names in ROLES.values()]
SENTINEL = re.compile(r"(<extra_id_\d+>)")


def sentinels(count: int) -> list[str]:
    """Names of tokens that stand for what is hidden."""
    return [f"<extra_id_{number}>" for number in range(count)]


LONGEST = 2**16  # letters that are encoded at once
MOST_KNOWN = 2**17  # words whose ids are kept
ENDS = re.compile(r"(?<=[^\W\d_])(?=[ \n\t.,;:!?)])")
WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
CUT = re.compile(r".*[^\W\d_]( )(?=[^\W\d_])", re.DOTALL)


def cut_of(text: str, start: int, longest: int) -> int:
    """Where a text that goes on for more than `longest` letters behind `start` is cut.

    Before the last space that stands between two letters, where every tokenizer begins a new word; where the second
    half of what is looked at has none, at a line's end, or anywhere.
    """
    first, last = start + longest // 2, start + longest
    if found := CUT.match(text, first, last + 1):
        return found.start(1)
    return text.rfind("\n", first, last) + 1 or last


def _seam(inner: "tk.Tokenizer") -> re.Pattern[str] | None:
    """Where a tokenizer begins anew whatever is around it, so that what is between two such places is encoded alone.

    Bytes by GPT-2's pattern, or one like it, end a word behind its last letter, whatever follows; others begin one with
    the space between two letters.
    """

    def rules(rule: dict[str, Any]) -> list[dict[str, Any]]:
        return [inner for each in rule["pretokenizers"] for inner in rules(each)] if "pretokenizers" in rule else [rule]

    if inner.pre_tokenizer is None or any(WORDS.search(t.content) for t in inner.get_added_tokens_decoder().values()):
        return None
    found = rules(json.loads(inner.pre_tokenizer.__getstate__()))
    by_letters = any(
        rule.get("use_regex", True) if rule["type"] == "ByteLevel" else r"?\p{L}+" in str(rule.get("pattern"))
        for rule in found
    )
    plain = inner.normalizer is None and not any(rule.get("add_prefix_space") for rule in found)
    if by_letters and plain and found[-1]["type"] == "ByteLevel":
        return ENDS
    by_spaces = any(rule["type"] == "WhitespaceSplit" or rule.get("split", False) for rule in found)
    return WORDS if by_letters or by_spaces else None


MOST_BYTES = 2**26  # of a tokenizer.json: the largest published ones have 2^25
UNSEEN = "\ue000\U0010fffd"  # letters for private use, which no tokenizer has


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Nothing reaches the process's stderr: the `tokenizers` library prints its panics there."""
    if sys.__stderr__ is None:  # closed, and its number may be another file's
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _library(complaint: str) -> Iterator[None]:
    """What the library raises, bare Exceptions and panics that are none, as InputError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{complaint} ({' '.join(str(error).split())[:300]}).") from None


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special tokens by role: `pad_id`, `bos_id`, `eos_id`, `sep_id`, `unk_id`.

    `sentinel_ids` are those of <extra_id_0>, <extra_id_1>, ... where there are any. A special token that is missing,
    and those of `names`, are added at the end; where `ids` says which those of a published model are, no role's is, and
    what there is none for is the end of a text. Text never turns into one: a text that contains `<eos>` is spelled out.

    `source` is the tokenizer of the sources of pairs: this one, where they have none of their own.
    """

    def __init__(self, inner: "tk.Tokenizer", names: Sequence[str] = (), ids: Mapping[str, int] | None = None) -> None:
        self.inner, self._ids = inner, dict(ids or {})
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        for known in ROLES.values() if ids is None else ():
            if not any(inner.token_to_id(name) is not None for name in known):
                inner.add_special_tokens([known[0]])
        inner.add_special_tokens(list(names))
        self._seam, self._known = _seam(inner), dict[str, bytes]()
        self.sentinel_ids = []
        while (token := inner.token_to_id(f"<extra_id_{len(self.sentinel_ids)}>")) is not None:
            self.sentinel_ids.append(token)
        self.pad_id, self.bos_id, self.eos_id, self.sep_id, self.unk_id = map(self._role, ROLES)

        self.source = self

    def _role(self, role: str) -> int:
        if role in self._ids:
            return self._ids[role]
        found = (token for name in ROLES[role] if (token := self.inner.token_to_id(name)) is not None)
        return next(found, self._ids.get("eos", 0))

    @property
    def size(self) -> int:
        """Rows that an embedding table needs: the largest id and one."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def word_ids(self) -> np.ndarray:
        """int32, the ids of all tokens but the special ones."""
        special = {number for number, token in self.inner.get_added_tokens_decoder().items() if token.special}
        return np.array(sorted(set(self.inner.get_vocab(with_added_tokens=True).values()) - special), np.int32)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, no special tokens added or recognised."""
        parts = [list(self.parts_of([text])) for text in texts]
        if self._seam:
            ids = (self._by_words(part, self._seam) for each in parts for part in each)
        else:
            ids = iter(self._encode([part for each in parts for part in each], False))
        return [np.concatenate([next(ids) for _ in each]) if len(each) > 1 else next(ids) for each in parts]

    def _by_words(self, text: str, seam: re.Pattern[str]) -> np.ndarray:
        """As `_encode`, each word but once: the library takes many times as long to encode it again."""
        words, known = seam.split(text), self._known
        if self._dropped:
            words[1:] = [word[1:] for word in words[1:]]
        if len(known) > MOST_KNOWN:
            known.clear()
        if new := list(dict.fromkeys(word for word in words if word not in known)):
            known.update(zip(new, (ids.tobytes() for ids in self._encode(new, False)), strict=True))
        return np.frombuffer(b"".join(map(known.__getitem__, words)), np.int32)

    def parts_of(self, texts: Iterable[str], longest: int = LONGEST) -> Iterator[str]:
        """What the texts are joined, in parts of at most `longest` letters that have the ids of the whole."""
        text, start = "", 0
        for more in texts:
            text, start = text[start:] + more, 0
            while len(text) - start > longest and self._dropped is not None:
                end = cut_of(text, start, longest)
                yield text[start:end]
                start = end + (self._dropped if text[end] == " " else 0)
        yield text[start:]

    @functools.cached_property
    def _dropped(self) -> int | None:
        """Letters that a part leaves out at its beginning: the space, where the tokenizer puts one in front of a text
        itself. None where a text cannot be cut."""
        whole, first = "an old man", "an"
        ids = self._encode([whole, first, whole[2:], whole[3:]], False)
        fits = [count for count, rest in enumerate(ids[2:]) if np.array_equal(ids[0], np.append(ids[1], rest))]
        return next(iter(fits), None)

    def encode_marked(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, where names of special tokens in a text stand for them; never for what people write."""
        self.inner.encode_special_tokens = False
        try:
            return self._encode(texts, False)
        finally:
            self.inner.encode_special_tokens = True

    def encode_as_published(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, with the special tokens that the tokenizer's own file puts around a text."""
        return self._encode(texts, True)

    def encode_in_words(self, texts: Sequence[str]) -> list[list[tuple[int, ...]]]:
        """As `encode`, cut into what the model reads one by one: no token comes from two of them."""
        found = []
        for encoding in self._encodings(texts, False):
            ids, ends = encoding.ids, np.flatnonzero(np.diff(np.asarray(encoding.word_ids))) + 1
            cuts = itertools.pairwise(sorted({0, *ends.tolist(), len(ids)}))
            found.append([tuple(ids[first:last]) for first, last in cuts])
        return found

    def _encode(self, texts: Sequence[str], special: bool) -> list[np.ndarray]:
        return [np.asarray(encoding.ids, np.int32) for encoding in self._encodings(texts, special)]

    def _encodings(self, texts: Sequence[str], special: bool) -> "list[tk.Encoding]":
        with _library("the tokenizer cannot encode a text"):
            return self.inner.encode_batch(list(texts), add_special_tokens=special)

    def encode_with_sentinels(self, text: str) -> np.ndarray:
        """As `encode`, of one text in which <extra_id_N> stands for itself."""
        parts = [part for part in SENTINEL.split(text) if part]
        known = {f"<extra_id_{number}>": token for number, token in enumerate(self.sentinel_ids)}
        ids = [[known[part]] if part in known else self.encode([part])[0] for part in parts]
        return np.concatenate([np.zeros(0, np.int32), *(np.asarray(i, np.int32) for i in ids)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens leave none, sentinels their name."""
        sentinels = {token: f"<extra_id_{number}>" for number, token in enumerate(self.sentinel_ids)}
        text, run = "", []
        for token in map(int, ids):
            if token in sentinels:
                text, run = text + self.inner.decode(run) + sentinels[token], []
            else:
                run.append(token)
        return text + self.inner.decode(run)

    def id_of(self, name: str) -> int:
        """The id of a token. Raises InputError where there is none."""
        number = self.inner.token_to_id(name)
        if number is None:
            raise InputError(f"The tokenizer has no token {name}, which the objective needs.")
        return number

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The name of each id."""
        return [self.inner.id_to_token(int(token)) or f"<{token}>" for token in ids]

    def to_json(self) -> str:
        """All of it, as `tokenizer.json` holds it."""
        return self.inner.to_str(pretty=True)


def tokenizer_of(
    text: str, names: Sequence[str] = (), name: str = "tokenizer.json", special: Mapping[str, int] | None = None
) -> Tokenizer:
    """The tokenizer that `to_json` wrote; `name` is for messages, and `special` as `ids` in Tokenizer.

    Raises:
        InputError: it is none, most of its ids have no token, or it cannot encode every text.
    """
    import tokenizers as tk

    with _library(f"{name}: not a tokenizer.json that can be used"), _hushed():
        inner = tk.Tokenizer.from_str(text)
        ids = list(inner.get_vocab(with_added_tokens=True).values())
        if len(set(ids)) < len(ids):
            raise ValueError("two tokens have the same id")
        if max(ids, default=0) >= 2 * len(ids):
            raise ValueError(f"{len(ids):,} tokens have ids up to {max(ids):,}: most ids are of no token")
        tokenizer = Tokenizer(inner, names, special)
        tokenizer.decode(tokenizer.encode([UNSEEN])[0])
    return tokenizer


def load_tokenizer(
    path: str | os.PathLike[str], names: Sequence[str] = (), special: Mapping[str, int] | None = None
) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, or in a SentencePiece model; see `tokenizer_of`.

    Raises:
        InputError: the file is missing or is no tokenizer that can be used.
    """
    name = os.fspath(path)
    if name.endswith(sentencepiece.ENDINGS):
        inner = sentencepiece.tokenizer_of_pieces(sentencepiece.read_pieces(name))
        return tokenizer_of(inner.to_str(), names, name, special)
    return tokenizer_of(decode(name, read_whole(name, MOST_BYTES)), names, name, special)


TOKENIZER, SOURCE_TOKENIZER = "tokenizer.json", "source_tokenizer.json"


def papers_of(tokenizer: Tokenizer) -> dict[str, str]:
    """What a run's folder says of its tokenizer, by the files' names."""
    source = {} if tokenizer.source is tokenizer else {SOURCE_TOKENIZER: tokenizer.source.to_json()}
    return {TOKENIZER: tokenizer.to_json()} | source


def tokenizer_of_papers(papers: Mapping[str, str], special: Mapping[str, int] | None = None) -> Tokenizer:
    """The tokenizer that `papers_of` told. Raises InputError."""
    tokenizer = tokenizer_of(papers[TOKENIZER], special=special)
    if SOURCE_TOKENIZER in papers:
        tokenizer.source = tokenizer_of(papers[SOURCE_TOKENIZER], name=SOURCE_TOKENIZER, special=special)
    return tokenizer


def read_tokenizer(folder: Path, special: Mapping[str, int] | None = None) -> Tokenizer:
    """The tokenizer of a run's folder, with that of the sources where it has one. Raises InputError."""
    tokenizer = load_tokenizer(folder / TOKENIZER, special=special)
    if (folder / SOURCE_TOKENIZER).exists():
        tokenizer.source = load_tokenizer(folder / SOURCE_TOKENIZER, special=special)
    return tokenizer


def _byte_alphabet() -> list[str]:
    import tokenizers as tk

    return sorted(tk.pre_tokenizers.ByteLevel.alphabet())


def _bpe(texts: Iterable[str], size: int) -> "tk.Tokenizer":
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2): every text has an encoding."""
    import tokenizers as tk

    inner = tk.Tokenizer(tk.models.BPE())
    inner.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tk.decoders.ByteLevel()
    least = len(SPECIAL) + 256
    if size < least:
        raise InputError(f"data.tokenizer_size={size} is too small for bpe: {least} are the bytes and special tokens.")
    trainer = tk.trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=_byte_alphabet(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def _between_spaces(inner: "tk.Tokenizer") -> "tk.Tokenizer":
    """Words are what stands between spaces, each with the one in front, as in SentencePiece."""
    import tokenizers as tk

    # a text that spells a special token is cut behind its "<", else the name could become a piece of the model
    names = "|".join(name.strip("<>") for name in (*SPECIAL, r"extra_id_\d+"))
    spelled = tk.pre_tokenizers.Split(tk.Regex(f"<(?=({names})>)"), "isolated")
    inner.pre_tokenizer = tk.pre_tokenizers.Sequence([spelled, tk.pre_tokenizers.Metaspace(prepend_scheme="first")])
    inner.decoder = tk.decoders.Metaspace(prepend_scheme="first")
    return inner


def _bpe_words(texts: Iterable[str], size: int) -> "tk.Tokenizer":
    """Byte-pair encoding of characters, within what stands between spaces (Sennrich et al. 2016, subword-nmt)."""
    import tokenizers as tk

    inner = _between_spaces(tk.Tokenizer(tk.models.BPE(unk_token="<unk>")))
    inner.train_from_iterator(
        texts, tk.trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    if (least := inner.get_vocab_size()) > size:
        raise InputError(
            f"data.tokenizer_size={size} is too small for bpe-words: {least} are the data's letters and special tokens."
        )
    return inner


def _unigram(texts: Iterable[str], size: int) -> "tk.Tokenizer":
    """Unigram language model (Kudo 2018)."""
    import tokenizers as tk

    inner = _between_spaces(tk.Tokenizer(tk.models.Unigram()))
    # the other special tokens are added after: a piece of the model could come from text
    trainer = tk.trainers.UnigramTrainer(
        vocab_size=size - len(SPECIAL) + 1, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    with _library(f"data.tokenizer_size={size} is too small for unigram"):
        inner.train_from_iterator(texts, trainer)
    return inner


# letters and digits, or what is neither, with a space in front; and other space. Together they are the text.
WORD = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"


def _word(texts: Iterable[str], size: int) -> "tk.Tokenizer":
    """A token a word, of the most frequent of the training data; others are <unk>."""
    import tokenizers as tk

    inner = tk.Tokenizer(tk.models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(WORD), "isolated")
    inner.decoder = tk.decoders.Fuse()
    inner.train_from_iterator(
        texts, tk.trainers.WordLevelTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    return inner


def _char(texts: Iterable[str], size: int) -> "tk.Tokenizer":
    """A token a character, of those that the training data has."""
    import tokenizers as tk

    letters = sorted(set().union(*map(set, texts)))
    vocabulary = {token: number for number, token in enumerate(SPECIAL + letters)}
    inner = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.add_special_tokens(SPECIAL)
    inner.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(r"[\s\S]"), "isolated")
    inner.decoder = tk.decoders.Fuse()
    return inner


def _bytes(texts: Iterable[str], size: int) -> "tk.Tokenizer":
    """A token a byte (ByT5)."""
    import tokenizers as tk

    vocabulary = {token: number for number, token in enumerate(SPECIAL + _byte_alphabet())}
    inner = tk.Tokenizer(tk.models.BPE(vocabulary, []))
    inner.add_special_tokens(SPECIAL)
    inner.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tk.decoders.ByteLevel()
    return inner


TRAINERS: dict[str, Callable[[Iterable[str], int], "tk.Tokenizer"]] = {
    "bpe": _bpe,
    "bpe-words": _bpe_words,
    "unigram": _unigram,
    "word": _word,
    "char": _char,
    "bytes": _bytes,
}


def make_tokenizer(
    name: str,
    size: int,
    texts: Callable[[], Iterable[str]],
    names: Sequence[str] = (),
    special: Mapping[str, int] | None = None,
) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: trained on the texts, or read from a file.

    Raises:
        InputError: the name is neither a kind of tokenizer nor a file; the size is too small.
    """
    if name in TRAINERS:
        # as it will be read from the run's folder: the library rounds a unigram's scores when it writes them
        import tokenizers as tk

        return Tokenizer(tk.Tokenizer.from_str(TRAINERS[name](texts(), size).to_str()), names, special)
    if not name.endswith(".json") and not Path(name).exists():
        kinds = ", ".join(TRAINERS)
        raise InputError(f"data.tokenizer={name!r} is none of {kinds}, and no file.{nearest(name, TRAINERS)}")
    return load_tokenizer(name, names, special)
