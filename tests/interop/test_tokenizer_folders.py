"""Tokenizers in and out: every kind is written as a folder whose `tokenizer.json` gives the same ids, and what came
from a Hugging Face folder goes back as it came. (transformers itself: tests/golden/check_tokenizers.py.)"""

import inspect
import json
import shutil
import textwrap
from pathlib import Path

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.tokenizer_training import train_tokenizer
from jaxlm.data.tokenizers import ByteTokenizer, CharacterTokenizer, JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from jaxlm.errors import RunError, UserError
from jaxlm.interop import tokenizers as interop
from jaxlm.interop.tokenizers import read_tokenizer, special_ids, write_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
TEXTS = [inspect.getsource(textwrap), "Grüße aus Köln: 日本 und Ελλάδα, naïve café — “quoted” words, quickly lazily.\n"] * 2
BERT = {"model_type": "bert", "max_length": 64, "causal": False}


def given_file():
    """A byte-level tokenizer.json that says nothing of what stands around texts, with BERT's special tokens."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = hf.pre_tokenizers.ByteLevel(False), hf.decoders.ByteLevel()
    tokenizer.post_processor = hf.processors.ByteLevel(trim_offsets=True)
    tokenizer.train_from_iterator(TEXTS, hf.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["[PAD]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
    return JsonTokenizer({"tokenizer.json": tokenizer.to_str().encode()})


MADE = {
    "bpe": lambda: train_tokenizer("bpe", TEXTS, 420), "bpe lowercase": lambda: train_tokenizer("bpe", TEXTS, 420, True),
    "unigram": lambda: train_tokenizer("unigram", TEXTS, 420), "bytes": lambda: ByteTokenizer({}),
    "unigram lowercase": lambda: train_tokenizer("unigram", TEXTS, 420, True), "given": given_file,
    "wordpiece": lambda: train_tokenizer("wordpiece", TEXTS, 300, True),
    "wordpiece cased": lambda: train_tokenizer("wordpiece", TEXTS, 300),
}


@pytest.fixture(scope="module", params=[*MADE])
def written(request, tmp_path_factory):
    """A tokenizer, and the file that a BERT with it is exported with."""
    tokenizer, folder = MADE[request.param](), tmp_path_factory.mktemp("exported")
    check = write_tokenizer(tokenizer, folder, **BERT)
    assert (check.strings, check.differences, check.notes) == (3000, 0, [])
    file = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.encode_special_tokens = True
    return tokenizer, file, folder


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(), st.text("ab  \n\t\u2581<>/s[]MASK0x41éÉ日\u0301\u200d")))
def test_every_text_has_the_same_ids(written, text):
    tokenizer, file, _ = written
    ids = tokenizer.encode(text)
    assert file.encode(text, add_special_tokens=False).ids == ids
    special = tokenizer.special
    row, pair = file.encode(text), file.encode(text, "a b")
    assert row.ids == [special.cls, *ids, special.sep]
    assert pair.ids == [special.cls, *ids, special.sep, *tokenizer.encode("a b"), special.sep]
    assert pair.type_ids == [0] * (len(ids) + 2) + [1] * (len(pair.ids) - len(ids) - 2)


def test_special_tokens_are_declared(written):
    tokenizer, file, folder = written
    config, declared = (json.loads((folder / name).read_text()) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    assert (config["tokenizer_class"], config["model_max_length"]) == ("PreTrainedTokenizerFast", 64)
    assert config["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
    assert {"cls_token", "sep_token", "mask_token", "pad_token"} <= declared.keys()
    for role, name in declared.items():
        token = getattr(tokenizer.special, role.removesuffix("_token"))
        assert config[role] == name and file.token_to_id(name) == token
        assert config["added_tokens_decoder"][str(token)]["content"] == name
        assert config["added_tokens_decoder"][str(token)]["special"] is True
    back = load_tokenizer(folder)
    assert back.special == tokenizer.special and back.vocab_size == tokenizer.vocab_size
    assert special_ids(tokenizer)["mask_token_id"] == tokenizer.special.mask


def test_decoding_is_the_same(written):
    tokenizer, file, _ = written
    for text in ("The quick brown  fox.\n", "naïve 日本", "x\u2581y"):
        ids = tokenizer.encode(text)
        assert file.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("start", [None, 257])
def test_causal_models_begin_as_their_rows_do(tmp_path, start):
    tokenizer = ByteTokenizer({})
    write_tokenizer(tokenizer, tmp_path, model_type="gpt2", max_length=99, causal=True, start=start)
    file = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    declared = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert file.encode("hé").ids == [*([] if start is None else [start]), *"hé".encode()]
    assert declared == {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    assert "token_type_ids" not in json.loads((tmp_path / "tokenizer_config.json").read_text())["model_input_names"]


def test_characters(tmp_path):
    """A character that is not known is an error there, as it is here."""
    tokenizer = CharacterTokenizer.of("".join(TEXTS), end_mark=True)
    assert write_tokenizer(tokenizer, tmp_path, model_type="gpt2", max_length=9, causal=True).differences == 0
    file = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert file.encode("der Text\n").ids == tokenizer.encode("der Text\n") and file.token_to_id("</s>") == tokenizer.special.eos
    with pytest.raises(Exception, match="Missing"):
        file.encode("一")
    assert file.decode(tokenizer.encode("a  b\nc")) == "a  b\nc"
    again = load_tokenizer(tmp_path)
    assert again.encode("der Text\n") == tokenizer.encode("der Text\n") and not again.lossless
    with pytest.raises(UserError, match=r"^tokenizer: a text cannot be encoded"):
        again.encode("一")
    write_tokenizer(CharacterTokenizer.of("ab", end_mark=False), tmp_path, model_type="gpt2", max_length=9, causal=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_came_goes_back_as_it_came(name, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for path in (GOLDEN / name).iterdir():
        shutil.copy(path, tmp_path / "in")
    tokenizer = load_tokenizer(tmp_path / "in")
    tokenizer.save(tmp_path / "run")
    causal = {"model_type": name, "max_length": 64, "causal": True, "start": tokenizer.special.eos}
    check = write_tokenizer(load_tokenizer(tmp_path / "run"), tmp_path / "out", **(BERT if tokenizer.has_framing else causal))
    assert check.differences == 0
    for path in (tmp_path / "in").iterdir():
        if path.name != "config.json":  # the model's
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    again = load_tokenizer(tmp_path / "out")
    assert (again.special, again.vocab_size, again.framing) == (tokenizer.special, tokenizer.vocab_size, tokenizer.framing)
    assert again.digest == tokenizer.digest


def test_a_given_file_that_says_all_is_not_touched(tmp_path):
    tokenizer = JsonTokenizer({"tokenizer.json": (GOLDEN / "modernbert" / "tokenizer.json").read_bytes()})
    write_tokenizer(tokenizer, tmp_path, model_type="modernbert", max_length=64, causal=False)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.files["tokenizer.json"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["mask_token"] == "[MASK]"


def test_a_folder_with_other_ids_is_not_written_silently(tmp_path, monkeypatch):
    tokenizer = ByteTokenizer({})
    right = interop.content_of(tokenizer, tokenizer.framing)
    wrong = right.replace(b'"a": 97', b'"a": 98').replace(b'"b": 98', b'"b": 97')
    assert wrong != right
    monkeypatch.setattr(interop, "content_of", lambda *arguments: wrong)
    with pytest.raises(RunError, match=r"^tokenizer: [\d,]+ of 3,000 texts have other ids in the written tokenizer\.json"):
        write_tokenizer(tokenizer, tmp_path, **BERT)
    framed = json.loads(right)
    framed["post_processor"]["special_tokens"]["<s>"]["ids"] = [256]
    monkeypatch.setattr(interop, "content_of", lambda *arguments: json.dumps(framed).encode())
    with pytest.raises(RunError, match="200 of 3,000"):
        write_tokenizer(tokenizer, tmp_path, **BERT)


def test_models_that_cannot_be_told_exactly_are_counted(tmp_path):
    """A unigram model from elsewhere: SentencePiece's rounding errors decide between equally good cuts."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter("".join(TEXTS).splitlines()), model_writer=model,
                                             vocab_size=300, model_type="unigram", minloglevel=3, hard_vocab_limit=False)
    tokenizer = SentencePieceTokenizer({"tokenizer.model": model.getvalue()})
    check = write_tokenizer(tokenizer, tmp_path, model_type="llama", max_length=64, causal=True, start=1)
    assert 0 < check.differences < 60 and f"{check.differences} of 3,000 texts have other ids" in check.notes[0]
    assert (tmp_path / "tokenizer.model").read_bytes() == model.getvalue()


def test_what_transformers_does_to_qwen2_is_said(tmp_path):
    note, = write_tokenizer(ByteTokenizer({}), tmp_path, model_type="qwen2", max_length=9, causal=True).notes
    assert "PreTrainedTokenizerFast.from_pretrained" in note
    assert not write_tokenizer(load_tokenizer(GOLDEN / "qwen2"), tmp_path, model_type="qwen2", max_length=9, causal=True).notes
    assert not write_tokenizer(ByteTokenizer({}), tmp_path, model_type="qwen3", max_length=9, causal=True).notes


def test_a_tokenizer_and_the_rows_of_its_model():
    assert read_tokenizer(GOLDEN / "qwen2", 512).vocab_size == 364
    assert read_tokenizer(GOLDEN / "bert").special.cls == 3
    with pytest.raises(UserError, match=r"vocab_size=363, but the tokenizer has 364 tokens \(the last is '<tool_call>'"):
        read_tokenizer(GOLDEN / "qwen2", 363)
    with pytest.raises(UserError, match="expected one of"):
        read_tokenizer(GOLDEN)
