"""SentencePiece models as tokenizer.json: the ids of SentencePiece itself, for any text."""

import inspect
import io
import textwrap

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import tokenizer_json as parts
from jaxlm.data.sentencepiece_json import Sentencepiece, charsmap_rules, pipeline
from jaxlm.data.tokenizer_training import train_tokenizer
from jaxlm.data.tokenizers import MODEL_FILE, SentencePieceTokenizer
from jaxlm.errors import UserError

TEXTS = [inspect.getsource(textwrap), "Grüße aus Köln: 日本 und Ελλάδα, naïve café — “quoted” words, <again>, lazily 0x41.\n"] * 2
LETTERS = "abcxyz  \n\t\u2581<>/s0x41é日AÉİǅ\u0301\u0308\u0903\u20dd\u200d\U0001f3fd\u0e33한ﬁ\u00a0\ue000"
PARTS = ["<s>", "</s>", "<0x41>", "<unk>", "<mask>", " ", "the", "    ", "----------", "<pad>", "É", "\u0301"]
ANY = st.one_of(st.text(), st.text(LETTERS), st.lists(st.sampled_from(PARTS)).map("".join))


def converted(tokenizer):
    """The tokenizer.json of a SentencePiece tokenizer, read by the other library."""
    found = pipeline(Sentencepiece.read(tokenizer.files[MODEL_FILE]), blanks=tokenizer.space_mark is not None)
    return tokenizers.Tokenizer.from_str(parts.document(found.pop("model"), **found).decode())


@pytest.fixture(scope="module", params=[(kind, lowercase) for kind in ("bpe", "unigram") for lowercase in (False, True)], ids=str)
def ours(request):
    kind, lowercase = request.param
    tokenizer = train_tokenizer(kind, TEXTS, 460, lowercase)
    return tokenizer, converted(tokenizer)


@settings(max_examples=150, deadline=None)
@given(text=ANY)
def test_what_is_trained_here_is_exact(ours, text):
    tokenizer, other = ours
    ids = tokenizer.encode(text)
    assert other.encode(text, add_special_tokens=False).ids == ids
    assert other.decode(ids) == tokenizer.decode(ids)


def test_long_texts(ours):
    """Whole documents, in which 32-bit sums of scores reach the thousands."""
    tokenizer, other = ours
    for text in (TEXTS[0] * 4, "-" * 5000, " " * 3001 + "x", inspect.getsource(inspect)[:60_000]):
        assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def elsewhere(kind, **options):
    """As others train them: with a blank before each text, blanks collapsed, unknown tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter("".join(TEXTS).splitlines()), model_writer=model,
                                             vocab_size=400, model_type=kind, minloglevel=3, hard_vocab_limit=False, **options)
    return SentencePieceTokenizer({MODEL_FILE: model.getvalue()})


OPTIONS = [{}, {"byte_fallback": True}, {"byte_fallback": True, "add_dummy_prefix": False}, {"remove_extra_whitespaces": False},
           {"byte_fallback": True, "user_defined_symbols": ["\n", "foo", "<tool>"]}]


@pytest.fixture(scope="module", params=range(len(OPTIONS)))
def theirs(request):
    tokenizer = elsewhere("bpe", normalization_rule_name="identity", **OPTIONS[request.param])
    return tokenizer, converted(tokenizer)


@settings(max_examples=80, deadline=None)
@given(text=ANY)
def test_byte_pair_encoding_from_elsewhere_is_exact(theirs, text):
    tokenizer, other = theirs
    assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_unigram_from_elsewhere_is_exact_for_words():
    """Where no two cuts are equally good."""
    tokenizer = elsewhere("unigram", normalization_rule_name="nmt_nfkc")
    other = converted(tokenizer)
    for text in ("the lines of a  text", " ﬁne Ａ ½ x²", "ｶﾞ e\u0301", "width\tis\u00a0it", "\u2581a \u2581", "naïve 日本 Ελλάδα"):
        assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text


def test_rules_of_a_charsmap_are_what_the_normalizer_does():
    """Decoded from the double-array trie, against SentencePiece on every single character."""
    tokenizer = elsewhere("bpe", normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, remove_extra_whitespaces=False)
    rules = charsmap_rules(Sentencepiece.read(tokenizer.files[MODEL_FILE]).proto.normalizer_spec.precompiled_charsmap)
    assert rules["ﬁ"] == "fi" and rules["Ａ"] == "A" and rules["e\u0301"] == "é" and rules["\u0007"] == ""
    for code in (*range(1, 0x3100), *range(0xF900, 0x10000, 3)):
        character = chr(code)
        assert tokenizer.processor.normalize(character).replace("\u2581", " ") == rules.get(character, character), hex(code)


def test_models_without_a_counterpart_are_refused():
    for content, message in ((b"", "not a SentencePiece model"), (b"\xff\xff", "not a SentencePiece model"),
                             (elsewhere("word").files[MODEL_FILE], "is of words or characters"),
                             (elsewhere("bpe", treat_whitespace_as_suffix=True).files[MODEL_FILE], "blanks behind words")):
        with pytest.raises(UserError, match=rf"^tokenizer\.model .*{message}"):
            Sentencepiece.read(content)
