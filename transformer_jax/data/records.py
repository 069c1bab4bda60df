"""A file or a data set -> its records, one at a time and in little memory, with the place of each for messages.

A record has the fields of its kind and no others: {"text": str}, {"source": str, "target": str}, or {"messages":
[{"role": str, "content": str}, ...]}; all of a file are of one kind.
"""

import functools
import itertools
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformer_jax.config_checks import shown
from transformer_jax.data.chat import read_turns
from transformer_jax.errors import InputError
from transformer_jax.files import PACKED, decode, lines_of, most_bytes, read_text, reading, too_large

Record = dict[str, Any]
Records = Iterator[tuple[str, Record]]
KINDS = {("messages",): "chat", ("source", "target"): "pairs", ("text",): "text"}  # the first whose fields are there
ROWS = 256  # of a Parquet file that are held at once
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def suffix_of(path: str | Path) -> str:
    """The suffix that says what is in a file, `.gz` and `.zst` aside."""
    name = Path(path).name
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix.lower()


def records_of(path: str | Path) -> Records:
    """(place, record) of each record of a file, of a folder by `save_to_disk`, or of `hf:NAME[@CONFIG][:SPLIT]`.

    Raises:
        InputError: it cannot be read, or a record is not what it should be; the message has its place. Also, at the
            end: there was nothing to learn from.
    """
    read = _read_dataset if is_dataset(path) else READERS.get(suffix_of(path), _read_text)
    return checked(path, read(str(path)))


def parallel(first: str | Path, second: str | Path) -> Records:
    """Two files' lines as pairs."""
    return checked(first, _read_parallel(first, second))


def checked(name: str | Path, found: Records) -> Records:
    """Records that are all of one kind, without other fields.

    Raises:
        InputError: they are not; a field is no string, or has what UTF-8 cannot hold; or none says anything.
    """
    fields, filled = (), set()
    for place, record in found:
        own = _fields(record)
        fields = fields or own
        if own != fields:
            raise InputError(
                f"{place}: has other fields than the lines before; a file holds texts, pairs or conversations."
            )
        if fields == ("messages",):
            record = {"messages": [turn._asdict() for turn in read_turns(place, record["messages"])]}
            filled.add("messages")
        else:
            record = {field: _string(place, field, record[field]) for field in fields}
            if len(filled) < len(fields):
                filled |= {field for field in fields if record[field].strip()}
        yield place, record
    if not fields:
        raise InputError(f"{name}: there is nothing in it.")
    for field in fields:
        if field not in filled:
            raise InputError(f"{name}: only blank {field}s, nothing to learn from.")


def _fields(record: Any) -> tuple[str, ...]:
    """Those of its kind, none where it is of no kind."""
    keys = record.keys() if isinstance(record, dict) else ()
    return next((fields for fields in KINDS if all(field in keys for field in fields)), ())


