"""Texts and pairs as a stream, for what is too large to be held: each document once, in parts as they come."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from transformer_jax.data.records import KINDS, READERS, Records, is_dataset, suffix_of
from transformer_jax.data.sources import parts_of
from transformer_jax.errors import InputError
from transformer_jax.files import stream_text


class Document(NamedTuple):
    """A text, or a pair of them.

    Attributes:
        kind: `text` or `pairs`.
        parts: (0 for a text or a source, 1 for a target; what it says, some of it at a time).
    """

    kind: str
    parts: list[tuple[int, Iterable[str]]]


def _documents(records: Records) -> Iterator[Document]:
    for _, record in records:
        yield Document(KINDS[tuple(record)], [(side, [text]) for side, text in enumerate(record.values())])


def documents_in(paths: tuple[str, ...]) -> Iterator[Document]:
    """What one path or two parallel files hold, as a stream.

    Raises:
        InputError: as `read`; or they hold conversations, whose tokens are for their template to say.
    """
    kinds = set()
    for source, records in parts_of(paths):
        whole = len(paths) == 1 and not is_dataset(source) and suffix_of(source) not in READERS  # a text, however long
        found = iter([Document("text", [(0, stream_text(source))])]) if whole else _documents(records)
        for document in found:
            kinds.add(document.kind)
            if "chat" in kinds:
                raise InputError(f"{source}: conversations are not prepared; --data.train reads them as they are.")
            if len(kinds) > 1:
                raise InputError(f"{paths[0]}: holds {' and '.join(sorted(kinds))}; give one of them.")
            yield document
