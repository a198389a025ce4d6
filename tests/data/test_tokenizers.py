"""Tokenizers: lossless, deterministic, special tokens out of reach of text, the same after saving and loading."""

import inspect
import json
import pickle
import textwrap

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.checks import check
from jaxlm.data.stages import given_tokenizer
from jaxlm.data.tokenizer_training import train_tokenizer
from jaxlm.data.tokenizers import (
    CHARACTERS_FILE,
    ByteTokenizer,
    CharacterTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings, ModelSettings, Settings

TEXTS = ["def add(a, b):\n    return a + b\n\n\nclass Tree:\n\tdef walk(self):\n\t\tyield from self.left.walk()\n",
         "The quick brown fox jumps over the lazy dog. The dog, being lazy, does not mind; the fox was quick.\n",
         "Grüße aus Köln: 日本 und Ελλάδα, naïve café — “quoted” words, and words again, quickly lazily.\n",
         inspect.getsource(textwrap)] * 2
SPELLED = "a [MASK] b <mask> <s></s><pad>[CLS][SEP] <0x41>"


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece_tokenizer(request):
    return train_tokenizer(request.param, TEXTS, 420)


@pytest.fixture(scope="module")
def wordpiece_tokenizer():
    return train_tokenizer("wordpiece", TEXTS, 300, lowercase=True)


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory):
    """A GPT-2-like tokenizer.json, with settings in it that must not matter."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
                                     initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@settings(max_examples=80, deadline=None)
@given(text=st.one_of(st.text(), st.text("ab \n\t\r\u2581<>/s[]MASK0x41é日"), st.sampled_from([*TEXTS, SPELLED])))
def test_encoding_any_text_is_lossless(sentencepiece_tokenizer, text):
    for tokenizer in (sentencepiece_tokenizer, ByteTokenizer({})):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not tokenizer.special.ids.intersection(ids)
        assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]


def test_special_ids(sentencepiece_tokenizer, wordpiece_tokenizer):
    special = sentencepiece_tokenizer.special
    assert (special.pad, special.unk, special.bos, special.eos, special.mask) == (0, 1, 2, 3, 4)
    assert (special.cls, special.sep) == (2, 3)
    names = [sentencepiece_tokenizer.processor.id_to_piece(token) for token in range(5)]
    assert names == ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    special = wordpiece_tokenizer.special
    assert (special.pad, special.unk, special.cls, special.sep, special.mask, special.bos, special.eos) == (0, 1, 2, 3, 4, 2, 3)
    names = [wordpiece_tokenizer.tokenizer.id_to_token(token) for token in range(5)]
    assert names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert sentencepiece_tokenizer.decode([2, *sentencepiece_tokenizer.encode("x y"), 4, 3, 0]) == "x y"


def test_text_that_spells_a_special_token_is_plain_text(wordpiece_tokenizer, byte_level_file):
    byte_level = load_tokenizer(byte_level_file)
    for tokenizer in (wordpiece_tokenizer, byte_level):
        ids = tokenizer.encode(SPELLED + "<|endoftext|>")
        assert not (tokenizer.special.ids - {tokenizer.special.unk}).intersection(ids)
    assert byte_level.decode(byte_level.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_training_is_deterministic(kind):
    digests = [train_tokenizer(kind, TEXTS, 400, lowercase=lowercase).digest for lowercase in (False, True, False, True)]
    assert digests[:2] == digests[2:] and digests[0] != digests[1]


def test_wordpiece_is_greedy_longest_match(wordpiece_tokenizer):
    vocabulary = wordpiece_tokenizer.tokenizer.get_vocab()

    def pieces(word):
        found, start = [], 0
        while start < len(word):
            stop = next((stop for stop in range(len(word), start, -1)
                         if ("##" * (start > 0) + word[start:stop]) in vocabulary), None)
            if stop is None:
                return [1]
            found.append(vocabulary["##" * (start > 0) + word[start:stop]])
            start = stop
        return found

    for word in ("quickly", "laziness", "foxes", "naive", "return", "walker", "zebra", "lazy"):
        assert wordpiece_tokenizer.encode(word) == pieces(word)
    assert wordpiece_tokenizer.encode("NAÏVE Café") == pieces("naive") + pieces("cafe")


def test_vocabulary_in_bert_order(wordpiece_tokenizer):
    vocabulary = wordpiece_tokenizer.tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(300)) and wordpiece_tokenizer.vocab_size == 300


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_impossible_vocabulary_sizes_name_the_possible_one(kind, capfd):
    with pytest.raises(UserError, match=r"^model\.vocab_size: 100000 .* at most (\d+) tokens$") as error:
        train_tokenizer(kind, TEXTS, 100_000)
    largest = int(str(error.value).split()[-2])
    assert train_tokenizer(kind, TEXTS, largest).vocab_size == largest
    with pytest.raises(UserError, match=r"^model\.vocab_size: 10 .* at least (\d+) tokens$"):
        train_tokenizer(kind, TEXTS, 10)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(kind, ["", "\n"], 300)
    assert capfd.readouterr() == ("", "")


def test_lowercase_strips_accents_only_of_letters_that_have_them():
    tokenizer = train_tokenizer("bpe", TEXTS, 380, lowercase=True)
    assert tokenizer.decode(tokenizer.encode("Éa\u0301 KÖLN Ελλάδα 가 日本\n")) == "ea koln ελλαδα 가 日本\n"


def test_very_long_lines_train(tmp_path):
    assert train_tokenizer("bpe", [" ".join(["longest", "line", "of", "words"] * 40_000)], 280).vocab_size == 280


def test_bytes():
    tokenizer = ByteTokenizer({})
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    special = tokenizer.special
    assert (special.pad, special.bos, special.cls, special.eos, special.sep, special.mask) == (256, 257, 257, 258, 258, 259)
    assert tokenizer.vocab_size == 260 and tokenizer.decode([257, 104, 105, 258, 0xFF]) == "hi\ufffd"


def test_characters():
    tokenizer = CharacterTokenizer.of("hello wörld\n", end_mark=True)
    assert tokenizer.vocab_size == len(set("hello wörld\n")) + 1 and tokenizer.special.eos == tokenizer.vocab_size - 1
    text = "hold\nrow ö"
    assert tokenizer.encode(text) == [sorted(set("hello wörld\n")).index(character) for character in text]
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.special.eos]) == text
    assert CharacterTokenizer.of("ab", end_mark=False).vocab_size == 2
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) at position 2 is not among the 10 characters"):
        tokenizer.encode("heé")


def starts(tokenizer, text):
    return [bool(tokenizer.starts_word[token]) for token in tokenizer.encode(text)]


def test_starts_word(sentencepiece_tokenizer, wordpiece_tokenizer, byte_level_file):
    characters = CharacterTokenizer.of("ab c,日本é", end_mark=False)
    assert starts(characters, "ab, c日本é") == [False, False, True, True, False, True, True, False]
    assert starts(ByteTokenizer({}), "a b\né") == [False, True, False, True, False, False]
    assert starts(wordpiece_tokenizer, "quickly, zzlazy") == [not token.startswith("##") for token in
                                                             wordpiece_tokenizer.tokenizer.encode("quickly, zzlazy").tokens]
    for tokenizer in (sentencepiece_tokenizer, load_tokenizer(byte_level_file)):
        text = "fox jumps over, it"
        assert sum(starts(tokenizer, text)) >= 4  # three blanks and the comma, the first word has nothing before it
        words = tokenizer.decode([token for token in tokenizer.encode(text) if tokenizer.starts_word[token]])
        assert words.count(" ") == 3 and "," in words
        assert tokenizer.starts_word.shape == (tokenizer.vocab_size,)
        assert all(tokenizer.starts_word[token] for token in tokenizer.special.ids)


def test_saved_loaded_and_sent_it_stays_the_same(sentencepiece_tokenizer, wordpiece_tokenizer, byte_level_file, tmp_path):
    text = "The quick brown fox"
    given = [sentencepiece_tokenizer, wordpiece_tokenizer, load_tokenizer(byte_level_file), ByteTokenizer({}),
             CharacterTokenizer.of(text, end_mark=True)]
    assert len({tokenizer.digest for tokenizer in given}) == len(given)
    for number, tokenizer in enumerate(given):
        tokenizer.save(tmp_path / str(number))
        copies = [load_tokenizer(tmp_path / str(number)), pickle.loads(pickle.dumps(tokenizer)),
                  Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))]
        for copy in copies:
            assert (copy.kind, copy.digest, copy.special, copy.vocab_size) == (
                tokenizer.kind, tokenizer.digest, tokenizer.special, tokenizer.vocab_size)
            assert copy.encode(text) == tokenizer.encode(text)


def test_the_digest_does_not_depend_on_where_it_lies(sentencepiece_tokenizer, tmp_path):
    for folder in ("one", "two"):
        sentencepiece_tokenizer.save(tmp_path / folder)
    model = tmp_path / "elsewhere.model"
    model.write_bytes((tmp_path / "one" / "tokenizer.model").read_bytes())
    digests = {load_tokenizer(path).digest for path in (tmp_path / "one", tmp_path / "two", model)}
    assert digests == {sentencepiece_tokenizer.digest}


def test_a_huggingface_file_is_read_without_its_padding(byte_level_file):
    tokenizer = load_tokenizer(byte_level_file)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(["fox", "a longer text"]) == [tokenizer.encode("fox"), tokenizer.encode("a longer text")]
    assert tokenizer.special.eos == tokenizer.special.sep == 0 and tokenizer.special.pad is None


def test_special_tokens_declared_beside_a_huggingface_file(byte_level_file, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_level_file.read_bytes())
    config = {"pad_token": {"content": "!"}, "mask_token": "a", "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = json.loads(byte_level_file.read_text())["model"]["vocab"]
    special = load_tokenizer(tmp_path).special
    assert (special.pad, special.mask, special.eos) == (vocabulary["!"], vocabulary["a"], 0)


def test_wrong_files_are_refused_by_name(tmp_path, sentencepiece_tokenizer):
    (tmp_path / "bad.model").write_bytes(b"nothing of the kind")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    (tmp_path / "empty").mkdir()
    sentencepiece_tokenizer.save(tmp_path / "changed")
    (tmp_path / "changed" / "tokenizer.model").write_bytes(b"")
    expected = {"bad.model": "not a SentencePiece model", "bad.json": "not a Hugging Face tokenizer", "empty": "expected one of",
                "changed": "tokenizer.model", "bbpe": "data.tokenizer.*did you mean 'bpe'"}
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(tmp_path / name if name != "bbpe" else name)
        assert name in str(error.value) and "\n" not in str(error.value)
    CharacterTokenizer.of("abc", end_mark=False).save(tmp_path / "other")
    (tmp_path / "other" / CHARACTERS_FILE).write_text('"abd"')
    with pytest.raises(UserError, match="not those that were saved"):
        load_tokenizer(tmp_path / "other")
    for damaged in ({}, {"kind": "sentencepiece"}, {"kind": "bites", "files": {}, "special": {}}):
        with pytest.raises(UserError, match=r"^tokenizer: "):
            Tokenizer.from_dict(damaged)


# ----------------------------------------------------------------------------------------------------------- end tokens

def word_level(folder, names, plain=()):
    """A tokenizer.json of a few words, with these special tokens, and `plain`: added tokens that are not called
    special."""
    tokenizer = hf.Tokenizer(hf.models.WordLevel({"some": 0, "text": 1, "end": 2, "s": 3, "[": 4, "]": 5, "?": 6}, unk_token="?"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([*names])
    tokenizer.add_tokens([*plain])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def beside(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def role(folder, name="eos"):
    """The token that has this role, as it is spelled."""
    tokenizer = load_tokenizer(folder)
    names = {token: spelling for spelling, token in tokenizer.vocabulary.items()}
    return names.get(getattr(tokenizer.special, name))


@pytest.mark.parametrize("end", [
    "<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|eos|>",
    "<EOS_TOKEN>", "<|end|>", "<end_of_turn>", "<|endofturn|>", "[|endofturn|]", "<|END_OF_TURN_TOKEN|>", "<|end_of_document|>"])
def test_end_tokens_in_any_usual_spelling(tmp_path, end):
    """Issue 14, line 5."""
    assert role(word_level(tmp_path, ["<unk>", "<|start|>", end, "<|header|>"])) == end


def test_a_word_that_looks_like_an_end_token_is_none(tmp_path):
    """`end`, `s` and `[end]` are words of a text; only tokens that are set apart are known by unusual spellings."""
    assert role(word_level(tmp_path, ["<unk>"])) is None


@pytest.mark.parametrize(("names", "files", "expected"), [
    # what is declared, in the files and forms of transformers 4 and 5
    (["<|a|>", "<|b|>"], {"tokenizer_config": {"eos_token": "<|b|>"}}, "<|b|>"),
    (["<|a|>", "<|b|>"], {"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "<|b|>"}}}, "<|b|>"),
    (["<|a|>", "<|b|>"], {"special_tokens_map": {"eos_token": {"content": "<|b|>", "lstrip": False}}}, "<|b|>"),
    (["<|a|>", "<|b|>"], {"generation_config": {"eos_token_id": 8}}, "<|b|>"),
    (["<|a|>", "<|b|>"], {"generation_config": {"eos_token_id": [8, 7]}}, "<|b|>"),
    (["<|a|>", "<|b|>"], {"config": {"eos_token_id": 8}}, "<|b|>"),
    # the nearer to the tokenizer, the more it counts; an id that is a word, or none, is of another model
    (["<|a|>", "<|b|>"], {"tokenizer_config": {"eos_token": "<|a|>"}, "config": {"eos_token_id": 8}}, "<|a|>"),
    (["<|a|>", "</s>"], {"config": {"eos_token_id": 2}}, "</s>"),
    (["<|a|>", "</s>"], {"generation_config": {"eos_token_id": 99}, "tokenizer_config": {"eos_token": None}}, "</s>"),
    # text is documents: the end of a text before the end of a turn, wherever it is found (Llama 3, Qwen, DeepSeek)
    (["<|end_of_text|>", "<|eot_id|>"], {"tokenizer_config": {"eos_token": "<|eot_id|>"}}, "<|end_of_text|>"),
    (["<|x|>", "<|eot_id|>"], {"tokenizer_config": {"eos_token": "<|eot_id|>"}, "generation_config": {"eos_token_id": [8, 7]}},
     "<|x|>"),
    (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|endoftext|>"),
    (["<|im_start|>", "<|im_end|>"], {"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
    (["<eos>", "<end_of_turn>"], {"generation_config": {"eos_token_id": [8, 7]}}, "<eos>"),
    (["[CLS]", "[SEP]"], {}, "[SEP]"),
])
def test_which_token_ends_a_document(tmp_path, names, files, expected):
    """Issue 14, line 5: ids 7 and 8 are the first two of `names`."""
    assert role(beside(word_level(tmp_path, names), **files)) == expected


def test_other_roles_have_other_spellings_too(tmp_path):
    folder = word_level(tmp_path, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"])
    assert role(folder, "bos") == "<｜begin▁of▁sentence｜>" and role(folder, "pad") == "<｜▁pad▁｜>"
    assert role(folder, "unk") == "?"  # what the model itself puts for what it does not know


def test_an_end_token_can_be_named(tmp_path):
    """Issue 14, line 5: data.end_token; also one that the file does not call special, and never from text that
    spells it."""
    folder = word_level(tmp_path / "given", ["</s>"], plain=["<|done|>"])
    tokenizer = given_tokenizer(DataSettings(tokenizer=str(folder), end_token="<|done|>"))
    end = tokenizer.vocabulary["<|done|>"]
    assert tokenizer.special.eos == end and end not in tokenizer.encode("some <|done|> text")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").special.eos == end
    assert tokenizer.digest != load_tokenizer(folder).digest
    with pytest.raises(UserError, match=r"data\.end_token: '<\|dome\|>' is not a token.*did you mean '<\|done\|>'"):
        given_tokenizer(DataSettings(tokenizer=str(folder), end_token="<|dome|>"))
    with pytest.raises(UserError, match=r"data\.end_token=</s>: data\.tokenizer=bpe has an end token of its own"):
        check(Settings(data=DataSettings(raw="x", end_token="</s>"), model=ModelSettings(vocab_size=300)))


def test_a_sentencepiece_model_takes_what_is_declared_beside_it(sentencepiece_tokenizer, tmp_path):
    sentencepiece_tokenizer.save(tmp_path)
    (tmp_path / "jaxlm_tokenizer.json").unlink()
    assert role(tmp_path) == "</s>" and role(tmp_path, "unk") == "<unk>"
    assert role(beside(tmp_path, tokenizer_config={"eos_token": "<mask>", "unk_token": "</s>"})) == "<mask>"
    assert role(tmp_path, "unk") == "<unk>"


def test_files_beside_a_tokenizer_that_are_no_json_objects_are_named(tmp_path):
    for content in ("[]", "{", '"a"'):
        (word_level(tmp_path, ["</s>"]) / "generation_config.json").write_text(content)
        with pytest.raises(UserError, match=r"generation_config\.json"):
            load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------- the text behind a prompt

def sentencepiece_with_dummy_prefix():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=330,
                                             byte_fallback=True, minloglevel=3)
    return SentencePieceTokenizer({"tokenizer.model": model.getvalue()})


def metaspace():
    """As T5 and Llama have it in their tokenizer.json."""
    tokenizer = hf.Tokenizer(hf.models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = hf.pre_tokenizers.Metaspace(), hf.decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, hf.trainers.UnigramTrainer(vocab_size=300, show_progress=False, unk_token="<unk>",
                                                                    special_tokens=["<unk>", "</s>"]))
    return JsonTokenizer({"tokenizer.json": tokenizer.to_str().encode()})


@pytest.fixture(scope="module")
def of_all_kinds(sentencepiece_tokenizer, wordpiece_tokenizer, byte_level_file):
    return [sentencepiece_tokenizer, wordpiece_tokenizer, load_tokenizer(byte_level_file), sentencepiece_with_dummy_prefix(),
            metaspace(), ByteTokenizer({}), CharacterTokenizer.of("".join(TEXTS), end_mark=True)]


@pytest.mark.parametrize("text", ["The quick brown fox", "it is lazy, and minds", "naïve café: 日本 und Köln", "a  b\n\nc"])
def test_the_blank_between_a_prompt_and_what_follows(of_all_kinds, text):
    """Issue 14, line 4: a prompt that ends at any token, and the rest behind it, read as the whole does."""
    for tokenizer in of_all_kinds:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        for end in range(1, len(ids)):
            prompt = tokenizer.decode(ids[:end])
            if "\ufffd" not in prompt:  # no prompt ends inside a character
                assert prompt + tokenizer.decode_after(ids[:end], ids[end:], prompt) == whole, (type(tokenizer), prompt)


def test_a_word_behind_a_prompt_has_its_blank(of_all_kinds):
    """Which decoding the continuation alone loses for WordPiece, Metaspace, and SentencePiece with its dummy prefix."""
    lost = 0
    for tokenizer in of_all_kinds:
        ids, prompt = tokenizer.encode("the lazy dog"), tokenizer.encode("the lazy")
        assert ids[:len(prompt)] == prompt
        assert tokenizer.decode_after(prompt, ids[len(prompt):], "the lazy") == " dog"
        lost += tokenizer.decode(ids[len(prompt):]) == "dog"
    assert lost == 3


def test_a_blank_that_the_prompt_has_is_not_there_twice(wordpiece_tokenizer):
    """WordPiece has no token for the blank at a prompt's end, and writes one before the next word."""
    ids = wordpiece_tokenizer.encode("the lazy ")
    assert wordpiece_tokenizer.decode_after(ids, wordpiece_tokenizer.encode("dog"), "the lazy ") == "dog"
    assert wordpiece_tokenizer.decode_after(ids, wordpiece_tokenizer.encode("dog"), "the lazy") == " dog"


def test_a_prompt_that_decoding_changes(wordpiece_tokenizer):
    """The prompt stays as it was typed; what comes after it is found behind its letters."""
    ids = wordpiece_tokenizer.encode("The lazy , dog")  # "the lazy, dog"
    assert wordpiece_tokenizer.decode_after(ids, wordpiece_tokenizer.encode("jumps"), "The lazy , dog") == " jumps"


def test_a_character_cut_by_the_end_of_the_prompt():
    """Bytes that go on with no character are none; those before them stay as they are."""
    tokenizer = ByteTokenizer({})
    new = [*"日".encode()[1:], *"本".encode()]
    assert tokenizer.decode_after(tokenizer.encode("é"), new, "é") == "\ufffd\ufffd本"
