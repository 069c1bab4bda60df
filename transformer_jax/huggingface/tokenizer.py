"""The tokenizer of a published folder: its tokenizer.json, or what its family makes of a SentencePiece model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformer_jax.config_checks import nearest, shown
from transformer_jax.data.sentencepiece import CONTROL, ORDINARY, UNKNOWN, Pieces, read_pieces, tokenizer_of_pieces
from transformer_jax.data.tokenizer import MOST_BYTES
from transformer_jax.errors import InputError
from transformer_jax.files import decode, read_whole
from transformer_jax.huggingface.folder import read_json

TOKENIZER, SETTINGS, VOCABULARY = "tokenizer.json", "tokenizer_config.json", "vocab.json"
MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm")
Json = dict[str, Any]
Piece = tuple[str, float, int]  # text, score, kind
TEXT = "$A"
MOST_EXTRA = 10_000


def _special(*names: str) -> list[Piece]:
    return [(name, 0.0, CONTROL) for name in names]


# --- how a family orders the pieces, and what it puts around a text. (pieces, settings) -> (pieces, template)

Arranged = tuple[list[Piece], list[str]]


def _as_they_are(pieces: list[Piece], settings: Json) -> Arranged:
    """Llama and Gemma: a start in front, where the settings do not say otherwise."""
    before = ["<bos>" if ("<bos>", 0.0, CONTROL) in pieces else "<s>"] if settings.get("add_bos_token", True) else []
    behind = ["<eos>" if ("<eos>", 0.0, CONTROL) in pieces else "</s>"] if settings.get("add_eos_token", False) else []
    return pieces, [*before, TEXT, *behind]


def _count(settings: Json, name: str, default: int) -> int:
    """A number of tokens. Raises InputError."""
    found = settings.get(name, default)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= MOST_EXTRA:
        raise InputError(f"{SETTINGS}: {name}={shown(found)} must be a whole number from 0 to {MOST_EXTRA:,}.")
    return found


def _t5(pieces: list[Piece], settings: Json) -> Arranged:
    """Sentinels come behind, the first of them last."""
    count = _count(settings, "extra_ids", 100)
    return pieces + _special(*(f"<extra_id_{number}>" for number in reversed(range(count)))), [TEXT, "</s>"]


def _mt5(pieces: list[Piece], settings: Json) -> Arranged:
    return _t5(pieces, {"extra_ids": 0} | settings)


def _pegasus(pieces: list[Piece], settings: Json) -> Arranged:
    """Two marks of what is hidden, and numbers that were left free, come before the unknown one and the pieces."""
    free = [f"<unk_{number}>" for number in range(2, _count(settings, "offset", 103))]
    return _special("<pad>", "</s>", "<mask_1>", "<mask_2>", *free) + pieces[2:], [TEXT, "</s>"]


def _fairseq(pieces: list[Piece], settings: Json) -> Arranged:
    """mBART and NLLB: four special tokens, the pieces without the model's own three, the languages."""
    first = [*_special("<s>", "<pad>", "</s>"), ("<unk>", 0.0, UNKNOWN)]
    codes, source = _languages(settings), settings.get("src_lang") or "en_XX"
    kind = str(settings.get("tokenizer_class", ""))
    behind = "Nllb" not in kind and "50" not in kind
    around = [TEXT, "</s>", source] if behind else [source, TEXT, "</s>"]
    return [*first, *pieces[3:], *_special(*codes, "<mask>")], around


def _languages(settings: Json) -> list[str]:
    """The languages' tokens."""
    codes = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    codes = codes if isinstance(codes, list) else []
    names = [each.get("content", "") if isinstance(each, dict) else each for each in codes]
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{SETTINGS}: additional_special_tokens must name the tokens of the languages.")
    return [name for name in names if name != "<mask>"]


