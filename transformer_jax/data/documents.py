"""Texts and pairs as a stream, for what is too large to be held: each document once, in parts as they come."""

import codecs
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from transformer_jax.data.corpora import Pairs, Texts
from transformer_jax.data.sources import READERS, files_of, kind_of, read, read_lines
from transformer_jax.errors import InputError
from transformer_jax.files import reading


class Document(NamedTuple):
    """A text, or a pair of them.

    Attributes:
        kind: `text` or `pairs`.
        parts: (0 for a text or a source, 1 for a target; what it says, some of it at a time).
    """

    kind: str
    parts: list[tuple[int, Iterable[str]]]


def stream_text(path: Path) -> Iterator[str]:
    """A file's text as `decode` has it, some of it at a time.

    Raises:
        InputError: as `read_whole` and `decode`; or there is no text in it.
    """
    decoder, left, at, line, blank = codecs.getincrementaldecoder("utf-8")(), "", 0, 1, True
    first = True
    for raw, final in itertools.chain(((chunk, False) for chunk in _streamed(path)), [(b"", True)]):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise InputError(
                f"{path}: byte {at - held + error.start} (line {line + error.object.count(10, 0, error.start)}) is not "
                f"valid UTF-8: found 0x{byte:02x}. Convert it to UTF-8 first."
            ) from None
        at, line = at + len(raw), line + raw.count(b"\n")
        text, first = left + (text.removeprefix("\ufeff") if first else text), first and not text
        left = "\r" if text.endswith("\r") and not final else ""  # whose line feed may follow
        text = text.removesuffix(left).replace("\r\n", "\n")
        blank = blank and not text.strip()
        yield text
    if blank:
        raise InputError(f"{path}: {'only blank lines, no text' if at else 'the file is empty'}.")


def _streamed(path: Path) -> Iterator[bytes]:
    with reading(path), open(path, "rb") as file:
        os.stat(path)
        yield from iter(lambda: file.read(2**20), b"")


def _documents(paths: tuple[str, ...]) -> Iterator[Document]:
    files = files_of(paths)
    if len(paths) == 2:
        for source, target in zip(*map(read_lines, files), strict=True):
            yield Document("pairs", [(0, [source]), (1, [target])])
        return
    for path in files:
        if kind_of(path) not in READERS:
            yield Document("text", [(0, stream_text(path))])
            continue
        corpus = read((str(path),))
        if isinstance(corpus, Texts):
            yield from (Document("text", [(0, [text])]) for text in corpus.documents)
        elif isinstance(corpus, Pairs):
            yield from (Document("pairs", [(0, [s]), (1, [t])]) for s, t in zip(corpus.sources, corpus.targets))


def documents_in(paths: tuple[str, ...]) -> Iterator[Document]:
    """What one path or two parallel files hold, as a stream.

    Raises:
        InputError: as `read`; or they hold conversations.
    """
    kind = ""
    for document in _documents(paths):
        if kind and document.kind != kind:
            raise InputError(f"{paths[0]}: holds {kind} and {document.kind}; give one of them.")
        kind = document.kind
        yield document
