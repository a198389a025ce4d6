"""`prepare` shows what it made: shares, examples, what was dropped and replaced, and what nobody would expect (line
8)."""

import json

import numpy as np
import pytest
import sentencepiece

from jaxlm import cli
from jaxlm.data.corpus import Corpus
from jaxlm.data.description import BOUND, WIDTH, describe, examples, pieces
from jaxlm.data.prepare import prepare
from jaxlm.data.tokenizers import ByteTokenizer, load_tokenizer
from jaxlm.errors import UserError
from jaxlm.settings import CleaningSettings, DataSettings

LINES = [f"the quick brown fox number {number} jumps" for number in range(400)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("\n".join(LINES))
    return tmp_path


def prepared(raw, corpus="corpus", vocab_size=None, **keys):
    keys = {"raw": raw, "tokenizer": "bytes", "prepare_processes": 1} | keys
    return prepare(DataSettings(**keys), corpus, vocab_size=vocab_size)


# ------------------------------------------------------------------------------------------------------------ the split

def test_a_single_text_file_splits_by_its_tail_and_says_so(folder):
    text = "\n".join(LINES)
    corpus = prepared("one.txt")
    kept = bytes(corpus.train.read(0, corpus.train.num_tokens - 1).astype(np.uint8)).decode()
    held_out = bytes(corpus.validation.read(0, corpus.validation.num_tokens - 1).astype(np.uint8)).decode()
    assert kept + held_out == text and len(kept) == int(len(text) * 0.99)
    assert corpus.notes[0] == ("the text is a single document, so its end (0.01 of it) is the validation split, as with "
                               "data.validation_split=tail")
    assert corpus.manifest["settings"]["data.validation_split"] == "tail"
    for split in (None, "tail"):  # the same key, later, and what it has become
        assert prepared("one.txt", validation_split=split).digest == corpus.digest
    with pytest.raises(UserError, match=r'^data\.validation_split: "documents", but .* was prepared with "tail"'):
        prepared("one.txt", validation_split="documents")


def test_several_documents_split_by_documents(folder):
    corpus = prepared("one.txt", document="line", validation=0.25)
    assert corpus.manifest["settings"]["data.validation_split"] == "documents"
    assert corpus.train.num_documents + corpus.validation.num_documents == 400 and corpus.notes == []
    assert prepared("one.txt", document="line", validation=0.25, validation_split="documents").digest == corpus.digest


def test_a_share_far_from_what_was_asked_is_said_with_its_real_size(folder):
    """Two files: a hundredth was asked for, and half is the least that documents can give."""
    sizes = {"a.txt": 9000, "b.txt": 11_000}
    for name, size in sizes.items():
        (folder / name).write_text("x" * size)
    corpus = prepared(["a.txt", "b.txt"], validation=0.01)
    share = corpus.validation.num_bytes / sum(sizes.values())
    assert share in (0.45, 0.55)
    [note] = corpus.notes
    assert note.startswith(f"data.validation=0.01, but the validation split has {100 * share:.0f} % of the text (1 of 2 docu")
    assert "data.validation_split=tail" in note
    report = json.loads((folder / "corpus" / "report.json").read_text())
    assert report["shares"] == pytest.approx({"train": 1 - share, "validation": share})
    assert f"shares      train {100 - 100 * share:.0f} %, validation {100 * share:.0f} % of the text" in describe(corpus)
    assert prepared(["a.txt", "b.txt"], "other", validation=0.01, validation_split="tail").notes == [
        "the validation split has only 202 tokens: its loss will say little; raise data.validation, or name a text for it"]


@pytest.mark.parametrize("validation, tokens", [(0.00001, 2), (0.001, 16)])
def test_a_validation_split_of_a_few_tokens_is_said(folder, validation, tokens):
    corpus = prepared("one.txt", validation=validation)
    assert corpus.validation.num_tokens == tokens
    assert any(note.startswith(f"the validation split has only {tokens} tokens") for note in corpus.notes)


def test_own_validation_text_and_none_are_no_surprise(folder):
    (folder / "held_out.txt").write_text("short")
    assert prepared("one.txt", validation="held_out.txt").notes == []
    assert prepared("one.txt", "other", validation=0).notes == []


# ------------------------------------------------------------------------------------------------------ nothing is left

@pytest.mark.parametrize("cleaning, words", [
    ({"max_bytes": 1000}, ["1 document was longer than data.cleaning.max_bytes=1000", "the largest has {size} bytes",
                           "data.document=line"]),
    ({"min_characters": 10**6}, ["1 document was shorter than data.cleaning.min_characters=1000000"]),
    ({"max_repetition": 0.01}, ["1 document was more repetitive than data.cleaning.max_repetition=0.01"]),
    ({"scripts": ["cyrillic"]}, ["1 document was not in data.cleaning.scripts=['cyrillic']"]),
])
def test_the_key_that_dropped_everything_is_named(folder, cleaning, words):
    with pytest.raises(UserError) as error:
        prepared("one.txt", cleaning=CleaningSettings(**cleaning))
    size = (folder / "one.txt").stat().st_size
    assert all(word.format(size=size) in str(error.value) for word in words), error.value
    assert "are empty" not in str(error.value) and str(error.value).startswith("data.raw: no document is left to train on: ")


@pytest.mark.parametrize("name, content, size", [
    ("a.txt", "x" * 5000, 5000), ("a.jsonl", json.dumps({"text": "x" * 5000}), 5000),
    ("b.csv", f"text,b\n{'x' * 5000},1\n", 5000)])
def test_what_was_too_long_is_counted_with_the_largest_size(folder, name, content, size):
    (folder / name).write_text(content)
    cleaning = CleaningSettings(max_bytes=4000)
    with pytest.raises(UserError, match=rf"1 document was longer than data\.cleaning\.max_bytes=4000 \(the largest has {size} b"):
        prepared(name, cleaning=cleaning, validation=0)
    (folder / "small.txt").write_text("small")
    corpus = prepared([name, "small.txt"], cleaning=cleaning, validation=0)
    assert corpus.notes == [f"1 document longer than data.cleaning.max_bytes=4000 was dropped; the largest has {size} bytes"]


def test_the_default_limit_holds_for_one_file_of_66_mib(folder):
    (folder / "large.txt").write_bytes(b"x" * (66 * 2**20))
    with pytest.raises(UserError, match=rf"data\.cleaning\.max_bytes={64 * 2**20} \(the largest has {66 * 2**20} bytes: raise"):
        prepared("large.txt")


def test_repeated_texts_and_empty_files_are_named_as_such(folder):
    (folder / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"no document is left to train on: 1 document was empty$"):
        prepared("empty.txt")
    (folder / "held_out.txt").write_text("\n".join(LINES))
    with pytest.raises(UserError, match=r"no document is left to train on: .*1 repeat others"):
        prepared("one.txt", validation="held_out.txt", cleaning=CleaningSettings(exact_duplicates=True))
    with pytest.raises(UserError, match=r"^data\.validation: no document is left of 'empty\.txt': 1 document was empty$"):
        prepared("one.txt", validation="empty.txt")


# ------------------------------------------------------------------------------------------------------------- examples

def test_three_examples_show_the_bounds_of_tokens(folder):
    """Told apart by SentencePiece itself: the pieces between the marks are its own."""
    corpus = prepared("one.txt", document="line", tokenizer="bpe", vocab_size=300, validation=0)
    shown = examples(corpus.train, corpus.tokenizer)
    assert len(shown) == 3 and [line for line in describe(corpus) if line.startswith("example")] == [
        f"example     {line}" for line in shown]
    model = sentencepiece.SentencePieceProcessor(str(folder / "corpus" / "tokenizer" / "tokenizer.model"))
    for line, number in zip(shown, (0, 133, 266), strict=True):
        expected = [piece.replace("\u2581", " ") for piece in model.encode(LINES[number], out_type=str)]
        found = line.removesuffix(f"{BOUND}...").split(BOUND)
        assert found[:len(expected)] == expected[:len(found)] and len(line) <= WIDTH + 4
    assert any("[eos]" in line for line in shown) or all(line.endswith("...") for line in shown)


def test_pieces_of_bytes_and_special_tokens():
    tokenizer = ByteTokenizer({})
    ids = [*tokenizer.encode("a\né日"), tokenizer.special.eos, *tokenizer.encode("b")]
    assert pieces(tokenizer, ids) == ["a", "\\n", "", "é", "", "", "日", "[eos]", "b"]


def test_a_single_document_is_shown_at_three_places(folder):
    corpus = prepared("one.txt", validation=0)
    shown = examples(corpus.train, corpus.tokenizer)
    text = "\n".join(LINES)
    for line, place in zip(shown, (0, 1, 2), strict=True):
        start = corpus.train.num_tokens * place // 3
        assert line.removesuffix(f"{BOUND}...").replace(BOUND, "").replace("\\n", "\n") in text[start:start + 60]


def test_the_longest_document_and_the_kinds_are_described(folder):
    (folder / "long.txt").write_text("x" * 1234)
    (folder / "short.jsonl").write_text('{"text": "abc"}\n')
    lines = describe(prepared(["long.txt", "short.jsonl"], validation=0))
    assert f"longest     a document of {1234 + 1:,} tokens" in lines
    assert "read as     1 text (utf-8), 1 JSON Lines (utf-8)" in lines
    assert "replaced    0 characters that could not be decoded" in lines


def test_the_verb_prints_it_and_train_prints_the_notes(folder, capfd):
    (folder / "run.yaml").write_text("run_dir: run\ndata: {raw: one.txt, tokenizer: bytes, prepare_processes: 1}\n"
                                     "devices: {platform: cpu}\n")
    assert cli.main(["prepare", "run.yaml"]) == 0
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert sum(line.startswith("example ") for line in lines) == 3
    assert any(line.startswith("note        the text is a single document") for line in lines)
    assert "note: " not in captured.err  # once is enough
    assert load_tokenizer("run/corpus/tokenizer").kind == "bytes" and Corpus("run/corpus").notes
