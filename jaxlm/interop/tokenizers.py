"""Tokenizers from Hugging Face folders and into them, with the same ids for any text, special tokens included.

What came from such a folder is written back byte by byte. Every other kind becomes a `tokenizer.json`, which
transformers reads with the `tokenizers` library and no code of its own: the class that is named,
PreTrainedTokenizerFast, is the one that takes the file as it is. The folder is read back and compared before it counts
as written.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from jaxlm.data import tokenizer_json as parts
from jaxlm.data.framing import Framing
from jaxlm.data.huggingface_files import CONFIG, MAP, TOKENIZER
from jaxlm.data.sentencepiece_json import CONTROL, Sentencepiece, pipeline, vocabulary
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.data.tokenizer_json import Json
from jaxlm.data.tokenizers import (
    MODEL_FILE,
    ByteTokenizer,
    CharacterTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from jaxlm.errors import RunError, UserError, shown
from jaxlm.storage.files import json_text, read_text, write_bytes

TEXTS, ROWS = 3000, 200  # texts that are compared, and of those the ones that are also compared in rows, with special tokens
# transformers reads every folder of these models as this class, whatever the folder says, and makes its own cuts.
READ_AS = {"qwen2": "Qwen2Tokenizer"}
WITHOUT_TYPES = ["input_ids", "attention_mask"]  # what a tokenizer gives to its model
WITH_TYPES = ["input_ids", "token_type_ids", "attention_mask"]
# How transformers names the roles; of two that are one token, the first is written for each kind of model.
CAUSAL_ALIASES, OTHER_ALIASES = {"cls": "bos", "sep": "eos"}, {"bos": "cls", "eos": "sep"}
SPECIAL_NAMES = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}  # of kinds without names


@dataclass(frozen=True)
class TokenizerCheck:
    """How the written tokenizer compares: `differences` of so many `strings` had other ids; `notes` a user should
    read."""

    strings: int
    differences: int
    notes: list[str] = field(default_factory=list)


def read_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, for a model with `vocab_size` rows (config.json), of which some may be
    spare.

    Raises UserError: there is none, its files are damaged, contradict each other or are of a class that is not
    supported, or it has more tokens than the model has rows.
    """
    tokenizer = load_tokenizer(folder)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        names = {token: name for name, token in tokenizer.vocabulary.items()}
        last = names.get(tokenizer.vocab_size - 1)
        raise UserError(f"{folder}: config.json says vocab_size={vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens"
                        + (f" (the last is {shown(last)})" if last else "") + "; they do not belong together")
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """bos_token_id, eos_token_id, ...: the ids of the special tokens that there are, as config.json names them."""
    return {f"{role}_token_id": token for role, token in asdict(tokenizer.special).items() if token is not None}


# ------------------------------------------------------------------------------------------------------------------ out

def write_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, model_type: str, max_length: int, causal: bool,
                    start: int | None = None) -> TokenizerCheck:
    """Writes the tokenizer's files into a folder, reads them back and compares.

    Args:
      folder: exists.
      model_type: as config.json names the model.
      max_length: positions that the model has.
      causal: texts are read behind `start`, or behind nothing; otherwise as `tokenizer.framing` says.

    Raises:
      RunError: the written tokenizer gives other ids.
    """
    folder, framing = Path(folder), framing_for(tokenizer, causal, start)
    files = huggingface_files(tokenizer, framing, model_type, max_length, causal)
    for name, content in files.items():
        write_bytes(folder / name, content)
    differing = compare(tokenizer, framing, folder)
    notes = notes_on(tokenizer, model_type, files)
    if differing:
        line = (f"tokenizer: {len(differing)} of {TEXTS:,} texts have other ids in the written {TOKENIZER}, "
                f"one is {shown(differing[0])}")
        if not may_differ(tokenizer):
            raise RunError(line)
        notes.append(f"{line}: the {MODEL_FILE} beside it is exact")
    return TokenizerCheck(TEXTS, len(differing), notes)


def framing_for(tokenizer: Tokenizer, causal: bool, start: int | None) -> Framing:
    """What the written file puts around texts: what the given one does, and for a causal model that came from elsewhere
    nothing if that does nothing; otherwise what rows of the model have."""
    if not causal or (isinstance(tokenizer, JsonTokenizer) and tokenizer.has_framing):
        return tokenizer.framing
    return Framing() if start is None or tokenizer.beside else Framing((start,))


def huggingface_files(tokenizer: Tokenizer, framing: Framing, model_type: str, max_length: int, causal: bool) -> dict[str, bytes]:
    """name -> content: those it came with, and those that are missing among them."""
    content = content_of(tokenizer, framing)
    declared = declaration(tokenizer, content, model_type, max_length, causal)
    written = {TOKENIZER: content} | {name: json_text(value).encode() for name, value in declared.items()}
    if isinstance(tokenizer, SentencePieceTokenizer):
        written[MODEL_FILE] = tokenizer.files[MODEL_FILE]
    return (written if CONFIG not in tokenizer.beside else {TOKENIZER: content}) | tokenizer.beside


