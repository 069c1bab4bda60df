"""Laws of reading files: every form gives its texts or pairs, and every complaint names the file and the place."""

import gzip
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data.corpora import Pairs, Texts
from transformer_jax.data.sources import load, read
from transformer_jax.errors import InputError

law = settings(derandomize=True, deadline=None, max_examples=150)
PAIRS = (["ein Hund", "zwei Katzen"], ["a dog", "two cats"])


def write(folder, name, content):
    """A file's path as text; `.gz` in its name packs it."""
    path, raw = folder / name, content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return str(path)


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def pairs_of(corpus):
    assert isinstance(corpus, Pairs)
    return corpus.sources, corpus.targets


# --- every form

TEXT_FORMS = {
    "plain.txt": ("one\n\ntwo\n", ["one\n\ntwo\n"]),
    "no-suffix": ("one", ["one"]),
    "packed.txt.gz": ("one\ntwo\n", ["one\ntwo\n"]),
    "bom.txt": (b"\xef\xbb\xbfone\n", ["one\n"]),
    "packed-bom.txt.gz": (b"\xef\xbb\xbfone\r\n", ["one\n"]),
    "crlf.txt": ("one\r\ntwo\r\n", ["one\ntwo\n"]),
    "separators.txt": ("a\u2028b\x0bc\x85d\re\n", ["a\u2028b\x0bc\x85d\re\n"]),
    "texts.jsonl": (jsonl({"text": "one\ntwo"}, {"text": "three", "id": 7}), ["one\ntwo", "three"]),
    "texts.jsonl.gz": (jsonl({"text": "one"}), ["one"]),
    "blank-lines.jsonl": ('\n{"text": "one"}\n  \n{"text": "two"}', ["one", "two"]),
    "escapes.jsonl": ('{"text": "\\ud83d\\ude00 \\u00e9"}\n', ["\N{GRINNING FACE} é"]),
}


@pytest.mark.parametrize("name", TEXT_FORMS)
def test_forms_of_text(tmp_path, name):
    content, wanted = TEXT_FORMS[name]
    corpus = read((write(tmp_path, name, content),))
    assert isinstance(corpus, Texts)
    assert corpus.documents == wanted


PAIR_FORMS = {
    "pairs.tsv": "ein Hund\ta dog\nzwei Katzen\ttwo cats\n",
    "pairs.tsv.gz": "ein Hund\ta dog\nzwei Katzen\ttwo cats\n",
    "PAIRS.TSV": "ein Hund\ta dog\nzwei Katzen\ttwo cats\n",
    "open-end.tsv": "ein Hund\ta dog\nzwei Katzen\ttwo cats",
    "bom-crlf.tsv": b"\xef\xbb\xbfein Hund\ta dog\r\nzwei Katzen\ttwo cats",
    "pairs.jsonl": jsonl(*({"source": s, "target": t} for s, t in zip(*PAIRS))),
    "pairs.jsonl.gz": jsonl(*({"target": t, "source": s, "more": [1]} for s, t in zip(*PAIRS))),
    "bom-crlf.jsonl": "\ufeff" + jsonl(*({"source": s, "target": t} for s, t in zip(*PAIRS))).replace("\n", "\r\n"),
}


@pytest.mark.parametrize("name", PAIR_FORMS)
def test_forms_of_pairs(tmp_path, name):
    path = write(tmp_path, name, PAIR_FORMS[name])
    corpus = read((path,))
    assert pairs_of(corpus) == PAIRS
    assert corpus.places == [f"{path}, line 1", f"{path}, line 2"]


PARALLEL_FORMS = {
    "plain": ("de.txt", "ein Hund\nzwei Katzen\n", "en.txt", "a dog\ntwo cats\n"),
    "one-open-end": ("de.txt", "ein Hund\nzwei Katzen", "en.txt", "a dog\ntwo cats\n"),
    "packed-and-not": ("de.gz", "ein Hund\nzwei Katzen\n", "en", "a dog\ntwo cats\n"),
    "bom-and-crlf": ("de.txt", b"\xef\xbb\xbfein Hund\r\nzwei Katzen\r\n", "en.txt", "a dog\ntwo cats\n"),
}


