"""Sources: which files are read, the documents in them however they are cut into units, and refusals that name file
and line."""

import codecs
import gzip
import json
import os
import sysconfig
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from jaxlm.data.documents import Document, read_documents
from jaxlm.data.formats import Reading, look_at
from jaxlm.data.sources import find_sources, plan_units
from jaxlm.errors import UserError


def documents(raw, unit_bytes=2**30, **reading):
    reading = Reading(**reading)
    files = look_at(find_sources(str(raw) if isinstance(raw, Path) else raw), reading)
    units = plan_units([file for file in files if file], reading.document, unit_bytes)
    return [document for unit in units for document in read_documents(unit, reading)]


def texts(raw, unit_bytes=2**30, **reading):
    return [document.text for document in documents(raw, unit_bytes, **reading)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def compressed(path, content):
    write(path.with_name(path.name + ".gz"), gzip.compress(content))
    write(path.with_name(path.name + ".zst"), zstandard.compress(content[:7]) + zstandard.compress(content[7:]))


# ---------------------------------------------------------------------------------------------------------------- files

def test_folders_globs_and_lists_in_a_fixed_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a/z.md", "a/y/c.py", "a.JSONL.gz", "skip.png", ".hidden/x.txt", "a/.x.txt", "notes.log", "c.txt.bak",
                 "d.zst"):
        write(tmp_path / "in" / name, "x")

    def names(raw):
        return [file.name for file in find_sources(raw)]

    everything = ["in/a.JSONL.gz", "in/a/y/c.py", "in/a/z.md", "in/b.txt"]
    assert names("in") == everything and sorted(names("in/*")) == everything
    assert names("in/**/*.txt") == ["in/b.txt"]
    assert names("in/*.log") == names("in/notes.log") == ["in/notes.log"]
    assert names(["in/b.txt", "in"]) == ["in/b.txt", *everything[:-1]]
    assert names(str(tmp_path / "in" / "b.txt")) == [str(tmp_path / "in" / "b.txt")]
    os.symlink(tmp_path / "in" / "a", tmp_path / "in" / "link")
    os.symlink(tmp_path / "in", tmp_path / "in" / "a" / "circle")
    assert names("in") == everything


