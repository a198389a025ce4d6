"""Tokenizers of Hugging Face folders that have no `tokenizer.json`: built from the older files, as transformers 5 does.

vocab.txt (WordPiece: BERT), vocab.json and merges.txt (byte-level BPE: GPT-2, RoBERTa, Qwen2), a SentencePiece .model
(Llama, Mistral, XLM-RoBERTa, CamemBERT, ALBERT, T5); each with tokenizer_config.json, special_tokens_map.json and
added_tokens.json. What is read becomes a `tokenizer.json`, the only form that the rest of jaxlm knows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxlm.console.progress import print_once
from jaxlm.data import tokenizer_json as parts
from jaxlm.data.huggingface_files import ADDED, CONFIG, MAP, MERGES, MODEL_CONFIG, VOCABULARY, WORDS, object_of, text_of, words_of
from jaxlm.data.sentencepiece_json import CONTROL, USER_DEFINED, Pieces, Sentencepiece, byte_fallback_decoder, pipeline
from jaxlm.data.special_tokens import token_name
from jaxlm.data.tokenizer_json import Json, Place
from jaxlm.errors import UserError, nearest, shown

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in the order in which transformers adds those that are missing
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")  # names of no particular tokenizer
# How Qwen2 cuts a text before byte-level BPE.
QWEN_CUTS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

Pipeline = dict[str, Json | None]  # model, normalizer, pre_tokenizer, decoder


@dataclass
class Older:
    """The older files of a folder, read."""

    files: Mapping[str, bytes]
    config: Mapping[str, Any]  # tokenizer_config.json
    roles: dict[str, str]  # role -> the name of its token
    ids: dict[str, int] = field(default_factory=dict)  # of the model's own vocabulary and, behind it, of added tokens
    free: int = 0  # the first id behind them
    own: dict[str, bool] = field(default_factory=dict)  # tokens that a SentencePiece model sets apart -> whether they are special
    added: dict[int, Json] = field(default_factory=dict)

    def option(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def role(self, name: str) -> str:
        if name not in self.roles:
            raise UserError(f"{CONFIG}: {name}_token is null, but this tokenizer class needs one")
        return self.roles[name]

    def flag(self, name: str, default: bool | None) -> bool | None:
        value = self.option(name, default)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{CONFIG}: {name}: {shown(value)}, expected true, false or null")
        return value


@dataclass(frozen=True)
class Kind:
    """How one class of transformers' tokenizers is read.

    pipeline: its parts but the post-processor, and the vocabulary in `Older.ids`. frame: the post-processor. roles: the
    names of special tokens unless the files say others.
    """

    files: tuple[str, ...]
    pipeline: Callable[[Older], Pipeline]
    frame: Callable[[Older], Json | None]
    roles: Mapping[str, str]


# ------------------------------------------------------------------------------------------------------------ WordPiece

def bert_pipeline(older: Older) -> Pipeline:
    older.ids = words_of(older.files)
    if older.role("unk") not in older.ids:
        raise UserError(f"{WORDS} has no {older.role('unk')}, which stands for unknown words"
                        f"{nearest(older.role('unk'), older.ids)}")
    warn_of_options(older)
    normalizer = {"type": "BertNormalizer", "clean_text": True, "lowercase": older.flag("do_lower_case", True),
                  "handle_chinese_chars": older.flag("tokenize_chinese_chars", True),
                  "strip_accents": older.flag("strip_accents", None)}
    return {"model": parts.wordpiece(older.ids, older.role("unk")), "normalizer": normalizer,
            "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}


def warn_of_options(older: Older) -> None:
    """A line for what only transformers' slow tokenizers did, in versions before 5."""
    ignored = [f"{name}={shown(older.config[name])}" for name, usual in (("never_split", []), ("do_basic_tokenize", True))
               if older.option(name, usual) != usual]
    if ignored:
        print_once(f"WARNING: {CONFIG}: {', '.join(ignored)} has no effect here, as in transformers 5")


def bert_frame(older: Older) -> Json:
    return pair_frame(older, "cls", ["sep"], second_type=1)


# ------------------------------------------------------------------------------------------------------- byte-level BPE

