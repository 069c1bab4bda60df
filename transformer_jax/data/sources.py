"""Files -> texts or pairs of texts. Every complaint names the file and the line or byte."""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from transformer_jax.config_checks import shown
from transformer_jax.data import dates
from transformer_jax.data.chat import Chats, read_turns
from transformer_jax.data.corpora import Pairs, Texts
from transformer_jax.data.prepared import Prepared, read_prepared
from transformer_jax.errors import InputError
from transformer_jax.files import PACKED, decode, most_bytes, read_whole, reading

FOLDER_FILES = (".txt", ".jsonl", ".parquet")


Corpus = Texts | Pairs | Chats  # in memory
Source = Corpus | Prepared  # what a run is trained on
FIELDS = ({"messages"}, {"source", "target"}, {"text"})  # of a record that is a conversation, a pair, a text


def read_text(path: Path) -> str:
    """A file's text, unpacked where its name ends in .gz or .zst, without a byte order mark and with plain line ends.

    Raises:
        InputError: as `read_whole` and `decode`; or there is no text in it.
    """
    text = decode(path, read_whole(path))
    if not text.strip():
        raise InputError(f"{path}: the file is empty." if not text else f"{path}: only blank lines, no text.")
    return text


def read_lines(path: Path) -> list[str]:
    """A file's lines; only a line feed ends one, so that parallel files stay parallel."""
    return read_text(path).removesuffix("\n").split("\n")


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, `.gz` and `.zst` aside."""
    name = path.name
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix.lower()


def _records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, record) of each line of a .jsonl file; its text fields are strings that UTF-8 can hold."""
    for number, line in enumerate(read_lines(path), 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise InputError(f"{place}: not a JSON object ({error}).") from None
        if not isinstance(record, dict) or not any(fields <= record.keys() for fields in FIELDS):
            raise InputError(
                f"{place}: expected an object with `text`, with `source` and `target`, or with `messages`; got "
                f"{line[:80]!r}"
            )
        for field in ("text", "source", "target"):
            value = record.get(field, "")
            if not isinstance(value, str):
                raise InputError(f"{place}: field {field!r} must be a string; got {shown(value)}.")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InputError(f"{place}: field {field!r} holds a lone surrogate, which UTF-8 cannot hold.") from None
        yield place, record


def _pairs(name: object, sources: list[str], targets: list[str], places: list[str]) -> Pairs:
    for texts, what in ((sources, "source"), (targets, "target")):
        if not any(text.strip() for text in texts):
            raise InputError(f"{name}: only blank {what}s, nothing to learn from.")
    return Pairs(sources, targets, places)


def _read_jsonl(path: Path) -> Corpus:
    records = list(_records(path))
    kinds = [next(number for number, fields in enumerate(FIELDS) if fields <= record.keys()) for _, record in records]
    if len(set(kinds)) > 1:
        odd = next(place for kind, (place, _) in zip(kinds, records, strict=True) if kind != kinds[0])
        raise InputError(f"{odd}: has other fields than the lines before; a file holds texts, pairs or conversations.")
    if kinds[0] == 0:
        places = [place for place, _ in records]
        return Chats([read_turns(place, record["messages"]) for place, record in records], places)
    if kinds[0] == 1:
        sources, targets = ([record[name] for _, record in records] for name in ("source", "target"))
        return _pairs(path, sources, targets, [place for place, _ in records])
    documents = [record["text"] for _, record in records]
    if not any(text.strip() for text in documents):
        raise InputError(f"{path}: only blank texts, nothing to learn from.")
    return Texts(documents)


def _read_parquet(path: Path) -> Corpus:
    """The column `text`, or `source` and `target`, whatever others there are."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: a Parquet file needs pip install 'transformer_jax[data]'.") from None
    with reading(path):
        if not path.is_file():
            os.stat(path)
            raise InputError(f"{path}: cannot be read (it is not a file).")
        try:
            file = parquet.ParquetFile(path)
            names = set(file.schema_arrow.names)
            columns = ["source", "target"] if {"source", "target"} <= names else ["text"]
            if not set(columns) <= names:
                raise InputError(
                    f"{path}: expected a column `text`, or `source` and `target`; got {shown(sorted(names))}."
                )
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            if sum(group.total_byte_size for group in groups) > most_bytes():
                raise InputError(f"{path}: larger than {most_bytes():,} bytes, the limit for it on this machine.")
            table = file.read(columns=columns)
        except ArrowException as error:
            raise InputError(
                f"{path}: not a Parquet file that can be read ({' '.join(str(error).split())[:200]})."
            ) from None
    found = [table.column(name).to_pylist() for name in columns]
    for name, values in zip(columns, found, strict=True):
        odd = next((number for number, value in enumerate(values) if not isinstance(value, str)), None)
        if odd is not None:
            raise InputError(f"{path}, row {odd + 1}: field {name!r} must be a string; got {shown(values[odd])}.")
    if len(columns) == 2:
        return _pairs(path, found[0], found[1], [f"{path}, row {number}" for number in range(1, len(found[0]) + 1)])
    if not any(text.strip() for text in found[0]):
        raise InputError(f"{path}: only blank texts, nothing to learn from.")
    return Texts(found[0])


def _read_tsv(path: Path) -> Pairs:
    rows = [line.split("\t") for line in read_lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise InputError(f"{path}, line {number}: expected source, one tab, target; got {len(row)} fields.")
    places = [f"{path}, line {number}" for number in range(1, len(rows) + 1)]
    return _pairs(path, [row[0] for row in rows], [row[1] for row in rows], places)


def _read_parallel(first: Path, second: Path) -> Pairs:
    sources, targets = read_lines(first), read_lines(second)
    if len(sources) != len(targets):
        longer, shorter = (first, second) if len(sources) > len(targets) else (second, first)
        least = min(len(sources), len(targets))
        raise InputError(
            f"{first} has {len(sources):,} lines and {second} has {len(targets):,}: line {least + 1:,} of {longer} is "
            f"the first without a partner in {shorter}."
        )
    return Pairs(sources, targets, [f"{first}, line {number}" for number in range(1, len(sources) + 1)])


def _files(path: str) -> list[Path]:
    """The files that a path, folder or glob names, in order."""
    if not path:
        raise InputError("An empty path names no data.")
    if os.path.isdir(path):
        found = sorted(p for p in Path(path).rglob("*") if p.is_file() and kind_of(p) in FOLDER_FILES)
        if not found:
            raise InputError(f"{path}: the folder has no {' or '.join(FOLDER_FILES)} file; for others give a glob.")
        return found
    if glob.has_magic(path) and not os.path.exists(path):
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
        if not found:
            raise InputError(f"{path}: no file matches.")
        return found
    return [Path(path)]


def files_of(paths: tuple[str, ...]) -> list[Path]:
    """The files that `read` reads."""
    return [Path(path) for path in paths] if len(paths) == 2 else _files(paths[0])


READERS = {".jsonl": _read_jsonl, ".tsv": _read_tsv, ".parquet": _read_parquet}


def _read_one(path: Path) -> Corpus:
    return READERS.get(kind_of(path), lambda path: Texts([read_text(path)]))(path)


def read(paths: tuple[str, ...]) -> Source:
    """What one path (texts, or pairs in a .tsv or .jsonl) or two parallel files hold.

    Raises:
        InputError: a file is missing, empty, unreadable, not UTF-8 or not what its name says; texts and pairs are
            mixed; two parallel files have unequal numbers of lines.
    """
    if len(paths) == 1 and paths[0] and (prepared := read_prepared(Path(paths[0]))):
        return prepared
    files = files_of(paths)
    if len(paths) == 2:
        return _read_parallel(*files)
    parts = [_read_one(path) for path in files]
    texts, pairs = [p for p in parts if isinstance(p, Texts)], [p for p in parts if isinstance(p, Pairs)]
    chats = [p for p in parts if isinstance(p, Chats)]
    if len({part.kind for part in parts}) > 1:
        kinds = " and ".join(sorted({part.kind for part in parts}))
        raise InputError(f"{paths[0]}: holds {kinds}; give one of them.")
    if chats:
        return Chats(
            [turns for part in chats for turns in part.turns], [place for part in chats for place in part.places]
        )
    if texts:
        return Texts([document for part in texts for document in part.documents])
    return Pairs(
        [text for part in pairs for text in part.sources],
        [text for part in pairs for text in part.targets],
        [place for part in pairs for place in part.places],
    )


def _dates() -> tuple[Corpus, Corpus]:
    def corpus(split: str) -> Pairs:
        pairs = dates.pairs(split)
        places = [f"dates, {split} pair {number}" for number in range(1, len(pairs) + 1)]
        return Pairs([source for source, _ in pairs], [target for _, target in pairs], places)

    return corpus("train"), corpus("validation")


def _code() -> tuple[Corpus, None]:
    """The Python standard library's modules, in an order by the hash of their names so that any part is a sample."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts):
            raw = path.read_bytes()
            try:
                documents.append((blake2b(name.as_posix().encode()).digest(), raw.decode("utf-8")))
            except UnicodeDecodeError:  # a few modules are written in another encoding on purpose
                continue
    return Texts([text for _, text in sorted(documents) if text.strip()]), None


EMBEDDED = {"dates": _dates, "code": _code}
# The rule of a few lines that a model has to beat, where a corpus has one.
BASELINES = {"dates": dates.baseline}


def load(train: tuple[str, ...], validation: tuple[str, ...], embedded: str, fraction: float) -> tuple[Source, Source]:
    """The training and the validation corpus that a run's data settings name.

    Raises:
        InputError: as `read`; or no data is named; or the two are of different kinds.
    """
    if not train and embedded == "none":
        raise InputError(
            "This recipe needs data: give --data.train FILE (plain text, .tsv, .jsonl) or two parallel files."
        )
    if not train and validation:
        raise InputError("--data.validation is given without --data.train.")
    first, held_out = (read(train), None) if train else EMBEDDED[embedded]()
    if validation:
        held_out = read(validation)
    if held_out is None:
        if len(first) == 1 and (first.kind == "pairs" or len(next(first.all_texts(), "ab")) < 2):
            raise InputError(
                "The training data is a single example: too small to hold some out; give --data.validation."
            )
        first, held_out = first.split(fraction)
    if first.kind != held_out.kind:
        raise InputError(f"--data.train holds {first.kind} and --data.validation holds {held_out.kind}.")
    return first, held_out
