"""Tokenizers of Hugging Face folders: the ids that transformers 5.24 has (tests/golden/make_tokenizers.py), special
tokens, what lies beside them, and one line for each folder that is wrong."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from jaxlm.console.progress import print_once
from jaxlm.data.framing import Framing
from jaxlm.data.stages import given_tokenizer
from jaxlm.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer, vocabulary_size
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
IDS = json.loads((GOLDEN / "ids.json").read_text())
TEXTS = IDS.pop("texts")
NAMES = sorted(IDS)


@pytest.fixture(autouse=True)
def nothing_was_said():
    """What is printed once only is printed again."""
    print_once.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(name):
    tokenizer = load_tokenizer(GOLDEN / name)
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.vocab_size == IDS[name]["size"]
    different = [text for text, ids in zip(TEXTS, IDS[name]["ids"], strict=True) if tokenizer.encode(text) != ids]
    assert different == []


@pytest.mark.parametrize("name", NAMES)
def test_rows_with_special_tokens_are_those_of_transformers(name):
    tokenizer, golden = load_tokenizer(GOLDEN / name), IDS[name]
    framing, one, two = tokenizer.framing, tokenizer.encode("the dog"), tokenizer.encode("a fox")
    if golden["single"] == one:  # the folder asks for none
        assert framing == Framing() or not tokenizer.has_framing
        return
    first, second = framing.token_types
    assert [*framing.start, *one, *framing.end] == golden["single"]
    assert [*framing.start, *one, *framing.middle, *two, *framing.end] == golden["pair"]
    if "llama" not in name and name not in ("gpt2_prefix", "mistral"):  # models without token types
        length = len(framing.start) + len(one) + len(framing.middle)
        assert [first] * length + [second] * (len(golden["pair"]) - length) == golden["types"]


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_are_those_of_transformers(name):
    """Unless transformers has none for a role, or says the end of a turn where a text ends otherwise (Qwen2)."""
    special, golden = load_tokenizer(GOLDEN / name).special, IDS[name]["special"]
    for role, token in golden.items():
        byte_level = role == "unk" and name in ("gpt2", "gpt2_prefix", "qwen2")  # knows every text
        if token is not None and not byte_level and (name, role) not in {("qwen2", "eos"), ("gpt2", "bos")}:
            assert getattr(special, role) == token, role


def test_special_tokens_of_qwen2():
    """A document ends with <|endoftext|>, a turn with <|im_end|>."""
    tokenizer = load_tokenizer(GOLDEN / "qwen2")
    assert tokenizer.special.eos == tokenizer.vocabulary["<|endoftext|>"] != tokenizer.vocabulary["<|im_end|>"]
    assert tokenizer.encode("<tool_call>") == [tokenizer.vocabulary["<tool_call>"]]  # added, but not special


def test_text_that_spells_a_special_token_is_plain_text():
    for name in NAMES:
        tokenizer = load_tokenizer(GOLDEN / name)
        known = {*range(tokenizer.vocab_size)} - tokenizer.special.ids | {tokenizer.special.unk}
        if name not in ("albert", "t5", "xlm_roberta", "camembert"):  # unigram models of transformers find them in text
            assert known.issuperset(tokenizer.encode("a [MASK] b <mask> <s></s><pad>[CLS][SEP] <|endoftext|>")), name


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_beside_travels_along(name, tmp_path):
    """Saved, in a checkpoint, to another process: an export writes it back as it came. It is no part of the digest."""
    tokenizer = load_tokenizer(GOLDEN / name)
    files = {path.name: path.read_bytes() for path in (GOLDEN / name).iterdir()
             if path.name not in ("config.json", "tokenizer.json")}
    assert tokenizer.beside == files
    tokenizer.save(tmp_path)
    sent = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for copy in (load_tokenizer(tmp_path), sent, pickle.loads(pickle.dumps(tokenizer))):
        assert (copy.beside, copy.files, copy.special) == (files, tokenizer.files, tokenizer.special)
        assert copy.digest == tokenizer.digest
    assert JsonTokenizer(tokenizer.files, tokenizer.special).digest == tokenizer.digest


def test_saved_files_beside_a_tokenizer_have_known_names(tmp_path):
    tokenizer = load_tokenizer(GOLDEN / "bert")
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.from_dict({**tokenizer.to_dict(), "beside": {"../escape.txt": "YQ=="}})
    tokenizer.save(tmp_path)
    path = tmp_path / "jaxlm_tokenizer.json"
    path.write_text(path.read_text().replace("vocab.txt", "../../x"))
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)


def test_spare_rows(capfd):
    """Qwen2: the table has more rows than there are tokens."""
    tokenizer = load_tokenizer(GOLDEN / "qwen2")
    assert vocabulary_size(512, tokenizer, given=True) == 512
    assert f"{512 - tokenizer.vocab_size} rows of the table are spare" in capfd.readouterr().err
    assert vocabulary_size(None, tokenizer, given=True) == vocabulary_size(364, tokenizer, given=True) == 364
    for wanted, given in ((363, True), (512, False)):
        with pytest.raises(UserError, match=rf"^model\.vocab_size={wanted}: the tokenizer has 364 tokens"):
            vocabulary_size(wanted, tokenizer, given)
    assert vocabulary_size(260, ByteTokenizer({}), given=False) == 260


# ----------------------------------------------------------------------------------------------------------- wrong ones

def changed(folder, name, **files):
    """A golden folder with these files changed (a dict updates JSON), written anew, or (None) taken away."""
    shutil.copytree(GOLDEN / name, folder)
    for file, content in files.items():
        path = folder / file.replace("__", ".")
        if content is None:
            path.unlink()
            continue
        if isinstance(content, dict):
            content = json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content})
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


CONFIG = "tokenizer_config__json"
LLAMA = (GOLDEN / "llama" / "tokenizer.model").read_bytes()
WRONG = [
    # a class that is not supported, or whose files are not there
    ("bert", {CONFIG: {"tokenizer_class": "XLNetTokenizer"}}, r"'XLNetTokenizer' is not supported.*expected one of"),
    ("bert", {CONFIG: {"tokenizer_class": "BertTokeniser"}}, "did you mean 'BertTokenizer'"),
    ("bert", {CONFIG: {"tokenizer_class": 7}}, "tokenizer_class '7' is not supported"),
    ("bert", {"vocab__txt": None}, r"model_type 'bert': expected vocab\.txt .* found none"),
    ("gpt2", {"merges__txt": None}, r"model_type 'gpt2': expected merges\.txt"),
    ("roberta", {"vocab__json": None}, r"expected vocab\.json"),
    ("llama", {"tokenizer__model": None}, r"LlamaTokenizer: expected one SentencePiece \.model"),
    ("llama", {"spiece__model": b"x"}, r"expected one SentencePiece \.model .* found 2"),
    ("xlm_roberta", {"config__json": {"model_type": "llama"}, CONFIG: {"tokenizer_class": "LlamaTokenizer"}},
     r"sentencepiece\.bpe\.model: unigram, but this tokenizer class has byte-pair encoding"),
    ("llama", {CONFIG: {"tokenizer_class": "T5Tokenizer"}}, "byte-pair encoding, but this tokenizer class has unigram"),
    # damaged files
    ("llama", {"tokenizer__model": b"\xff\xff\xff"}, r"tokenizer\.model is not a SentencePiece model"),
    ("bert", {"vocab__txt": b"[UNK]\n\xff\xfe"}, r"vocab\.txt: not UTF-8"),
    ("bert", {"vocab__txt": ""}, r"vocab\.txt has no \[UNK\]"),
    ("bert", {"vocab__txt": "[unk]\n[PAD]\n"}, r"vocab\.txt has no \[UNK\].*did you mean '\[unk\]'"),
    ("gpt2", {"vocab__json": "{"}, r"vocab\.json is not JSON"),
    ("gpt2", {"vocab__json": "[1]"}, r"vocab\.json: expected a JSON object"),
    ("gpt2", {"vocab__json": {"x": "1"}}, r"vocab\.json: 'x': '1', expected an id"),
    ("gpt2", {"vocab__json": {"x": -1}}, r"vocab\.json: 'x': -1, expected an id"),
    ("gpt2", {"vocab__json": {"x": 10**9}}, "has the id 1,000,000,000, but there are only 360 tokens"),
    ("gpt2", {"vocab__json": {"x": 10**12}}, "expected an id"),
    ("gpt2", {"vocab__json": {"new": 5}}, r"vocab\.json: '\W' and 'new' have the same id, 5"),
    ("gpt2", {"merges__txt": "#version: 0.2\na b c\n"}, r"merges\.txt, line 2: 'a b c', expected two symbols"),
    ("gpt2", {"merges__txt": "#version: 0.2\nQ Q\n"}, r"merges\.txt, line 2: 'QQ' is not in vocab\.json"),
    ("bert", {"config__json": "{"}, r"config\.json is not JSON"),
    ("bert", {CONFIG: "[]"}, r"tokenizer_config\.json: expected a JSON object"),
    ("bert", {CONFIG: {"do_lower_case": "yes"}}, r"tokenizer_config\.json: do_lower_case: 'yes', expected true"),
    ("bert", {CONFIG: {"cls_token": None}}, r"cls_token is null, but this tokenizer class needs one"),
    ("bert", {CONFIG: {"cls_token": 5}}, r"cls_token: 5, expected a token"),
    ("t5", {CONFIG: {"extra_ids": "many"}}, r"extra_ids: 'many', expected a number"),
    ("gpt2", {CONFIG: {"additional_special_tokens": 7}}, "additional_special_tokens: 7, expected a list"),
    ("gpt2", {"special_tokens_map__json": '{"pad_token": "\\ud800"}'}, r"special_tokens_map\.json: half of a surrogate pair"),
    ("llama", {"tokenizer__model": LLAMA.replace(b"\xe2\x96\x81t", b"\xe2\x28\x81t", 1)},
     r"tokenizer\.model is (damaged: a piece is not UTF-8|not a SentencePiece model)"),
    # added tokens: the first free id, or the token's own
    ("gpt2", {"added_tokens__json": {"<x>": 400}}, "'<x>' has the id 400, but the vocabulary ends at 359"),
    ("gpt2", {"added_tokens__json": {"<x>": 7}}, "'<x>' has the id 7, which is"),
    ("gpt2", {"added_tokens__json": {"a": 361}}, "'a' has the id 361, but the vocabulary says"),
    ("gpt2", {"added_tokens__json": {"<x>": "360"}}, r"added_tokens\.json: '<x>': '360', expected an id"),
    ("gpt2", {CONFIG: {"added_tokens_decoder": {"x": {"content": "<x>"}}}}, "added_tokens_decoder: 'x'"),
    ("gpt2", {CONFIG: {"added_tokens_decoder": []}}, r"added_tokens_decoder"),
    ("qwen2", {"added_tokens__json": {"<other>": 361}},
     r"added_tokens\.json and tokenizer_config\.json contradict each other: 361"),
    # files that contradict a tokenizer.json
    ("modernbert", {"added_tokens__json": {"[MASK]": 5}},
     r"added_tokens\.json and tokenizer\.json contradict each other: '\[MASK\]' is 5"),
    ("modernbert", {"vocab__json": {"<|endoftext|>": 3}}, r"vocab\.json and tokenizer\.json contradict each other"),
    ("modernbert", {CONFIG: {"added_tokens_decoder": {"9": {"content": "[CLS]"}}}},
     r"tokenizer_config\.json and tokenizer\.json contradict each other: '\[CLS\]' is 9"),
    ("bert_saved", {CONFIG: {"do_lower_case": False}}, r"do_lower_case is false in one, true \(lowercase\)"),
    ("bert_saved", {"vocab__txt": "[UNK]\n[PAD]\n"}, r"vocab\.txt and tokenizer\.json contradict each other: '\[UNK\]' is 0"),
    ("modernbert", {"tokenizer__json": "{}"}, r"tokenizer\.json is not a Hugging Face tokenizer"),
]


@pytest.mark.parametrize(("name", "files", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_folder_is_one_line(name, files, message, tmp_path):
    folder = changed(tmp_path / "wrong", name, **files)
    with pytest.raises(UserError, match=message) as error:
        given_tokenizer(DataSettings(tokenizer=str(folder)))
    line = str(error.value)
    assert line.startswith(f"data.tokenizer={folder}: ") and "\n" not in line and len(line) < 700


def test_a_post_processor_that_fails_is_a_line(tmp_path):
    """Which the library notices only when it is used, and by a panic."""
    file = json.loads((GOLDEN / "modernbert" / "tokenizer.json").read_text())
    del file["post_processor"]["special_tokens"]["[CLS]"]
    tokenizer = load_tokenizer(changed(tmp_path / "wrong", "modernbert", tokenizer__json=json.dumps(file)))
    with pytest.raises(UserError, match=r"^tokenizer: tokenizer\.json: its post_processor fails"):
        assert tokenizer.framing


def test_two_files_that_name_different_tokens_are_a_warning(tmp_path, capfd):
    """As in transformers: special_tokens_map.json counts, unless tokenizer_config.json has an added_tokens_decoder."""
    both = {"tokenizer_config__json": {"pad_token": "the"}, "special_tokens_map__json": {"pad_token": "<pad>"}}
    older = load_tokenizer(changed(tmp_path / "older", "roberta", **both))
    assert older.special.pad == older.vocabulary["<pad>"]
    assert "WARNING: pad_token is 'the' in tokenizer_config.json, '<pad>' in special_tokens_map.json" in capfd.readouterr().err
    both["tokenizer_config__json"]["added_tokens_decoder"] = {}
    newer = load_tokenizer(changed(tmp_path / "newer", "roberta", **both))
    assert newer.special.pad == newer.vocabulary["the"]


def test_special_tokens_that_no_vocabulary_has_are_added_and_said(tmp_path, capfd):
    lines = (GOLDEN / "bert" / "vocab.txt").read_text().splitlines()
    folder = changed(tmp_path / "bert", "bert", vocab__txt="\n".join(line for line in lines if line != "[MASK]") + "\n")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special.mask == len(lines) - 1 and tokenizer.vocab_size == len(lines)
    assert f"'[MASK]' is in no vocabulary; it is added as {len(lines) - 1}" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "file"), [("bert", "vocab.txt"), ("gpt2", "vocab.json"), ("gpt2", "merges.txt")])
def test_one_file_of_several_stands_for_its_folder(name, file):
    assert load_tokenizer(GOLDEN / name / file).digest == load_tokenizer(GOLDEN / name).digest


def test_options_without_effect_are_said(tmp_path, capfd):
    load_tokenizer(changed(tmp_path / "bert", "bert", tokenizer_config__json={"never_split": ["NASA"], "do_lower_case": True}))
    assert "never_split=['NASA'] has no effect" in capfd.readouterr().err


def test_what_else_a_folder_may_hold_is_named(tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"found vocab\.json, tekken\.json \(transformers' save_pretrained writes"):
        load_tokenizer(tmp_path)


def test_folders_without_a_class_are_known_by_their_files(tmp_path, capfd):
    for name, special in (("bert", "[CLS]"), ("roberta", "<mask>"), ("gpt2", "<|endoftext|>")):
        folder = changed(tmp_path / name, name, config__json=None)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.vocabulary[special] in tokenizer.special.ids
        assert tokenizer.files == load_tokenizer(GOLDEN / name).files
        assert "no file says of which class it is" in capfd.readouterr().err


def test_windows_line_ends(tmp_path):
    """A vocabulary that was checked out with them has the same tokens."""
    for name, file in (("bert", "vocab.txt"), ("gpt2", "merges.txt")):
        content = (GOLDEN / name / file).read_bytes().replace(b"\n", b"\r\n")
        folder = changed(tmp_path / name, name, **{file.replace(".", "__"): content})
        assert load_tokenizer(folder).files == load_tokenizer(GOLDEN / name).files
