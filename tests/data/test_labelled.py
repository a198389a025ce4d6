"""Rows of labelled records: the arrays written out by hand, cut as the tokenizers library cuts, with their labels."""

import itertools
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxlm.data.labelled import HeldRecords, LabelledRows, truncated
from jaxlm.data.prepare import prepare
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings, TaskSettings

PAD, CLS, SEP, BOS, EOS = 0, 90, 91, 92, 93
BERT = SpecialTokens(pad=PAD, cls=CLS, sep=SEP, bos=CLS, eos=SEP)
GPT = SpecialTokens(pad=None, cls=BOS, sep=EOS, bos=BOS, eos=EOS)
BARE = SpecialTokens(pad=PAD)  # a tokenizer without any


class Stream:
    def __init__(self, texts, end):
        self.offsets = np.cumsum([0, *(len(text) + (end is not None) for text in texts)])
        self.tokens = np.array([token for text in texts for token in (*text, *([] if end is None else [end]))], np.int32)

    def read(self, start, stop):
        return self.tokens[start:stop]


class Held:
    def __init__(self, streams, end, label=None):
        self.streams = {name: Stream(texts, end) for name, texts in zip(("text", "pair"), streams, strict=False)}
        self.num_documents = len(streams[0])
        self.columns = () if label is None else ("label",)
        self.label = label

    def column(self, name):
        return self.label


def all_rows(rows):
    numbers = np.arange(rows.count)
    batch = rows.rows(numbers, numbers.astype(np.uint64), numbers.astype(np.uint64))
    for name, field in rows.spec.items():
        assert batch[name].shape == (rows.count, *field.shape) and batch[name].dtype == field.dtype
    assert batch.keys() == rows.spec.keys()
    return batch


def test_rows_of_an_encoder():
    rows = LabelledRows(Held([[[1, 2], [3, 4, 5, 6], []]], SEP, np.array([2, 0, 1], np.int32)), BERT, 5, causal=False)
    batch = all_rows(rows)
    np.testing.assert_array_equal(batch["tokens"], [[CLS, 1, 2, SEP, 0], [CLS, 3, 4, 5, SEP], [CLS, SEP, 0, 0, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1, 0], [1] * 5, [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0]])
    assert batch["label"].tolist() == [2, 0, 1] and batch["label_mask"].all() and "token_types" not in batch
    assert (rows.count, rows.truncated) == (3, 1) and rows.padding_share == pytest.approx(1 - 11 / 15)
    assert rows.truncation_note()[0].startswith("1 of 3 records (33 %) are longer than data.sequence_length=5")


def test_rows_of_pairs():
    label = np.array([[True, False], [False, False]])
    held = Held([[[1, 2], [3]], [[4], [5, 6, 7]]], SEP, label)
    batch = all_rows(LabelledRows(held, BERT, 8, causal=False, token_types=True))
    np.testing.assert_array_equal(batch["tokens"], [[CLS, 1, 2, SEP, 4, SEP, 0, 0], [CLS, 3, SEP, 5, 6, 7, SEP, 0]])
    np.testing.assert_array_equal(batch["token_types"], [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1] * 6 + [0, 0], [1] * 7 + [0]])
    np.testing.assert_array_equal(batch["labels"], label)
    assert batch["label_mask"].all() and "label" not in batch
    roberta = all_rows(LabelledRows(held, BERT, 8, causal=False, separators=2))
    np.testing.assert_array_equal(roberta["tokens"], [[CLS, 1, 2, SEP, SEP, 4, SEP, 0], [CLS, 3, SEP, SEP, 5, 6, 7, SEP]])


def test_rows_of_a_causal_model_end_with_what_has_seen_it_all():
    held = Held([[[1, 2], [3, 4, 5, 6]], [[4], [5, 6, 7]]], EOS, np.array([0.5, -1], np.float32))
    rows = LabelledRows(held, GPT, 9, causal=True)
    batch = all_rows(rows)
    np.testing.assert_array_equal(batch["tokens"], [[BOS, 1, 2, EOS, 4, EOS, 0, 0, 0], [BOS, 3, 4, 5, EOS, 5, 6, 7, EOS]])
    assert batch["last_position"].tolist() == [5, 8] and batch["last_position"].dtype == np.int32
    assert batch["label"].dtype == np.float32 and batch["label"].tolist() == [0.5, -1]
    bare = all_rows(LabelledRows(Held([[[1, 2], [3]]], None), BARE, 3, causal=True))
    np.testing.assert_array_equal(bare["tokens"], [[1, 2, 0], [3, 0, 0]])
    assert bare["last_position"].tolist() == [1, 0] and "label" not in bare and "label_mask" not in bare


