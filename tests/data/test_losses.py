"""Issue 14, line 3: what a tokenizer has no tokens for is kept where it can be, and else counted, said, and no bits
per byte."""

import json
import random

import pytest
import tokenizers as hf

from jaxlm.data.corpus import Corpus
from jaxlm.data.description import describe
from jaxlm.data.prepare import prepare
from jaxlm.data.stages import count_lost
from jaxlm.data.tokenizer_training import LONGEST_WORD, train_tokenizer
from jaxlm.data.tokenizers import ByteTokenizer, CharacterTokenizer, load_tokenizer
from jaxlm.settings import DataSettings

UNKNOWN = 1
# 3,000 ideographs, the rarest of them once: as in Chinese, more characters than any alphabet has letters.
IDEOGRAPHS = [chr(0x4E00 + number) for number in range(3000)]
SHARES = [1 / (1 + rank) for rank in range(3000)]
CHINESE = ["".join(random.Random(line).choices(IDEOGRAPHS, SHARES, k=200)) for line in range(60)]
CHINESE.append("".join(IDEOGRAPHS))


def test_wordpiece_has_no_limit_of_a_thousand_characters():
    """Which would make an [UNK] of 2,000 of these. Left out is at most what 0.9995 of the text does without."""
    tokenizer = train_tokenizer("wordpiece", [*CHINESE, "and some words of English, and words again\n" * 20], 3035)
    unknown = sum(tokenizer.encode(text).count(UNKNOWN) for text in CHINESE)
    assert unknown <= 0.0005 * sum(map(len, CHINESE)) + 1 and tokenizer.vocab_size == 3035


def test_wordpiece_fills_a_vocabulary_with_characters_where_there_are_no_more_words():
    texts = ["".join(IDEOGRAPHS[:500]) * 2, "".join(IDEOGRAPHS[500:600])]
    tokenizer = train_tokenizer("wordpiece", texts, 5 + 600)
    assert [tokenizer.encode(text).count(UNKNOWN) for text in texts] == [0, 0]


def test_characters_left_out_of_the_alphabet_are_said(capsys):
    texts = ["some words, and some more words\n" * 300, "日"]
    tokenizer = train_tokenizer("wordpiece", texts, 30)
    assert tokenizer.encode("日") == [UNKNOWN]
    assert "1 of 11 characters get no token (1 of the sample's 7,801), and words" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "vocab_size"), [
    ("ราชอาณาจักรไทย" * 12, 50), ("カタカナ" * 40, 40), ("".join(random.Random(0).choices("acgt", k=LONGEST_WORD)), 90)])
def test_words_of_more_than_a_hundred_letters(word, vocab_size):
    """Thai, DNA and kana have no blanks: BERT's WordPiece makes one [UNK] of what is longer than 100 letters."""
    assert len(word) > 100
    tokenizer = train_tokenizer("wordpiece", [word, "some words"], vocab_size)
    assert UNKNOWN not in tokenizer.encode(word) and tokenizer.decode(tokenizer.encode(word)) == word
    longer = word * 30  # cut, and still all there
    assert tokenizer.decode(tokenizer.encode(longer)).replace(" ", "") == longer


# ----------------------------------------------------------------------------------------------------- given tokenizers

TEXT = [f"plain words and {number} numbers" for number in range(50)]
DNA = ["".join(random.Random(line).choices("acgt", k=150)) for line in range(50)]


def bert(folder, lowercase=False):
    """A WordPiece tokenizer as Hugging Face has them."""
    tokenizer = hf.BertWordPieceTokenizer(lowercase=lowercase)
    tokenizer.train_from_iterator([*TEXT, *(line[:20] for line in DNA)], vocab_size=120, show_progress=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def prepared(tmp_path, lines, tokenizer, **keys):
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = DataSettings(raw=str(tmp_path / "text.txt"), document="line", tokenizer=str(tokenizer), validation=0.2, **keys)
    return prepare(data, tmp_path / "corpus", processes=1)


def test_unknown_tokens_are_counted_and_warned_of(tmp_path):
    """Every line of random DNA is one [UNK] and an end mark: nothing is left of it, so there are no bits per byte of
    it."""
    corpus = prepared(tmp_path, DNA, bert(tmp_path / "bert"))
    for documents in (corpus.train, corpus.validation):
        assert documents.entry["unknown_tokens"] == documents.num_documents == documents.num_tokens / 2
        assert documents.entry["lost_characters"] == 150 * documents.num_documents
    assert corpus.loses_text
    said = [line for line in describe(corpus) if line.startswith("WARNING")]
    assert len(said) == 2 and all("50 % of the" in line and "most often" in line for line in said)
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())["splits"]["train"]
    assert set(report["unknown"]) <= {line[:20] for line in DNA} and len(report["unknown"]) == 20


