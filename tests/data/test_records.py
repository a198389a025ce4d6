"""Labelled records: read from every format as they were written, their columns and labels found or refused in a line,
and a corpus of them that is the same however it was made."""

import bz2
import codecs
import csv
import datetime
import gzip
import io
import itertools
import json
import lzma
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from jaxlm.checks import check_held_out
from jaxlm.data import sources
from jaxlm.data.corpus import Corpus
from jaxlm.data.description import describe
from jaxlm.data.manifest import read_report
from jaxlm.data.prepare import prepare
from jaxlm.data.records import read_records
from jaxlm.errors import UserError
from jaxlm.settings import CleaningSettings, DataSettings, Settings, TaskSettings

TEXTS = ["plain words here", 'he said "so", and left', "line\nand line", "tab\there", "é 日本 \U0001f600", '"quoted"', " blanks ",
         "comma, comma", "semi; colon", "a|b", "'single'", "back\\slash", "NaN", "1", "null", "#3", "x" * 5000]
LABELS = [("neg", "pos", "neutral ground")[number % 3] for number in range(len(TEXTS))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(rows, separator=",", header=("text", "label"), quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    content = io.StringIO()
    writer = csv.writer(content, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([*([header] if header else []), *rows])
    return content.getvalue().encode()


def stored(write):
    content = io.BytesIO()
    write(content)
    return content.getvalue()


def objects(rows, names=("text", "label")):
    return [dict(zip(names, row, strict=True)) for row in rows]


def lines(rows, **options):
    return "".join(json.dumps(record, **options) + "\n" for record in objects(rows)).encode()


def columns(rows, names=("text", "label")):
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def texts_and_labels(raw, streams=("text",), data=None, **task):
    found = list(read_records(str(raw), data or DataSettings(), TaskSettings(name="text_classification", **task), streams))
    return [(*record.texts, record.label) for record in found]


def test_whether_there_are_pairs_is_seen_where_nobody_says(folder):
    """As `predict` with an imported model has it."""
    (folder / "pairs.csv").write_bytes(table([("a b", "c d", "x"), ("e", "f", "y")], header=("text", "pair", "label")))
    assert texts_and_labels("pairs.csv", streams=None) == [("a b", "c d", "x"), ("e", "f", "y")]


def prepared(raw, name="corpus", task=None, processes=None, **data):
    data = DataSettings(**{"raw": str(raw), "tokenizer": "bytes", "validation": 0} | data)
    return prepare(data, name, task=TaskSettings(**{"name": "text_classification"} | (task or {})), processes=processes)


def decoded(corpus, split="train"):
    """Texts and labels of a split, as the corpus has them."""
    documents = getattr(corpus, split)
    end = int(corpus.tokenizer.special.eos is not None)
    texts = [[corpus.tokenizer.decode(stream.read(start, stop - end))
              for start, stop in itertools.pairwise(stream.offsets.tolist())] for stream in documents.streams.values()]
    return list(zip(*texts, documents.column("label").tolist(), strict=True))


# -------------------------------------------------------------------------------------------------------------- reading

ROWS = list(zip(TEXTS, LABELS, strict=True))
ONE_LINE = [(text.replace("\n", " ").replace("\t", " "), label) for text, label in ROWS]
FILES = {  # name: content
    "a.jsonl": lines(ROWS), "utf8.jsonl": lines(ROWS, ensure_ascii=False), "named.txt": lines(ROWS),
    "bom.jsonl": codecs.BOM_UTF8 + lines(ROWS), "crlf.jsonl": lines(ROWS).replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n" + lines(ROWS).replace(b"\n", b"\n  \n"), "utf16.jsonl": lines(ROWS).decode().encode("utf-16"),
    "array.json": json.dumps(objects(ROWS), indent=1).encode(), "behind.json": "\n".join(map(json.dumps, objects(ROWS))).encode(),
    "utf16.json": json.dumps(objects(ROWS), indent=1).encode("utf-16"),
    "a.jsonl.gz": gzip.compress(lines(ROWS)), "a.json.xz": lzma.compress(lines(ROWS)), "a.ndjson.bz2": bz2.compress(lines(ROWS)),
    "a.csv": table(ROWS), "lf.csv": table(ROWS, end="\n"), "all.csv": table(ROWS, quoting=csv.QUOTE_ALL),
    "bom.csv": codecs.BOM_UTF8 + table(ROWS), "semicolon.csv": table(ROWS, ";"), "bare.csv": table(ROWS, header=None),
    "a.csv.gz": gzip.compress(table(ROWS)), "utf16.csv": table(ROWS).decode().encode("utf-16"), "a.psv": table(ROWS, "|"),
    "a.tsv": table(ROWS, "\t"), "bare.tsv": table(ROWS, "\t", header=None), "a.tsv.bz2": bz2.compress(table(ROWS, "\t")),
    "table.txt": table(ROWS, "\t"), "more.tsv": table([(7, text, label) for text, label in ROWS], "\t", ("idx", "text", "label")),
    "a.parquet": stored(lambda file: parquet.write_table(columns(ROWS), file, row_group_size=4)),
    "a.parquet.gz": gzip.compress(stored(lambda file: parquet.write_table(columns(ROWS), file))),
    "category.parquet": stored(lambda file: parquet.write_table(columns(ROWS).set_column(
        1, "label", columns(ROWS)["label"].dictionary_encode()), file)),
    "a.feather": stored(lambda file: feather.write_feather(columns(ROWS), file)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_records_that_were_written(folder, name):
    (folder / name).write_bytes(FILES[name])
    assert texts_and_labels(name) == ROWS


def test_quotes_of_a_tsv_may_be_letters_as_in_glue(folder):
    rows = [*ONE_LINE, ('"open and never closed', "neg"), ('closed" only', "pos"), ('a "b', "neg")]
    content = "".join(f"{text}\t{label}\n" for text, label in rows).encode()
    for name, stored_as in (("a.tsv", content), ("a.tsv.gz", gzip.compress(content)), ("b.tsv", content.replace(b"\n", b"\r\n"))):
        (folder / name).write_bytes(stored_as)
        assert texts_and_labels(name, fields={"text": "0", "label": "1"}) == rows


def test_many_random_records_come_back_from_every_format(folder):
    generator = random.Random(5)
    letters = 'ab ,;\t"\'\n\\|é日\U0001f600#-{}[]:\u2028\x0b'
    rows = [(generator.choice("xyz") + "".join(generator.choices(letters, k=generator.randint(1, 40))),
             f"pair {generator.random()}", generator.choice(["yes", "no", "it, is"])) for _ in range(1000)]
    names = ("sentence1", "sentence2", "label")
    (folder / "a.csv").write_bytes(table(rows, header=names))
    (folder / "b.tsv").write_bytes(table(rows, "\t", names, csv.QUOTE_ALL, "\n"))
    (folder / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in objects(rows, names)))
    (folder / "d.json").write_text(json.dumps(objects(rows, names), ensure_ascii=False), encoding="utf-8")
    parquet.write_table(columns(rows, names), folder / "e.parquet", row_group_size=100)
    feather.write_feather(columns(rows, names), folder / "f.feather")
    for path in sorted(folder.iterdir()):
        assert texts_and_labels(path, ("text", "pair")) == rows, path
    with open("a.csv", encoding="utf-8", newline="") as file:
        assert [tuple(row) for row in csv.reader(file)][1:] == rows


def test_records_say_where_they_stand(folder):
    (folder / "a.csv").write_text('text,label\n"two\nlines",a\n\nthree,b\n')
    (folder / "b.jsonl").write_text('\n{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n')
    (folder / "c.json").write_text('[{"text": "x", "label": 1},\n\n{"text": "y", "label": 0}]')
    parquet.write_table(columns([("x", 1), ("y", 0)]), folder / "d.parquet", row_group_size=1)
    for name, places in (("a.csv", ["line 2", "line 5"]), ("b.jsonl", ["line 2", "line 3"]), ("c.json", ["record 1", "record 2"]),
                         ("d.parquet", ["row 1", "row 2"])):
        found = read_records(name, DataSettings(), TaskSettings(name="text_classification"), ("text",))
        assert [record.place for record in found] == [f"{name}, {place}" for place in places]


def test_to_predict_no_labels_are_needed_and_every_record_comes(folder):
    fields = {"text": "review", "label": "stars"}  # as the run was trained
    for name, content in (("a.csv", "id,review\n1,good\n2,\n3,bad one\n"), ("b.tsv", "review\ngood\n\"\"\nbad one\n"),
                          ("c.jsonl", '{"review": "good"}\n{"review": ""}\n{"review": "bad one"}\n')):
        (folder / name).write_text(content)
        assert texts_and_labels(name, fields=fields) == [("good", None), ("", None), ("bad one", None)]
    (folder / "d.tsv").write_text("a good one\nand a bad one\n")
    assert texts_and_labels("d.tsv") == [("a good one", None), ("and a bad one", None)]
    (folder / "e.csv").write_text("text,label\na,unheard of\n")
    assert texts_and_labels("e.csv") == [("a", "unheard of")]


def test_other_columns_come_along(folder):
    rows = [("good", 1, 0.5, "x"), ("bad", 0, float("nan"), None)]
    names = ("text", "label", "weight", "note")
    (folder / "a.csv").write_text("text,label,weight,note\ngood,1,0.5,x\n")
    (folder / "b.tsv").write_text("good one\t1\t0.5\nbad one\t0\t2\n")
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, [*objects(rows, names), {"text": "", "new": [1]}])))
    days = columns(rows, names).append_column("day", pa.array([datetime.date(2026, 11, 25)] * 2))
    parquet.write_table(days, folder / "d.parquet")

    def found(name, **task):
        records = read_records(name, DataSettings(), TaskSettings(name="text_classification", **task), ("text",))
        return [record.columns for record in records]

    assert found("a.csv") == [{"label": "1", "weight": "0.5", "note": "x"}]
    assert found("b.tsv", fields={"text": "0"})[1] == {"1": "0", "2": "2"}
    assert found("c.jsonl", fields={"text": "text"}) == [
        {"label": 1, "weight": 0.5, "note": "x"}, {"label": 0, "weight": None, "note": None}, {"new": [1]}]
    assert found("d.parquet")[1] == {"label": 0, "weight": None, "note": None, "day": "2026-11-25"}


# -------------------------------------------------------------------------------------------------------------- columns

BODY = "id1\tthe first text\tits other text\t{}\nid2\ta second text\tand another\t{}\n"
FOUND = {  # name: content, settings, texts and label of the first record
    "glue.tsv": ("sentence\tlabel\nhide new\t0\ncontains no\t1\n", {}, ("hide new", "0")),
    "sst2.tsv": ("hide new things\t0\ncontains no wit\t1\n", {}, ("hide new things", "0")),
    "turned.csv": ("0,hide new things\n1,contains no wit\n", {}, ("hide new things", "0")),
    "stsb.csv": ("a plane is,an air plane,5.0\na man plays,a man sings,3.8\n", {}, ("a plane is", "an air plane", "5.0")),
    "imdb.csv": ('review,sentiment\n"so, good",positive\nbad,negative\n', {}, ("so, good", "positive")),
    "Upper.csv": ("Review Text,Rating\nso good,5\nbad,1\n", {}, ("so good", "5")),
    "mnli.tsv": ("pairID\tgold_label\tsentence1\tsentence2\nx\tneutral\tone text\ttwo\n", {}, ("one text", "two", "neutral")),
    "qnli.tsv": ("index\tquestion\tsentence\tlabel\n0\twhy so?\tit is\tentailment\n", {}, ("why so?", "it is", "entailment")),
    "trec.csv": ("question,label\nwhat is it,DESC\n", {}, ("what is it", "DESC")),
    "mrpc.tsv": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tone\ttwo\n", {}, ("one", "two", "1")),
    "index.csv": (",text,label\n0,some,a\n1,more,b\n", {}, ("some", "a")),
    "counted.csv": ("0,1\nsome text,a\nmore text,b\n", {"fields": {"text": "0", "label": "1"}}, ("some text", "a")),
    "cola.tsv": ("gj04\t1\t\tour friends\ngj04\t0\t*\tthe more\n", {"fields": {"text": "3", "label": "1"}}, ("our friends", "1")),
    "named.tsv": ("a\tb\tc\nsome text\t3\tx\n", {"fields": {"text": "a", "label": "c"}}, ("some text", "x")),
    "single.csv": ("premise,hypothesis,label\none,two,1\n", {"fields": {"text": "premise"}}, ("one", "1")),
    "name.jsonl": ('{"0": "x", "text": "some", "labels": ["a"]}\n', {}, ("some", ["a"])),
    "score.jsonl": ('{"utterance": "some", "Intent": "play"}\n', {}, ("some", "play")),
    "number.jsonl": ('{"premise": "one", "hypothesis": "two", "label": 2}\n', {}, ("one", "two", 2)),
    "class.csv": ("what is it,question\nwhere is it,question\nno way is it,answer\n", {}, ("what is it", "question")),
}


@pytest.mark.parametrize("name", FOUND)
def test_columns_are_found_by_their_names_or_by_what_they_hold(folder, name):
    content, task, first = FOUND[name]
    (folder / name).write_text(content)
    assert texts_and_labels(name, ("text", "pair")[:len(first) - 1], **task)[0] == first


UNCLEAR = {  # name: content, settings, words of the refusal
    "two.tsv": ("a text here\t1\t0\nmore text here\t0\t0\n", {}, "which column is", "task.fields={text: 0, label: 2}"),
    "long.csv": ("a text,b text,c text,d text\n", {}, "which column is the text", "0 'a text', 1 'b text'"),
    "none.csv": ("text,extra words\nsome,of these\nother,of those\n", {}, "which column is the label is not clear"),
    "other.csv": ("review,stars\na,1\n", {"fields": {"text": "reviews"}}, "no column 'reviews' (task.fields.text)",
                  "did you mean 'review'?"),
    "one.csv": ("text\na\nb\n", {}, "one column alone, text 'a'", "expected a text and its label"),
    "blanks.tsv": ("text label\nsome 1\n", {}, "one column alone", "another separator?"),
    "quotes.jsonl": ("{'text': 'a', 'label': 1}\n", {}, "line 1: not a JSON object"),
    "rows.json": ('{"rows": [{"text": "a", "label": 1}]}', {}, "the records are in 'rows'", "jq -c '.rows[]'"),
    "far.tsv": ("some text\t1\n", {"fields": {"text": "0", "label": "2"}}, "no column '2' (task.fields.label)", "0 'some text'"),
    "same.csv": ("text,label\na,1\n", {"fields": {"text": "text", "label": "text"}}, "one column is named twice"),
    "twice.csv": ("text,text,label\na,b,1\n", {}, "more than one column 'text'"),
    "role.csv": ("text,label\na,1\n", {"fields": {"txt": "text"}}, "'txt' is nothing that text_classification reads", "'text'"),
    "turned.csv": ("sentence,label\na,1\n", {"fields": {"sentence": "text"}}, "{text: sentence}"),
    "list.csv": ("a,b,label\na,b,1\n", {"fields": {"text": ["a", "b"]}}, "task.fields: text is a list of 2 columns"),
    "pair.csv": ("a,b,label\na,b,1\n", {"fields": {"pair": "b"}}, "a pair without a text"),
    "prose.txt": ("This is a text.\nIt has no columns.\n", {}, "plain text", "expected labelled records"),
    "code.py": ("text = 1\n", {}, "plain text", "expected labelled records"),
    "empty.csv": ("", {}, "empty", "expected labelled records"), "header.csv": ("text,label\n", {}, "no record below"),
    "empty.jsonl": ("\n\n", {}, "no record"), "array.json": ("[]", {}, "no record"),
    "a.conll": ("EU B-ORG\nsays O\n", {}, "CoNLL", "label whole texts"),
    "squad.json": ('{"data": [{"paragraphs": [{"context": "c", "qas": []}]}]}', {}, "SQuAD", "label whole texts"),
    "page.tsv": ("<!DOCTYPE html>\n<p>a\t1", {}, "a web page"),
    "wrapped.json": ('{"rows": [{"text": "a", "label": 1}]}', {"fields": {"text": "text", "label": "label"}}, "text"),
    "a.csv": (pickle.dumps({"text": "a"}).decode("latin-1"), {}, "pickle"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_not_clear_is_refused_with_what_there_is(folder, name):
    content, task, *words = UNCLEAR[name]
    (folder / name).write_text(content, encoding="latin-1")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as refused:
        prepared(name, "runs/corpus", task)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert sorted(folder.rglob("*")) == before


def test_what_was_taken_is_said_in_a_line(folder):
    (folder / "a.csv").write_text("id,review,label\n1,good,1\n2,bad,0\n")
    (folder / "b.csv").write_text("7,fine words,1\n8,bad words,0\n")
    notes = prepared("a.csv").notes
    assert "a.csv: text from column 'review', label from column 'label' (not read: id)" in notes
    assert "labels: single_label; 0, 1" in notes
    corpus = prepared("b.csv", "b", {"fields": {"text": "1", "label": "2"}})
    (folder / "c.tsv").write_text("phrase text\tmark\nsome words\tgood\nmore words\tbad\nmany words\tgood\nyet more\tbad\n")
    assert "c.tsv: text from column 'phrase text', label from column 'mark'" in prepared("c.tsv", "c").notes
    assert corpus.notes[0] == ("b.csv: text from column 1, label from column 2 (not read: 0) (no line names the columns: the "
                               "first is a record)")


@pytest.mark.parametrize("offset", [2**31 - 1, -1, 10**6])
def test_an_arrow_file_that_points_outside_of_itself_is_refused(folder, offset):
    """Arrow believes offsets, and would read anywhere, or end the process."""
    content = stored(lambda file: feather.write_feather(columns([("abc", "x"), ("defg", "y")]), file, compression="uncompressed"))
    offsets = np.array([0, 3, 7], np.int32).tobytes()
    assert content.count(offsets) == 1
    (folder / "a.feather").write_bytes(content.replace(offsets, np.array([0, offset, 7], np.int32).tobytes()))
    with pytest.raises(UserError, match=r"^a\.feather: not a valid Arrow file"):
        prepared("a.feather")
    with pytest.raises(UserError, match=r"^a\.feather: not a valid Arrow file"):
        prepare(DataSettings(raw="a.feather", tokenizer="bytes", validation=0), "text")


def test_all_files_have_a_pair_or_none(folder):
    (folder / "a.csv").write_text("sentence1,sentence2,label\na,b,1\n")
    (folder / "b.csv").write_text("text,label\na,1\n")
    with pytest.raises(UserError, match=r"^b\.csv: one text in a record, but a\.csv has a pair of texts"):
        prepared("*.csv")


# --------------------------------------------------------------------------------------------------------------- labels

KINDS = {  # labels as they are written in JSON; settings; problem, names, the column
    "names": (["b", "a", "b"], {}, "single_label", ["a", "b"], [1, 0, 1]),
    "numbers": ([10, 9, 2, 10], {}, "single_label", ["2", "9", "10"], [2, 1, 0, 2]),
    "from zero": ([2, 0, 1, 2], {}, "single_label", ["0", "1", "2"], [2, 0, 1, 2]),
    "negative": ([1, -1, 0], {}, "single_label", ["-1", "0", "1"], [2, 0, 1]),
    "truth": ([True, False], {}, "single_label", ["false", "true"], [1, 0]),
    "written numbers": (["1", "0.0", " 1.0 "], {}, "single_label", ["0", "1"], [1, 0, 1]),
    "codes": (["01", "02", "10"], {}, "single_label", ["01", "02", "10"], [0, 1, 2]),
    "whole floats": ([1.0, 0.0], {}, "single_label", ["0", "1"], [1, 0]),
    "mixed": (["1", "two", 1], {}, "single_label", ["1", "two"], [0, 1, 0]),
    "blanks": ([" a", "a ", "b"], {}, "single_label", ["a", "b"], [0, 0, 1]),
    "scores": ([0.5, 3, "4.25", -1e-3], {}, "regression", None, [0.5, 3, 4.25, -1e-3]),
    "whole scores": ([1, 5, 3], {"problem": "regression"}, "regression", None, [1, 5, 3]),
    "fractions as names": (["2.5", "10", "2.5"], {"problem": "single_label"}, "single_label", ["2.5", "10"], [0, 1, 0]),
    "lists": ([["b", "a"], [], ["b", "b"]], {}, "multi_label", ["a", "b"], [[1, 1], [0, 0], [0, 1]]),
    "lists of numbers": ([[10], [2, 10]], {}, "multi_label", ["2", "10"], [[0, 1], [1, 1]]),
    "separated": (["a; b", "b", ""], {"label_separator": ";"}, "multi_label", ["a", "b"], [[1, 1], [0, 1], [0, 0]]),
    "given": (["b", "a"], {"labels": ["b", "c", "a"]}, "single_label", ["b", "c", "a"], [0, 2]),
    "given by number": ([1, 0], {"labels": ["neg", "pos"]}, "single_label", ["neg", "pos"], [1, 0]),
    "given numbers": ([1, 2], {"labels": ["2", "1"]}, "single_label", ["2", "1"], [1, 0]),
    "given several": ([["b"], ["c", "b"]], {"labels": ["a", "b", "c"]}, "multi_label", ["a", "b", "c"], [[0, 1, 0], [0, 1, 1]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_labels(folder, kind):
    values, task, problem, names, expected = KINDS[kind]
    (folder / "a.jsonl").write_bytes(lines([(f"text {number}", value) for number, value in enumerate(values)]))
    corpus = prepared("a.jsonl", task=task)
    column = corpus.train.column("label")
    assert (corpus.problem, corpus.labels) == (problem, names)
    np.testing.assert_array_equal(column, np.array(expected, column.dtype))
    assert column.dtype == {"single_label": np.int32, "multi_label": bool, "regression": np.float32}[problem]
    assert not column.flags.writeable


WRONG = {  # labels as they are written in JSON; settings; words of the refusal
    "missing": (["a", "b", None], {}, "line 3: no label"), "empty": (["a", " ", "b"], {}, "line 2: no label"),
    "NaN": ([1.5, float("nan")], {}, "line 2: no label (nan)"), "written NaN": (["0.5", "NaN"], {}, "line 2: no label ('NaN')"),
    "no number": ([0.5, 1, "good"], {}, "line 3: label 'good' is no number, but others have a fraction (0.5)"),
    "no score": (["good", "bad"], {"problem": "regression"}, "line 1: label 'good' is no number, expected one"),
    "infinite": ([1.0, float("inf")], {"problem": "regression"}, "line 2: label inf is not finite"),
    "too large": ([1.5, 1e300], {}, "line 2: label 1e+300 is not finite in float32"),
    "truth as score": ([0.5, True], {}, "line 2: label True is no number"),
    "one": (["a", "a"], {}, "data.raw: every record has the label 'a'"),
    "one score": ([0.5, 0.5], {}, "data.raw: every record has the label 0.5"),
    "none": ([-1, -1], {}, "every record has the label '-1'", "-1 often marks records without a label"),
    "each its own": ([f"id {number}" for number in range(30)], {}, "each of 30 records has a label of its own"),
    "decimal comma": (["3", "4,5"], {}, "line 2: label '4,5' has a decimal comma"),
    "a list among names": (["a", ["b"]], {}, "line 1: label 'a' is one, expected several"),
    "names among lists": ([["a"], "b"], {}, "line 2: label 'b' is one, expected several"),
    "a list for one": ([["a"], ["b"]], {"problem": "single_label"}, "line 1: label ['a'] is no single name"),
    "an object": ([{"a": 1}, {"b": 1}], {}, "line 1: label {'a': 1} is no single name"),
    "one for several": (["a", "b"], {"problem": "multi_label"}, "task.label_separator"),
    "nothing at all": ([[], []], {}, "no record has a label"),
    "none of the given": (["pos", "ngative"], {"labels": ["pos", "negative"]}, "line 2: label 'ngative' is none of pos, negative",
                          "did you mean 'negative'?"),
    "given twice": (["a", "b"], {"labels": ["a", "a"]}, "task.labels: 'a' stands there twice"),
    "names of scores": ([0.5, 1.5], {"labels": ["a", "b"]}, "task.labels: names, but the labels are numbers"),
    "number out of the given": ([0, 1, 2], {"labels": ["a", "b"]}, "line 3: label '2' is none of a, b"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_labels_are_refused_with_file_and_line(folder, kind):
    values, task, *words = WRONG[kind]
    (folder / "a.jsonl").write_bytes(lines([(f"text {number}", value) for number, value in enumerate(values)]))
    with pytest.raises(UserError) as refused:
        prepared("a.jsonl", "runs/corpus", task)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert [path.name for path in folder.rglob("*")] == ["a.jsonl"]


@pytest.mark.parametrize("problem, training, validation, message", [
    ("names", ["pos", "neg"], ["pos", "postive"], r"dev\.csv, line 3: label 'postive' is none of neg, pos; did you mean 'pos'\?"),
    ("unlabelled", ["1", "0"], ["-1"], r"dev\.csv, line 2: label '-1' is none of 0, 1; -1 often marks"),
    ("scores", ["0.5", "2"], ["3", "four"], r"dev\.csv, line 3: label 'four' is no number"),
    ("missing", ["1", "0"], ["1", ""], r"dev\.csv, line 3: no label"),
])
def test_labels_of_the_validation_file_are_those_of_the_training_file(folder, problem, training, validation, message):
    (folder / "train.csv").write_bytes(table([(f"text {label} {n}", label) for n, label in enumerate(training)]))
    (folder / "dev.csv").write_bytes(table([(f"other {label} {n}", label) for n, label in enumerate(validation)]))
    with pytest.raises(UserError, match=f"^{message}"):
        prepared("train.csv", validation="dev.csv")


def test_validation_has_the_numbers_of_training(folder):
    (folder / "train.tsv").write_text("label\ttext\nc\tone text\na\ttwo text\nb\tthree text\n")
    (folder / "dev.jsonl").write_text('{"label": "c", "sentence": "x y"}\n{"label": "b", "sentence": "z"}\n')
    corpus = prepared("train.tsv", validation="dev.jsonl")
    assert decoded(corpus) == [("one text", 2), ("two text", 0), ("three text", 1)]
    assert decoded(corpus, "validation") == [("x y", 2), ("z", 1)]
    assert read_report(corpus.directory)["splits"]["validation"]["labels"] == {"a": 0, "b": 1, "c": 1}


def test_names_of_numbers_that_a_data_set_of_hugging_face_has(folder):
    def write(name, names, rows, several=False):
        feature = {"names": names, "_type": "ClassLabel"}
        features = {"sentence": {"dtype": "string", "_type": "Value"},
                    "label": {"feature": feature, "_type": "List"} if several else feature}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        parquet.write_table(columns(rows, ("sentence", "label")).replace_schema_metadata(metadata), folder / name)

    write("train.parquet", ["negative", "positive"], [("good", 1), ("bad", 0)])
    write("several.parquet", ["a", "b", "c"], [("x", [0, 2]), ("y", [])], several=True)
    (folder / "dev.csv").write_text("text,label\nfine,positive\nawful,0\n")
    corpus = prepared("train.parquet", validation="dev.csv")
    assert corpus.labels == ["negative", "positive"] and decoded(corpus) == [("good", 1), ("bad", 0)]
    assert decoded(corpus, "validation") == [("fine", 1), ("awful", 0)]
    several = prepared("several.parquet", "several")
    assert several.labels == ["a", "b", "c"]
    assert decoded(several) == [("x", [True, False, True]), ("y", [False, False, False])]
    assert prepared("train.parquet", "own", {"labels": ["poor", "fine"]}).labels == ["poor", "fine"]
    write("turned.parquet", ["positive", "negative"], [("good", 0), ("bad", 1)])
    with pytest.raises(UserError, match=r"^train\.parquet: its numbers of labels have other names than those of turned\.parquet"):
        prepared("train.parquet", "other", validation="turned.parquet")


def test_columns_of_zeros_and_ones_are_several_labels(folder):
    (folder / "a.csv").write_text("id,comment_text,toxic,threat,rude\n1,you,1,0,0\n2,they,0,0,0\n3,we,true,False,1.0\n")
    task = {"fields": {"text": "comment_text", "label": ["toxic", "threat", "rude"]}}
    corpus = prepared("a.csv", task=task)
    assert (corpus.problem, corpus.labels) == ("multi_label", ["toxic", "threat", "rude"])
    assert decoded(corpus) == [("you", [True, False, False]), ("they", [False] * 3), ("we", [True, False, True])]
    assert any("1 training record has no label at all" in note for note in corpus.notes)
    (folder / "b.csv").write_text("comment_text,toxic,threat,rude\nyou,1,0,maybe\n")
    with pytest.raises(UserError, match=r"^b\.csv, line 2: column 'rude' \(task\.fields\) is 'maybe'; expected 0 or 1"):
        prepared("b.csv", "b", task)


# --------------------------------------------------------------------------------------------------------------- corpus

def many(folder, count=300, seed=1):
    """Records of three formats and some that repeat; texts, pairs and labels in the order of the files."""
    generator = random.Random(seed)
    rows = [(f"{generator.choice(['fox', 'été', 'dog'])} {number}", f"pair {number}", generator.choice(["yes", "no", "maybe"]))
            for number in range(count)]
    names, third = ("premise", "hypothesis", "label"), count // 3
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in" / "a.csv").write_bytes(table(rows[:third], header=names))
    (folder / "in" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects(rows[third:2 * third], names)))
    parquet.write_table(columns(rows[2 * third:], names), folder / "in" / "c.parquet", row_group_size=7)
    return rows


def test_every_record_comes_out_again(folder):
    rows = many(folder)
    corpus = prepared("in")
    assert (corpus.streams, corpus.labels) == (("text", "pair"), ["maybe", "no", "yes"])
    assert decoded(corpus) == [(text, pair, corpus.labels.index(label)) for text, pair, label in rows]
    again = pickle.loads(pickle.dumps(corpus.train.streams["pair"]))
    np.testing.assert_array_equal(again.read(0, 9), corpus.train.streams["pair"].read(0, 9))


def test_records_keep_their_side_and_their_label(folder):
    rows = many(folder)
    corpus = prepared("in", validation=0.2)
    held = decoded(corpus, "validation")
    assert 30 < len(held) < 90
    everything = {(text, pair): corpus.labels.index(label) for text, pair, label in rows}
    for split in ("train", "validation"):
        for text, pair, label in decoded(corpus, split):
            assert everything.pop((text, pair)) == label
    assert not everything
    counts = read_report(corpus.directory)["splits"]["validation"]["labels"]
    assert counts == {name: sum(label == number for *_, label in held) for number, name in enumerate(corpus.labels)}


def test_the_same_bytes_whatever_the_processes_and_units(folder, monkeypatch):
    many(folder)
    data = {"validation": 0.1, "shard_tokens": 500, "cleaning": CleaningSettings(near_duplicates=0.9)}
    first = prepared("in", "whole", **data)
    monkeypatch.setattr(sources, "UNIT_BYTES", 700)
    for name, processes in (("alone", 1), ("together", 2)):
        corpus = prepared("in", name, processes=processes, **data)
        assert corpus.digest == first.digest
        for path in (folder / "whole").rglob("*.*"):
            assert (folder / name / path.relative_to(folder / "whole")).read_bytes() == path.read_bytes(), path


KILLED = """
from jaxlm.data import sources
from jaxlm.data.prepare import prepare
from jaxlm.settings import DataSettings, TaskSettings
sources.UNIT_BYTES = 200
if __name__ == "__main__":
    prepare(DataSettings(raw="in", tokenizer="bytes", shard_tokens=400, prepare_processes=2, validation=0.1), "corpus",
            task=TaskSettings(name="text_classification"))
"""


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_corpus(folder, monkeypatch):
    many(folder, 3000)
    monkeypatch.setattr(sources, "UNIT_BYTES", 200)
    data = {"validation": 0.1, "shard_tokens": 400}
    expected = prepared("in", "expected", processes=1, **data).digest
    (folder / "main.py").write_text(KILLED)
    for phase in ("read", "tokenize", "write train.pair"):
        process = subprocess.Popen([sys.executable, "main.py"], stderr=subprocess.DEVNULL)
        while not list(folder.glob(f"corpus.partial/*/work/{phase}-*.json")) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "corpus").exists()
    time.sleep(0.2)  # the workers notice
    assert prepared("in", processes=1, **data).digest == expected


def test_labels_that_differ_in_case_alone_are_told(folder):
    (folder / "a.csv").write_bytes(table([("x", "Pos"), ("y", "pos"), ("z", "neg")]))
    corpus = prepared("a.csv")
    assert corpus.labels == ["Pos", "neg", "pos"]
    assert "labels Pos, pos differ in case alone, and are different labels" in corpus.notes


def test_doubts_are_told_and_counted(folder):
    rows = [("same", "a"), ("same", "a"), ("same", "b"), ("", "a"), ("other", "b"), ("shared", "a")]
    (folder / "in").mkdir()
    (folder / "in" / "train.csv").write_bytes(table(rows))
    (folder / "in" / "dev.csv").write_bytes(table([("shared", "b"), ("x", "a")]))
    (folder / "in" / "test.csv").write_bytes(table([("y", "a")]))
    corpus = prepared("in", validation="in/dev.csv")
    report = read_report(corpus.directory)
    assert report["dropped"]["empty"] == 1 and report["documents_in"] == 9
    for words in ("1 file of data.raw is data.validation, and not trained on", "trained on, too: in/test.csv",
                  "2 training records repeat the texts of another, 1 with another label",
                  "1 training record has the texts of validation records", "the validation split has only 2 records"):
        assert any(words in note for note in corpus.notes), (words, corpus.notes)
    fewer = prepared("in", "fewer", validation="in/dev.csv", cleaning=CleaningSettings(exact_duplicates=True))
    assert read_report(fewer.directory)["dropped"]["exact_duplicate"] == 3
    assert [row for row in decoded(fewer) if row[0] == "same"] == [("same", 0)]


def test_a_corpus_of_another_kind_is_refused_in_a_line(folder):
    (folder / "a.csv").write_bytes(table([("x", "a"), ("y", "b")]))
    (folder / "a.txt").write_text("some text, and more of it")
    prepared("a.csv", "records")
    prepare(DataSettings(raw="a.txt", tokenizer="bytes", validation=0), "prose")
    with pytest.raises(UserError, match=r"prose is a corpus of plain text, and task\.name=text_classification reads labelled"):
        prepared("a.csv", "prose")
    with pytest.raises(UserError, match=r"records is a corpus of labelled records \(single_label\), and it is for"):
        prepare(DataSettings(raw="a.txt", tokenizer="bytes", validation=0), "records")


@pytest.mark.parametrize("data, message", [
    ({"text_field": "review"}, r"^data\.text_field=review: .* task\.fields=\{text: review\}"),
    ({"document": "line"}, r"^data\.document=line: every labelled record is a document"),
    ({"validation_split": "tail", "validation": 0.1}, r"^data\.validation_split=tail: labelled records are held out whole"),
    ({"raw": ["a.csv", "./a.csv"], "validation": "a.csv"}, r"^data\.raw: its files are those of data\.validation"),
])
def test_keys_of_text_are_refused(folder, data, message):
    (folder / "a.csv").write_bytes(table([("x", "a"), ("y", "b")]))
    data = DataSettings(**{"raw": "a.csv", "tokenizer": "bytes", "validation": 0} | data)
    with pytest.raises(UserError, match=message):
        prepare(data, "corpus", task=TaskSettings(name="text_classification"))
    with pytest.raises(UserError, match=r"^data\.validation=a\.csv is data\.raw, too"):
        check_held_out(Settings(task=TaskSettings(name="text_classification"),
                                data=DataSettings(raw="a.csv", validation="a.csv")))


def test_other_settings_of_a_finished_corpus_are_named(folder):
    (folder / "a.csv").write_bytes(table([("x", "a"), ("y", "b")]))
    prepared("a.csv")
    found = {"problem": "single_label", "labels": ["a", "b"]}  # what config.yaml then says
    assert prepared("a.csv").labels == prepared("a.csv", task=found).labels == ["a", "b"]
    with pytest.raises(UserError, match=r'^task\.labels: \["b", "a"\], but .* was prepared with \["a", "b"\]'):
        prepared("a.csv", task={"labels": ["b", "a"]})


def damage(corpus, change):
    path = corpus.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("change", [
    lambda manifest: manifest.pop("labels"), lambda manifest: manifest["labels"].update(problem="regression"),
    lambda manifest: manifest["splits"]["train"].pop("columns"), lambda manifest: manifest.update(format=1),
    lambda manifest: manifest["splits"]["validation"].pop("streams"),
    lambda manifest: manifest["splits"]["train"]["streams"]["pair"].update(documents=7),
    lambda manifest: manifest["splits"]["train"]["columns"]["label"].update(file="../secret.npy"),
    lambda manifest: manifest["splits"]["train"]["streams"].update({"../x": manifest["splits"]["train"]["streams"]["pair"]}),
])
def test_a_lying_manifest_is_refused(folder, change):
    many(folder, 30)
    damage(prepared("in", validation=0.2), change)
    with pytest.raises(UserError, match=r"manifest\.json: damaged|manifest\.json: .*pair"):
        Corpus("corpus")


def test_damaged_labels_are_noticed(folder):
    many(folder, 30)
    corpus = prepared("in")
    path = folder / "corpus" / "train.label.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"train\.label\.npy: differs from its digest"):
        corpus.train.column("label")
    path.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"train\.label\.npy: .* expected"):
        Corpus("corpus")
    path.unlink()
    with pytest.raises(UserError, match=r"train\.label\.npy: missing"):
        Corpus("corpus")


def test_what_prepare_tells(folder):
    (folder / "a.csv").write_bytes(table([("a fine text", "good"), ("bad", "poor"), ("so so it is", "poor")]))
    settings = Settings(task=TaskSettings(name="text_classification"), data=DataSettings(sequence_length=8))
    told = "\n".join(describe(prepared("a.csv"), settings))
    assert "labels      single_label, 2 names" in told and "train: good (1), poor (2)" in told
    assert "2 of 3 records (67 %) are longer than data.sequence_length=8" in told and "b|a|d" in told and "= poor" in told
