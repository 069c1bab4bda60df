"""Texts -> token shards: read once as a stream, encoded by several processes, written in the order that they came.

What is written is a function of the texts, the tokenizer and the size of a shard alone: of however many processes, and
however often it was killed and started again. A shard is there whole or not at all, and the paper says which there are.
"""

import dataclasses
import itertools
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.data.documents import Document, documents_in
from transformer_jax.data.prepared import (
    ENDS,
    FORMAT,
    PAPER,
    PARTS,
    counted,
    damage,
    digest_of,
    names_of,
    read_paper,
)
from transformer_jax.data.tokenizer import TOKENIZER, TRAINERS, Tokenizer, load_tokenizer, make_tokenizer, tokenizer_of
from transformer_jax.errors import InputError
from transformer_jax.folders import sync, write_whole
from transformer_jax.workers import processes

OURS = re.compile(r"lock|tokenizer\.json|prepared\.json|(\w+-\d+\.(tokens|ends)|(tokenizer|prepared)\.json)\.tmp")
BLOCK = 2**20  # letters that a process encodes at a time
SAMPLE = 2**26  # letters that a tokenizer is trained on


class Piece(NamedTuple):
    """A part of a document that is encoded at once: of which side, what it says, whether the document ends with it."""

    side: int
    text: str
    ends: bool


class Encoded(NamedTuple):
    """A block's tokens, and where documents end in it, of each side."""

    tokens: list[np.ndarray]
    ends: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be prepared.

    Attributes:
        data: one path, or two parallel files.
        tokenizer, size: as `make_tokenizer` takes them.
        shard_tokens: tokens of a shard, to the next end of a block.
    """

    data: tuple[str, ...]
    tokenizer: str
    size: int
    shard_tokens: int


# --- in the processes that encode

_tokenizer: Tokenizer | None = None


def _begin(text: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as there is to share
    _tokenizer = tokenizer_of(text) if text else None


def _encode(pieces: list[Piece], sides: int, dtype: str) -> Encoded:
    assert _tokenizer is not None
    found = Encoded([], [])
    for side in range(sides):
        mine = [piece for piece in pieces if piece.side == side]
        ids = _tokenizer.encode([piece.text for piece in mine])
        ends = np.cumsum([len(each) for each in ids], dtype=np.int64)
        found.tokens.append(np.concatenate([np.zeros(0, dtype), *ids]).astype(dtype))
        found.ends.append(ends[np.asarray([piece.ends for piece in mine], bool)])
    return found


def _train(wanted: Wanted, sample: float) -> str:
    """A tokenizer trained on a share of the documents, spread over all of them, as JSON."""

    def texts() -> Iterator[str]:
        passed, left = 0.0, SAMPLE if wanted.tokenizer != "char" else math.inf
        for document in documents_in(wanted.data):
            for _, chunks in document.parts:
                for chunk in chunks:
                    for start in range(0, len(chunk), BLOCK // 16):
                        if left <= 0:  # the rest of a stream need not be read
                            return
                        passed += sample
                        if passed >= 1:
                            passed -= 1
                            part = chunk[start : start + BLOCK // 16]
                            left -= len(part)
                            yield part

    return make_tokenizer(wanted.tokenizer, wanted.size, texts).to_json()


# --- in the first process


def _pieces(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Piece]:
    for document in documents:
        for side, chunks in document.parts:
            parts = tokenizer.parts_of(chunks)
            part = next(parts)
            for following in parts:
                yield Piece(side, part, False)
                part = following
            yield Piece(side, part, True)


def _blocks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    block, letters = [], 0
    for piece in pieces:
        block.append(piece)
        letters += len(piece.text)
        if letters >= BLOCK:
            yield block
            block, letters = [], 0
    if block:
        yield block


class Writer:
    """The shards of a folder, one after the other; `paper` says which are there."""

    def __init__(self, folder: Path, paper: dict[str, Any]) -> None:
        self.folder, self.paper = folder, paper
        self.sides = PARTS[paper["kind"]]
        for left in folder.glob("*.tmp"):
            if OURS.fullmatch(left.name):
                left.unlink()
        self._open()

    def _open(self) -> None:
        self.number = len(self.paper["shards"])
        self.names = [names_of(side, self.number) for side in self.sides]
        self.files = {name: (self.folder / f"{name}.tmp").open("wb") for pair in self.names for name in pair}
        self.digests = {name: blake2b(digest_size=16) for name in self.files}
        self.counts = [0] * len(self.sides)

    def _write(self, name: str, array: np.ndarray) -> None:
        data = array.tobytes()
        self.files[name].write(data)
        self.digests[name].update(data)

    def add(self, block: Encoded) -> None:
        """Goes on with the shard."""
        for side, (tokens, ends) in enumerate(zip(*block, strict=True)):
            here, where = self.names[side]
            self._write(here, tokens)
            self._write(where, (ends + self.counts[side]).astype(ENDS))
            self.counts[side] += len(tokens)

    def close(self, blocks: int, source: str, done: bool) -> None:
        """Ends the shard: its files are on the disk, and then the paper says so."""
        about = {}
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            about[name] = {"bytes": file.tell(), "digest": self.digests[name].hexdigest()}
            file.close()
            (self.folder / f"{name}.tmp").replace(self.folder / name)
        sync(self.folder)
        self.paper["shards"].append({"files": about, "blocks": blocks, "source": source})
        self.paper |= counted(self.paper) | {"done": done}
        write_whole(self.folder / PAPER, json.dumps(self.paper, indent=1) + "\n")
        if not done:
            self._open()

    def abandon(self) -> None:
        """Leaves the shard that is under way."""
        for name, file in self.files.items():
            file.close()
            (self.folder / f"{name}.tmp").unlink(missing_ok=True)


def _make_tokenizer(folder: Path, wanted: Wanted, total: int, say: Callable[[str], None]) -> Path:
    """The file of the folder's tokenizer; one that is trained is so in a process, whose memory is given back."""
    sample = min(1.0, SAMPLE / max(total, 1)) if wanted.tokenizer != "char" else 1.0
    if wanted.tokenizer not in TRAINERS:
        text = make_tokenizer(wanted.tokenizer, wanted.size, lambda: ()).to_json()
    else:
        say("trains a tokenizer" + (f" on {sample:.1%} of the text" if sample < 1 else ""))
        with processes(1, _begin, "") as pool:
            text = pool.submit(_train, wanted, sample).result()
    write_whole(folder / TOKENIZER, text)
    return folder / TOKENIZER


