"""Preparing: nothing lost, the same bytes however it was run or interrupted, clear refusals that leave nothing
behind."""

import gzip
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import sources, stages
from jaxlm.data.corpus import Corpus
from jaxlm.data.prepare import prepare
from jaxlm.data.workers import exclusive, remove_exclusive
from jaxlm.errors import UserError
from jaxlm.settings import CleaningSettings, DataSettings

WORDS = ["fox", "dog", "jumps", "over", "lazy", "quick", "été", "return", "x = 1", "\n", "日本"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_texts(folder, count, seed=0, length=40):
    """`count` files of random words; their texts in the order of the files."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, length))) + f" {number}" for number in range(count)]
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8", newline="")
    return texts


def decoded(documents, tokenizer):
    return [tokenizer.decode(documents.read(start, stop)) for start, stop in itertools.pairwise(documents.offsets.tolist())]


def contents(directory):
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*")) if path.is_file()}


# --------------------------------------------------------------------------------------------------------- nothing lost

@pytest.mark.parametrize("tokenizer, vocab_size", [("bytes", None), ("characters", None), ("bpe", 310), ("unigram", 305)])
def test_every_document_comes_out_again(folder, tokenizer, vocab_size):
    texts = write_texts(folder / "in", 60)
    data = DataSettings(raw="in", tokenizer=tokenizer, validation=0.2, shard_tokens=37)
    corpus = prepare(data, "corpus", vocab_size=vocab_size)
    train, validation = decoded(corpus.train, corpus.tokenizer), decoded(corpus.validation, corpus.tokenizer)
    assert sorted(train + validation) == sorted(texts) and 3 < len(validation) < 25
    assert [text for text in texts if text in set(train)] == train
    for split, kept in ((corpus.train, train), (corpus.validation, validation)):
        assert split.num_documents == len(kept) and split.num_bytes == sum(len(text.encode()) for text in kept)
        assert split.offsets[0] == 0 and split.offsets[-1] == split.num_tokens and split.offsets.dtype == np.int64
        assert all(shard["tokens"] == 37 for shard in split.entry["shards"][:-1])
        assert all(split.read(int(stop) - 1, int(stop))[0] == corpus.tokenizer.special.eos for stop in split.offsets[1:])


def test_reading_across_shards_is_one_stream(folder):
    write_texts(folder / "in", 20)
    corpus = prepare(DataSettings(raw="in", tokenizer="bytes", shard_tokens=11), "corpus")
    documents = corpus.train
    stream = np.concatenate([np.load(folder / "corpus" / shard["file"]) for shard in documents.entry["shards"]])
    assert stream.dtype == np.uint16 and len(documents.entry["shards"]) > 20
    end = documents.num_tokens
    for start, stop in ((0, end), (0, 0), (10, 12), (11, 22), (5, 100), (end, end)):
        tokens = documents.read(start, stop)
        assert tokens.dtype == np.int32 and tokens.tolist() == stream[start:stop].tolist()
    for start, stop in ((-1, 3), (5, 4), (0, end + 1)):
        with pytest.raises(IndexError):
            documents.read(start, stop)
    for copy in (pickle.loads(pickle.dumps(corpus)).train, pickle.loads(pickle.dumps(documents))):
        assert copy.read(5, 100).tolist() == stream[5:100].tolist()
    assert len(pickle.dumps(documents)) < 1000


def test_the_report_counts_every_document(folder):
    texts = write_texts(folder / "in", 30, length=20)
    more = [b" \n", b"ab", b"word " * 500, texts[0].encode(), "русский".encode(), b"caf\xe9 und mehr", b"again and\n" * 9]
    for number, content in enumerate(more):
        (folder / "in" / f"more-{number}.txt").write_bytes(content)
    cleaning = CleaningSettings(min_characters=5, max_bytes=1000, max_repetition=0.6, exact_duplicates=True,
                                scripts=["latin", "cjk"], min_script_fraction=0.5)
    corpus = prepare(DataSettings(raw="in", tokenizer="bytes", cleaning=cleaning), "corpus")
    report = json.loads((folder / "corpus" / "report.json").read_text())
    assert report["documents_in"] == 37 == sum(report["dropped"].values()) + report["documents_out"]
    dropped = {reason: count for reason, count in report["dropped"].items() if count}
    short = sum(len(text) < 5 for text in texts) + 1
    assert dropped == {"empty": 1, "too_short": short, "too_long": 1, "exact_duplicate": 1, "other_script": 1, "repetitive": 1}
    assert report["repaired"] == 1
    assert report["documents_out"] == sum(split["documents"] for split in report["splits"].values())
    assert texts[0] in decoded(corpus.train, corpus.tokenizer) + decoded(corpus.validation, corpus.tokenizer)


def test_near_duplicates_keep_the_first(folder):
    (folder / "in").mkdir()
    first, other = (" ".join(f"{letter}{number}" for number in range(200)) for letter in "wv")
    for name, text in {"a": first, "b": first.replace("w100", "changed"), "c": other}.items():
        (folder / "in" / f"{name}.txt").write_text(text)
    data = DataSettings(raw="in", tokenizer="bytes", validation=0, cleaning=CleaningSettings(near_duplicates=0.7))
    corpus = prepare(data, "corpus")
    assert decoded(corpus.train, corpus.tokenizer) == [first, other]
    assert json.loads((folder / "corpus" / "report.json").read_text())["dropped"]["near_duplicate"] == 1


def test_a_text_longer_than_a_stretch_is_tokenized_whole(folder, monkeypatch):
    monkeypatch.setattr(stages, "STRETCH_CHARACTERS", 50)
    text = "".join(write_texts(folder / "other", 30)) + "x" * 130
    (folder / "long.txt").write_text(text, encoding="utf-8", newline="")
    corpus = prepare(DataSettings(raw="long.txt", tokenizer="bpe", validation=0), "corpus", vocab_size=302)
    assert decoded(corpus.train, corpus.tokenizer) == [text]


# ------------------------------------------------------------------------------------------------------------ the split

@pytest.mark.parametrize("fraction", [0.1, 0.05, 0.01, 0.2, 0.3, 0.5, 1e-05])
def test_the_tail_is_exact(fraction):
    data = DataSettings(validation=fraction, validation_split="tail")
    for length in (*range(1, 300), 1_115_394):
        kept, held_out = stages.split_text("x" * length, stages.TRAIN, stages.tail_share(data, np.zeros(2, np.uint8)))
        assert len(kept) == int(length * (1 - fraction)) if fraction != 0.3 else abs(len(kept) - length * 0.7) < 1
        assert kept + held_out == "x" * length and held_out


def test_tail_of_one_text_with_characters(folder):
    text = "".join(write_texts(folder / "other", 50))
    (folder / "in.txt").write_text(text, encoding="utf-8", newline="")
    corpus = prepare(DataSettings(raw="in.txt", tokenizer="characters", validation=0.1, validation_split="tail"), "corpus")
    assert corpus.tokenizer.vocab_size == len(set(text)) and corpus.tokenizer.special.eos is None
    assert decoded(corpus.train, corpus.tokenizer) == [text[:int(len(text) * 0.9)]]
    assert decoded(corpus.validation, corpus.tokenizer) == [text[int(len(text) * 0.9):]]
    by_itself = prepare(DataSettings(raw="in.txt", tokenizer="characters", validation=0.1), "by-itself")
    assert by_itself.digest == corpus.digest and not corpus.notes[:-1]
    assert "single document" in by_itself.notes[0] and "data.validation_split=tail" in by_itself.notes[0]
    with pytest.raises(UserError, match=r"^data\.validation: 0\.1 of a single document .*data\.validation_split=tail"):
        whole = DataSettings(raw="in.txt", tokenizer="characters", validation=0.1, validation_split="documents")
        prepare(whole, "other-corpus")


def test_a_document_keeps_its_side(folder):
    texts = write_texts(folder / "in", 300, length=5)
    (folder / "lines.txt").write_text("\n".join(reversed([text.replace("\n", " ") for text in texts])), encoding="utf-8")
    for number, text in enumerate(texts):
        (folder / "in" / f"{number:04d}.txt").write_text(text.replace("\n", " "), encoding="utf-8")
    held_out = []
    for raw, corpus in (("in", "one"), ("lines.txt", "two")):
        corpus = prepare(DataSettings(raw=raw, tokenizer="bytes", document="line", validation=0.1), corpus)
        held_out.append(set(decoded(corpus.validation, corpus.tokenizer)))
    assert held_out[0] == held_out[1] and 10 < len(held_out[0]) < 60


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_sides_get_a_document(folder, fraction):
    write_texts(folder / "in", 2)
    corpus = prepare(DataSettings(raw="in", tokenizer="bytes", validation=fraction), "corpus")
    assert corpus.train.num_documents == corpus.validation.num_documents == 1


def test_own_validation_text_stays_and_its_copies_go(folder):
    texts = write_texts(folder / "in", 20)
    (folder / "held-out.txt").write_text(texts[7], encoding="utf-8", newline="")
    data = DataSettings(raw="in", validation="held-out.txt", tokenizer="bytes", cleaning=CleaningSettings(exact_duplicates=True))
    corpus = prepare(data, "corpus")
    assert decoded(corpus.validation, corpus.tokenizer) == [texts[7]]
    assert decoded(corpus.train, corpus.tokenizer) == texts[:7] + texts[8:]


def test_no_validation(folder):
    write_texts(folder / "in", 3)
    corpus = prepare(DataSettings(raw="in", tokenizer="bytes", validation=0.0), "corpus")
    assert corpus.train.num_documents == 3 and corpus.validation.num_documents == corpus.validation.num_tokens == 0
    assert corpus.validation.read(0, 0).tolist() == [] and corpus.validation.offsets.tolist() == [0]


def test_the_tokenizer_sample_is_bounded_and_from_training_text(folder):
    texts = write_texts(folder / "in", 100)
    seen = []
    cleaned_data = DataSettings(raw="in", tokenizer="bpe", validation=0.5, tokenizer_sample=500)
    original = stages.train_tokenizer
    try:
        stages.train_tokenizer = lambda kind, sample, *rest: seen.extend(sample) or original(kind, texts, *rest)
        corpus = prepare(cleaned_data, "corpus", vocab_size=310)
    finally:
        stages.train_tokenizer = original
    train = decoded(corpus.train, corpus.tokenizer)
    assert 490 < sum(len(text.encode()) for text in seen) <= 500
    assert all(any(text.startswith(part) for text in train) for part in seen)


# ----------------------------------------------------------------------------------------------------------- same bytes

def test_the_same_bytes_whatever_the_processes_and_units(folder, monkeypatch):
    write_texts(folder / "in", 60)
    with gzip.open(folder / "in" / "zz.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"line {number}"}) + "\n" for number in range(50))
    data = DataSettings(raw="in", tokenizer="bpe", shard_tokens=100, cleaning=CleaningSettings(near_duplicates=0.8))
    prepare(data, "whole", vocab_size=310)
    monkeypatch.setattr(sources, "UNIT_BYTES", 700)
    for name, processes in (("alone", 1), ("together", 2)):
        prepare(data, name, vocab_size=310, processes=processes)
        assert contents(folder / name) == contents(folder / "whole")
    assert Corpus("whole").digest == Corpus("alone").digest
    assert not list(folder.glob("*.partial"))


KILLED = """
import sys
from jaxlm.data import sources
from jaxlm.data.prepare import prepare
from jaxlm.settings import DataSettings
sources.UNIT_BYTES = 300
if __name__ == "__main__":
    prepare(DataSettings(raw="in", tokenizer="bpe", shard_tokens=400, prepare_processes=2), "corpus", vocab_size=310)
"""


def test_killed_anywhere_it_goes_on_to_the_same_bytes(folder, monkeypatch):
    write_texts(folder / "in", 400)
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    data = DataSettings(raw="in", tokenizer="bpe", shard_tokens=400, prepare_processes=1)
    prepare(data, "expected", vocab_size=310)
    (folder / "main.py").write_text(KILLED)
    done_again = []
    tokenize_unit = stages.tokenize_unit
    monkeypatch.setattr(stages, "tokenize_unit", lambda task, stem: done_again.append(stem.name) or tokenize_unit(task, stem))
    for phase, number in (("read", 1), ("read", 90), ("tokenize", 1)):  # each time further
        process = subprocess.Popen([sys.executable, "main.py"], stderr=subprocess.DEVNULL)
        while len(done := list(folder.glob(f"corpus.partial/*/work/{phase}-*.json"))) < number and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(done) >= number and not (folder / "corpus").exists()
        with pytest.raises(UserError, match="its preparation was not finished"):
            Corpus("corpus")
    time.sleep(0.2)  # the workers notice
    done = {path.stem for path in folder.glob("corpus.partial/*/work/*.json")}
    prepare(data, "corpus", vocab_size=310)
    assert contents(folder / "corpus") == contents(folder / "expected")
    assert done_again and done.isdisjoint(done_again) and not (folder / "corpus.partial").exists()


def test_changed_input_is_not_mixed_with_what_was_finished_before(folder, monkeypatch):
    write_texts(folder / "in", 5)
    data = DataSettings(raw="in", tokenizer="bytes", validation=0)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_shard", lambda task, stem: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(data, "corpus")
    assert list(folder.glob("corpus.partial/*/work/read-00000.json"))
    (folder / "in" / "0002.txt").write_text("new text")
    corpus = prepare(data, "corpus")
    assert decoded(corpus.train, corpus.tokenizer)[2] == "new text"


# ------------------------------------------------------------------------------------------------------------- refusals

def test_a_finished_corpus_is_opened_and_other_settings_are_named(folder):
    write_texts(folder / "in", 10)
    data = DataSettings(raw="in", tokenizer="bpe")
    first = prepare(data, "corpus", vocab_size=310)
    before = contents(folder / "corpus")
    shutil.rmtree(folder / "in")
    assert prepare(data, "corpus", vocab_size=310).digest == first.digest
    assert prepare(DataSettings(raw=["in"], tokenizer="bpe", prepare_processes=1), "corpus").digest == first.digest
    assert prepare(DataSettings(), "corpus").digest == first.digest
    stricter = DataSettings(raw="in", tokenizer="bpe", cleaning=CleaningSettings(min_characters=3))
    for changed, vocab_size, message in (
            (stricter, 310, r"data\.cleaning\.min_characters: 3, but .* was prepared with 1"),
            (DataSettings(raw="on", tokenizer="bpe"), 310, r'data\.raw: \["on"\], but .* with \["in"\]'),
            (data, 300, r"model\.vocab_size: 300, but .* with 310")):
        with pytest.raises(UserError, match=f"^{message}"):
            prepare(changed, "corpus", vocab_size=vocab_size)
    assert contents(folder / "corpus") == before


@pytest.mark.parametrize("changed, vocab_size, message", [
    ({"raw": None}, None, r"^data\.raw: missing"),
    ({"raw": "inn"}, None, r"^data\.raw: 'inn' matches no file; did you mean"),
    ({"validation": "nothing*"}, None, r"^data\.validation: 'nothing\*' matches no file"),
    ({"tokenizer": "bpe"}, None, r"^model\.vocab_size: missing"),
    ({"tokenizer": "bpe"}, 10**6, r"^model\.vocab_size: 1000000 does not fit .* at most \d+ tokens"),
    ({"tokenizer": "wordpeice"}, None, r"^data\.tokenizer: .*did you mean 'wordpiece'"),
    ({"tokenizer": "other"}, None, r"other: expected one of"),
    ({"cleaning": CleaningSettings(scripts=["latn"])}, None, r"did you mean 'latin'"),
    ({"cleaning": CleaningSettings(min_characters=10**6)}, None, r"^data\.raw: no document is left"),
    ({"raw": "in/*.jsonl"}, None, r"bad\.jsonl, line 2: not a JSON object"),
    ({"raw": ["in", "in/bad.txt.gz"]}, None, r"bad\.txt\.gz: truncated or not valid gzip"),
])
def test_a_refusal_is_one_line_and_leaves_nothing(folder, changed, vocab_size, message):
    write_texts(folder / "in", 5)
    (folder / "other").mkdir()
    (folder / "in" / "bad.jsonl").write_text('{"text": "fine"}\n{"text":\n')
    (folder / "in" / "bad.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:-10])
    if changed.get("raw") != ["in", "in/bad.txt.gz"]:
        (folder / "in" / "bad.txt.gz").unlink()
    if changed.get("raw") != "in/*.jsonl":
        (folder / "in" / "bad.jsonl").unlink()
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        prepare(DataSettings(**{"raw": "in", "tokenizer": "bytes"} | changed), "runs/new/corpus", vocab_size=vocab_size)
    assert "\n" not in str(error.value) and sorted(folder.rglob("*")) == before


def test_an_error_in_another_process_is_the_same_error(folder, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    write_texts(folder / "in", 10)
    (folder / "in" / "0005.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"0005\.jsonl, line 1: no field 'text'"):
        prepare(DataSettings(raw="in", tokenizer="bytes"), "corpus", processes=2)
    assert sorted(os.listdir(folder)) == ["in"]


def test_two_do_not_prepare_the_same_corpus(folder):
    write_texts(folder / "in", 5)
    data = DataSettings(raw="in", tokenizer="bytes")
    with ThreadPoolExecutor() as pool:
        with exclusive(folder / "corpus.partial"):
            waiting = pool.submit(prepare, data, folder / "corpus")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
        assert waiting.result().train.num_documents > 0


def test_many_come_and_go_and_one_at_a_time_is_inside(folder):
    inside, seen = [], []

    def come_and_go() -> None:
        for _ in range(200):
            with exclusive(folder / "a" / "corpus.partial"):
                inside.append(1)
                seen.append(len(inside))
                inside.pop()
                remove_exclusive(folder / "a" / "corpus.partial")

    with ThreadPoolExecutor(8) as pool:
        for one in [pool.submit(come_and_go) for _ in range(8)]:
            one.result()
    assert seen == [1] * 1600 and not list((folder / "a").iterdir())


def test_a_folder_that_cannot_be_made_is_an_error():
    with pytest.raises(FileNotFoundError), exclusive(Path("/proc/nowhere/corpus.partial")):
        pass


def test_folders_that_are_no_corpus(folder):
    write_texts(folder / "in", 5)
    data = DataSettings(raw="in", tokenizer="bytes")
    (folder / "taken").mkdir()
    prepare(data, "taken")
    with pytest.raises(UserError, match="in: exists and is not a corpus"):
        prepare(data, "in")
    with pytest.raises(UserError, match=r"nowhere: not a corpus"):
        Corpus("nowhere")
    prepare(data, "corpus")
    for name, damage, message in (
            ("train-00000.tokens.npy", lambda path: path.unlink(), "missing"),
            ("train-00000.tokens.npy", lambda path: path.write_bytes(path.read_bytes()[:-2]), r"[\d,]+ bytes, expected [\d,]+"),
            ("train.offsets.npy", lambda path: np.save(path, np.zeros(3)), r"[\d,]+ bytes, expected"),
            ("validation.offsets.npy", lambda path: path.write_text("text"), "not a .npy file"),
            ("manifest.json", lambda path: path.write_text("{"), "damaged"),
            ("manifest.json", lambda path: path.write_text('{"format": 99}'), "corpus format 99, expected 1")):
        shutil.copytree(folder / "corpus", folder / "damaged")
        damage(folder / "damaged" / name)
        with pytest.raises(UserError, match=f"{name}: {message}"):
            Corpus("damaged")
        shutil.rmtree(folder / "damaged")