def content_of(tokenizer: Tokenizer, framing: Framing) -> bytes:
    """tokenizer.json, with a post-processor that puts `framing` around texts."""
    if isinstance(tokenizer, JsonTokenizer):
        return with_framing(tokenizer, framing)
    kinds: dict[type, Callable[[Any, Framing], bytes]] = {
        SentencePieceTokenizer: sentencepiece_content, ByteTokenizer: bytes_content, CharacterTokenizer: characters_content}
    return kinds[type(tokenizer)](tokenizer, framing)


def with_framing(tokenizer: JsonTokenizer, framing: Framing) -> bytes:
    """The given file, byte by byte where it says what stands around texts, or where nothing does."""
    if tokenizer.has_framing or framing == Framing():
        return tokenizer.files[TOKENIZER]
    given = json.loads(tokenizer.files[TOKENIZER])
    names = {token: name for name, token in tokenizer.vocabulary.items()}
    first, template = given.get("post_processor"), parts.framed(framing, names)
    given["post_processor"] = {"type": "Sequence", "processors": [first, template]} if first else template
    return (json.dumps(given, ensure_ascii=False, indent=2) + "\n").encode()


def sentencepiece_content(tokenizer: SentencePieceTokenizer, framing: Framing) -> bytes:
    found, blanks = Sentencepiece.read(tokenizer.files[MODEL_FILE]), tokenizer.space_mark is not None
    names = dict(enumerate(vocabulary(found, blanks)))
    controls = {token for token, piece in enumerate(found.proto.pieces) if piece.type == CONTROL}
    added = [parts.added_token(token, names[token]) for token in controls | tokenizer.special.ids]
    found_parts = pipeline(found, blanks)
    return parts.document(found_parts.pop("model"), added=added, post_processor=post_processor(framing, names), **found_parts)


def bytes_content(tokenizer: ByteTokenizer, framing: Framing) -> bytes:
    """Each byte as the letter that byte-level BPE has for it, and nothing to merge."""
    names = dict(enumerate(byte_letters())) | special_names(tokenizer.special)
    model = parts.bpe({name: token for token, name in names.items()}, [])
    added = [parts.added_token(token, names[token]) for token in tokenizer.special.ids]
    return parts.document(model, added=added, pre_tokenizer=parts.byte_level(use_regex=False),
                          post_processor=post_processor(framing, names), decoder=parts.BYTE_LEVEL_DECODER)


def characters_content(tokenizer: CharacterTokenizer, framing: Framing) -> bytes:
    """Each character is a word; one that is not known is an error, as here."""
    names = dict(enumerate(tokenizer.characters)) | special_names(tokenizer.special)
    model = parts.word_level({name: token for token, name in names.items()}, unknown=SPECIAL_NAMES["unk"])
    added = [parts.added_token(token, names[token]) for token in tokenizer.special.ids]
    return parts.document(model, added=added, pre_tokenizer=parts.split(r"[\s\S]"), decoder={"type": "Fuse"},
                          post_processor=post_processor(framing, names))


def post_processor(framing: Framing, names: dict[int, str]) -> Json | None:
    return None if framing == Framing() else parts.framed(framing, names)


def special_names(special: SpecialTokens) -> dict[int, str]:
    """Names for special tokens that have none: of cls and bos, sep and eos, which are one token, the latter's."""
    return {getattr(special, role): name for role, name in SPECIAL_NAMES.items() if getattr(special, role) is not None}


def byte_letters() -> list[str]:
    """What byte-level BPE writes for each byte: itself where it is printable, else a letter from U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def declaration(tokenizer: Tokenizer, content: bytes, model_type: str, max_length: int, causal: bool) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json."""
    added = {str(token.pop("id")): token for token in json.loads(content)["added_tokens"]}
    names = names_of(content)
    roles = {role: token for role, token in asdict(tokenizer.special).items() if token is not None}
    for role, other in (CAUSAL_ALIASES if causal else OTHER_ALIASES).items():
        if role in roles and roles[role] == roles.get(other):
            del roles[role]
    for token in roles.values():
        properties = parts.added_token(token, names[token])
        added.setdefault(str(properties.pop("id")), properties)
    special = {f"{role}_token": names[token] for role, token in roles.items()}
    types = WITH_TYPES if not causal and model_type == "bert" else WITHOUT_TYPES
    config = {"added_tokens_decoder": dict(sorted(added.items(), key=lambda token: int(token[0]))), **special,
              "clean_up_tokenization_spaces": False, "model_input_names": types, "model_max_length": max_length,
              "tokenizer_class": "PreTrainedTokenizerFast"}
    return {CONFIG: config, MAP: special}