def _first_paper(wanted: Wanted, kind: str, path: Path) -> dict[str, Any]:
    size = load_tokenizer(path).size
    return {
        "format": FORMAT,
        "kind": kind,
        "data": list(wanted.data),
        "wanted_tokenizer": [wanted.tokenizer, wanted.size],
        "shard_tokens": wanted.shard_tokens,
        "dtype": "<u2" if size <= 2**16 else "<u4",
        "tokenizer": {"bytes": path.stat().st_size, "digest": digest_of(path)},
        "done": False,
        "shards": [],
    }


def prepare(
    folder: Path,
    wanted: Wanted,
    workers: int,
    total: int,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Writes the shards that are not there yet, and returns the folder's paper.

    `total` is how many bytes there are to read, for the share that a tokenizer is trained on; `progress` is told the
    letters and the tokens so far.

    Raises:
        InputError: the data cannot be used, or the folder holds another preparation, or is damaged.
    """
    paper = read_paper(folder)
    if paper is None and (others := [path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)]):
        raise InputError(f"{folder} has other files in it ({sorted(others)[0]}): give a new folder.")
    asked = {"data": list(wanted.data), "wanted_tokenizer": [wanted.tokenizer, wanted.size]}
    asked["shard_tokens"] = wanted.shard_tokens
    for name, value in asked.items():
        if paper is not None and paper.get(name) != value:
            flag = {"wanted_tokenizer": "tokenizer and --tokenizer-size"}.get(name, name.replace("_", "-"))
            raise InputError(
                f"{folder} holds another preparation: --{flag} was {paper.get(name)!r} there and is {value!r} here. "
                "Give another folder."
            )
    if paper is not None and (wrong := damage(folder, paper)):
        raise InputError(f"{wrong}. Remove the folder and prepare it again.")
    if paper is not None and paper["done"]:
        return paper
    documents = documents_in(wanted.data)
    first = next(documents)
    if paper is None:
        paper = _first_paper(wanted, first.kind, _make_tokenizer(folder, wanted, total, say))
        write_whole(folder / PAPER, json.dumps(paper, indent=1) + "\n")
    if paper["kind"] != first.kind:
        raise InputError(f"{folder} holds {paper['kind']}, and {wanted.data[0]} holds {first.kind}.")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    blocks = _blocks(_pieces(itertools.chain([first], documents), tokenizer))
    writer = Writer(folder, paper)
    try:
        with processes(workers, _begin, tokenizer.to_json()) as pool:
            _write_all(blocks, writer, pool, 2 * workers, progress)
    finally:
        writer.abandon()
    return paper


def _write_all(
    blocks: Iterator[list[Piece]], writer: Writer, pool: Executor, ahead: int, progress: Callable[[int, int], None]
) -> None:
    """Encodes the blocks that no shard has yet; those before are read again, and must say what they said."""
    paper, digest = writer.paper, blake2b(digest_size=16)
    there = {shard["blocks"]: shard["source"] for shard in paper["shards"]}
    done, letters, tokens = max(there, default=0), 0, 0
    waiting: deque[tuple[Future[Encoded], int, str, int]] = deque()

    def settle(most: int) -> None:
        nonlocal tokens
        while len(waiting) > most:
            future, count, source, read = waiting.popleft()
            block = future.result()
            writer.add(block)
            tokens += sum(map(len, block.tokens))
            if sum(writer.counts) >= paper["shard_tokens"]:
                writer.close(count, source, False)
            progress(read, tokens)

    count = 0
    for count, block in enumerate(blocks, 1):
        for piece in block:
            digest.update(piece.text.encode() + b"\0" * (1 + piece.side + 2 * piece.ends))
            letters += len(piece.text)
        if count <= done:
            if there.get(count, digest.hexdigest()) != digest.hexdigest():
                raise InputError(
                    f"{writer.folder}: {', '.join(paper['data'])} has other text than the shards that are there were "
                    "made of. Remove the folder and prepare it again."
                )
            progress(letters, tokens)
            continue
        future = pool.submit(_encode, block, len(writer.sides), paper["dtype"])
        waiting.append((future, count, digest.hexdigest(), letters))
        settle(ahead)
    settle(0)
    if count < done:
        raise InputError(f"{writer.folder}: {', '.join(paper['data'])} has less text than the shards were made of.")
    if not (tokens or there):
        raise InputError(f"{', '.join(paper['data'])}: no text, nothing to learn from.")
    writer.close(count, digest.hexdigest(), True)
