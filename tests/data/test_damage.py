"""Damage on disk: noticed when it is read, named, and skipped where that is wanted, without a change to anything
else."""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.data import corpus as corpus_module
from jaxlm.data.batches import iterate
from jaxlm.data.corpus import Corpus
from jaxlm.data.damage import DamagedData
from jaxlm.data.manifest import MANIFEST
from jaxlm.data.prepare import prepare
from jaxlm.data.shards import BLOCK_TOKENS
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings, ModelSettings, Settings
from jaxlm.tasks.find import find_task

SHARD_TOKENS = 3 * BLOCK_TOKENS - 1000  # the last block of every shard is shorter
EVERY_KIND = [("gpt", "concatenate", False), ("gpt", "documents", False), ("bert", "concatenate", False),
              ("bert", "documents", False), ("bert", "concatenate", True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A corpus of several shards: documents of a few hundred words, with a tokenizer that BERT can use."""
    folder = tmp_path_factory.mktemp("damage")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(200)]
    lines = [" ".join(draw.choices(words, k=draw.randint(1, 500))) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    data = DataSettings(raw=str(folder / "text.txt"), document="line", tokenizer="wordpiece", validation=0.05,
                        shard_tokens=SHARD_TOKENS)
    corpus = prepare(data, folder / "corpus", vocab_size=150, processes=1)
    assert len(corpus.train.entry["shards"]) >= 4
    return corpus


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(whole.directory, tmp_path / "corpus")


def shard_path(folder, number):
    return folder / f"train-{number:05d}.tokens.npy"


def flip(path, place, bit=0):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def without_checksums(folder):
    """The corpus as it was prepared before there were any."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            (folder / shard.pop("checksums")["file"]).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def read_all(corpus):
    return corpus.train.read(0, corpus.train.num_tokens)


# -------------------------------------------------------------------------------------------------------------- noticed

def test_every_flipped_bit_is_noticed_and_the_text_around_it_stays(whole, folder):
    draw, documents, stream = random.Random(1), Corpus(folder).train, read_all(whole)
    for _ in range(150):
        number = draw.randrange(len(documents.entry["shards"]))
        path, size = shard_path(folder, number), documents.entry["shards"][number]["tokens"]
        token, begin = draw.randrange(size), os.path.getsize(path) - 2 * size
        place, bit = begin + 2 * token + draw.randrange(2), draw.randrange(8)
        flip(path, place, bit)
        start = number * SHARD_TOKENS + max(0, token - draw.randrange(100))
        stop = min(number * SHARD_TOKENS + token + draw.randint(1, 100), documents.num_tokens)
        with pytest.raises(DamagedData, match="differ from their checksum") as error:
            documents.read(start, stop)
        assert (error.value.path, error.value.block) == (path, token // BLOCK_TOKENS)
        first, last = (int(text.replace(",", "")) for text in re.search(r"bytes ([\d,]+) to ([\d,]+)", str(error.value)).groups())
        assert first <= place < last and last - first <= 2 * BLOCK_TOKENS and "\n" not in str(error.value)
        for other in {number, draw.randrange(len(documents.entry["shards"]))}:  # all blocks but this one
            tokens = documents.entry["shards"][other]["tokens"]
            for start in range(0, tokens, BLOCK_TOKENS):
                if (other, start // BLOCK_TOKENS) != (number, token // BLOCK_TOKENS):
                    span = slice(other * SHARD_TOKENS + start, other * SHARD_TOKENS + min(start + BLOCK_TOKENS, tokens))
                    np.testing.assert_array_equal(documents.read(span.start, span.stop), stream[span])
        flip(path, place, bit)
    np.testing.assert_array_equal(read_all(Corpus(folder)), stream)


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")  # NumPy takes some headers for Python 2's
def test_a_damaged_header_or_checksum_file_is_named(whole, folder):
    draw, stream = random.Random(2), read_all(whole)
    for name in ("train-00001.tokens.npy", "train-00001.crc32.npy"):
        path, refused = folder / name, 0
        for place in range(128):
            bit = draw.randrange(8)
            flip(path, place, bit)
            try:
                np.testing.assert_array_equal(read_all(Corpus(folder, whole=False)), stream)  # a header has spaces to spare
            except DamagedData as error:
                assert error.path == path
                refused += 1
            flip(path, place, bit)
        assert refused > 50
    flip(folder / "train-00001.crc32.npy", 130)
    with pytest.raises(DamagedData, match=r"train-00001\.crc32\.npy: differs from its digest"):
        read_all(Corpus(folder))


def test_damaged_offsets_are_refused_when_they_are_first_needed(folder):
    flip(folder / "train.offsets.npy", 200)
    corpus = Corpus(folder)
    batches(corpus, "gpt", "concatenate").batch(0)
    with pytest.raises(UserError, match=r"train\.offsets\.npy: differs from its digest .*prepare it again"):
        batches(corpus, "gpt", "documents")


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("damage, problem", [
    (lambda path: os.truncate(path, os.path.getsize(path) // 2), r"[\d,]+ bytes, expected [\d,]+"),
    (lambda path: os.truncate(path, 0), "not a .npy file"),
    (lambda path: path.unlink(), "missing"),
    (lambda path: path.rename(path.with_name("moved")), "missing"),
    (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    (lambda path: (np.save(path.with_name("new.npy"), np.zeros(7, np.uint16)), os.replace(path.with_name("new.npy"), path)),
     r"142 bytes, expected [\d,]+"),
], ids=["truncated", "emptied", "removed", "moved", "not a file", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_named(whole, folder, opened, checksums, damage, problem):
    if not checksums:
        without_checksums(folder)
    documents, stream = Corpus(folder).train, read_all(whole)
    if opened:
        documents.read(SHARD_TOKENS, SHARD_TOKENS + 1)
    damage(shard_path(folder, 1))
    for start in (SHARD_TOKENS - 5, SHARD_TOKENS + 10, 2 * SHARD_TOKENS - 5):
        with pytest.raises(DamagedData, match=r"train-00001\.tokens\.npy: " + problem + ".*data.damaged=skip") as error:
            documents.read(start, start + 10)
        assert error.value.block is None
    np.testing.assert_array_equal(documents.read(SHARD_TOKENS - 50, SHARD_TOKENS), stream[SHARD_TOKENS - 50:SHARD_TOKENS])


def test_a_file_that_is_put_back_is_read_again(whole, folder):
    documents, stream, path = Corpus(folder).train, read_all(whole), shard_path(folder, 0)
    documents.read(0, 10)
    path.unlink()
    with pytest.raises(DamagedData, match="missing"):
        documents.read(0, 10)
    shutil.copy(shard_path(whole.directory, 0), path)
    np.testing.assert_array_equal(documents.read(0, 10), stream[:10])


def test_another_shard_in_its_place_is_noticed(folder):
    documents = Corpus(folder).train
    documents.read(0, 10)
    shutil.copy(shard_path(folder, 1), folder / "copy")
    os.replace(folder / "copy", shard_path(folder, 0))
    with pytest.raises(DamagedData, match="differ from their checksum"):
        documents.read(0, 10)


def test_without_checksums_tokens_outside_of_the_vocabulary_are_noticed(whole, folder):
    without_checksums(folder)
    corpus, stream = Corpus(folder), read_all(whole)
    assert corpus.digest == whole.digest
    np.testing.assert_array_equal(read_all(corpus), stream)
    path, limit = shard_path(folder, 2), corpus.tokenizer.vocab_size
    for value in (limit, 65_535):
        tokens = np.load(path, mmap_mode="r+")
        tokens[5000] = value
        tokens.flush()
        place = os.path.getsize(path) - 2 * len(tokens) + 2 * 5000
        with pytest.raises(DamagedData, match=f"token {value:,} at byte {place:,}, in a vocabulary of {limit}") as error:
            corpus.train.read(2 * SHARD_TOKENS + 4990, 2 * SHARD_TOKENS + 5010)
        assert error.value.block == 1
    np.testing.assert_array_equal(corpus.train.read(0, 2 * SHARD_TOKENS + 5000), stream[:2 * SHARD_TOKENS + 5000])


# ----------------------------------------------------------------------------------------------------------- open files

def test_only_so_many_shards_are_open_at_a_time(whole, folder, monkeypatch):
    monkeypatch.setattr(corpus_module, "OPEN_SHARDS", 2)
    before, corpus = len(os.listdir("/dev/fd")), Corpus(folder)
    for start in random.Random(3).choices(range(corpus.train.num_tokens - 10), k=200):
        np.testing.assert_array_equal(corpus.train.read(start, start + 10), whole.train.read(start, start + 10))
        assert len(os.listdir("/dev/fd")) <= before + 3 + len(whole.train.entry["shards"])
    opened = len(os.listdir("/dev/fd"))
    del corpus
    assert len(os.listdir("/dev/fd")) == opened - 2


def test_threads_read_while_files_are_replaced(whole, folder):
    documents, stream, stop = Corpus(folder).train, read_all(whole), threading.Event()

    def read(seed):
        draw, reads = random.Random(seed), 0
        while not stop.is_set() or reads < 100:
            start = draw.randrange(len(stream) - 300)
            np.testing.assert_array_equal(documents.read(start, start + 300), stream[start:start + 300])
            reads += 1

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, seed) for seed in range(4)]
        try:
            for turn in range(200):
                path = shard_path(folder, turn % 3)
                shutil.copy(shard_path(whole.directory, turn % 3), folder / "copy")
                os.replace(folder / "copy", path)
        finally:
            stop.set()
        for reader in readers:
            reader.result()


def test_sent_to_another_process_it_opens_its_files_anew(whole, folder):
    documents = Corpus(folder).train
    documents.read(0, 10)
    shard_path(folder, 3).unlink()
    copy = pickle.loads(pickle.dumps(documents))
    np.testing.assert_array_equal(copy.read(0, 1000), whole.train.read(0, 1000))
    with pytest.raises(DamagedData, match="missing"):
        copy.read(3 * SHARD_TOKENS, 3 * SHARD_TOKENS + 1)
    corpus = pickle.loads(pickle.dumps(Corpus(folder, whole=False)))
    with pytest.raises(DamagedData, match="missing") as error:
        read_all(corpus)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


# -------------------------------------------------------------------------------------------------------------- skipped

def settings_of(packing, damaged="stop"):
    return DataSettings(sequence_length=128, global_batch_size=16, packing=packing, damaged=damaged)


def batches(corpus, family, packing, next_sentence=False, damaged="stop", training=True):
    model = ModelSettings(family=family, next_sentence=next_sentence)
    task = find_task(Settings(data=settings_of(packing, damaged), model=model, seed=3))
    if training:
        return task.training_batches([(corpus, 1.0)])
    return task.validation_batches([corpus], batch_size=16)


def touches(example, damaged_spans):
    return any(start < end and begin < stop for start, stop in example.spans for begin, end in damaged_spans)


@pytest.mark.parametrize("family, packing, next_sentence", EVERY_KIND)
def test_skipping_changes_no_other_row(whole, folder, capsys, family, packing, next_sentence):
    flip(shard_path(folder, 0), 128 + 2 * (BLOCK_TOKENS + 17))
    shard_path(folder, 2).unlink()
    damaged_spans = [(BLOCK_TOKENS, 2 * BLOCK_TOKENS), (2 * SHARD_TOKENS, 3 * SHARD_TOKENS)]
    good = batches(whole, family, packing, next_sentence)
    bad = batches(Corpus(folder, whole=False), family, packing, next_sentence, damaged="skip")
    pad, steps, skipped = whole.tokenizer.special.pad, good.sequences_per_epoch // 16, []
    assert bad.spec == good.spec
    for step in range(steps):
        expected, found = good.batch(step), bad.batch(step)
        parts = [bad.batch(step, rows) for rows in np.split(np.random.default_rng(step).permutation(16), 4)]  # other processes
        order = np.argsort(np.random.default_rng(step).permutation(16))
        for row, example in enumerate(good.examples(step)):
            is_padding = not any(found[name][row].any() for name in found if name.endswith("mask"))
            if is_padding:
                skipped.append(step * 16 + row)
                assert (found["tokens"][row] == pad).all()
                assert not any(found[name][row].any() for name in found if name != "tokens")
            else:
                for name, array in expected.items():
                    np.testing.assert_array_equal(found[name][row], array[row])
            if packing == "documents" and family == "gpt":  # a row may need the token before a span, to begin with
                assert is_padding >= touches(example, damaged_spans)
                assert is_padding <= touches(example, [(begin, end + 1) for begin, end in damaged_spans])
            else:
                assert is_padding == touches(example, damaged_spans)
        for name, array in found.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts])[order], array)
    assert 0.05 < len(skipped) / (16 * steps) < 0.6
    np.testing.assert_array_equal(bad.damage.samples(16 * steps), skipped)
    np.testing.assert_array_equal(bad.damage.samples(16 * 3), [number for number in skipped if number < 48])
    assert bad.damage.blocks() == {shard_path(folder, 0): 1, shard_path(folder, 2): 1} and good.damage is None
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 2 and all(any(line.startswith(f"{path}: ") for line in lines) for path in bad.damage.blocks())


@pytest.mark.parametrize("family, packing, next_sentence", EVERY_KIND)
def test_skipping_in_an_evaluation(whole, folder, family, packing, next_sentence):
    (folder / "validation-00000.tokens.npy").unlink()
    corpus = Corpus(folder, whole=False)
    found = batches(corpus, family, packing, next_sentence, "skip", training=False)
    for step in range(len(found)):
        batch = found.batch(step)
        assert not any(array.any() for name, array in batch.items() if name.endswith("mask") or name == "segment_ids")
    assert len(found.damage.samples(10**9)) == found.sequences_per_epoch
    found.batch(0)
    assert len(found.damage.samples(10**9)) == found.sequences_per_epoch  # seen twice, counted once
    with pytest.raises(DamagedData, match=r"validation-00000\.tokens\.npy: missing"):
        batches(corpus, family, packing, next_sentence, training=False).batch(0)


def test_a_skipped_row_is_not_masked_where_no_token_stands_for_padding(folder):
    flip(shard_path(folder, 0), 1000)
    corpus = Corpus(folder)
    given = corpus.tokenizer
    corpus.tokenizer = SimpleNamespace(special=dataclasses.replace(given.special, pad=None), vocab_size=given.vocab_size,
                                       starts_word=given.starts_word, digest=given.digest)
    made = batches(corpus, "bert", "concatenate", damaged="skip")
    predicted = np.concatenate([made.batch(step)["masked_mask"].any(axis=1) for step in range(20)])
    np.testing.assert_array_equal(np.flatnonzero(~predicted), made.damage.samples(320))
    assert 0 < len(made.damage.samples(320)) < 160


def test_stopping_brings_the_damage_to_who_asked_for_the_batch(folder):
    made = batches(Corpus(folder), "gpt", "concatenate")
    bad = next(step for step in range(1000) if any(touches(example, [(0, BLOCK_TOKENS)]) for example in made.examples(step)))
    flip(shard_path(folder, 0), 1000)
    with iterate(made, 0, 1000) as iterator:
        for _ in range(bad):
            next(iterator)
        with pytest.raises(DamagedData, match="differ from their checksum"):
            next(iterator)


def test_a_corpus_that_is_gone_as_a_whole_is_not_skipped(folder):
    made = batches(Corpus(folder), "gpt", "concatenate", damaged="skip")
    made.batch(0)
    shutil.rmtree(folder)
    with pytest.raises(DamagedData, match="missing"):
        made.batch(1)
    assert not len(made.damage.samples(10**9))


def test_many_threads_count_every_row_once(folder, capsys):
    flip(shard_path(folder, 1), 5000)
    made = batches(Corpus(folder), "gpt", "concatenate", damaged="skip")
    alone = batches(Corpus(folder), "gpt", "concatenate", damaged="skip")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(made.batch, [*range(40), *range(40)]))
    for step in range(40):
        alone.batch(step)
    np.testing.assert_array_equal(made.damage.samples(640), alone.damage.samples(640))
    assert len(alone.damage.samples(640)) and capsys.readouterr().err.count("differ from their checksum") == 2