def _by_vocabulary(pieces: list[Piece], vocabulary: Json, languages: list[str]) -> list[Piece]:
    """The pieces under the numbers that vocab.json gives them; what it has besides is not found in text."""
    size, numbers = len(vocabulary), list(vocabulary.values())
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(size)):
        raise InputError(f"{VOCABULARY}: its {size:,} numbers must be 0 to {size - 1:,}.")
    known = {text: (score, kind) for text, score, kind in pieces}
    rest = (0.0, CONTROL)
    found = [(text, *known.get(text, rest)) for text, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    found = [(text, score, UNKNOWN if text == "<unk>" else kind) for text, score, kind in found]
    return found + _special(*(each for each in languages if each not in vocabulary))


def _marian(pieces: list[Piece], target: Path, vocabulary: Json) -> list[Piece]:
    """Targets have a model of their own. What only they have is so unlikely that no source is cut by it."""
    have, least = {text for text, _, _ in pieces}, min(score for _, score, _ in pieces) - 100
    others = [(text, least, ORDINARY) for text, _, kind in read_pieces(target).pieces if kind == ORDINARY]
    return _by_vocabulary(pieces + [each for each in others if each[0] not in have], vocabulary, [])


ARRANGEMENTS: dict[str, Callable[[list[Piece], Json], Arranged]] = {
    "t5": _t5,
    "mt5": _mt5,
    "t5gemma": _as_they_are,
    "pegasus": _pegasus,
    "mbart": _fairseq,
    "m2m_100": _fairseq,
}


def _arranged(folder: Path, path: Path, kind: str, settings: Json) -> tuple[Pieces, list[str]]:
    """The pieces in the order of the family's ids, and what is around a text."""
    model = read_pieces(path)
    if (folder / VOCABULARY).exists():
        vocabulary = read_json(folder / VOCABULARY)
        if path.suffix == ".spm":
            pieces, around = _marian(model.pieces, path.with_name("target.spm"), vocabulary), [TEXT, "</s>"]
        else:
            pieces = _by_vocabulary(model.pieces, vocabulary, _languages(settings))
            around = [f"__{settings.get('src_lang') or 'en'}__", TEXT, "</s>"]
    else:
        pieces, around = ARRANGEMENTS.get(kind, _as_they_are)(model.pieces, settings)
    return Pieces(pieces, model.bpe, model.byte_fallback, model.normalizer, model.prefix, model.squeeze), around


def _settings(folder: Path) -> Json:
    found: Json = {}
    for name in ("special_tokens_map.json", SETTINGS):
        found |= read_json(folder / name) if (folder / name).exists() else {}
    return found


def tokenizer_json(folder: Path, kind: str) -> str | None:
    """The text of a tokenizer.json for a folder of a family, None where it has no tokenizer that is known.

    Raises:
        InputError: its files are none, or not understood.
    """
    if (folder / TOKENIZER).exists():
        return decode(folder / TOKENIZER, read_whole(folder / TOKENIZER, MOST_BYTES))
    path = next((folder / name for name in MODELS if (folder / name).exists()), None)
    if path is None:
        return None
    import tokenizers as tk

    model, around = _arranged(folder, path, kind, _settings(folder))
    inner = tokenizer_of_pieces(model)
    special = [(name, inner.token_to_id(name)) for name in around if name != TEXT]
    if missing := [name for name, number in special if number is None]:
        raise InputError(f"{path}: it has no token {shown(missing[0])}, which is put around a text.")
    inner.post_processor = tk.processors.TemplateProcessing(around, None, special)
    return inner.to_str(pretty=True)


def chat_template_of(folder: Path) -> str:
    """The template of conversations that a folder has, empty where it has none."""
    if (path := folder / "chat_template.jinja").exists():
        return decode(path, read_whole(path, 2**20))
    found = _settings(folder).get("chat_template") or ""
    if isinstance(found, list):  # several by name
        found = next((each.get("template") for each in found if each.get("name") == "default"), "")
    return found if isinstance(found, str) else ""


# --- languages

FORMS = ("{}", "__{}__", ">>{}<<", "<2{}>")


def language_token(names: dict[str, int], language: str, flag: str) -> str:
    """The token of a language, which may be given without its marks.

    Raises:
        InputError: there is none.
    """
    for form in FORMS:
        if (name := form.format(language)) in names:
            return name
    raise InputError(f"{flag} {language}: the tokenizer has no token for it.{nearest(language, names)}")


def with_language(text: str, language: str, also: bool) -> str:
    """A tokenizer.json that puts the token of a language around a text, where it has another language's.

    Args:
        text: tokenizer.json.
        language: as `language_token` gives it.
        also: where it has none, in front.

    Raises:
        InputError: it has none, or its template is unknown.
    """
    found = json.loads(text)
    steps = found.get("post_processor") or {}
    steps = steps.get("processors", [steps])
    template = next((step for step in steps if step.get("type") == "TemplateProcessing"), None)
    number = next((each["id"] for each in found.get("added_tokens", []) if each["content"] == language), None)
    number = found["model"].get("vocab", {}).get(language) if number is None and _is_table(found) else number
    if template is None or number is None:
        raise InputError(f"The tokenizer puts nothing around a text in a way that is known, so not {language} either.")
    single = template["single"]
    places = [place for place, part in enumerate(single) if _is_language(part)]
    if not places and not also:
        raise InputError(f"The tokenizer puts no language around a text, so not {language} either.")
    token = {"SpecialToken": {"id": language, "type_id": 0}}
    template["single"] = [token if place in places else part for place, part in enumerate(single)]
    template["single"] = template["single"] if places else [token, *single]
    template["special_tokens"][language] = {"id": language, "ids": [number], "tokens": [language]}
    return json.dumps(found, ensure_ascii=False)


def _is_table(found: Json) -> bool:
    return isinstance(found["model"].get("vocab"), dict)


def _is_language(part: Json) -> bool:
    name = part.get("SpecialToken", {}).get("id", "")
    return bool(name) and name not in ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<bos>", "<eos>")