@pytest.mark.parametrize("form", PARALLEL_FORMS)
def test_forms_of_parallel_files(tmp_path, form):
    first, first_content, second, second_content = PARALLEL_FORMS[form]
    paths = write(tmp_path, first, first_content), write(tmp_path, second, second_content)
    corpus = read(paths)
    assert pairs_of(corpus) == PAIRS
    assert corpus.places == [f"{paths[0]}, line 1", f"{paths[0]}, line 2"]


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Other Unicode line ends are text, or parallel files would go out of step."""
    odd = "a\u2028b\x0bc\x85d\x0ce"
    assert pairs_of(read((write(tmp_path, "a", f"{odd}\nx\n"), write(tmp_path, "b", "1\n2\n")))) == (
        [odd, "x"],
        ["1", "2"],
    )


def test_a_blank_line_of_parallel_files_keeps_its_partner(tmp_path):
    assert pairs_of(read((write(tmp_path, "a", "x\n\n"), write(tmp_path, "b", "1\n2\n")))) == (["x", ""], ["1", "2"])


def test_a_folder_is_its_files_in_order(tmp_path):
    for name, content in (
        ("b.txt", "two"),
        ("a/z.txt.gz", "one"),
        ("c.jsonl", jsonl({"text": "three"})),
        ("d.md", "no"),
    ):
        write(tmp_path, f"texts/{name}", content)
    assert read((str(tmp_path / "texts"),)).documents == ["one", "two", "three"]


def test_a_glob_is_its_files_in_order(tmp_path):
    for name in ("b.md", "a.md", "deep/c.md", "d.txt"):
        write(tmp_path, name, name)
    assert read((f"{tmp_path}/*.md",)).documents == ["a.md", "b.md"]
    assert read((f"{tmp_path}/**/*.md",)).documents == ["a.md", "b.md", "deep/c.md"]
    for number in (2, 1):
        write(tmp_path, f"{number}.tsv", f"s{number}\tt{number}\n")
    assert pairs_of(read((f"{tmp_path}/[0-9].tsv",))) == (["s1", "s2"], ["t1", "t2"])


def test_a_name_with_brackets_is_a_file_where_there_is_one(tmp_path):
    assert read((write(tmp_path, "a[1].txt", "here"),)).documents == ["here"]


# --- every complaint

BROKEN_GZIP = gzip.compress(b"a long enough text " * 99)[:-20]
# name: (file, its content or None for no file, what the message says besides the path)
ERRORS = {
    "missing": ("a.txt", None, "no such file"),
    "empty": ("a.txt", "", "empty"),
    "empty tsv": ("a.tsv", "", "empty"),
    "empty packed": ("a.txt.gz", "", "empty"),
    "blank": ("a.txt", "\n \n\t\n", "only blank lines"),
    "blank jsonl": ("a.jsonl", "\n\n", "only blank lines"),
    "not UTF-8": ("a.txt", b"one\ntw\xffo\n", r"byte 6 \(line 2\).*UTF-8.*0xff"),
    "not UTF-8, packed": ("a.txt.gz", b"one\ntwo\n\xc3", r"byte 8 \(line 3\).*UTF-8.*0xc3"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), r"byte 0 \(line 1\).*UTF-8"),
    "tsv of 3": ("a.tsv", "a\tb\na\tb\tc\n", "line 2: .*one tab.*3 fields"),
    "tsv of 1": ("a.tsv", "a\tb\n\na\tb\n", "line 2: .*one tab.*1 fields"),
    "json cut": ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2: not a JSON object"),
    "json deep": ("a.jsonl", "[" * 20_000, "line 1: not a JSON object"),
    "json list": ("a.jsonl", '["text"]\n', "line 1: expected an object with `text`"),
    "no field": ("a.jsonl", '{"text": "a"}\n\n{"txt": "b"}\n', "line 3: expected an object with `text`"),
    "half a pair": ("a.jsonl", '{"source": "a"}\n', "line 1: .*`source` and `target`"),
    "number": ("a.jsonl", '{"text": 5}\n', "line 1: field 'text' must be a string; got 5"),
    "null": ("a.jsonl", '{"source": "a", "target": null}\n', "line 1: field 'target' must be a string; got None"),
    "surrogate": ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800b"}\n', "line 2: field 'text' .*lone surrogate"),
    "surrogate in a pair": ("a.jsonl", '{"source": "a", "target": "\\udfff"}\n', "line 1: field 'target' .*surrogate"),
    "texts and pairs": ("a.jsonl", '{"text": "a"}\n{"source": "a", "target": "b"}\n', "line 2: .*texts, pairs"),
    "not packed": ("a.txt.gz", None, "cannot be read.*gzip"),
    "packed, cut": ("a.txt.gz", None, "cannot be read.*end"),
}
RAW = {"not packed": b"plain text", "packed, cut": BROKEN_GZIP}


@pytest.mark.parametrize("case", ERRORS)
def test_a_broken_file_is_named_with_the_place(tmp_path, case):
    name, content, says = ERRORS[case]
    if content is not None:
        write(tmp_path, name, content)
    if case in RAW:
        (tmp_path / name).write_bytes(RAW[case])
    with pytest.raises(InputError, match=f"(?s){name}.*{says}"):
        read((str(tmp_path / name),))
    other = write(tmp_path, "other", "x\n")
    if ".jsonl" not in name and ".tsv" not in name:
        with pytest.raises(InputError, match=f"(?s){name}.*{says}"):
            read((other, str(tmp_path / name)))


def test_a_file_of_a_byte_order_mark_alone_is_empty(tmp_path):
    with pytest.raises(InputError, match="the file is empty"):
        read((write(tmp_path, "bom.txt", "\ufeff"),))


def test_a_name_too_long_is_a_complaint(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read((f"{tmp_path}/{'x' * 300}",))


def test_an_empty_path_is_no_folder(tmp_path, monkeypatch):
    """It would be the current folder, and all that lies in it."""
    write(tmp_path, "a.txt", "text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        read(("",))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may read everything")
def test_a_file_without_permission(tmp_path):
    path = write(tmp_path, "secret.txt", "text")
    os.chmod(path, 0)
    with pytest.raises(InputError, match=r"secret.txt: no permission"):
        read((path,))


@pytest.mark.parametrize(
    ("first", "second", "place"), [("1\n2\n3\n4\n", "1\n2\n", 3), ("1\n", "1\n2\n3", 2), ("1", "1\n\n", 2)]
)
def test_parallel_files_of_unequal_length(tmp_path, first, second, place):
    """The first line without a partner is named, in the longer file, with the shorter one."""
    paths = write(tmp_path, "a.txt", first), write(tmp_path, "b.txt", second)
    longer, shorter = paths if place == 3 else paths[::-1]
    with pytest.raises(InputError, match=f"line {place} of {longer} is the first without a partner in {shorter}"):
        read(paths)


def test_texts_and_pairs_do_not_mix(tmp_path):
    write(tmp_path, "a.txt", "text")
    write(tmp_path, "b.jsonl", jsonl({"source": "a", "target": "b"}))
    with pytest.raises(InputError, match=f"{tmp_path}: holds pairs and text"):
        read((str(tmp_path),))


def test_folders_and_globs_that_hold_nothing(tmp_path):
    write(tmp_path, "a.md", "text")
    with pytest.raises(InputError, match=f"{tmp_path}: the folder has no .txt or .jsonl or .parquet"):
        read((str(tmp_path),))
    with pytest.raises(InputError, match=r"\*\.rst: no file matches"):
        read((f"{tmp_path}/*.rst",))
    with pytest.raises(InputError, match="cannot be read"):
        read((str(tmp_path), str(tmp_path / "a.md")))


# --- training and validation


@law
@given(st.lists(st.text(max_size=20), min_size=1, max_size=9), st.floats(0.05, 0.95))
def test_splits_keep_everything_in_order(documents, fraction):
    """Texts are split at a document's end, a lone one within; the held-out share is at least the fraction, barely."""
    corpus = Texts(documents)
    first, held_out = corpus.split(fraction)
    assert "".join(first.documents + held_out.documents) == "".join(documents)
    if len(documents) > 1:
        assert first.documents + held_out.documents == documents
        assert len(first)
        least = sum(map(len, held_out.documents[1:]))
        assert least < fraction * sum(map(len, documents)) or least == 0
    pairs = Pairs(documents, documents[::-1], documents)
    first, held_out = pairs.split(fraction)
    assert first.sources + held_out.sources == documents
    assert first.targets + held_out.targets == documents[::-1]
    assert len(held_out)
    assert len(first) == min(int(len(documents) * (1 - fraction)), len(documents) - 1)


