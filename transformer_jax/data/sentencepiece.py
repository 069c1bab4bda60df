"""A SentencePiece model (.model, .spm) as a tokenizer of the `tokenizers` library, which a run keeps as tokenizer.json.

The file is read by the `sentencepiece` library, an extra; it encodes here as it does there.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_jax.errors import InputError
from transformer_jax.files import read_whole

if TYPE_CHECKING:
    import tokenizers as tk

ENDINGS = (".model", ".spm")
MOST_BYTES = 2**26
SPACE = "\u2581"
ORDINARY, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What such a file holds.

    Attributes:
        pieces: text, score and kind of each, in the order of their ids.
        bpe: merges by score; else a unigram model.
        byte_fallback: what no piece spells becomes bytes.
        normalizer: the compiled rules, empty for none.
        prefix: a text begins as if it had a space in front.
        squeeze: several spaces are one, and those at the ends none.
    """

    pieces: list[tuple[str, float, int]]
    bpe: bool
    byte_fallback: bool
    normalizer: bytes
    prefix: bool
    squeeze: bool

    @property
    def unknown(self) -> int:
        """The id of what no piece spells."""
        return next((number for number, (_, _, kind) in enumerate(self.pieces) if kind == UNKNOWN), 0)


def read_pieces(path: str | Path) -> Pieces:
    """A file's pieces.

    Raises:
        InputError: it is missing, is no such file, or the library that reads it is not installed.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError:
        raise InputError(f"{path}: a SentencePiece model needs pip install 'transformer_jax[sentencepiece]'.") from None
    model: Any = schema.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]: made at run time
    try:
        model.ParseFromString(read_whole(str(path), MOST_BYTES))
    except DecodeError as error:
        raise InputError(f"{path}: not a SentencePiece model ({error}).") from None
    rules, kind = model.normalizer_spec, model.trainer_spec.model_type
    if kind not in (UNIGRAM, BPE) or not model.pieces:
        raise InputError(f"{path}: not a SentencePiece model of the kind unigram or bpe.")
    if model.trainer_spec.treat_whitespace_as_suffix or not rules.escape_whitespaces or rules.normalization_rule_tsv:
        raise InputError(
            f"{path}: a SentencePiece model that treats spaces, or rules of its own, in a way unknown here."
        )
    return Pieces(
        [(each.piece, each.score, each.type) for each in model.pieces],
        kind == BPE,
        model.trainer_spec.byte_fallback,
        rules.precompiled_charsmap,
        rules.add_dummy_prefix,
        rules.remove_extra_whitespaces,
    )


def merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Pairs of pieces that are a piece together, the likeliest first."""
    ranks = {text: number for number, (text, _, _) in enumerate(pieces)}
    found = []
    for text, score, kind in pieces:
        if kind == ORDINARY:
            cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            pairs = [(a, b) for a, b in cuts if a in ranks and b in ranks]
            found += [(-score, ranks[a], ranks[b], a, b) for a, b in pairs]
    return [(a, b) for *_, a, b in sorted(found)]


def tokenizer_of_pieces(model: Pieces) -> "tk.Tokenizer":
    """The tokenizer whose ids are those of the pieces."""
    import tokenizers as tk

    pieces, normal = model.pieces, tk.normalizers
    unknown = pieces[model.unknown][0]
    if model.bpe:
        inner = tk.Tokenizer(
            tk.models.BPE(
                {text: number for number, (text, _, _) in enumerate(pieces)},
                merges(pieces),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    else:
        scores = [(text, score) for text, score, _ in pieces]
        inner = tk.Tokenizer(tk.models.Unigram(scores, model.unknown, model.byte_fallback))
        # a text that spells a special token is cut behind its first letter, else it could become one
        names = [text for text, _, kind in pieces if kind != ORDINARY and len(text) > 1]
        spelled = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in names)
        inner.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(spelled), "isolated") if names else None
    steps: list[Any] = [normal.Precompiled(model.normalizer)] if model.normalizer else []
    if model.squeeze:
        steps += [normal.Replace(tk.Regex("^ +| +$"), ""), normal.Replace(tk.Regex(" {2,}"), " ")]
    steps += [normal.Prepend(SPACE)] if model.prefix else []
    inner.normalizer = normal.Sequence([*steps, normal.Replace(" ", SPACE)])
    decode = tk.decoders
    around = [decode.Strip(" ", 1, 0)] if model.prefix else []
    inner.decoder = decode.Sequence([decode.Replace(SPACE, " "), decode.ByteFallback(), decode.Fuse(), *around])
    special = [text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    inner.add_special_tokens(special)
    inner.add_tokens([tk.AddedToken(text, normalized=False) for text, _, kind in pieces if kind == USER])
    return inner