def byte_level_model(older: Older) -> Json:
    """vocab.json and merges.txt: two symbols a line, the most frequent pair first."""
    vocabulary = older.ids = ids_of(older.files)
    merges = []
    for number, line in enumerate(text_of(older.files, MERGES).split("\n"), 1):
        pair = line.rstrip("\r").split(" ")
        if line.startswith("#version") or not line.rstrip("\r"):
            continue
        if len(pair) != 2:
            raise UserError(f"{MERGES}, line {number}: {shown(line)}, expected two symbols with a blank between them")
        for token in (*pair, "".join(pair)):
            if token not in vocabulary:
                raise UserError(f"{MERGES}, line {number}: {shown(token)} is not in {VOCABULARY}; expected the two files of one "
                                "tokenizer")
        merges.append(pair)
    return parts.bpe(vocabulary, merges, affixes="")


def ids_of(files: Mapping[str, bytes]) -> dict[str, int]:
    """vocab.json: token -> id, each of its own."""
    vocabulary, taken = object_of(files, VOCABULARY), {}
    for token, number in vocabulary.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise UserError(f"{VOCABULARY}: {shown(token)}: {shown(number)}, expected an id")
        if taken.setdefault(number, token) != token:
            raise UserError(f"{VOCABULARY}: {shown(taken[number])} and {shown(token)} have the same id, {number}")
    return vocabulary


def gpt2_pipeline(older: Older) -> Pipeline:
    return {"model": byte_level_model(older), "decoder": parts.BYTE_LEVEL_DECODER,
            "pre_tokenizer": parts.byte_level(older.flag("add_prefix_space", False))}


def qwen2_pipeline(older: Older) -> Pipeline:
    cuts = [parts.split(QWEN_CUTS), parts.byte_level(older.flag("add_prefix_space", False), use_regex=False)]
    return {"model": byte_level_model(older), "normalizer": {"type": "NFC"}, "decoder": parts.BYTE_LEVEL_DECODER,
            "pre_tokenizer": parts.sequence("pretokenizers", cuts)}


def start_end_frame(older: Older) -> Json | None:
    """bos and eos where tokenizer_config.json asks for them, around each text."""
    names = {role: older.role(role) for role in ("bos", "eos") if older.flag(f"add_{role}_token", False)}
    if not names:
        return None
    one, two = ([*([(names["bos"], kind)] if "bos" in names else []), (text, kind),
                 *([(names["eos"], kind)] if "eos" in names else [])] for text, kind in (("$A", 0), ("$B", 1)))
    return parts.template(one, one + two, older.ids)


def roberta_frame(older: Older) -> Json:
    cls, sep = older.role("cls"), older.role("sep")
    return parts.roberta((cls, older.ids[cls]), (sep, older.ids[sep]), older.flag("trim_offsets", True),
                         older.flag("add_prefix_space", False))


# -------------------------------------------------------------------------------------------------------- SentencePiece

def sentencepiece_of(older: Older, bpe: bool) -> Sentencepiece:
    """The .model, whose control tokens and whole pieces become added tokens. UserError: of the other algorithm."""
    name = model_name(older)
    found = Sentencepiece.read(older.files[name], name)
    if found.is_bpe != bpe:
        kinds = ("unigram", "byte-pair encoding")
        raise UserError(f"{name}: {kinds[found.is_bpe]}, but this tokenizer class has {kinds[bpe]}")
    older.own = dict.fromkeys(found.of_type(CONTROL), True) | dict.fromkeys(found.of_type(USER_DEFINED), False)
    return found


def sentencepiece_pipeline(older: Older) -> Pipeline:
    """As SentencePiece itself reads text."""
    name = model_name(older)
    found = Sentencepiece.read(older.files[name], name)
    older.own = dict.fromkeys(found.of_type(CONTROL), True)
    older.ids = {piece: number for number, (piece, _) in enumerate(found.pieces)}
    return pipeline(found)


def llama_pipeline(older: Older) -> Pipeline:
    """Byte-pair encoding of a whole text with a blank before it, unless it begins with one."""
    found = sentencepiece_of(older, bpe=True)
    older.ids = {piece: number for number, (piece, _) in enumerate(found.pieces)}
    prefix = older.flag("add_prefix_space", True)
    scheme = "never" if not prefix else "always" if older.flag("legacy", False) else "first"
    model = parts.bpe(older.ids, merges_by_id(older.ids), fuse_unknown=True, byte_fallback=True)
    return {"model": model, "pre_tokenizer": parts.metaspace(scheme, split=False), "decoder": byte_fallback_decoder(prefix)}