def test_one_document_is_split_as_nano_gpt_does():
    """The first 90 % of the characters train: `int(n * 0.9)` of them."""
    for length in (10, 11, 999, 1_115_394):
        text = ("abcdefg" * (length // 7 + 1))[:length]
        first, held_out = Texts([text]).split(0.1)
        assert first.documents == [text[: int(length * 0.9)]]
        assert held_out.documents == [text[int(length * 0.9) :]]


def test_load_reads_what_is_named(tmp_path):
    text = write(tmp_path, "a.txt", "0123456789")
    other = write(tmp_path, "b.txt", "other")
    first, held_out = load((text,), (), "dates", 0.2)
    assert (first.documents, held_out.documents) == (["01234567"], ["89"])
    first, held_out = load((text,), (other,), "none", 0.2)
    assert (first.documents, held_out.documents) == (["0123456789"], ["other"])


LOAD_ERRORS = {
    "nothing": ((), (), "none", "needs data: give --data.train"),
    "validation alone": ((), ("a.txt",), "none", "needs data: give --data.train"),
    "validation of embedded data": ((), ("pair.tsv",), "dates", "--data.validation is given without --data.train"),
    "a single pair": (("pair.tsv",), (), "none", "a single example.*--data.validation"),
    "a single letter": (("letter.txt",), (), "none", "a single example.*--data.validation"),
    "two kinds": (("a.txt",), ("pair.tsv",), "none", "--data.train holds text and --data.validation holds pairs"),
}


@pytest.mark.parametrize("case", LOAD_ERRORS)
def test_load_complains(tmp_path, monkeypatch, case):
    train, validation, embedded, says = LOAD_ERRORS[case]
    for name, content in (("a.txt", "some text"), ("pair.tsv", "a\tb\n"), ("letter.txt", "x")):
        write(tmp_path, name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        load(train, validation, embedded, 0.1)


# --- files that libraries read


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_holds_texts_or_pairs(tmp_path):
    """In any number of columns and row groups; a folder has them beside others."""
    texts = write_parquet(tmp_path / "a.parquet", number=[1, 2, 3], text=["one", "zwei\n", "три"])
    assert read((str(texts),)).documents == ["one", "zwei\n", "три"]
    (tmp_path / "b.txt").write_text("four")
    assert read((str(tmp_path),)).documents == ["one", "zwei\n", "три", "four"]
    pairs = read((str(write_parquet(tmp_path / "p.parquet", target=PAIRS[1], text=PAIRS[0], source=PAIRS[0])),))
    assert (pairs.sources, pairs.targets) == PAIRS
    assert pairs.places[1] == f"{tmp_path / 'p.parquet'}, row 2"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (dict(words=["one"]), "expected a column `text`, or `source` and `target`"),
        (dict(text=["one", None]), "row 2: field 'text' must be a string"),
        (dict(text=[1, 2]), "row 1: field 'text' must be a string; got 1"),
        (dict(source=["a", "b"], target=["", " "]), "only blank targets"),
        (dict(text=[" "]), "only blank texts"),
        (b"PAR1 and no more", "not a Parquet file"),
        (b"", "not a Parquet file"),
        (None, "no such file"),
    ],
)
def test_parquet_that_holds_neither_is_refused(columns, says, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow")
    path = tmp_path / "a.parquet"
    if isinstance(columns, dict):
        write_parquet(path, **columns)
    elif columns is not None:
        path.write_bytes(columns)
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + says) as found:
        read((str(path),))
    assert "\n" not in str(found.value)


def test_zst_is_unpacked(tmp_path):
    """Also of several frames; a file that is cut, or is none, is refused, and so is one that unpacks beyond reason."""
    zstandard = pytest.importorskip("zstandard", reason=".zst is unpacked by zstandard")
    packed = zstandard.compress(b"ein Hund\ta dog\n") + zstandard.compress(b"zwei Katzen\ttwo cats\n")
    path = tmp_path / "a.tsv.zst"
    path.write_bytes(packed)
    assert read((str(path),)).targets == ["a dog", "two cats"]
    for broken in (packed[: len(packed) // 4], b"no zst"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"a.tsv.zst: (cannot be read|the file is empty)"):
            read((str(path),))
    path.write_bytes(zstandard.compress(bytes(2**29)))
    with pytest.raises(InputError, match="beyond the limit of 200 times"):
        read((str(path),))
