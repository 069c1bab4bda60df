"""`transformer-jax prepare FOLDER --data FILE...`: tokens once, on the disk, for data that is larger than memory."""

import dataclasses
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import tyro

from transformer_jax import host
from transformer_jax.config_checks import at_least, at_most
from transformer_jax.errors import BusyError, InputError, StorageError
from transformer_jax.flags import parse


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where the tokens go; --data.train FOLDER reads them. The same command goes on with what it finds there."""
    data: tuple[str, ...]
    """One path, or two parallel files, as --data.train takes them; no conversations."""
    tokenizer: str = "bpe"
    """bpe, bpe-words, unigram, word, char or bytes: trained on the data, where it is large on 64 MB spread over it. Or
    the path of a tokenizer.json or of a SentencePiece model."""
    tokenizer_size: int = 8000
    """Entries of a trained bpe, bpe-words, unigram or word tokenizer, special tokens included."""
    workers: int = 0
    """Processes that encode; 0 is one for each core. What is written is the same for any number."""
    shard_tokens: int = 2**25
    """Tokens in a file; a preparation that was stopped goes on behind its last whole file."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.data) <= 2:
            raise ValueError(f"--data takes one path, or two parallel files; got {len(self.data)}.")
        at_least(self, 0, "workers")
        at_most(self, 1024, "workers")
        at_least(self, 16, "tokenizer_size")
        at_least(self, 1, "shard_tokens")
        at_most(self, 2_000_000, "tokenizer_size")
        at_most(self, 2**40, "shard_tokens")


def _bytes_of(paths: tuple[str, ...]) -> int:
    """Bytes of the files that are read; 0 where they are none."""
    from transformer_jax.data.sources import files_of

    try:
        return sum(path.stat().st_size for path in files_of(paths))
    except OSError:  # said when it is read
        return 0


class _Bar:
    """A progress bar on a terminal, a line at times elsewhere."""

    def __init__(self, total: int) -> None:
        from rich import progress

        from transformer_jax.terminal import Terminal

        self.terminal, self.spoke, self.total = Terminal(), time.monotonic(), total
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
            console=self.terminal.console,
            transient=True,
        )
        self.task = self.bar.add_task("", total=total or None)

    def tell(self, letters: int, tokens: int) -> None:
        """Letters read and tokens written so far."""
        text = f"{letters / 1e6:,.0f} MB read, {tokens:,} tokens"
        self.bar.update(self.task, completed=letters, description=text)
        if not self.terminal.console.is_terminal and time.monotonic() - self.spoke > 10:
            self.spoke = time.monotonic()
            self.terminal.say(text + (f" of about {self.total / 1e6:,.0f} MB" if self.total else ""))


def command_prepare(arguments: list[str]) -> int:
    """writes texts or pairs as token shards, for data that is larger than memory"""
    about = "Writes texts or pairs as token shards, which --data.train FOLDER reads where they are."
    args = parse(PrepareArguments, "transformer-jax prepare", arguments, about)
    from transformer_jax.data.prepare import Wanted, prepare
    from transformer_jax.folders import locked

    folder, total = Path(args.folder), _bytes_of(args.data)
    bar = _Bar(total)
    wanted = Wanted(args.data, args.tokenizer, args.tokenizer_size, args.shard_tokens)
    workers = args.workers or len(host.cores())
    try:
        _make(folder)
        with locked(folder) as holder, bar.bar:
            if holder:
                raise BusyError(f"{folder} is in use: {holder} is preparing there. Wait for its end.")
            paper = prepare(folder, wanted, workers, total, bar.terminal.say, bar.tell)
    except KeyboardInterrupt:
        bar.terminal.say(f"{folder}: stopped; the shards that are whole are kept, and the same command goes on.")
        return 75
    except BrokenProcessPool:
        bar.terminal.say(
            f"{folder}: a process that encodes was ended, perhaps for want of memory; the shards that are whole are "
            "kept, and the same command goes on, with --workers 1 in the least memory."
        )
        return 75
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror or error}). The same command goes on behind the last shard."
        ) from None
    bar.terminal.say(summary(folder, paper))
    return 0


def _make(folder: Path) -> None:
    """The folder, ours to fill: a new one, an empty one, or one that was begun."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}).") from None


def summary(folder: Path, paper: dict[str, Any]) -> str:
    """What a folder holds, as one line."""
    shards = paper["shards"]
    size = sum(about["bytes"] for shard in shards for about in shard["files"].values())
    return (
        f"{folder}: {paper['documents']:,} {paper['kind']}, {paper['tokens']:,} tokens in {len(shards)} shards of "
        f"{size / 1e6:,.1f} MB in all, each file with its checksum. --data.train {folder} reads it."
    )
