"""Raw text that was edited, removed or added after preparing is said at the start, and never an error (line 9)."""

import json
import os
import shutil

import pytest

from jaxlm.data import changes as changing
from jaxlm.data.changes import changes
from jaxlm.data.corpus import Corpus
from jaxlm.data.description import describe
from jaxlm.data.prepare import prepare
from jaxlm.settings import DataSettings, Settings
from jaxlm.training.corpora import open_corpora


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.txt").write_text(f"the text number {number}")
    (tmp_path / "in" / "package.json").write_text('{"a": 1}')
    return tmp_path


def data(**keys):
    return DataSettings(**{"raw": "in", "tokenizer": "bytes", "validation": 0, "prepare_processes": 1} | keys)


def write_later(path, text):
    path.write_text(text)
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


def test_what_changed_is_named(folder):
    corpus = prepare(data(), "corpus")
    assert changes(corpus, data()) == []
    write_later(folder / "in" / "0.txt", "the text number 0, and more")
    write_later(folder / "in" / "1.txt", "the text number X")
    write_later(folder / "in" / "2.txt", "the text number 2")  # written again, and the same
    (folder / "in" / "3.txt").unlink()
    (folder / "in" / "new.md").write_text("new")
    (folder / "in" / "passed.over").write_text("new")
    (folder / "in" / "tsconfig.json").write_text('{"b": 1}')
    [line] = changes(corpus, data())
    assert line == (f"data.raw is not what {folder / 'corpus'} was prepared from: 2 files changed (in/0.txt: 17 to 27 bytes, "
                    "in/1.txt: other content); 1 file gone (in/3.txt); 1 new file (in/new.md). The corpus is used as it is; "
                    "delete it, or name another folder (data.corpus), to prepare anew")
    assert prepare(data(), "corpus").digest == corpus.digest


def test_many_are_counted_and_three_named(folder):
    corpus = prepare(data(), "corpus")
    for number in range(6):
        (folder / "in" / f"{number}.txt").unlink()
    (folder / "in" / "one.txt").write_text("x")
    [line] = changes(corpus, data())
    assert "6 files gone (in/0.txt, in/1.txt, in/2.txt, ...); 1 new file (in/one.txt)" in line


def test_large_files_go_by_size_and_time(folder, monkeypatch):
    monkeypatch.setattr(changing, "DIGESTED", 20)  # bytes: one of them
    corpus = prepare(data(), "corpus")
    for number in (0, 1):
        write_later(folder / "in" / f"{number}.txt", f"the text number {number}")
    [line] = changes(corpus, data())
    assert "1 file changed (in/1.txt: written since, of the same size)" in line


def test_text_that_is_gone_is_a_line(folder):
    corpus = prepare(data(), "corpus")
    shutil.rmtree(folder / "in")
    assert changes(corpus, data()) == [
        f"data.raw: 'in' is not there any more, so it cannot be compared with {folder / 'corpus'}, which is used as it is"]
    assert changes(corpus, data(raw=None)) == []


def test_validation_text_counts_too(folder):
    (folder / "held_out.txt").write_text("held out")
    corpus = prepare(data(validation="held_out.txt"), "corpus")
    assert changes(corpus, data(validation="held_out.txt")) == []
    write_later(folder / "held_out.txt", "held OUT")
    assert "1 file changed (held_out.txt: other content)" in changes(corpus, data(validation="held_out.txt"))[0]


def test_what_came_through_a_pipe_is_not_missed(folder, monkeypatch):
    reading, writing = os.pipe()
    os.write(writing, b"text of a pipe")
    os.close(writing)
    with_pipe = data(raw=["in", f"/dev/fd/{reading}"])
    corpus = prepare(with_pipe, "corpus")
    os.close(reading)
    assert corpus.train.num_documents == 7 and changes(corpus, with_pipe) == []
    (folder / "in" / "0.txt").unlink()
    assert "1 file gone (in/0.txt)" in changes(corpus, with_pipe)[0]


def test_a_manifest_of_before_knows_sizes_only(folder):
    """Older corpora stay usable: without versions, kinds, shares, notes, and without data.encoding among their
    settings."""
    prepare(data(), "corpus")
    manifest = json.loads((folder / "corpus" / "manifest.json").read_text())
    manifest["sources"] = [{key: entry[key] for key in ("path", "bytes", "sha256")} for entry in manifest["sources"]]
    del manifest["passed_over"], manifest["settings"]["data.encoding"]
    (folder / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    report = json.loads((folder / "corpus" / "report.json").read_text())
    for key in ("shares", "notes", "replaced_characters"):
        del report[key]
    (folder / "corpus" / "report.json").write_text(json.dumps(report))
    corpus = prepare(data(), "corpus")
    assert corpus.notes == [] and changes(corpus, data()) == [] and describe(corpus)
    write_later(folder / "in" / "0.txt", "the text number X")
    assert changes(corpus, data()) == []
    write_later(folder / "in" / "0.txt", "longer than it was before")
    assert "1 file changed (in/0.txt: 17 to 25 bytes)" in changes(corpus, data())[0]


def test_a_start_says_it_once_and_a_fresh_corpus_has_its_notes(folder, capsys):
    settings = Settings(run_dir="run", data=data(validation=0.3))
    open_corpora(settings, list)
    first = capsys.readouterr().err
    assert "note: 1 file in in was passed over: .json without records 1\n" in first and "is not what" not in first
    open_corpora(settings, list)
    assert capsys.readouterr().err == ""
    write_later(folder / "in" / "0.txt", "edited")
    open_corpora(settings, list)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: data.raw is not what ") and "1 file changed (in/0.txt: 17 to 6 bytes)" in line
    assert Corpus("run/corpus").train.num_documents > 0
