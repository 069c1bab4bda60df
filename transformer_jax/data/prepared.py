"""Token shards on the disk, as `transformer-jax prepare` writes them: read where they are, never as a whole.

    prepared.json           what it is made of and how far it is
    tokenizer.json
    text-00000.tokens       numbers of tokens, of documents end to end, two bytes or four each
    text-00000.ends         where in this shard documents end, eight bytes each; one may go on in the next shard

Pairs have `source-` and `target-` in place of `text-`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from transformer_jax.data.ragged import Ragged, Shards
from transformer_jax.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from transformer_jax.errors import InputError
from transformer_jax.files import decode, read_whole, reading

PAPER = "prepared.json"
PARTS = {"text": ("text",), "pairs": ("source", "target")}
ENDS = "<i8"
MOST_PAPER = 2**26  # bytes
FORMAT = 1
SAMPLE, SHOWN = 256, 4096  # documents that are shown as text, and tokens of each


def digest_of(path: Path) -> str:
    """A digest of a file's bytes."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def read_paper(folder: Path) -> dict[str, Any] | None:
    """What `prepared.json` says, None where there is none. Raises InputError."""
    path = folder / PAPER
    if not os.path.isfile(path):
        return None
    try:
        paper = json.loads(decode(path, read_whole(path, MOST_PAPER)))
        if paper["format"] != FORMAT:
            raise InputError(f"{path}: format {paper['format']!r} is not known here, only {FORMAT}.")
        if paper["kind"] not in PARTS or paper["dtype"] not in ("<u2", "<u4"):
            raise ValueError("its kind or dtype is unknown")
        for number, shard in enumerate(paper["shards"]):
            wanted = {name for part in PARTS[paper["kind"]] for name in names_of(part, number)}
            if set(shard["files"]) != wanted:
                raise ValueError(f"shard {number} has other files than {', '.join(sorted(wanted))}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not what transformer-jax prepare has written ({error}).") from None
    return paper


def counted(paper: dict[str, Any]) -> dict[str, int]:
    """Documents, or pairs of them, and tokens of all shards."""
    files = [item for shard in paper["shards"] for item in shard["files"].items()]
    tokens, ends = (sum(about["bytes"] for name, about in files if name.endswith(end)) for end in (".tokens", ".ends"))
    return {
        "documents": ends // np.dtype(ENDS).itemsize // len(PARTS[paper["kind"]]),
        "tokens": tokens // np.dtype(paper["dtype"]).itemsize,
    }


def names_of(part: str, number: int) -> tuple[str, str]:
    """The files of a shard: its tokens, and where documents end in it."""
    return f"{part}-{number:05}.tokens", f"{part}-{number:05}.ends"


def damage(folder: Path, paper: dict[str, Any]) -> str:
    """What is wrong with the first file that is not as it was written, nothing where all are."""
    files = {name: about for shard in paper["shards"] for name, about in shard["files"].items()}
    files[TOKENIZER] = paper["tokenizer"]
    for name, about in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != about["bytes"]:
            found = "is missing" if size < 0 else f"has {size:,} bytes where {about['bytes']:,} were written"
            return f"{path} {found}"
    with ThreadPoolExecutor(4) as pool:  # hashing lets go of Python's lock
        for name, digest in zip(files, pool.map(lambda name: digest_of(folder / name), files), strict=True):
            if digest != files[name]["digest"]:
                return f"{folder / name} has other bytes than were written"
    return ""


