"""Batches against what the streams say: a token's id is its place in the stream, so that a batch shows where it is
from."""

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.data.batches import iterate
from jaxlm.data.prepare import prepare
from jaxlm.data.tokenizers import SpecialTokens
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings, MaskingSettings, ModelSettings, Settings
from jaxlm.tasks.find import find_task

FIRST = 10  # ids below are special, also without a name
SPECIAL = SpecialTokens(pad=0, unk=1, eos=2, cls=4, sep=5, mask=6)
EVERY_KIND = [("gpt", "concatenate", False), ("gpt", "documents", False), ("bert", "concatenate", False),
              ("bert", "documents", False), ("bert", "concatenate", True), ("bert", "documents", True)]


class InMemory:
    """A split: documents of these lengths (their end mark included), whose tokens are FIRST, FIRST + 1, ... along
    the stream."""

    def __init__(self, lengths: list[int], directory: str = "corpus", split: str = "train"):
        self.directory, self.split = directory, split
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_documents = len(lengths)
        self.num_tokens = int(self.offsets[-1])
        self.stream = np.arange(FIRST, FIRST + self.num_tokens, dtype=np.int32)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.num_tokens
        return self.stream[start:stop].copy()


def make_corpus(lengths: list[int], validation: list[int] | None = None, *, special: SpecialTokens = SPECIAL,
                name: str = "corpus", digest: str = "same") -> SimpleNamespace:
    vocab_size = FIRST + 5000
    tokenizer = SimpleNamespace(special=special, vocab_size=vocab_size, starts_word=np.arange(vocab_size) % 2 == 0, digest=digest)
    return SimpleNamespace(directory=name, tokenizer=tokenizer, train=InMemory(lengths, name),
                           validation=InMemory(lengths if validation is None else validation, name, "validation"))


LENGTHS = [7, 40, 3, 19, 2, 11, 90, 5, 16, 17, 33, 8, 1, 25]
CORPUS = make_corpus(LENGTHS)


def task_of(data, family, next_sentence=False, seed=0):
    return find_task(Settings(data=data, model=ModelSettings(family=family, next_sentence=next_sentence), seed=seed))


def training(corpora, family="gpt", packing="concatenate", next_sentence=False, seed=0, length=16, size=4, start_token=True,
             **masking):
    corpora = corpora if isinstance(corpora, list) else [(corpora, 1.0)]
    data = DataSettings(sequence_length=length, global_batch_size=size, packing=packing, start_token=start_token,
                        masking=MaskingSettings(**masking))
    return task_of(data, family, next_sentence, seed).training_batches(corpora)


def validation(corpora, family="gpt", packing="concatenate", next_sentence=False, length=16, size=4, start_token=True):
    corpora = corpora if isinstance(corpora, list) else [corpora]
    data = DataSettings(sequence_length=length, packing=packing, start_token=start_token)
    return task_of(data, family, next_sentence).validation_batches(corpora, batch_size=size)


def epoch_of(batches, number=0):
    """All sequences of one epoch, as one batch."""
    return batches.samples(np.arange(batches.sequences_per_epoch) + number * batches.sequences_per_epoch)