def test_rows_are_any_records_in_any_order():
    held = Held([[[number] * number for number in range(1, 9)]], SEP, np.arange(8, dtype=np.int32))
    rows = LabelledRows(held, BERT, 12, causal=False)
    some = np.array([6, 0, 6, 3])
    batch = rows.rows(some, some.astype(np.uint64), some.astype(np.uint64))
    assert batch["label"].tolist() == [6, 0, 6, 3] and [row[1] for row in batch["tokens"].tolist()] == [7, 1, 7, 4]
    begins = held.streams["text"].offsets
    assert rows.spans(some, some, some) == [[(begins[number], begins[number] + number + 1)] for number in some]


@pytest.mark.parametrize("room", [1, 2, 5, 6, 9, 20])
def test_pairs_are_cut_as_the_tokenizers_library_does(room):
    """longest_first of its Rust code, which transformers' fast tokenizers are."""
    library = Tokenizer(models.WordLevel({"a": 1, "b": 2, "[UNK]": 0}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    library.enable_truncation(room, strategy="longest_first")
    lengths = np.array(list(itertools.product(range(12), repeat=2)))
    expected = []
    for first, second in lengths.tolist():
        ids = library.encode("a " * first, "b " * second).ids
        expected.append([ids.count(1), ids.count(2)])
    np.testing.assert_array_equal(truncated(lengths, room), expected)
    np.testing.assert_array_equal(truncated(lengths[:, :1], room), np.minimum(lengths[:, :1], room))


@pytest.mark.parametrize("streams, options, least", [(1, {}, 3), (2, {}, 5), (2, {"separators": 2}, 6)])
def test_rows_too_short_for_any_text_are_refused(streams, options, least):
    held = Held([[[1, 2, 3]]] * streams, SEP)
    with pytest.raises(UserError, match=rf"^data\.sequence_length={least - 1}: .* expected {least} or more"):
        LabelledRows(held, BERT, least - 1, causal=False, **options)
    LabelledRows(held, BERT, least, causal=False, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_a_corpus_decode_to_its_records(tmp_path, causal):
    generator = random.Random(3)
    records = [(f"first {'x' * generator.randint(1, 9)} {number}", f"second {number}", number % 3) for number in range(50)]
    (tmp_path / "a.csv").write_text("sentence1,sentence2,label\n" + "".join(f"{a},{b},{label}\n" for a, b, label in records))
    data = DataSettings(raw=str(tmp_path / "a.csv"), tokenizer="bpe", validation=0)
    task = TaskSettings(name="text_classification")
    corpus = prepare(data, tmp_path / "corpus", vocab_size=310, task=task)
    tokenizer = corpus.tokenizer
    batch = all_rows(LabelledRows(corpus.train, tokenizer.special, 64, causal=causal, token_types=not causal))
    held = HeldRecords.of([record[:2] for record in records], tokenizer)
    in_memory = all_rows(LabelledRows(held, tokenizer.special, 64, causal=causal, token_types=not causal))
    assert in_memory.keys() == batch.keys() - {"label", "label_mask"}
    for name, array in in_memory.items():
        np.testing.assert_array_equal(array, batch[name])
    start, end = tokenizer.special.bos if causal else tokenizer.special.cls, tokenizer.special.eos
    for number, (first, second, label) in enumerate(records):
        row = batch["tokens"][number][batch["segment_ids"][number] == 1].tolist()
        middle = row.index(end)
        assert row[0] == start and row[-1] == end
        assert (tokenizer.decode(row[1:middle]), tokenizer.decode(row[middle + 1:-1])) == (first, second)
        assert batch["label"][number] == label
