"""Files and data sets -> texts, pairs of texts or conversations. Every complaint names the file and the place in it."""

import glob
import math
import os
import sysconfig
from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from transformer_jax.config import DataConfig
from transformer_jax.data import dates
from transformer_jax.data.chat import Chats, Turn
from transformer_jax.data.corpora import Pairs, Texts
from transformer_jax.data.prepared import Prepared, read_prepared
from transformer_jax.data.records import KINDS, Records, dataset_of, is_dataset, parallel, records_of, suffix_of
from transformer_jax.errors import InputError
from transformer_jax.files import most_bytes, too_large

MOST_TURNS = 10_000  # turns after which the sources come in the same order again
FOLDER_FILES = (".txt", ".jsonl", ".parquet", ".arrayrecord", ".array_record")


Corpus = Texts | Pairs | Chats  # in memory
Source = Corpus | Prepared  # what a run is trained on


def sources_of(path: str) -> list[str]:
    """The files that a path, folder or glob names, in order; or the data set."""
    if not path:
        raise InputError("An empty path names no data.")
    if is_dataset(path):
        return [path]
    found = [Path(path)]
    if os.path.isdir(path):
        found = sorted(p for p in Path(path).rglob("*") if p.is_file() and suffix_of(p) in FOLDER_FILES)
        if not found:
            raise InputError(f"{path}: the folder has no {' or '.join(FOLDER_FILES)} file; for others give a glob.")
    elif glob.has_magic(path) and not os.path.exists(path):
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
        if not found:
            raise InputError(f"{path}: no file matches.")
    return list(map(str, found))


def files_of(paths: tuple[str, ...]) -> list[Path]:
    """The files that `read` reads, none for a data set of a hub."""
    if len(paths) == 2:
        return [Path(path) for path in paths]
    if is_dataset(paths[0]):
        folder = dataset_of(paths[0])[0]
        return [path for path in Path(folder).rglob("*") if path.is_file()] if os.path.isdir(folder) else []
    return [Path(path) for path in sources_of(paths[0])]


def parts_of(paths: tuple[str, ...]) -> list[tuple[str, Records]]:
    """(name, records) of each source that one path or two parallel files name; none is opened yet."""
    if len(paths) == 2:
        return [(paths[0], parallel(*paths))]
    return [(source, records_of(source)) for source in sources_of(paths[0])]


def stream(paths: tuple[str, ...], most: int | None = None) -> Records:
    """(place, record) of all that one path or two parallel files hold, one at a time; the records are of one kind.

    Args:
        paths: files, a folder, a glob, or a data set.
        most: how many letters each file may have.

    Raises:
        InputError: as `read`.
    """
    kinds = set()
    for source, records in parts_of(paths):
        held = 0
        for place, record in records:
            kinds.add(KINDS[tuple(record)])
            if len(kinds) > 1:
                raise InputError(f"{paths[0]}: holds {' and '.join(sorted(kinds))}; give one of them.")
            if most is not None:
                held += sum(map(_letters, record.values()))
                if held > most:
                    raise too_large(source, most)
            yield place, record


def _letters(value: str | list[dict[str, str]]) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(len(turn["role"]) + len(turn["content"]) for turn in value)


def read(paths: tuple[str, ...]) -> Source:
    """What one path (texts, pairs or conversations; or a folder of tokens) or two parallel files hold.

    Raises:
        InputError: a file is missing, empty, unreadable, not UTF-8, not what its name says or larger than memory
            allows; texts and pairs are mixed; two parallel files have unequal numbers of lines.
    """
    if len(paths) == 1 and paths[0] and (prepared := read_prepared(Path(paths[0]))):
        return prepared
    fields: dict[str, list[Any]] = {}
    places = []
    for place, record in stream(paths, most_bytes()):
        for field, value in record.items():
            fields.setdefault(field, []).append(value)
        if "text" not in record:
            places.append(place)
    if "messages" in fields:
        return Chats([tuple(Turn(**turn) for turn in turns) for turns in fields["messages"]], places)
    if "text" in fields:
        return Texts(fields["text"])
    return Pairs(fields["source"], fields["target"], places)


def joined(corpora: list[Corpus]) -> Corpus:
    """Several corpora of one kind, one after the other."""
    if len(corpora) == 1:
        return corpora[0]
    fields = {name for corpus in corpora for name in vars(corpus)}
    values = {name: [each for corpus in corpora for each in getattr(corpus, name)] for name in fields}
    return type(corpora[0])(**values)


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


def shares_of(texts: Sequence[str]) -> dict[str, int]:
    """`PATH=WEIGHT ...` as whole numbers in the same proportions.

    Raises:
        InputError: one is written otherwise, or they are in no proportion of small numbers.
    """
    found: dict[str, Fraction] = {}
    for text in texts:
        path, sign, weight = text.rpartition("=")
        try:
            share = Fraction(weight)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if path in found:
            raise InputError(f"data.mixture: {path!r} is given twice.")
        if not path or not sign or share <= 0:
            raise InputError(f"data.mixture: {text!r} must be PATH=WEIGHT, such as a.txt=0.7, with a weight above 0.")
        found[path] = share
    scale = math.lcm(*(share.denominator for share in found.values()))
    whole = [int(share * scale) for share in found.values()]
    common = math.gcd(*whole)
    if sum(whole) // common > MOST_TURNS:
        raise InputError(
            f"data.mixture: the weights must be in proportions of whole numbers of at most {MOST_TURNS:,} in all."
        )
    return {path: number // common for path, number in zip(found, whole, strict=True)}


class Loaded(NamedTuple):
    """What a run's data settings name.

    Attributes:
        train: the sources of training data by their paths, and the shares of the rows that they have.
        shares: these shares.
        validation: the validation data of each, or the only one.
        named: further validation data.
    """

    train: dict[str, Source]
    shares: tuple[int, ...]
    validation: list[Source]
    named: dict[str, Source]


def load_all(config: DataConfig) -> Loaded:
    """All data that a run's settings name.

    Raises:
        InputError: as `load` and `shares_of`; or some is of another kind.
    """
    if config.mixture:
        shares = shares_of(config.mixture)
        train = {path: read((path,)) for path in shares}
        if config.validation:
            held_out = [read(config.validation)]
        else:
            parts = {path: _split(source, config.validation_fraction) for path, source in train.items()}
            train, held_out = {path: part[0] for path, part in parts.items()}, [part[1] for part in parts.values()]
    else:
        first, last = load(config.train, config.validation, config.embedded, config.validation_fraction)
        shares, train, held_out = {"": 1}, {"": first}, [last]
    paths = dict(text.split("=", 1) for text in config.validation_sets)
    named = {name: read((path,)) for name, path in paths.items()}
    if len(kinds := {each.kind for each in (*train.values(), *held_out, *named.values())}) > 1:
        raise InputError(f"The data of a run must be of one kind; this is {' and '.join(sorted(kinds))}.")
    return Loaded(train, tuple(shares.values()), held_out, named)


def _split(corpus: Source, fraction: float) -> tuple[Source, Source]:
    if len(corpus) == 1 and (corpus.kind == "pairs" or len(next(corpus.all_texts(), "ab")) < 2):
        raise InputError("The training data is a single example: too small to hold some out; give --data.validation.")
    return corpus.split(fraction)


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
        first, held_out = _split(first, fraction)
    if first.kind != held_out.kind:
        raise InputError(f"--data.train holds {first.kind} and --data.validation holds {held_out.kind}.")
    return first, held_out
