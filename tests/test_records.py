"""Laws of records: every source gives the same ones, in little memory, and every complaint names the place."""

import gzip
import json
import os
import random
import re
import socket
import sys
import tracemalloc
from types import SimpleNamespace

import pytest

from transformer_jax import files
from transformer_jax.data import records
from transformer_jax.data.records import dataset_of, parallel, records_of
from transformer_jax.data.sources import files_of, read, stream
from transformer_jax.errors import InputError
from transformer_jax.files import lines_of

TEXTS = [{"text": "ein Hund\nund 日本"}, {"text": ""}, {"text": "zwei"}]
PAIRS = [{"source": "ein Hund", "target": "a dog"}, {"source": "zwei Katzen", "target": "two cats"}]
CHATS = [
    {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]},
    {"messages": [{"role": "user", "content": "a"}]},
]
KINDS = {"texts": TEXTS, "pairs": PAIRS, "chats": CHATS}


def write_lines(folder, rows, name="a.jsonl"):
    path, raw = folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return str(path)


def write_parquet(folder, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    return str(folder / "a.parquet")


def write_arrayrecord(folder, rows, name="a.arrayrecord", options="group_size:1"):
    """A record each: bytes, a text, or an object as JSON."""
    pytest.importorskip("array_record", reason="ArrayRecord is read by its library")
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / name), options)
    for row in rows:
        writer.write(row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode())
    writer.close()
    return str(folder / name)


@pytest.fixture
def datasets():
    pytest.importorskip("datasets", reason="a data set is read by its library")
    return records._library()


def write_saved(folder, rows, **splits):
    """A folder that `save_to_disk` has written: a split, or several."""
    pytest.importorskip("datasets", reason="a data set is read by its library")
    datasets, path = records._library(), str(folder / "saved")
    if splits:
        rows = datasets.DatasetDict({name: datasets.Dataset.from_list(each) for name, each in splits.items()})
    else:
        rows = datasets.Dataset.from_list(rows)
    rows.save_to_disk(path)
    return path


def write_folder(folder, rows):
    (folder / "data").mkdir()
    write_lines(folder / "data", rows, "train.jsonl")
    write_lines(folder / "data", [{"text": "held out"}], "validation.jsonl")
    pytest.importorskip("datasets", reason="a data set is read by its library")
    return f"hf:{folder / 'data'}"