@pytest.mark.parametrize("raw, message", [
    ("train.tx", r"^data.raw: 'train.tx' matches no file; did you mean '.*train.txt'\?$"),
    ("*.parquet", r"^data.raw: '\*.parquet' matches no file"),
    ("empty", r"^data.raw: no text file in 'empty'"),
    ("python://stdlibs", r"did you mean 'python://stdlib'"),
])
def test_nothing_found_is_refused(tmp_path, monkeypatch, raw, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.txt", "x")
    write(tmp_path / "empty" / "picture.png", "x")
    with pytest.raises(UserError, match=message):
        find_sources(raw)


def test_the_standard_library_without_tests_and_packages():
    files = find_sources("python://stdlib")
    names = [file.name for file in files]
    assert {"python://stdlib/abc.py", "python://stdlib/json/decoder.py", "python://stdlib/pydoc_data/topics.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name or "/tests/" in name]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert all(Path(file.path).is_relative_to(sysconfig.get_path("stdlib")) for file in files)


# ------------------------------------------------------------------------------------------------------------ documents

@settings(max_examples=120, deadline=None)
@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r\ufeff"), max_size=12), max_size=12),
       ends=st.sampled_from(["\n", "\r\n"]), closed=st.booleans(), unit_bytes=st.integers(1, 40), max_bytes=st.integers(1, 30))
def test_lines_do_not_depend_on_units(tmp_path_factory, lines, ends, closed, unit_bytes, max_bytes):
    path = tmp_path_factory.mktemp("lines") / "x.txt"
    write(path, ends.join(lines) + (ends if closed and lines else ""))
    expected = lines if closed or (lines and lines[-1]) else lines[:-1]
    expected = [line if len(line.encode()) <= max_bytes else None for line in expected]
    assert texts(path, unit_bytes, document="line", max_bytes=max_bytes) == expected


@pytest.mark.parametrize("unit_bytes", [1, 50, 10**6])
def test_every_format_gives_the_same_documents(tmp_path, unit_bytes):
    expected = [f"document {number} é\n" + "word " * (number % 7) for number in range(50)]
    content = "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in expected).encode()
    write(tmp_path / "plain.jsonl", content)
    compressed(tmp_path / "packed.jsonl", content)
    table = pa.table({"other": range(50), "body": expected})
    for name, kind in {"a": pa.string(), "b": pa.dictionary(pa.int32(), pa.string()), "c": pa.large_string()}.items():
        column = table["body"].cast(kind)
        parquet.write_table(table.set_column(1, "body", column), tmp_path / f"{name}.parquet", row_group_size=7)
    compressed(tmp_path / "d.parquet", (tmp_path / "a.parquet").read_bytes())
    for path in tmp_path.iterdir():
        assert texts(path, unit_bytes, text_field="body") == expected, path


def test_a_document_per_file_is_the_file(tmp_path):
    content = b"one\r\ntwo \xe2\x98\x83\n\n"
    write(tmp_path / "a.txt", content)
    compressed(tmp_path / "b.txt", content)
    write(tmp_path / "c.txt", b"")
    assert texts(tmp_path) == [content.decode()] * 3 + [""]


def test_invalid_text_is_repaired_and_counted(tmp_path):
    write(tmp_path / "a.txt", b"caf\xe9 \xff\xfe!")
    write(tmp_path / "b.txt", codecs.BOM_UTF8 + "é".encode())
    write(tmp_path / "c.jsonl", b'{"text": "half \\ud83d pair"}\n{"text": "whole \\ud83d\\ude00"}\n\n{"text": "\xff"}\n')
    assert documents(tmp_path) == [
        Document("caf\ufffd \ufffd\ufffd!", 3), Document("é"),
        Document("half \ufffd pair", 1), Document("whole \U0001f600"), Document(""), Document("\ufffd", 1)]


def test_null_in_a_column_is_an_empty_document(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None, "c" * 100]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", max_bytes=50) == ["a", "", None]


@pytest.mark.parametrize("name, document", [("a.txt", "line"), ("a.txt", "file"), ("a.jsonl", "file"), ("a.txt.gz", "line"),
                                            ("a.txt.gz", "file"), ("a.txt.zst", "file")])
def test_a_giant_document_is_never_held(tmp_path, name, document):
    giant = b"x" * 20_000_000
    content = b'{"text": "' + giant + b'"}\n{"text": "small"}\n' if "jsonl" in name else giant + b"\nsmall\n"
    pack = gzip.compress if name.endswith(".gz") else zstandard.compress if name.endswith(".zst") else bytes
    write(tmp_path / name, pack(content))
    del giant, content
    tracemalloc.start()
    found = texts(tmp_path / name, document=document, max_bytes=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ([None] if document == "file" and "txt" in name else [None, "small"])
    assert peak < 8_000_000


# ------------------------------------------------------------------------------------------------------------- refusals

def refusal(raw, **options):
    with pytest.raises(UserError) as error:
        documents(raw, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("name, document", [("a.txt", "file"), ("a.txt", "line"), ("a.jsonl", "file")])
@pytest.mark.parametrize("max_bytes", [100, 10**9])
def test_damaged_archives_are_refused_by_name(tmp_path, suffix, pack, name, document, max_bytes):
    whole = pack(b"".join(b'{"text": "%d"}\n' % (number**5) for number in range(3000)))
    for damaged in (whole[:-3], whole[:len(whole) // 2], b"not an archive at all"):
        path = write(tmp_path / (name + suffix), damaged)
        message = refusal(path, document=document, max_bytes=max_bytes)
        assert str(path) in message and "truncated or not valid" in message


@pytest.mark.parametrize("unit_bytes", [10, 10**6])
@pytest.mark.parametrize("line, problem", [
    ('{"text": "x"', "not a JSON object"), ("[" * 100_000, "not a JSON object"),
    ('["text"]', "expected a JSON object, found list"),
    ('{"txt": "x"}', "no field 'text' (data.text_field), only txt; did you mean 'txt'?"),
    ('{"text": null}', "field 'text' (data.text_field) is NoneType, expected a string"), ('{"text": 3}', "is int"),
])
def test_bad_json_names_file_and_line(tmp_path, line, problem, unit_bytes):
    path = write(tmp_path / "a.jsonl", '{"text": "é"}\n\n{"text": "fine"}\n' + line + '\n{"text": "y"}\n')
    message = refusal(path, unit_bytes=unit_bytes)
    assert message.startswith(f"{path}, line 4: ") and problem in message


def test_bad_parquet_names_the_file(tmp_path):
    parquet.write_table(pa.table({"number": [1, 2], "texts": ["a", "b"]}), tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    assert "a.parquet: no column 'text' (data.text_field), only number, texts; did you mean 'texts'?" in refusal(path)
    assert "column 'number' (data.text_field) is int64, expected string" in refusal(path, text_field="number")
    whole = (tmp_path / "a.parquet").read_bytes()
    for unit_bytes in (10, 10**6):
        write(tmp_path / "b.parquet", whole[:-20])
        assert "b.parquet: not a valid Parquet file" in refusal(tmp_path / "b.parquet", unit_bytes=unit_bytes)


def test_a_vanished_file_is_refused_by_name(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    units = plan_units(look_at(find_sources(str(path)), Reading()), "file", 100)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.txt: unreadable \(No such file"):
        list(read_documents(units[0], Reading()))