def _array(path: Path, dtype: str) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Texts or pairs whose tokens lie in a folder.

    Attributes:
        folder: where.
        kind: `text` or `pairs`.
        parts: the documents, or the sources and the targets.
        fingerprint: how much it is, and a digest.
    """

    folder: str
    kind: str
    parts: tuple[Ragged, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.parts[0])

    def tokens(self, tokenizer: Tokenizer) -> tuple[Ragged, ...]:
        """Of the texts, or of the sources and of the targets."""
        return self.parts

    @property
    def tokenizer_path(self) -> str:
        """The file with the tokenizer that the tokens are of."""
        return str(Path(self.folder) / TOKENIZER)

    def all_texts(self) -> Iterator[str]:
        """None: the tokenizer is there."""
        return iter(())

    def place(self, index: int) -> str:
        """Where a document came from, for messages."""
        return f"{self.folder}, document {index + 1:,}"

    def _part(self, offsets: list[np.ndarray], name: str) -> "Prepared":
        parts = tuple(Ragged(part.ids, each) for part, each in zip(self.parts, offsets, strict=True))
        return dataclasses.replace(self, parts=parts, fingerprint=f"{name} of {self.fingerprint}")

    def split(self, fraction: float) -> tuple["Prepared", "Prepared"]:
        """The last `fraction` of the tokens held out, at a document's end; a lone document is cut in two."""
        if len(self) == 1:
            first, last = self.parts[0].offsets
            cut = first + int((last - first) * (1 - fraction))
            offsets = [np.array([first, cut])], [np.array([cut, last])]
        else:
            left = np.sum([part.offsets[-1] - part.offsets for part in self.parts], 0)  # tokens from each document on
            cut = int(np.searchsorted(-left, -fraction * left[0], side="right")) - 1
            cut = min(max(cut, 1), len(self) - 1)
            offsets = [part.offsets[: cut + 1] for part in self.parts], [part.offsets[cut:] for part in self.parts]
        return self._part(offsets[0], f"all but the last {fraction}"), self._part(offsets[1], f"the last {fraction}")

    def said(self, tokenizer: Tokenizer, kept: np.ndarray | None = None) -> list[list[str]]:
        """Each part's first documents, or first ones of those that are kept, as text, as far as it is shown."""
        numbers = (np.arange(len(self)) if kept is None else kept)[:SAMPLE]
        return [[tokenizer.decode(part[int(i)][:SHOWN]) for i in numbers] for part in self.parts]


def read_prepared(folder: Path) -> Prepared | None:
    """What a folder holds, every byte of which is as it was written; None where nothing was prepared there.

    Raises:
        InputError: it is not finished, or damaged.
    """
    paper = read_paper(folder)
    if paper is None:
        return None
    if not paper["done"]:
        raise InputError(f"{folder}: not prepared to its end; the same transformer-jax prepare goes on with it.")
    if wrong := damage(folder, paper):
        raise InputError(f"{wrong}: prepare it again, in another folder.")
    parts, digest = [], blake2b(digest_size=16)
    with reading(folder):
        for part in PARTS[paper["kind"]]:
            tokens, offsets, start = [], [np.zeros(1, np.int64)], 0
            for number in range(len(paper["shards"])):
                here, ends = names_of(part, number)
                tokens.append(_array(folder / here, paper["dtype"]))
                offsets.append(_array(folder / ends, ENDS) + start)
                start += len(tokens[-1])
            parts.append(Ragged(Shards(tokens), np.concatenate(offsets)))
    for shard in paper["shards"]:
        for name, about in sorted(shard["files"].items()):
            digest.update(f"{name} {about['digest']}\n".encode())
    fits = all(len(part) == len(parts[0]) and part.offsets[-1] == len(part.ids) for part in parts)
    if not fits or counted(paper) != {name: paper.get(name) for name in ("documents", "tokens")} or not len(parts[0]):
        raise InputError(f"{folder / PAPER}: its shards do not fit together; prepare it again, in another folder.")
    size = f"{len(parts[0]):,} {paper['kind']}, {sum(len(part.ids) for part in parts):,} tokens"
    return Prepared(str(folder), paper["kind"], tuple(parts), f"{size}, {digest.hexdigest()}")


def check_tokenizer(prepared: Prepared, tokenizer: Tokenizer, name: str) -> None:
    """Raises InputError where a run's tokenizer gives other ids than the one that the tokens are of."""
    ours, theirs = (json.loads(each.to_json()) for each in (tokenizer, load_tokenizer(prepared.tokenizer_path)))
    if any(ours[key] != theirs[key] for key in ("model", "normalizer", "pre_tokenizer")):
        raise InputError(
            f"{prepared.folder}: its tokens are of another tokenizer than {name}; prepare it "
            "with --tokenizer of that one."
        )