FORMS = {
    "jsonl": (write_lines, "line"),
    "jsonl.gz": (lambda folder, rows: write_lines(folder, rows, "a.jsonl.gz"), "line"),
    "parquet": (write_parquet, "row"),
    "arrayrecord": (write_arrayrecord, "record"),
    "array_record": (lambda folder, rows: write_arrayrecord(folder, rows, "a.array_record", "group_size:9"), "record"),
    "saved": (write_saved, "row"),
    "saved, by name": (lambda folder, rows: "hf:" + write_saved(folder, rows), "row"),
    "folder": (write_folder, "row"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(form, kind, tmp_path, capfd):
    """With nothing else in them, where each was, and no word of a library; `read` has what `stream` gives."""
    write, unit = FORMS[form]
    path = write(tmp_path, [row | {"more": None} for row in KINDS[kind]])
    capfd.readouterr()
    found = list(records_of(path))
    assert [record for _, record in found] == KINDS[kind]
    assert [place for place, _ in found] == [f"{path}, {unit} {number + 1}" for number in range(len(KINDS[kind]))]
    assert list(stream((path,))) == found
    corpus = read((path,))
    assert corpus.kind == {"texts": "text", "pairs": "pairs", "chats": "chat"}[kind]
    if kind == "texts":
        assert corpus.documents == [row["text"] for row in TEXTS]
    elif kind == "pairs":
        assert (corpus.sources, corpus.targets) == tuple([row[name] for row in PAIRS] for name in PAIRS[0])
        assert corpus.places == [place for place, _ in found]
    else:
        assert [[turn._asdict() for turn in turns] for turns in corpus.turns] == [row["messages"] for row in CHATS]
    assert capfd.readouterr() == ("", "")


def test_a_text_a_table_and_parallel_files_are_records(tmp_path):
    for name, text in {"a.txt": "one\n\ntwo\n", "a.tsv": "a\tb\r\n\tc\n", "s": "a\n\n", "t": "b\r\nc"}.items():
        (tmp_path / name).write_bytes(text.encode())
    assert list(records_of(tmp_path / "a.txt")) == [(f"{tmp_path}/a.txt", {"text": "one\n\ntwo\n"})]
    pairs = [{"source": "a", "target": "b"}, {"source": "", "target": "c"}]
    assert [record for _, record in records_of(tmp_path / "a.tsv")] == pairs
    found = list(parallel(tmp_path / "s", tmp_path / "t"))
    assert found == [(f"{tmp_path}/s, line {number}", pair) for number, pair in enumerate(pairs, 1)]
    assert list(stream((str(tmp_path / "s"), str(tmp_path / "t")))) == found


@pytest.mark.parametrize("write", [write_parquet, write_saved])
def test_a_translation_is_a_pair_in_the_order_of_its_languages(write, tmp_path):
    rows = [{"id": 1, "translation": {"de": row["source"], "en": row["target"]}} for row in PAIRS]
    assert [record for _, record in records_of(write(tmp_path, rows))] == PAIRS


def test_arrayrecord_holds_plain_texts(tmp_path):
    """Also ones that are JSON of another kind; a folder has them beside others."""
    texts = ["one\ntwo", '{"title": "no text"}', "[]", "日本", ""]
    write_arrayrecord(tmp_path, texts)
    (tmp_path / "b.txt").write_text("last")
    assert read((str(tmp_path),)).documents == [*texts, "last"]


# --- lines


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
def test_lines_are_those_of_the_whole_file(chunk, tmp_path, monkeypatch):
    """However it is cut into parts."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    path, draw = tmp_path / "a", random.Random(chunk)
    for _ in range(300):
        text = "".join(draw.choices(["\n", "\r\n", "\r", "日", "é", "x", " ", "\ufeff", "\u2028"], k=draw.randrange(9)))
        path.write_bytes(text.encode())
        try:
            whole = files.read_text(path).removesuffix("\n").split("\n")
        except InputError as error:
            with pytest.raises(InputError, match=re.escape(str(error))):
                list(lines_of(path))
        else:
            assert list(lines_of(path)) == whole
    path.write_bytes("one\r\n日".encode() + b"\xff\n\xfe")
    with pytest.raises(InputError, match=r"a: byte 8 \(line 2\) is not valid UTF-8: found 0xff"):
        list(lines_of(path))


@pytest.mark.parametrize("form", ["jsonl.gz", "parquet", "arrayrecord", "saved"])
def test_a_large_file_is_read_in_little_memory(form, tmp_path):
    """15 to 60 MB of text of which a few are held, as Python's own count of memory has it."""
    word = random.Random(0).randbytes(500).hex()  # so that it packs to no less than its limit
    rows = [{"text": f"{number} {word}"} for number in range(60)]
    (tmp_path / "small").mkdir()
    assert len(list(records_of(FORMS[form][0](tmp_path / "small", rows)))) == 60  # what is imported is not counted
    times = 1000 if form == "jsonl.gz" else 250
    path = FORMS[form][0](tmp_path, rows * times)
    tracemalloc.start()
    try:
        length = sum(len(record["text"]) for _, record in records_of(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert length > 60_000 * times
    assert peak < 6_000_000


# --- complaints

ROWS_ERRORS = {
    "a number": ([{"text": "a"}, {"text": "b"}], {"text": 5}, "3: field 'text' must be a string; got 5"),
    "nothing": (
        [{"source": "a", "target": "b"}],
        {"source": "a", "target": None},
        "2: field 'target' must be a string",
    ),
    "no turns": (CHATS, {"messages": []}, "3: messages must be a list of one or more turns"),
    "a turn of nothing": (
        CHATS,
        {"messages": [{"role": "user", "content": None}]},
        "3: turn 1 must have `role` and `content`",
    ),
    "blank texts": ([{"text": " "}], {"text": "\n"}, ": only blank texts, nothing to learn from"),
    "blank sources": ([{"source": " ", "target": "b"}], {"source": "", "target": "c"}, ": only blank sources"),
}


@pytest.mark.parametrize("case", ROWS_ERRORS)
@pytest.mark.parametrize("form", ["jsonl", "arrayrecord", "parquet", "saved", "folder"])
def test_a_bad_record_is_named_with_its_place(form, case, tmp_path):
    good, bad, says = ROWS_ERRORS[case]
    write, unit = FORMS[form]
    if case == "a number" and form not in ("jsonl", "arrayrecord"):  # a column has one type
        good, bad, says = [], {"text": 5}, "1: field 'text' must be a string; got 5"
    path = write(tmp_path, [*good, bad])
    says = re.escape(path + (says if says.startswith(":") else f", {unit} {says}"))
    with pytest.raises(InputError, match=says):
        list(records_of(path))


ARRAYRECORD_ERRORS = {
    "not UTF-8": ([b"one", b"tw\xffo"], r"record 2: byte 2 \(line 1\) is not valid UTF-8: found 0xff"),
    "other fields": ([*TEXTS, PAIRS[0]], "record 4: has other fields"),
    "no field": ([*TEXTS, {"txt": "b"}], "record 4: expected an object with `text`"),
    "no object": ([*TEXTS, "text"], "record 4: not a JSON object"),
    "nothing": ([], ": there is nothing in it"),
    "missing": (None, "no such file"),
}


@pytest.mark.parametrize("case", ARRAYRECORD_ERRORS)
def test_arrayrecord_that_holds_anything_else_is_refused(case, tmp_path):
    pytest.importorskip("array_record", reason="ArrayRecord is read by its library")
    rows, says = ARRAYRECORD_ERRORS[case]
    path = str(tmp_path / "a.arrayrecord") if rows is None else write_arrayrecord(tmp_path, rows)
    with pytest.raises(InputError, match=f"{re.escape(path)}.*{says}"):
        read((path,))


@pytest.mark.parametrize("options", ["group_size:1", "group_size:50,uncompressed", "group_size:20,brotli"])
def test_a_damaged_arrayrecord_is_refused(options, tmp_path, capfd):
    """Cut, with bits turned, or of other bytes: it is as it was where nothing that counts was touched, or refused."""
    draw = random.Random(0)
    texts = [f"{number} {draw.random()}" * 9 for number in range(400)]
    path = write_arrayrecord(tmp_path, texts, options=options)
    whole, said = (tmp_path / "a.arrayrecord").read_bytes(), []
    for number in range(90):
        raw = bytearray(whole)
        if number % 3 == 0:
            raw = raw[: draw.randrange(len(raw))]
        for _ in range(number % 3 * 10 - 9 if number % 3 else 0):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        (tmp_path / "a.arrayrecord").write_bytes(raw)
        try:
            assert read((path,)).documents == texts
        except InputError as error:
            said.append(str(error))
    assert len(said) >= 30
    assert all(
        re.fullmatch(re.escape(path) + r"(, record \d+)?: not an ArrayRecord file that .*", each) for each in said
    )
    for raw in (b"", b"no such file", bytes(70_000), b"x" * 70_000):
        (tmp_path / "a.arrayrecord").write_bytes(raw)
        with pytest.raises(InputError, match=r"a.arrayrecord: not an ArrayRecord file"):
            read((path,))
    (tmp_path / "folder.arrayrecord").mkdir()
    with pytest.raises(InputError, match="it is not a file"):
        list(records_of(tmp_path / "folder.arrayrecord"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_larger_than_memory_allows_is_not_held(form, tmp_path, monkeypatch):
    """But it can be streamed."""
    path = FORMS[form][0](tmp_path, [{"text": "x" * 60}] * 4)
    monkeypatch.setattr("transformer_jax.data.sources.most_bytes", lambda: 200)
    with pytest.raises(InputError, match=f"{re.escape(path)}: larger than 200 bytes"):
        read((path,))
    assert len(list(stream((path,)))) == 4


@pytest.mark.parametrize("form", ["jsonl", "arrayrecord"])
def test_a_record_larger_than_memory_allows_is_refused(form, tmp_path, monkeypatch):
    path = FORMS[form][0](tmp_path, [{"text": "x" * 600}])
    for module in (files, records):
        monkeypatch.setattr(module, "most_bytes", lambda: 500)
    with pytest.raises(InputError, match="larger than 500 bytes"):
        list(records_of(path))


# --- data sets


def test_a_path_names_a_data_set_its_configuration_and_its_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("odd@name:x")
    assert dataset_of("hf:owner/name") == ("owner/name", "", "")
    assert dataset_of("hf:wikitext@wikitext-2-raw-v1:train") == ("wikitext", "wikitext-2-raw-v1", "train")
    assert dataset_of("hf:odd@name:x") == ("odd@name:x", "", "")
    assert dataset_of("hf:odd@name:x@y:z") == ("odd@name:x", "y", "z")
    assert dataset_of(str(tmp_path)) == (str(tmp_path), "", "")


def test_a_split_is_taken_by_name(tmp_path):
    path = write_saved(tmp_path, None, train=TEXTS, test=PAIRS)
    assert read((path,)).kind == "text"
    assert read((f"hf:{path}:test",)).kind == "pairs"
    with pytest.raises(InputError, match=re.escape(f"hf:{path}:x: there is no split 'x'; give one of train, test")):
        read((f"hf:{path}:x",))
    with pytest.raises(InputError, match="has no configurations; leave 'y' out"):
        read((f"hf:{path}@y",))
    alone = f"{path}/test"
    assert read((alone,)).kind == "pairs"
    with pytest.raises(InputError, match="there is no split 'x'"):
        read((f"hf:{alone}:x",))
    folder = write_folder(tmp_path, TEXTS)
    assert read((f"{folder}:validation",)).documents == ["held out"]
    with pytest.raises(InputError, match="there is no split 'x'; give one of train, validation"):
        read((f"{folder}:x",))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"words": "one", "n": 1}], r"expected a column `text`, .* got \['n', 'words'\]"),
        ([{"source": "one"}], "expected a column `text`"),
        ([{"translation": {"de": "a", "en": "b", "fr": "c"}}], "row 1: field 'translation' must hold .* two lang"),
        ([{"translation": "a"}], "row 1: field 'translation' must hold"),
        ([{"translation": {"de": "a", "en": None}}], "row 1: field 'target' must be a string"),
    ],
)
@pytest.mark.parametrize("write", [write_parquet, write_saved])
def test_other_columns_are_refused(write, rows, says, tmp_path):
    path = write(tmp_path, rows)
    with pytest.raises(InputError, match=re.escape(path) + ".*" + says):
        read((path,))


def test_a_damaged_data_set_is_refused(datasets, tmp_path):
    path = write_saved(tmp_path, TEXTS * 500)
    (file,) = (tmp_path / "saved").glob("*.arrow")
    whole = file.read_bytes()
    for length in (0, 9, 300, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"saved.*: the data set cannot be read") as found:
            read((path,))
        assert "\n" not in str(found.value)
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(InputError, match="the data set cannot be read"):
        read((path,))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/train.jsonl").write_text('{"text": "a"}\n{"text"')
    (tmp_path / "none").mkdir()
    for name in ("x", "none"):
        with pytest.raises(InputError, match=f"hf:{tmp_path}/{name}.*: the data set cannot be read"):
            read((f"hf:{tmp_path}/{name}",))


def test_a_name_of_the_hub_is_streamed(monkeypatch):
    """By its name, configuration and split alone, and what goes wrong there is one message."""
    asked = []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        if name == "gone":
            raise ConnectionError("Couldn't reach 'gone' on the Hub\nat all")
        return {"train": Rows(), "test": Rows()}

    class Rows:
        column_names = None

        def __iter__(self):
            yield {"text": "one", "n": 1}
            raise OSError("connection lost")

        def select_columns(self, columns):
            return ({"text": row["text"]} for row in self)

    formats = SimpleNamespace(_PACKAGED_DATASETS_MODULES={})
    library = SimpleNamespace(load_dataset=load_dataset, packaged_modules=formats)
    monkeypatch.setattr(records, "_library", lambda: library)
    found = records_of("hf:owner/name@small:test")
    assert next(found) == ("hf:owner/name@small:test, row 1", {"text": "one"})
    with pytest.raises(InputError, match=r"row 1: the data set cannot be read after this row \(connection lost\)"):
        next(found)
    with pytest.raises(InputError, match=r"hf:gone: the data set cannot be read \(Couldn't reach 'gone' .* at all\)"):
        read(("hf:gone",))
    assert asked == [("owner/name", "small", {"streaming": True}), ("gone", None, {"streaming": True})]


@pytest.mark.parametrize("name", ["", "/no/such/folder", "../x", "a/b/c", "s3://bucket/x", "a b", "\ud800", "a\0"])
def test_what_is_no_name_of_the_hub_is_not_asked_for(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "_library", lambda: pytest.fail("asked"))
    with pytest.raises(InputError, match=r"there is no folder .* no name of a data set on the hub"):
        read((f"hf:{name}",))


@pytest.mark.parametrize("name", ["json", "text", "pandas"])
def test_a_format_is_no_data_set(datasets, name, tmp_path, monkeypatch):
    """The library would read all files of the current folder by it."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path, TEXTS)
    with pytest.raises(InputError, match=f"hf:{name}: '{name}' is a format"):
        read((f"hf:{name}",))


def test_a_folder_is_read_without_a_network(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    assert len(read((write_folder(tmp_path, TEXTS),))) == 3


def test_libraries_that_are_missing_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.arrayrecord").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    records._library.cache_clear()
    with pytest.raises(InputError, match=r"a.arrayrecord: .* pip install 'transformer_jax\[data\]'"):
        read((str(tmp_path / "a.arrayrecord"),))
    with pytest.raises(InputError, match=r"hf:owner/name: .* pip install 'transformer_jax\[datasets\]'"):
        read(("hf:owner/name",))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="3.6.0"))  # it may run what it downloads
    with pytest.raises(InputError, match=r"hf:owner/name: .* pip install 'transformer_jax\[datasets\]'"):
        read(("hf:owner/name",))


def test_the_files_of_a_data_set_are_those_of_its_folder(tmp_path):
    """So that no output is written over them."""
    path = write_saved(tmp_path, TEXTS)
    names = {"dataset_info.json", "state.json", "data-00000-of-00001.arrow"}
    assert {file.name for file in files_of((path,))} == {file.name for file in files_of((f"hf:{path}",))} == names
    assert files_of(("hf:owner/name:train",)) == []
