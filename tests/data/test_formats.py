"""What a file is: records under any name are read by their fields, prose and code as they stand, the rest is
refused."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from jaxlm.data.documents import read_documents
from jaxlm.data.formats import Reading, look, look_at
from jaxlm.data.prepare import prepare
from jaxlm.data.sources import PassedOver, find_sources, plan_units
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings

TEXTS = ["one, and \"two\"", "line\nand line", "tab\there", "", "é 日本 \U0001f600",
         *(f"text number {number}" for number in range(40))]
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()
RECORDS = [{"text": text, "id": 1} for text in TEXTS]


def table(separator=",", quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    content = io.StringIO()
    writer = csv.writer(content, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([["id", "text", "more"], *([number, text, ""] for number, text in enumerate(TEXTS))])
    return content.getvalue().encode()


def stored(write):
    content = io.BytesIO()
    write(content)
    return content.getvalue()


def as_arrow_stream(file):
    with pa.ipc.new_stream(file, pa.schema({"text": pa.string()})) as stream:
        stream.write_table(pa.table({"text": TEXTS}))


PARQUET = stored(lambda file: parquet.write_table(pa.table({"text": TEXTS}), file))
FEATHER = stored(lambda file: feather.write_feather(pa.table({"text": TEXTS}), file))
READ = {  # name: content, kind
    **{name: (LINES, "jsonl") for name in ("x.json", "x.jsonl", "x.ndjson", "x.jsonlines", "x.jl", "x.txt", "x.log", "x.csv", "x",
                                           "X.JSON", "x.jsonl-00000-of-00004")},
    "c4-train.00000-of-01024.json.gz": (gzip.compress(LINES), "jsonl"),
    "packed.txt": (gzip.compress(LINES), "jsonl"), "x.json.bz2": (bz2.compress(LINES), "jsonl"),
    "x.json.xz": (lzma.compress(LINES), "jsonl"), "bom.json": (codecs.BOM_UTF8 + LINES, "jsonl"),
    "utf16.jsonl": (codecs.BOM_UTF16_BE + LINES.decode().encode("utf-16-be"), "jsonl"),
    "array.json": (json.dumps(RECORDS).encode(), "json"), "array.txt": (json.dumps(RECORDS, indent=2).encode(), "json"),
    "array.jsonl": (json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(), "json"),
    "behind.json": ("\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(), "json"),
    "arrays.json": ((json.dumps(RECORDS[:9]) + "\n" + json.dumps(RECORDS[9:])).encode(), "json"),
    "x2.csv": (table(), "csv"), "all.csv": (table(quoting=csv.QUOTE_ALL, end="\n"), "csv"), "semicolon.csv": (table(";"), "csv"),
    "bom.csv": (codecs.BOM_UTF8 + table(), "csv"), "utf16.csv": (table().decode().encode("utf-16"), "csv"),
    "x.csv.gz": (gzip.compress(table()), "csv"), "x.tsv": (table("\t"), "tsv"), "x.tab": (table("\t"), "tsv"),
    "table.txt": (table(), "csv"), "export": (table("\t"), "tsv"),
    "x.parquet": (PARQUET, "parquet"), "parquet.txt": (PARQUET, "parquet"), "x.feather": (FEATHER, "arrow"),
    "feather.dat": (FEATHER, "arrow"), "x.arrow": (stored(as_arrow_stream), "arrow"),
}


def documents(path, unit_bytes=2**30, **reading):
    reading = Reading(**reading)
    [file] = look_at(find_sources(str(path)), reading)
    return file.kind, [document.text for unit in plan_units([file], reading.document, unit_bytes)
                       for document in read_documents(unit, reading)]


@pytest.mark.parametrize("name", READ)
def test_records_are_read_by_their_field_under_any_name(tmp_path, name):
    """Line 1: no brace, header or comma of these is ever text; and however they are cut into units, they are the
    same."""
    content, kind = READ[name]
    (tmp_path / name).write_bytes(content)
    for unit_bytes in (50, 2**30):
        assert documents(tmp_path / name, unit_bytes) == (kind, TEXTS)


PROSE = {
    "README.md": '{"a": 1}\n{"b": 2}\n', "code.py": '{"text": 1}\n', "brace.txt": "{% extends 'x' %}\nand on\n",
    "song.txt": "[Music]\nla la\n", "said.txt": '"Hello", he said,\nand left, too.\n', "mixed.txt": '{"text": 1}\nis JSON.\n',
    "comma.txt": "the text, said he\nis long\n", "page.html": "<!DOCTYPE html><p>text</p>", "set.jl": "function f(x)\n x\nend\n",
    "object.c": "{\n  int text;\n}\n", "list.text": "['text', 'a']\n", "ORC.txt": "ORCs are many\n",
}


@pytest.mark.parametrize("name", PROSE)
def test_prose_and_source_code_stay_what_they_are(tmp_path, name):
    (tmp_path / name).write_text(PROSE[name])
    assert documents(tmp_path / name) == ("text", [PROSE[name]])


def archive(kind):
    def write(file):
        if kind == "zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("a.txt", "text")
        else:
            with tarfile.open(fileobj=file, mode="w") as archive:
                archive.addfile(tarfile.TarInfo("a.txt"))
    return stored(write)


WORDS = "EU B-ORG\nrejects O\nGerman B-MISC\ncall O\nto O\n. O\n\n"
SQUAD = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": []}]}]}
REFUSED = {  # name: content, words of the message
    "a.pdf": (b"%PDF-1.7 ...", "a PDF document", "pdftotext"), "pdf.txt": (b"%PDF-1.7 ...", "a PDF document", "extract"),
    "a.docx": (archive("zip"), "a zip archive", "save it as text"), "zip.txt": (archive("zip"), "a zip archive", "unpack"),
    "a.tar.gz": (gzip.compress(archive("tar")), "a tar archive", "unpack"),
    "x.npy": (stored(lambda file: np.save(file, [1])), "NumPy"), "x.txt": (pickle.dumps({"text": "a"}), "pickle", "JSON Lines"),
    "twice.gz": (gzip.compress(gzip.compress(b"a")), "compressed twice"),
    "a.warc": (b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", "WARC", "trafilatura"),
    "download.txt": (b"<!DOCTYPE html>\n<html></html>", "web page", ".html"),
    "saved.json": (b"<html></html>", "web page", ".html"),
    "binary.txt": (b"a\0b\xff" * 9, "byte 1 is zero", "binary"),
    "train.txt": (WORDS.encode(), "CoNLL", "sentences"), "ner.tsv": (WORDS.replace(" ", "\t").encode(), "CoNLL"),
    "doc.txt": (b"-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\n", "CoNLL"),
    "x.conllu": (b"# text = a\n1\ta\ta\tX\t_\t_\t0\troot\t_\t_\n", "CoNLL"),
    "train-v1.1.json": (json.dumps(SQUAD).encode(), "SQuAD", "jq"),
    "squad.txt": (json.dumps(SQUAD, indent=1).encode(), "SQuAD", "jq"),
    "wrapped.json": (json.dumps({"data": RECORDS}).encode(), "line 1", "'data'", "jq -c '.data[]'"),
    "pretty.json": (json.dumps({"rows": RECORDS}, indent=1).encode(), "record 1", "'rows'", "jq -c '.rows[]'"),
    "strings.json": (json.dumps(TEXTS).encode(), "record 1", "expected a JSON object, found str"),
    "cut.json": (json.dumps(RECORDS * 99, indent=1).encode()[:-40], "line", "not valid JSON"),
    "comma.json": (b'[{"text": "a"}\n {"text": "b"}]', "line 2", "not valid JSON (expected ',' or ']')"),
    "other.csv": (b"id,review\n1,good\n", "no column 'text' (data.text_field)", "id, review"),
    "wide.csv": (b"id,text\n1,a\n2,b,c\n", "line 3: 3 columns, but the first has 2"),
    "headless.csv": (b"ham,Go until jurong point\nspam,Free entry\n", "no column 'text'", "only ham, Go until", "header line"),
    "open.csv": (b'id,text\n1,"never closed\n2,b\n', "open.csv, line 3: not a row"),
    "stray.csv": (b'id,text\n1,"so" it is\n', "stray.csv, line 2: not a row", "doubled"),
    "twice.csv": (b"text,text\na,b\n", "more than one column 'text'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name):
    """Line 1: in one line, with what it is and the way out."""
    content, *words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        documents(tmp_path / name)
    message = str(error.value)
    assert name in message and "\n" not in message and all(word in message for word in words), message


def test_an_sqlite_database_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "a.txt") as database:
        database.execute("create table a (b)")
    with pytest.raises(UserError, match=r"a\.txt: an SQLite database"):
        documents(tmp_path / "a.txt")


def test_the_quotes_of_a_tsv_are_what_its_writer_means(tmp_path):
    """GLUE has quotes as letters, pandas encloses cells in them; no line is swallowed either way."""
    (tmp_path / "glue.tsv").write_text('label\ttext\n1\t"Hello she said\n0\tthe end" of it\n1\t"whole"\n')
    (tmp_path / "pandas.tsv").write_text('label\ttext\n1\t"two\nlines"\n0\t"a ""word"" more"\n')
    assert documents(tmp_path / "glue.tsv")[1] == ['"Hello she said', 'the end" of it', '"whole"']
    assert documents(tmp_path / "pandas.tsv")[1] == ["two\nlines", 'a "word" more']


def test_a_large_array_is_read_piece_by_piece(tmp_path):
    texts = [f"{number} " + "word " * 2000 for number in range(400)]  # 4 MB: several pieces
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert documents(tmp_path / "a.json")[1] == texts
    with pytest.raises(UserError, match=r"a\.json, line 1: a record of more than 1,048,578 characters; raise data\.cleaning"):
        (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 3 * 2**20}]))
        documents(tmp_path / "a.json", max_bytes=1)


def test_long_cells_are_dropped_and_not_held_to_a_limit_of_the_library(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\nb\n")
    assert documents(tmp_path / "a.csv")[1] == ["x" * 200_000, "b"]
    assert documents(tmp_path / "a.csv", max_bytes=1000)[1] == [None, "b"]


# -------------------------------------------------------------------------------------------------------- mixed folders

def test_each_file_of_a_folder_by_its_own_kind_and_the_rest_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name, content in {"a.txt": b"prose", "b.json": LINES, "c.csv": table(), "d.parquet": PARQUET, "package.json": b'{"a": 1}',
                          "own.json": b'{\n "text": "mine"\n}', "e.log": b"x", "f.LOG": b"x", "g.bin": b"\0", ".hidden": b"x",
                          "Makefile": b"x"}.items():
        (tmp_path / "in" / name).write_bytes(content)
    passed_over = PassedOver()
    files = look_at(find_sources("in", passed_over=passed_over), Reading())
    assert [file and file.kind for file in files] == ["text", "jsonl", "csv", "parquet", "json", None]
    assert passed_over == {".log": 2, ".bin": 1, "hidden": 1, "without suffix": 1}
    corpus = prepare(DataSettings(raw="in", tokenizer="bytes", validation=0), "corpus")
    assert corpus.notes == [
        "6 files in in were passed over: .log 2, .bin 1, .json without records 1, hidden 1, without suffix 1"]
    assert corpus.train.num_documents == 2 + 3 * (len(TEXTS) - 1)
    kinds = {entry["path"]: entry["kind"] for entry in corpus.manifest["sources"]}
    assert kinds == {"in/a.txt": "text", "in/b.json": "JSON Lines", "in/c.csv": "CSV", "in/d.parquet": "Parquet",
                     "in/own.json": "JSON"}


def test_the_same_file_named_outright_is_not_passed_over(tmp_path):
    (tmp_path / "package.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"package\.json, line 1: no field 'text' \(data\.text_field\), only a"):
        documents(tmp_path / "package.json")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "package.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"data\.raw: no text to read: 1 file in .* was passed over: \.json without records 1"):
        prepare(DataSettings(raw=str(tmp_path / "only"), tokenizer="bytes"), tmp_path / "corpus")


def test_a_key_that_no_file_can_use_is_an_error(tmp_path):
    """Line 1: text_field on plain text, lines where there are records only."""
    (tmp_path / "a.txt").write_text("the review\nof a film\n")
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "c.csv").write_text("review\ngood\n")

    def prepared(*names, **keys):
        return prepare(DataSettings(raw=[str(tmp_path / name) for name in names], tokenizer="bytes", validation=0, **keys),
                       tmp_path / f"corpus-{len(list(tmp_path.iterdir()))}")

    with pytest.raises(UserError, match=r"^data\.text_field=review: .*a\.txt is plain text"):
        prepared("a.txt", text_field="review")
    with pytest.raises(UserError, match=r"^data\.document=line: .*b\.jsonl is JSON Lines"):
        prepared("b.jsonl", document="line")
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: no field 'review'"):
        prepared("a.txt", "b.jsonl", text_field="review")
    assert prepared("a.txt", "c.csv", text_field="review", document="line").train.num_documents == 3
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_is_looked_at_once_for_what_it_is(tmp_path):
    """An empty file, and one whose name promises more than it holds."""
    for name in ("a.txt", "a.jsonl", "a.csv", "a.json"):
        (tmp_path / name).write_bytes(b"")
        [file] = find_sources(str(tmp_path / name))
        assert look(file, Reading()).kind in ("text", "jsonl")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a valid Parquet file"):
        documents(tmp_path / "a.parquet")