def names_of(content: bytes) -> dict[int, str]:
    """id -> token of a tokenizer.json."""
    given = json.loads(content)
    words = given["model"]["vocab"]
    found = dict(enumerate(piece for piece, _ in words)) if isinstance(words, list) else {words[name]: name for name in words}
    return found | {token["id"]: token["content"] for token in given["added_tokens"]}


def notes_on(tokenizer: Tokenizer, model_type: str, files: dict[str, bytes]) -> list[str]:
    named = str(json.loads(files[CONFIG]).get("tokenizer_class"))
    taken = READ_AS.get(model_type)
    if taken is None or named.removesuffix("Fast") == taken:
        return []
    return [f"tokenizer: transformers 5 reads every {model_type} folder as {taken}, which would cut texts otherwise; load this "
            "one with PreTrainedTokenizerFast.from_pretrained(FOLDER)"]


# -------------------------------------------------------------------------------------------------------------- compare

def may_differ(tokenizer: Tokenizer) -> bool:
    """Whether some texts cannot be told exactly: SentencePiece models with rules of several characters, and unigram
    models whose scores are summed in 32 bits, with rounding errors that decide between equally good cuts."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    found = Sentencepiece.read(tokenizer.files[MODEL_FILE])
    return not found.is_bpe or any(len(source) > 1 for source in found.rules)


def compare(tokenizer: Tokenizer, framing: Framing, folder: Path) -> list[str]:
    """The probe texts whose ids, or rows of one or two texts, are others in the written folder."""
    import tokenizers

    written = tokenizers.Tokenizer.from_str(read_text(folder / TOKENIZER))
    written.no_padding()
    written.no_truncation()
    written.encode_special_tokens = True  # spelled in a text, they are plain text here, too
    texts = [*islice(probe_texts(tokenizer), TEXTS)]
    expected, found = tokenizer.encode_batch(texts), written.encode_batch(texts, add_special_tokens=False)
    differing = [text for text, encoding, ids in zip(texts, found, expected, strict=True) if encoding.ids != ids]
    start, middle, end = map(list, (framing.start, framing.middle, framing.end))
    for text, ids, other, more in list(zip(texts, expected, texts[1:], expected[1:], strict=False))[-ROWS:]:
        alone, pair = written.encode(text).ids, written.encode(text, other).ids
        if alone != [*start, *ids, *end] or pair != [*start, *ids, *middle, *more, *end]:
            differing.append(text)
    return [*dict.fromkeys(differing)]


FIXED = ("", " ", "  ", "\n", "\n\n\n", "\t\t", "\r\n", " a", "a ", "\u2581", "\u2581a", " \u2581 ", "\x00", "\ufeff", "\u200d",
         "\u0301", "e\u0301", "\u1e9b\u0323", "\ufdfa", "\U0001f469\u200d\U0001f469\u200d\U0001f467",
         "\U0001f44d\U0001f3fd", "<0x41>", "##s")
WORDS = ("the", "The", "THE", "naïve", "Ångström", "1984", "3.14", "don't", "it's", "(", "),", "...", "--------", "_name_",
         "日本語", "한국어", "русский", "עברית", "العربية", "हिन्दी", "ไทย", "ΣΊΣΥΦΟΣ", "İstanbul", "straße", "ﬁne", "Ａ", "x²",
         "\u0301", "\ufffd", "\u2028")
BLANKS = (" ", "  ", "    ", "\n", "\n    ", "\t", "", "", "\u00a0", "\u3000", "\u200b", ", ")
SCRIPTS = ((0x20, 0x7E), (0x0, 0x1F), (0x7F, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF),
           (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x30FF),
           (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x1F300, 0x1F6FF), (0x20000, 0x2FA1F),
           (0xE0000, 0x10FFFF))


def probe_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Endlessly many texts, the same every time: words, blanks, scripts, marks, control characters, special tokens."""
    draw = random.Random(0)
    if isinstance(tokenizer, CharacterTokenizer):  # it takes no others
        while True:
            yield "".join(draw.choices(tokenizer.characters, k=draw.randint(0, 40)))
    names = [name for name, token in tokenizer.vocabulary.items() if token in tokenizer.special.ids]
    yield from chain(FIXED, names)
    ranges = [draw.choices(SCRIPTS, k=4) for _ in range(50)]
    while True:
        letters = "".join(chr(draw.randint(*draw.choice(draw.choice(ranges)))) for _ in range(draw.randint(1, 24)))
        words = draw.choices([*WORDS, *names, letters], k=draw.randint(1, 12))
        blanks = draw.choices(BLANKS, k=len(words))
        yield draw.choice([" ".join(words), letters, "".join(chain(*zip(words, blanks, strict=True)))])
