"""The figures beside a model: the same tokens, after the same tokens, counted on the train split alone."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.baselines import ngrams, yardsticks
from jaxlm.baselines.yardsticks import histories, sequences
from jaxlm.data.corpus import Corpus
from jaxlm.data.damage import DamagedData
from jaxlm.data.prepare import prepare
from jaxlm.settings import DataSettings, ModelSettings, Settings
from jaxlm.tasks.find import find_task

ORDER = yardsticks.ORDER
VOCABULARY = {"bytes": None, "wordpiece": 39}  # of LINES and HELD_OUT
LINES = [f"{one} {two} {three}" for one in ("the", "a") for two in ("cat", "dog", "ant") for three in ("sat", "ran", "hid")]
HELD_OUT = ["the cat hid", "an ant sat", "a dog and a cat ran", "x"]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """`corpus(tokenizer)`: LINES to learn from, HELD_OUT to be measured on."""
    def make(tokenizer, **settings):
        for name, lines in (("train", LINES * 3), ("validation", HELD_OUT)):
            (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
        data = DataSettings(raw=str(tmp_path / "train.txt"), validation=str(tmp_path / "validation.txt"), document="line",
                            tokenizer=tokenizer, prepare_processes=1, sequence_length=256, **settings)
        return prepare(data, tmp_path / "corpus", vocab_size=VOCABULARY[tokenizer]), data
    return make


def batches_of(corpus, data, family, size):
    model = ModelSettings(family=family, max_length=256, vocab_size=corpus.tokenizer.vocab_size)
    return find_task(Settings(model=model, data=data)).validation_batches([corpus], size)


def documents(split):
    return [split.read(begin, end).tolist() for begin, end in zip(split.offsets[:-1], split.offsets[1:], strict=True)]


@pytest.mark.parametrize(("packing", "start_token"), [("documents", True), ("documents", False), ("concatenate", True)])
def test_figures_are_those_of_the_formula(packing, start_token, corpus, formula_of):
    """Rows long enough to hold a document, or all of the text: nothing is cut off."""
    corpus, data = corpus("bytes", packing=packing, start_token=start_token)
    train, held_out = ([list(itertools.chain(*found))] if packing == "concatenate" else found
                       for found in (documents(corpus.train), documents(corpus.validation)))
    if packing == "documents" and start_token:
        opening = corpus.tokenizer.special.bos if corpus.tokenizer.special.bos is not None else corpus.tokenizer.special.eos
        train, held_out = ([[opening, *tokens] for tokens in found] for found in (train, held_out))
    batches = batches_of(corpus, data, "gpt", 2)
    found = yardsticks.yardsticks([corpus], [corpus], batches, data)

    formula = formula_of(train, corpus.tokenizer.vocab_size, ORDER)
    for n in (1, 2, ORDER):
        losses = [-math.log(formula.probability(tokens[i], tokens[max(0, i - ORDER + 1):i], n))
                  for tokens in held_out for i in range(1, len(tokens))]
        loss = sum(losses) / len(losses)
        figures = found[f"n-gram ({n})"]
        assert figures["loss"] == pytest.approx(loss, rel=1e-10)
        assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-10)
        per_byte = sum(map(len, documents(corpus.validation))) / sum(len(line.encode()) for line in HELD_OUT)
        assert figures["bits_per_byte"] == pytest.approx(loss / math.log(2) * per_byte, rel=1e-10)


def test_a_masked_model_is_beside_the_frequencies_of_words(corpus):
    corpus, data = corpus("wordpiece")
    batches = batches_of(corpus, data, "bert", 2)
    found = yardsticks.yardsticks([corpus], [corpus], batches, data)
    assert list(found) == ["unigram"]
    stream = [token for tokens in documents(corpus.train) for token in tokens if token not in corpus.tokenizer.special.ids]
    best = max(set(stream), key=stream.count)
    targets = np.concatenate([batch["masked_targets"][batch["masked_mask"]] for batch in map(batches.batch, range(len(batches)))])
    assert len(targets) and found["unigram"]["accuracy"] == pytest.approx((targets == best).mean())
    shares = np.bincount(stream, minlength=corpus.tokenizer.vocab_size) / len(stream)
    seen = [target for target in targets if shares[target] > 0.01]
    assert len(seen) > 1 and found["unigram"]["loss"] > 0
    assert found["unigram"]["perplexity"] == pytest.approx(math.exp(found["unigram"]["loss"]))


def test_figures_are_kept_with_the_corpus_and_counted_anew_for_other_rows(corpus, monkeypatch):
    corpus, data = corpus("bytes", packing="documents")
    batches = batches_of(corpus, data, "gpt", 2)
    found = yardsticks.yardsticks([corpus], [corpus], batches, data)
    kept = list((corpus.directory / "baseline").iterdir())
    assert len(kept) == 1
    monkeypatch.setattr(yardsticks, "KneserNey", None)  # nothing is counted again
    assert yardsticks.yardsticks([corpus], [corpus], batches_of(corpus, data, "gpt", 3), data) == found
    shorter = DataSettings(**{**vars(data), "sequence_length": 8})
    with pytest.raises(TypeError):
        yardsticks.yardsticks([corpus], [corpus], batches_of(corpus, shorter, "gpt", 2), shorter)


def test_where_text_was_lost_bits_per_byte_are_not_known(corpus, monkeypatch):
    corpus, data = corpus("bytes", packing="documents")
    monkeypatch.setattr(Corpus, "loses_text", True)
    found = yardsticks.yardsticks([corpus], [corpus], batches_of(corpus, data, "gpt", 2), data)
    assert found["n-gram (5)"]["bits_per_byte"] is None and found["n-gram (5)"]["loss"] > 0


def test_contexts_end_where_rows_and_segments_begin():
    tokens = np.array([[5, 6, 7, 8, 9], [1, 2, 3, 4, 0]])
    segments = np.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0]])
    found = histories(tokens, segments, 3)
    assert found[0].tolist() == [[5, -1, -1], [6, 5, -1], [7, 6, 5], [8, 7, 6], [9, 8, 7]]
    assert found[1, :4].tolist() == [[1, -1, -1], [2, 1, -1], [3, -1, -1], [4, 3, -1]]
    assert histories(tokens[:, :1], None, 3).tolist() == [[[5, -1, -1]], [[1, -1, -1]]]  # rows shorter than the order


def test_damaged_text_is_left_out_where_a_run_leaves_it_out(monkeypatch, capsys):
    """20 blocks of 4 tokens in two documents, of which block 7 is damaged: what stands behind it is no continuation."""
    monkeypatch.setattr(yardsticks, "BLOCK_TOKENS", 4)
    stream, offsets = np.arange(80, dtype=np.int32), np.array([0, 20, 80])

    def read(start, stop):
        if start < 32 and stop > 28:
            raise DamagedData(Path("train-00000.tokens.npy"), "bytes 28 to 32 differ")
        return stream[start:stop].copy()

    corpora = [SimpleNamespace(train=SimpleNamespace(num_tokens=80, offsets=offsets, read=read))]
    with pytest.raises(DamagedData):
        list(sequences(corpora, "documents", None))
    for start, opening in ((None, []), (99, [99])):
        tokens, begins = (np.concatenate(parts) for parts in zip(*sequences(corpora, "documents", start, True), strict=True))
        found = [part.tolist() for part in np.split(tokens, np.flatnonzero(begins)[1:])]
        kept = [token for part in found for token in part if token != 99]
        assert set(range(80)) - set(kept) <= set(range(24, 36)) and not set(kept) & set(range(28, 32))
        assert [len(part) for part in found[:1]] == [20 + len(opening)] and found[1][:1 + len(opening)] == [*opening, 20]
        assert len(found) == 3 and 32 <= found[2][0] < 36 and found[2][-1] == 79  # no document begins here: no start token
    assert "differ" in capsys.readouterr().err


@pytest.mark.parametrize("chunk", [100, 3])
def test_documents_become_sequences_whatever_the_chunks(chunk, monkeypatch):
    """Documents of 3, 0, 4, 1 and 0 tokens; also one that a chunk cuts."""
    monkeypatch.setattr(ngrams, "CHUNK", chunk)
    stream, offsets = np.arange(10, 18, dtype=np.int32), np.array([0, 3, 3, 7, 8, 8])
    split = SimpleNamespace(num_tokens=8, offsets=offsets, read=lambda start, stop: stream[start:stop].copy())
    corpora = [SimpleNamespace(train=split)] * 2

    def cut(packing, start):
        tokens, begins = (np.concatenate(parts).tolist() for parts in zip(*sequences(corpora, packing, start), strict=True))
        firsts = [place for place, begin in enumerate(begins) if begin] + [len(tokens)]
        assert firsts[0] == 0
        return [tokens[first:last] for first, last in itertools.pairwise(firsts)]

    one = [[10, 11, 12], [13, 14, 15, 16], [17]]
    assert cut("documents", None) == one * 2
    assert [tokens for tokens in cut("documents", 9) if len(tokens) > 1] == [[9, *tokens] for tokens in one] * 2
    assert cut("concatenate", None) == [list(range(10, 18))] * 2