def merges_by_id(ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; of two pieces, the one with the smaller id first."""
    found = [(number, len(piece[:cut]), piece[:cut], piece[cut:]) for piece, number in ids.items() for cut in range(1, len(piece))
             if piece[:cut] in ids and piece[cut:] in ids]
    return [(left, right) for _, _, left, right in sorted(found, key=lambda merge: merge[:2])]


def words_pipeline(older: Older, found: Sentencepiece, pieces: Pieces, unknown: int, before: Iterable[Json] = ()) -> Pipeline:
    """Unigram over words: cut at blanks, each with one before it (XLM-RoBERTa, ALBERT, T5)."""
    older.ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    blank = parts.metaspace("always" if older.flag("add_prefix_space", True) else "never")
    normalizers = [*before, *([found.charsmap] if found.charsmap else [])]
    return {"model": parts.unigram(pieces, unknown), "decoder": blank,
            "normalizer": parts.sequence("normalizers", normalizers),
            "pre_tokenizer": parts.sequence("pretokenizers", [{"type": "WhitespaceSplit"}, blank])}


def xlm_roberta_pipeline(older: Older) -> Pipeline:
    """fairseq's four tokens stand before the pieces, of which the first three go, and the mask behind them."""
    found = sentencepiece_of(older, bpe=False)
    first = [(older.role(role), 0.0) for role in ("bos", "pad", "eos", "unk")]
    return words_pipeline(older, found, [*first, *found.pieces[3:], (older.role("mask"), 0.0)], unknown=3)


def camembert_pipeline(older: Older) -> Pipeline:
    """Five tokens stand before the pieces, of which the first goes, and the mask behind them."""
    found = sentencepiece_of(older, bpe=False)
    first = [("<s>NOTUSED", 0.0), (older.role("pad"), 0.0), ("</s>NOTUSED", 0.0), (older.role("unk"), 0.0),
             ("<unk>NOTUSED", -100.0)]
    return words_pipeline(older, found, [*first, *found.pieces[1:], (older.role("mask"), 0.0)], unknown=3)


def albert_pipeline(older: Older) -> Pipeline:
    found = sentencepiece_of(older, bpe=False)
    before = [parts.replace("``", '"'), parts.replace("''", '"')]
    if not older.flag("keep_accents", False):
        before += [{"type": "NFKD"}, {"type": "StripAccents"}]
    if older.flag("do_lower_case", True):
        before.append({"type": "Lowercase"})
    return words_pipeline(older, found, found.pieces, 1, before)


def t5_pipeline(older: Older) -> Pipeline:
    count = older.option("extra_ids", 100)
    if not isinstance(count, int) or not 0 <= count <= 10_000:
        raise UserError(f"{CONFIG}: extra_ids: {shown(count)}, expected a number of tokens")
    found = sentencepiece_of(older, bpe=False)
    extra = [f"<extra_id_{number}>" for number in reversed(range(count))]
    older.own |= dict.fromkeys(extra, True)
    return words_pipeline(older, found, [*found.pieces, *((name, 0.0) for name in extra)], 2)


def double_frame(older: Older) -> Json:
    return pair_frame(older, "bos", ["eos", "eos"], second_type=0)


def t5_frame(older: Older) -> Json:
    end = (older.role("eos"), 0)
    return parts.template([("$A", 0), end], [("$A", 0), end, ("$B", 0), end], older.ids)


def pair_frame(older: Older, start: str, between: list[str], second_type: int) -> Json:
    """start A between[0], or start A between B between[0]."""
    def places(roles: Iterable[str], kind: int) -> list[Place]:
        return [(older.role(role), kind) for role in roles]

    opened = [*places([start], 0), ("$A", 0)]
    pair = [*opened, *places(between, 0), ("$B", second_type), *places(between[:1], second_type)]
    return parts.template([*opened, *places(between[:1], 0)], pair, older.ids)


# -------------------------------------------------------------------------------------------------------------- classes

BERT_ROLES = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
ROBERTA_ROLES = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
GPT2_ROLES = dict.fromkeys(("unk", "bos", "eos"), "<|endoftext|>")
QWEN2_ROLES = dict.fromkeys(("unk", "eos", "pad"), "<|endoftext|>")
LLAMA_ROLES = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
ALBERT_ROLES = {"bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "sep": "[SEP]", "pad": "<pad>", "cls": "[CLS]", "mask": "[MASK]"}

BERT = Kind((WORDS,), bert_pipeline, bert_frame, BERT_ROLES)
GPT2 = Kind((VOCABULARY, MERGES), gpt2_pipeline, start_end_frame, GPT2_ROLES)
ROBERTA = Kind((VOCABULARY, MERGES), gpt2_pipeline, roberta_frame, ROBERTA_ROLES)
SENTENCEPIECE = Kind((".model",), sentencepiece_pipeline, start_end_frame, LLAMA_ROLES)
KINDS = {  # by the name of transformers' class
    **dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"), BERT),
    **dict.fromkeys(("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer"), ROBERTA),
    "GPT2Tokenizer": GPT2,
    "Qwen2Tokenizer": Kind((VOCABULARY, MERGES), qwen2_pipeline, start_end_frame, QWEN2_ROLES),
    "LlamaTokenizer": Kind((".model",), llama_pipeline, start_end_frame, LLAMA_ROLES),
    "XLMRobertaTokenizer": Kind((".model",), xlm_roberta_pipeline, double_frame, ROBERTA_ROLES),
    "CamembertTokenizer": Kind((".model",), camembert_pipeline, double_frame, ROBERTA_ROLES),
    "AlbertTokenizer": Kind((".model",), albert_pipeline, bert_frame, ALBERT_ROLES),
    "T5Tokenizer": Kind((".model",), t5_pipeline, t5_frame, {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}),
}
OF_MODELS = {  # config.json's model_type -> the class, where no file names one
    **dict.fromkeys(("bert", "distilbert", "electra", "mobilebert"), "BertTokenizer"),
    **dict.fromkeys(("roberta", "bart", "longformer"), "RobertaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"), "gpt2": "GPT2Tokenizer", "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer", "albert": "AlbertTokenizer", "t5": "T5Tokenizer",
}
PLAIN_SENTENCEPIECE = ("llama", "mistral")  # models whose .model transformers reads as SentencePiece does


def older_tokenizer(files: Mapping[str, bytes]) -> bytes | None:
    """The `tokenizer.json` that a folder's older files stand for; None where they are no such tokenizer.

    Args:
      files: the folder's tokenizer files and config.json: name -> content.

    Raises:
      UserError: a class that is not supported, a file that is missing, damaged, or contradicts another.
    """
    config, model = object_of(files, CONFIG), object_of(files, MODEL_CONFIG)
    kind = find_kind(files, config, model)
    if kind is None:
        return None
    older = Older(files, config, find_roles(files, config, kind.roles))
    found = kind.pipeline(older)
    add_tokens(older)
    return parts.document(found.pop("model"), added=older.added.values(), post_processor=kind.frame(older), **found)


def find_kind(files: Mapping[str, bytes], config: Mapping[str, Any], model: Mapping[str, Any]) -> Kind | None:
    """By the class that the files name, else by the model, else by the vocabulary."""
    name = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
    name = name.removesuffix("Fast") if isinstance(name, str) else shown(name)
    model_type, has_model = str(model.get("model_type")), any(file.endswith(".model") for file in files)
    if has_model and ((model_type == "mistral" and name == "LlamaTokenizer") or name in GENERIC
                      or (not name and model_type in PLAIN_SENTENCEPIECE)):
        return with_files(SENTENCEPIECE, files, name or f"model_type '{model_type}'")
    if name and name not in GENERIC:
        if name not in KINDS:
            raise UserError(f"tokenizer_class '{name}' is not supported without a tokenizer.json, expected one of "
                            f"{', '.join(KINDS)}{nearest(name, KINDS)} (transformers writes one: "
                            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER))")
        return with_files(KINDS[name], files, name)
    if model_type in OF_MODELS:
        return with_files(KINDS[OF_MODELS[model_type]], files, f"model_type '{model_type}'")
    return guessed(files)


def guessed(files: Mapping[str, bytes]) -> Kind | None:
    """By the files alone; says so."""
    if WORDS in files:
        name = "BertTokenizer"
    elif VOCABULARY in files and MERGES in files:
        name = "RobertaTokenizer" if {"<s>", "</s>", "<mask>"} <= {*object_of(files, VOCABULARY)} else "GPT2Tokenizer"
    else:
        return None
    print_once(f"tokenizer: no file says of which class it is; {' and '.join(KINDS[name].files)} are read as {name}")
    return KINDS[name]


def with_files(kind: Kind, files: Mapping[str, bytes], why: str) -> Kind:
    for wanted in kind.files:
        count = sum(name.endswith(wanted) for name in files)
        if count != 1:
            what = "one SentencePiece .model" if wanted == ".model" else wanted
            raise UserError(f"{why}: expected {what} (or a tokenizer.json) in this folder, found {count or 'none'}")
    return kind


def find_roles(files: Mapping[str, bytes], config: Mapping[str, Any], usual: Mapping[str, str]) -> dict[str, str]:
    """role -> token, as special_tokens_map.json and tokenizer_config.json say, else the class's own."""
    declared = [config, object_of(files, MAP)] if "added_tokens_decoder" not in config else [config]
    found = dict(usual)
    for content in declared:
        for role in ROLES:
            if f"{role}_token" in content:
                given = content[f"{role}_token"]
                name = token_name(given)
                if given is not None and name is None:
                    raise UserError(f"{CONFIG} or {MAP}: {role}_token: {shown(given)}, expected a token")
                found = {**found, role: name} if name else {key: value for key, value in found.items() if key != role}
    return found


# --------------------------------------------------------------------------------------------------------- added tokens

def add_tokens(older: Older) -> None:
    """The special tokens and those that were added behind the vocabulary; all get their ids in `older.ids`."""
    older.ids, older.free = dict(older.ids), max(older.ids.values(), default=-1) + 1
    special = {*older.roles.values(), *(token_name(each) for each in extra_tokens(older))}
    for name, is_special in older.own.items():
        if name in older.ids:
            add(older, name, older.ids[name], parts.added_token(older.ids[name], name, is_special, normalized=False))
    for number, token in sorted(declared_tokens(older, special).items()):
        add(older, token["content"], number, token)
    for name in [*(older.roles[role] for role in ROLES if role in older.roles), *map(token_name, extra_tokens(older))]:
        if older.ids.get(name) not in older.added:
            number = older.ids.get(name, older.free)
            if name not in older.ids:
                print_once(f"tokenizer: {shown(name)} is in no vocabulary; it is added as {number}, as transformers does")
            add(older, name, number, parts.added_token(number, name))


def extra_tokens(older: Older) -> list[Any]:
    """Special tokens without a role."""
    named = [content.get(key) for content in (older.config, object_of(older.files, MAP))
             for key in ("additional_special_tokens", "extra_special_tokens")]
    found = next(filter(None, named), [])
    if not isinstance(found, list | dict):
        raise UserError(f"{CONFIG} or {MAP}: additional_special_tokens: {shown(found)}, expected a list of tokens")
    return [token for token in (found.values() if isinstance(found, dict) else found) if token_name(token)]


def declared_tokens(older: Older, special: set[str]) -> dict[int, Json]:
    """Of tokenizer_config.json (added_tokens_decoder), or of added_tokens.json."""
    decoder = older.config.get("added_tokens_decoder")
    found: dict[int, Json] = {}
    if decoder is not None:
        for key, token in decoder.items() if isinstance(decoder, dict) else [("", decoder)]:
            if not key.isdecimal() or not token_name(token) or not isinstance(token, dict):
                raise UserError(f"{CONFIG}: added_tokens_decoder: {shown(key)}: {shown(token)}, expected an id and a token")
            flags = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
            found[int(key)] = parts.added_token(int(key), token_name(token), bool(token.get("special")), **flags)
    for name, number in object_of(older.files, ADDED).items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise UserError(f"{ADDED}: {shown(name)}: {shown(number)}, expected an id")
        if number in found and found[number]["content"] != name:
            raise UserError(f"{ADDED} and {CONFIG} contradict each other: {number} is {shown(name)} in one, "
                            f"{shown(found[number]['content'])} in the other")
        found.setdefault(number, parts.added_token(number, name, name in special))
    return found


def add(older: Older, name: str, number: int, token: Json) -> None:
    """UserError unless the id is the token's own, or the first behind the vocabulary."""
    own = older.ids.get(name)
    if own is not None and own != number:
        raise UserError(f"the added token {shown(name)} has the id {number}, but the vocabulary says {own}")
    if own is None and number != older.free:
        taken = next((other for other, id_ in older.ids.items() if id_ == number), None)
        raise UserError(f"the added token {shown(name)} has the id {number}, "
                        + (f"which is {shown(taken)}'s" if taken is not None else
                           f"but the vocabulary ends at {older.free - 1}: tokens between them are missing"))
    if own is None:
        older.ids[name], older.free = number, number + 1
    older.added[number] = token


def model_name(older: Older) -> str:
    """Of the one SentencePiece model."""
    return next(name for name in older.files if name.endswith(".model"))