def test_a_few_unknown_tokens_are_said_and_no_warning(tmp_path):
    lines = [*TEXT * 40, "日 日"]
    corpus = prepared(tmp_path, lines, bert(tmp_path / "bert"))
    counts = [documents.entry["unknown_tokens"] for documents in (corpus.train, corpus.validation)]
    assert sum(counts) == 2
    described = "\n".join(describe(corpus))
    assert f"unknown     train {counts[0]} of {corpus.train.num_tokens:,} tokens (" in described and "WARNING" not in described


@pytest.mark.parametrize(("lines", "lowercase", "lost"), [
    (TEXT, True, 0),  # nothing in it that this tokenizer would change
    ([line.upper() for line in TEXT], True, None), ([line.replace("s", "é") for line in TEXT], True, None),
    ([line.replace(" ", "  ") for line in TEXT], True, None)])
def test_text_that_is_changed_is_lost(tmp_path, lines, lowercase, lost):
    """Case, accents and blanks: counted where tokens do not decode to the text, though none is unknown."""
    corpus = prepared(tmp_path, lines, bert(tmp_path / "bert", lowercase))
    assert corpus.validation.entry["unknown_tokens"] == 0 and corpus.loses_text == (lost is None)
    if lost is not None:
        assert corpus.validation.entry["lost_characters"] == lost


def test_characters_that_a_tokenizer_drops_without_a_token_are_lost(tmp_path):
    """BPE without an unknown token leaves out what it does not know."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.train_from_iterator(TEXT, hf.trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False))
    tokenizer.decoder = hf.decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert not prepared(tmp_path, TEXT, tmp_path / "tokenizer.json").loses_text
    (tmp_path / "other").mkdir()
    corpus = prepared(tmp_path / "other", [line.replace("w", "日") for line in TEXT], tmp_path / "tokenizer.json")
    assert corpus.validation.entry["lost_characters"] == corpus.validation.num_documents and corpus.loses_text


def test_an_older_corpus_does_not_say_what_it_lost(tmp_path):
    """Its tokenizer does: one that can lose text may have lost some."""
    for name, tokenizer, loses in (("bert", bert(tmp_path / "given"), True), ("bytes", "bytes", False)):
        (tmp_path / name).mkdir()
        prepared(tmp_path / name, TEXT, tokenizer)
        manifest = tmp_path / name / "corpus" / "manifest.json"
        content = json.loads(manifest.read_text())
        for split in content["splits"].values():
            del split["unknown_tokens"], split["lost_characters"]
        manifest.write_text(json.dumps(content))
        corpus = Corpus(tmp_path / name / "corpus")
        assert corpus.loses_text == loses and "train not counted" in "\n".join(describe(corpus))


def test_documents_that_run_together_are_said(tmp_path):
    """Issue 14, line 5: a tokenizer without an end token."""
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"plain": 0, "?": 1}, unk_token="?"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    described = describe(prepared(tmp_path, ["plain"] * 10, tmp_path / "tokenizer.json"))
    assert any("documents run together" in line and "data.end_token" in line for line in described)


def test_which_tokenizers_lose_no_text(tmp_path):
    texts = ["some words, and some more words, and again\n" * 20]
    for kind in ("bpe", "unigram"):
        assert train_tokenizer(kind, texts, 278).lossless and not train_tokenizer(kind, texts, 278, lowercase=True).lossless
    assert ByteTokenizer({}).lossless and CharacterTokenizer.of("ab", end_mark=True).lossless
    assert not train_tokenizer("wordpiece", texts, 40).lossless and not load_tokenizer(bert(tmp_path / "bert")).lossless


def test_lost_characters_are_those_in_which_two_texts_differ():
    pairs = [("abc", "abc"), ("abc", "ab"), ("ABc", "abc"), ("a b", "ab"), ("ab", "a b"), ("ab", "ba")]
    assert [count_lost(*pair) for pair in pairs] == [0, 1, 2, 1, 1, 1]
    assert count_lost("a" * 100, "") == 100