def all_of(batches):
    parts = [batches.batch(step) for step in range(len(batches))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def unmasked(batch):
    """tokens of a bert batch as they were before masking."""
    tokens = batch["tokens"].copy()
    rows, slots = np.nonzero(batch["masked_mask"])
    tokens[rows, batch["masked_positions"][rows, slots]] = batch["masked_targets"][rows, slots]
    return tokens


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize(("family", "packing", "next_sentence"), EVERY_KIND)
def test_what_a_batch_holds_is_known_without_a_corpus(family, packing, next_sentence):
    batches = training(CORPUS, family, packing, next_sentence)
    data = DataSettings(sequence_length=16, packing=packing)
    known = task_of(data, family, next_sentence).spec()
    assert known == {name: field._replace(fill=0) for name, field in batches.spec.items()}
    assert {name: (array.shape[1:], array.dtype) for name, array in batches.batch(0).items()} == {
        name: (field.shape, field.dtype) for name, field in batches.spec.items()}


# ----------------------------------------------------------------------------------------------- the same batch for all

@pytest.mark.parametrize(("family", "packing", "next_sentence"), EVERY_KIND)
def test_batch_is_a_pure_function(family, packing, next_sentence):
    corpora = [(CORPUS, 3.0), (make_corpus([30, 50, 20]), 1.0)]
    batches = training(corpora, family, packing, next_sentence, seed=5, size=12)
    later = training(corpora, family, packing, next_sentence, seed=5, size=12)
    whole = batches.batch(7)
    hosts = [later.batch(7, rows) for rows in np.split(np.arange(12), 3)]
    assert_same(whole, {name: np.concatenate([part[name] for part in hosts]) for name in whole})
    assert_same(whole, {name: np.stack([later.sample(7 * 12 + row)[name] for row in range(12)]) for name in whole})
    assert_same(whole, training(corpora, family, packing, next_sentence, seed=5, size=6).samples(np.arange(84, 96)))
    other = training(corpora, family, packing, next_sentence, seed=6, size=12).batch(7)
    assert (other["tokens"] != whole["tokens"]).any(axis=1).mean() > 0.5


@pytest.mark.parametrize(("family", "packing", "next_sentence"), EVERY_KIND)
@pytest.mark.parametrize("make", [training, validation])
def test_spec_says_what_a_batch_holds(family, packing, next_sentence, make):
    batches = make(CORPUS, family, packing, next_sentence, size=5)
    batch = batches.batch(0)
    assert {name: ((5, *field.shape), field.dtype) for name, field in batches.spec.items()} == {
        name: (array.shape, array.dtype) for name, array in batch.items()}
    several = packing == "documents" or next_sentence or (family == "bert" and make is validation)
    expected = {"gpt": {"tokens", "targets", "loss_mask"},
                "bert": {"tokens", "masked_positions", "masked_targets", "masked_mask"}}[family]
    expected = expected | ({"segment_ids", "positions"} if several else set())
    expected |= {"token_types", "next_sentence", "next_sentence_mask"} if next_sentence else set()
    assert set(batch) == expected
    assert all(array.dtype == (bool if name.endswith("mask") else np.int32) for name, array in batch.items())


@pytest.mark.parametrize(("family", "packing", "next_sentence"), EVERY_KIND)
@pytest.mark.parametrize("make", [training, validation])
def test_examples_say_what_a_batch_is_made_of(family, packing, next_sentence, make):
    batches = make(CORPUS, family, packing, next_sentence)
    split = CORPUS.train if make is training else CORPUS.validation
    examples, steps = [], -(-batches.sequences_per_epoch // 4) * (2 if make is training else 1)
    for step in range(steps):
        found, batch = batches.examples(step), batches.batch(step)
        assert batches.examples(step, np.array([2, 0])) == [found[2], found[0]]
        tokens = unmasked(batch) if family == "bert" else batch["targets" if packing == "documents" else "tokens"]
        for row, example in zip(tokens, found, strict=True):
            expected = np.concatenate([np.empty(0, int), *(split.read(*span) for span in example.spans)] if example else [[]])
            if (family, packing) == ("gpt", "concatenate"):
                expected = expected[:-1]  # a target only
            np.testing.assert_array_equal(row[row >= FIRST], expected)
        examples += found
    numbers = [(example.epoch, example.sequence) for example in examples if example]
    count = batches.sequences_per_epoch
    assert sorted(numbers[:count]) == [(0, sequence) for sequence in range(count)]
    assert sorted(numbers[count:2 * count]) == [(1, sequence) for sequence in range(count) if make is training]
    assert {example[:2] for example in examples if example} == {("corpus", "train" if make is training else "validation")}
    assert examples.count(None) == (0 if make is training else -count % 4)


def test_examples_of_a_mixture_name_their_corpus():
    batches = training([(CORPUS, 1.0), (make_corpus([30, 50, 20], name="other"), 3.0)], size=8)
    assert [example.corpus for example in batches.examples(0)].count("other") == 6
    assert batches.examples(5, np.array([1])) == [batches.examples(5)[1]]


# ---------------------------------------------------------------------------------------------------------- concatenate

def test_gpt_windows_are_shuffled_and_cover_the_stream_at_each_epochs_offset():
    batches = training(CORPUS, length=16)
    starts = []
    for number in range(6):
        epoch = epoch_of(batches, number)
        assert epoch["loss_mask"].all()
        np.testing.assert_array_equal(epoch["tokens"], epoch["tokens"][:, :1] + np.arange(16))
        np.testing.assert_array_equal(epoch["targets"], epoch["tokens"] + 1)
        begins = epoch["tokens"][:, 0] - FIRST
        assert begins.tolist() != sorted(begins.tolist())
        assert (np.diff(np.sort(begins)) == 16).all()  # side by side
        assert begins.min() < 16 and begins.max() + 17 <= CORPUS.train.num_tokens
        starts.append(begins)
    assert len({int(begins.min()) for begins in starts}) > 2
    orders = {tuple(np.argsort(begins)) for begins in starts}
    assert len(orders) == 6


def test_bert_windows():
    batches = training(CORPUS, "bert", length=16)
    epoch = epoch_of(batches)
    tokens = unmasked(epoch)
    assert (tokens[:, 0] == SPECIAL.cls).all() and (tokens[:, -1] == SPECIAL.sep).all()
    np.testing.assert_array_equal(tokens[:, 1:-1], tokens[:, 1:2] + np.arange(14))
    assert (np.diff(np.sort(tokens[:, 1])) == 14).all()
    assert (epoch["masked_mask"].sum(axis=1) == 2).all()  # 0.15 * 14


def test_masks_are_fresh_each_epoch():
    batches = training(make_corpus([17]), "bert", length=17)
    masks = [tuple(batches.sample(number)["masked_positions"]) for number in range(50)]
    assert batches.sequences_per_epoch == 1 and len(set(masks)) > 25


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 18, 33, 100])
def test_validation_predicts_each_target_once(num_tokens):
    batches = validation(make_corpus([5], [num_tokens]), size=3)
    epoch = all_of(batches)
    assert len(epoch["tokens"]) == 3 * len(batches) and len(batches) == -(-batches.sequences_per_epoch // 3)
    targets = epoch["targets"][epoch["loss_mask"]]
    np.testing.assert_array_equal(targets, np.arange(FIRST + 1, FIRST + num_tokens))
    np.testing.assert_array_equal(epoch["tokens"][epoch["loss_mask"]], targets - 1)
    assert (epoch["tokens"][~epoch["loss_mask"]] == SPECIAL.pad).all()
    with pytest.raises(IndexError):
        batches.batch(len(batches))


def test_bert_validation_is_whole_and_fixed():
    batches = validation(CORPUS, "bert", size=6)
    epoch = all_of(batches)
    real = epoch["segment_ids"] > 0
    tokens = unmasked(epoch)
    np.testing.assert_array_equal(tokens[real & (tokens >= FIRST)], CORPUS.validation.stream)
    np.testing.assert_array_equal(epoch["positions"], np.arange(16) * real)
    assert (tokens[~real] == SPECIAL.pad).all()
    rows = epoch["masked_mask"].any(axis=1)
    assert rows[:batches.sequences_per_epoch].all() and not rows[batches.sequences_per_epoch:].any()
    assert_same(epoch, all_of(validation(CORPUS, "bert", size=6)))


# ------------------------------------------------------------------------------------------------------------ documents

def document_of(corpus, tokens):
    return np.searchsorted(corpus.train.offsets, tokens - FIRST, side="right") - 1


def check_segments(epoch):
    """segment_ids count up from 1 and end in padding; positions begin anew with each. Yields (row, columns) of each
    segment."""
    for row, ids in enumerate(epoch["segment_ids"]):
        used = ids[ids > 0]
        assert (ids[:len(used)] > 0).all() and (epoch["positions"][row, len(used):] == 0).all()
        assert np.unique(used).tolist() == list(range(1, used.max(initial=0) + 1)) and (np.diff(used) >= 0).all()
        for segment in np.unique(used):
            columns = np.flatnonzero(ids == segment)
            np.testing.assert_array_equal(epoch["positions"][row, columns], np.arange(len(columns)))
            yield row, columns


@pytest.mark.parametrize("make", [training, validation])
@pytest.mark.parametrize("start", [2, 3])
def test_a_document_of_a_gpt_begins_with_its_start_token(make, start):
    """Its first token is a target, and so is every other one, once. The start token is bos, or eos as for GPT-2."""
    corpus = make_corpus(LENGTHS, special=dataclasses.replace(SPECIAL, bos=start if start != SPECIAL.eos else None))
    batches = make(corpus, packing="documents", size=4)
    epoch = epoch_of(batches) if make is training else all_of(batches)
    first_tokens, seen = set((corpus.train.offsets[:-1] + FIRST).tolist()), []
    for row, columns in check_segments(epoch):
        tokens, targets = epoch["tokens"][row, columns], epoch["targets"][row, columns]
        np.testing.assert_array_equal(targets, targets[0] + np.arange(len(targets)))
        assert len(set(document_of(corpus, targets))) == 1
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        assert tokens[0] == (start if targets[0] in first_tokens else targets[0] - 1)  # a later piece: the token before it
        assert epoch["loss_mask"][row, columns].all()
        seen += targets.tolist()
    assert sorted(seen) == corpus.train.stream.tolist()
    padding = epoch["segment_ids"] == 0
    assert not epoch["loss_mask"][padding].any() and not epoch["tokens"][padding].any()
    assert padding[:batches.sequences_per_epoch].mean() == pytest.approx(batches.padding_share) or make is validation


@pytest.mark.parametrize("make", [training, validation])
@pytest.mark.parametrize(("special", "start_token"), [(SpecialTokens(pad=0), True), (SPECIAL, False)])
def test_documents_without_a_start_token(make, special, start_token):
    """As they were before there was one: the same sequences, in which the first token of a document is no target."""
    corpus = make_corpus(LENGTHS, special=special)
    batches = make(corpus, packing="documents", size=4, start_token=start_token)
    epoch = epoch_of(batches) if make is training else all_of(batches)
    last_tokens = set((corpus.train.offsets[1:] - 1 + FIRST).tolist())
    seen = []
    for row, columns in check_segments(epoch):
        tokens, targets = epoch["tokens"][row, columns], epoch["targets"][row, columns]
        np.testing.assert_array_equal(tokens, tokens[0] + np.arange(len(tokens)))
        assert len(set(document_of(corpus, tokens))) == 1
        has_target = np.array([token not in last_tokens for token in tokens.tolist()])
        np.testing.assert_array_equal(epoch["loss_mask"][row, columns], has_target)
        np.testing.assert_array_equal(targets, np.where(has_target, tokens + 1, 0))
        seen += tokens.tolist()
    assert sorted(seen) == corpus.train.stream.tolist()


@pytest.mark.parametrize("eos", [2, None])
def test_bert_documents(eos):
    corpus = make_corpus(LENGTHS, special=SpecialTokens(pad=0, unk=1, eos=eos, cls=4, sep=5, mask=6))
    batches = training(corpus, "bert", "documents")
    epoch = epoch_of(batches)
    epoch["tokens"] = unmasked(epoch)
    seen = []
    for row, columns in check_segments(epoch):
        tokens = epoch["tokens"][row, columns]
        assert tokens[0] == SPECIAL.cls and tokens[-1] == SPECIAL.sep
        np.testing.assert_array_equal(tokens[1:-1], tokens[1] + np.arange(len(tokens) - 2))
        assert len(set(document_of(corpus, tokens[1:-1]))) == 1
        seen += tokens[1:-1].tolist()
    dropped = set() if eos is None else set((corpus.train.offsets[1:] - 1 + FIRST).tolist())
    assert sorted(seen) == [token for token in corpus.train.stream.tolist() if token not in dropped]
    assert (epoch["segment_ids"] == 0).mean() == pytest.approx(batches.padding_share)


def test_epochs_of_documents_differ_in_order_only():
    batches = training(CORPUS, packing="documents")
    first, second = ([row.tobytes() for row in epoch_of(batches, number)["tokens"]] for number in (0, 1))
    assert first != second and sorted(first) == sorted(second)


# ------------------------------------------------------------------------------------------------------- sentence pairs

@pytest.mark.parametrize("make", [training, validation])
def test_pairs(make):
    batches = make(CORPUS, "bert", next_sentence=True, length=20)
    numbers = np.arange(batches.sequences_per_epoch * (40 if make is training else 1))
    batch = batches.samples(numbers)
    batch["tokens"] = unmasked(batch)
    ends = set((CORPUS.train.offsets[1:] - 1 + FIRST).tolist())
    splits = set()
    for row, columns in check_segments(batch):
        tokens, types = batch["tokens"][row, columns], batch["token_types"][row, columns]
        separators = np.flatnonzero(tokens == SPECIAL.sep)
        assert tokens[0] == SPECIAL.cls and len(separators) == 2 and separators[1] == len(tokens) - 1
        np.testing.assert_array_equal(types, np.arange(len(tokens)) > separators[0])
        first, second = tokens[1:separators[0]], tokens[separators[0] + 1:-1]
        for part in (first, second):
            assert len(part) and len(set(document_of(CORPUS, part))) == 1 and ends.isdisjoint(part.tolist())
            np.testing.assert_array_equal(part, part[0] + np.arange(len(part)))
        follows = second[0] == first[-1] + 1
        assert follows == (batch["next_sentence"][row] == 0)
        assert follows or document_of(CORPUS, first)[0] != document_of(CORPUS, second)[0]
        splits.add(len(first))
    assert batch["next_sentence_mask"].all()
    assert not batch["token_types"][batch["segment_ids"] == 0].any()
    if make is training:
        assert splits == set(range(1, 17))
        assert abs(batch["next_sentence"].mean() - 0.5) < 3 * np.sqrt(0.25 / len(numbers))
        others = batch["next_sentence"] == 1
        share = [(batch["segment_ids"][rows] > 0).mean() for rows in (others, ~others)]
        assert share[0] / share[1] > 0.85  # a wrong B is about as long as a right one


def test_padded_rows_of_the_last_validation_batch_count_for_nothing():
    batches = validation(CORPUS, "bert", next_sentence=True, size=50)
    batch = batches.batch(0)
    used = np.arange(50) < batches.sequences_per_epoch
    np.testing.assert_array_equal(batch["next_sentence_mask"], used)
    np.testing.assert_array_equal(batch["masked_mask"].any(axis=1), used)
    np.testing.assert_array_equal((batch["segment_ids"] > 0).any(axis=1), used)


# ------------------------------------------------------------------------------------------------------------- mixtures

def test_mixture_gives_each_corpus_its_share_and_its_own_epochs():
    sizes, weights = [20, 300, 77], [5.0, 1.0, 3.3]
    corpora = [make_corpus([16 * size + 1 + 32]) for size in sizes]
    for corpus, base in zip(corpora, (0, 100_000, 200_000), strict=True):
        corpus.train.stream = corpus.train.stream + base
    batches = training(list(zip(corpora, weights, strict=True)), size=1000)
    source = np.concatenate([batches.batch(step)["tokens"][:, 0] for step in range(6)]) // 100_000
    for begin, end in [(0, 500), (100, 1100), (0, 6000), (4321, 5999)]:
        counts = np.bincount(source[begin:end], minlength=3)
        np.testing.assert_allclose(counts, np.array(weights) / sum(weights) * (end - begin), atol=2)

    alone = training(corpora[2], size=1000)  # in the mixture: the third source, with the random numbers of a third source
    tokens = batches.samples(np.flatnonzero(source == 2)[:alone.sequences_per_epoch])["tokens"][:, 0]
    assert len(np.unique(tokens)) == alone.sequences_per_epoch == 77 + 1
    assert batches.sequences_per_epoch == sum(sizes) + 3


def test_validation_of_several_corpora_takes_one_after_the_other():
    corpora = [make_corpus([40], [40]), make_corpus([70], [70])]
    epoch = all_of(validation(corpora, size=4))
    expected = [np.arange(FIRST + 1, FIRST + 40), np.arange(FIRST + 1, FIRST + 70)]
    np.testing.assert_array_equal(epoch["targets"][epoch["loss_mask"]], np.concatenate(expected))


# --------------------------------------------------------------------------------------------------------------- errors

WITHOUT_MASK = make_corpus(LENGTHS, special=SpecialTokens(pad=0, cls=4, sep=5))


@pytest.mark.parametrize(("make", "words"), [
    (lambda: training([(CORPUS, 1.0), (make_corpus(LENGTHS, name="other", digest="another"), 1.0)]), ["other", "tokenizers"]),
    (lambda: training(WITHOUT_MASK, "bert"), ["corpus", "no mask token"]),
    (lambda: training(make_corpus([16])), ["train split", "16 tokens in 1 documents", "data.sequence_length=16"]),
    (lambda: training(make_corpus([]), packing="documents"), ["0 tokens"]),
    (lambda: training(make_corpus([5]), "bert"), ["5 tokens"]),
    (lambda: validation([CORPUS, make_corpus([50], [])]), ["validation split", "0 tokens in 0 documents"]),
    (lambda: validation(make_corpus([50], [1])), ["1 tokens"]),
    (lambda: validation([CORPUS, make_corpus([50], [])], "bert", "documents"), ["0 tokens"]),
    (lambda: training(make_corpus([500]), "bert", next_sentence=True), ["model.next_sentence", "1 documents"]),
    (lambda: training(CORPUS, "bert", length=2), ["data.sequence_length", "2"]),
])
def test_bad_input_is_refused_in_one_line(make, words):
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


# -------------------------------------------------------------------------------------------------------------- iterate

def test_iterate_yields_the_batches_in_order():
    batches = training(CORPUS, packing="documents")
    rows = np.array([1, 3])
    with iterate(batches, 5, 25, rows=rows, prefetch=3) as made:
        for step, batch in zip(range(5, 25), made, strict=True):
            assert_same(batch, batches.batch(step, rows))


def test_iterate_brings_errors_to_the_consumer_and_ends_its_threads():
    corpus = make_corpus([4000])
    batches = training(corpus, length=16)
    bad = next(step for step in range(len(batches)) if batches.batch(step)["tokens"].max() > 3000)
    corpus.train.read, good = lambda start, stop: 1 / 0 if stop > 3000 - FIRST else good(start, stop), corpus.train.read
    with iterate(batches, 0, 1000) as made:
        for _ in range(bad):
            next(made)
        with pytest.raises(ZeroDivisionError):
            next(made)
    made.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(10)
            assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(made)


# ------------------------------------------------------------------------------------------------------------ from disk

def test_a_prepared_corpus(tmp_path):
    texts = [f"document {number}: " + "some words of it. " * (number % 7) for number in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    data = DataSettings(raw=str(tmp_path / "text.txt"), document="line", tokenizer="bytes", sequence_length=160,
                        global_batch_size=4, packing="documents", validation=0.2)
    corpus = prepare(data, tmp_path / "corpus", processes=1)
    task = task_of(data, "gpt", seed=1)
    epochs = [epoch_of(task.training_batches([(corpus, 1.0)])), all_of(task.validation_batches([corpus], batch_size=4))]
    special = corpus.tokenizer.special.ids
    found = [corpus.tokenizer.decode([token for token in row[ids == segment].tolist() if token not in special])
             for epoch in epochs for row, ids in zip(epoch["tokens"], epoch["segment_ids"], strict=True)
             for segment in np.unique(ids[ids > 0])]
    assert sorted(found) == sorted(texts)