def _string(place: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: field {field!r} must be a string; got {shown(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: field {field!r} holds a lone surrogate, which UTF-8 cannot hold.") from None
    return value


# --- lines


def _read_text(path: str) -> Records:
    yield path, {"text": read_text(path)}


def _read_jsonl(path: str) -> Records:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _parsed(place, line)


def _parsed(place: str, text: str) -> Record:
    """An object in JSON with the fields of some kind."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise InputError(f"{place}: not a JSON object ({error}).") from None
    if not _fields(record):
        raise InputError(
            f"{place}: expected an object with `text`, with `source` and `target`, or with `messages`; got "
            f"{text[:80]!r}"
        )
    return record


def _read_tsv(path: str) -> Records:
    for number, line in enumerate(lines_of(path), 1):
        row = line.split("\t")
        if len(row) != 2:
            raise InputError(f"{path}, line {number}: expected source, one tab, target; got {len(row)} fields.")
        yield f"{path}, line {number}", {"source": row[0], "target": row[1]}


def _read_parallel(first: str | Path, second: str | Path) -> Records:
    rows = itertools.zip_longest(lines_of(first), lines_of(second))
    for number, (source, target) in enumerate(rows, 1):
        if source is None or target is None:
            rest = number + sum(1 for _ in rows)
            longer, shorter = (first, second) if target is None else (second, first)
            counts = (rest, number - 1) if target is None else (number - 1, rest)
            raise InputError(
                f"{first} has {counts[0]:,} lines and {second} has {counts[1]:,}: line {number:,} of {longer} is the "
                f"first without a partner in {shorter}."
            )
        yield f"{first}, line {number}", {"source": source, "target": target}


# --- files that libraries read


def _need_file(path: str) -> None:
    if not os.path.isfile(path):
        os.stat(path)
        raise InputError(f"{path}: cannot be read (it is not a file).")


def _said(error: BaseException) -> str:
    """What a library says, in a line that is not long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _columns(name: str, names: list[str]) -> list[str]:
    """Which of a table's columns are read."""
    for fields in (*KINDS, ("translation",)):
        if all(field in names for field in fields):
            return list(fields)
    raise InputError(
        f"{name}: expected a column `text`, or `source` and `target`, or `messages`, or `translation`; got "
        f"{shown(sorted(names))}."
    )


def _row(place: str, row: Record) -> Record:
    """A table's row, where a `translation` has become a pair: its first language is the source."""
    if "translation" not in row:
        return row
    said = row["translation"]
    if not isinstance(said, dict) or len(said) != 2:
        raise InputError(f"{place}: field 'translation' must hold a text in each of two languages; got {shown(said)}.")
    return dict(zip(("source", "target"), said.values(), strict=True))


def _read_parquet(path: str) -> Records:
    """Some of its columns, whatever others there are; a few rows at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: a Parquet file needs pip install 'transformer_jax[data]'.") from None
    with reading(path):
        _need_file(path)
        try:
            # without a buffer of this size, and with its own, a row group is held whole
            with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
                columns, number = _columns(path, file.schema_arrow.names), 0
                for batch in file.iter_batches(ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        place = f"{path}, row {number}"
                        yield place, _row(place, row)
        except ArrowException as error:
            raise InputError(f"{path}: not a Parquet file that can be read ({_said(error)}).") from None


def _read_arrayrecord(path: str) -> Records:
    """A text each; or an object in JSON each, where the first one is."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise InputError(f"{path}: an ArrayRecord file needs pip install 'transformer_jax[data]'.") from None
    with reading(path):
        _need_file(path)
        place, objects, most = path, False, most_bytes()
        try:
            reader = ArrayRecordReader(os.fsencode(path), options="readahead_buffer_size:0,max_parallelism:0")
            for number in range(1, reader.num_records() + 1):
                place = f"{path}, record {number}"
                raw = reader.read()
                if len(raw) > most:
                    raise too_large(place, most)
                text = decode(place, raw)
                if number == 1:
                    objects = _is_object(text)
                yield place, _parsed(place, text) if objects else {"text": text}
            reader.close()  # which complains where it is no such file: that has no records
        except (RuntimeError, IndexError, MemoryError) as error:
            raise InputError(f"{place}: not an ArrayRecord file that can be read ({_said(error)}).") from None


def _is_object(text: str) -> bool:
    try:
        return bool(_parsed("", text))
    except InputError:
        return False


# --- data sets of Hugging Face's library


def is_saved(path: str | Path) -> bool:
    """Whether a folder is one that `save_to_disk` of the library `datasets` has written."""
    names = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all(os.path.isfile(os.path.join(path, name)) for name in each) for each in names)


def is_dataset(path: str | Path) -> bool:
    """Whether the library `datasets` reads it: `hf:...`, or a folder that it has written."""
    return str(path).startswith("hf:") or is_saved(path)


def dataset_of(path: str) -> tuple[str, str, str]:
    """(folder or name on the hub, configuration, split) of `hf:NAME[@CONFIG][:SPLIT]`, empty where it has none."""
    name, behind = path.removeprefix("hf:"), {":": "", "@": ""}
    for sign in behind:
        first, found, last = name.rpartition(sign)
        if found and "/" not in last and not os.path.isdir(name):  # a folder's own name may have either
            name, behind[sign] = first, last
    return name, behind["@"], behind[":"]


@functools.cache
def _library() -> Any:
    """`datasets`, which then prints neither bars nor warnings. Raises ImportError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ImportError("before version 4 a data set could bring a program of its own")
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return datasets


def _load(path: str) -> Any:
    """The rows of a split; they stay on the disk or the hub."""
    name, config, split = dataset_of(path)
    if not os.path.isdir(name) and not HUB_NAME.fullmatch(name):
        raise InputError(
            f"{path}: there is no folder {name!r}, and it is no name of a data set on the hub (owner/name)."
        )
    if is_saved(name):
        if config:
            raise InputError(f"{path}: what `save_to_disk` has written has no configurations; leave {config!r} out.")
        found = _library().load_from_disk(name)
    else:
        if name in _library().packaged_modules._PACKAGED_DATASETS_MODULES:  # it would read all files that lie about
            raise InputError(f"{path}: {name!r} is a format; give the name of a data set, or a folder.")
        found = _library().load_dataset(name, config or None, streaming=True)
    if not isinstance(found, dict):  # one split, saved alone
        split = split or str(found.split or "train")
        found = {str(found.split or "train"): found}
    split = split or "train"
    if split not in found:
        raise InputError(
            f"{path}: there is no split {split!r}; give one of {', '.join(map(str, found))} as NAME:SPLIT."
        )
    return found[split]


def _read_dataset(path: str) -> Records:
    place = path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = _load(path)
            columns = _columns(path, rows.column_names or list(next(iter(rows), {})))
        for number, row in enumerate(rows.select_columns(columns), 1):
            place = f"{path}, row {number}"
            yield place, _row(place, row)
    except InputError:
        raise
    except ImportError as error:
        needs = "a data set needs pip install 'transformer_jax[datasets]'"
        raise InputError(f"{path}: {needs} ({_said(error)}).") from None
    except Exception as error:  # whatever the library, what it imports and the hub come up with
        after = "" if place == path else " after this row"
        raise InputError(f"{place}: the data set cannot be read{after} ({_said(error)}).") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrayrecord": _read_arrayrecord,
    ".array_record": _read_arrayrecord,
}
