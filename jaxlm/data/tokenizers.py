"""Text to token ids and back: one small interface over SentencePiece, Hugging Face `tokenizer.json`, bytes and characters.

A tokenizer is its kind, its special tokens and the bytes of its files, nothing else: that is what `digest` covers, what `save`
writes and what travels in a checkpoint (`to_dict`). Reading one never runs code: the files are JSON or a SentencePiece protobuf.
"""

import base64
import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxlm.errors import UserError, nearest, shown
from jaxlm.reporting.files import Location, as_path, exists, is_special, names_in, read_bytes, read_text, write_bytes, write_json
from jaxlm.settings import BUILT_IN_TOKENIZERS, TRAINED_TOKENIZERS

DESCRIPTION = "jaxlm_tokenizer.json"  # in a saved folder: kind, special tokens, digest and file names
MODEL_FILE, JSON_FILE, CHARACTERS_FILE = FILES = ("tokenizer.model", "tokenizer.json", "characters.json")
SPACE_MARK = "\u2581"  # how SentencePiece writes a blank inside a piece
SPELLINGS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "[BOS]", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "[EOS]", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that no text encodes to; None where the tokenizer has none."""

    pad: int | None = None
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(token for token in asdict(self).values() if token is not None)


class Tokenizer(ABC):
    """`vocab_size` tokens with ids 0 .. vocab_size - 1, of which `special` never come from text."""

    kind: ClassVar[str]
    special: SpecialTokens
    vocab_size: int

    def __init__(self, files: dict[str, bytes]):
        self.files = files

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Nothing is added, and text that spells a special token is plain text."""

    @abstractmethod
    def decode_plain(self, ids: list[int]) -> str:
        """The text of ids none of which is special."""

    @abstractmethod
    def token_starts_word(self, token: int) -> bool:
        """Whether a token that is not special begins a word."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special ones are dropped."""
        return self.decode_plain([int(token) for token in ids if int(token) not in self.special.ids])

    @cached_property
    def starts_word(self) -> np.ndarray:
        """bool [vocab_size]: the token begins a word (a blank, punctuation, an ideograph, or marked so by the tokenizer).

        A word is such a token and the following ones that do not begin another: what whole-word masking masks together.
        """
        special = self.special.ids
        return np.array([token in special or self.token_starts_word(token) for token in range(self.vocab_size)])

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over kind, special tokens and file contents."""
        contents = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        identity = {"kind": self.kind, "special": asdict(self.special), "files": contents}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description that `from_dict` turns back into this tokenizer."""
        files = {name: content.decode() if name.endswith(".json") else base64.b64encode(content).decode()
                 for name, content in self.files.items()}
        return {"kind": self.kind, "special": asdict(self.special), "files": files}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "Tokenizer":
        """The tokenizer that `to_dict` described; UserError when it is damaged."""
        try:
            files = {name: content.encode() if name.endswith(".json") else base64.b64decode(content, validate=True)
                     for name, content in value["files"].items()}
            return build(value["kind"], files, SpecialTokens(**value["special"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"tokenizer: the saved description is damaged ({shown(error)})") from error

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Tokenizer.from_dict, (self.to_dict(),)

    def save(self, directory: str | Path) -> None:
        """Writes the files, and last the description that makes the folder complete."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_bytes(directory / name, content)
        write_json(directory / DESCRIPTION, {"kind": self.kind, "digest": self.digest, "special": asdict(self.special),
                                             "files": sorted(self.files)})


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson 2018), trained here or elsewhere."""

    kind = "sentencepiece"

    def __init__(self, files: dict[str, bytes], special: SpecialTokens | None = None):
        super().__init__(files)
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(files[MODEL_FILE])
        except RuntimeError as error:
            raise UserError(f"tokenizer: {MODEL_FILE} is not a SentencePiece model") from error
        self.vocab_size = self.processor.vocab_size()
        self.special = special or self.find_special()
        self.space_mark = self.find_space_mark()

    def find_special(self) -> SpecialTokens:
        """What the model itself declares, then control and user-defined pieces with a usual spelling."""
        model = self.processor
        declared = {"pad": model.pad_id(), "unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id()}
        pieces = {model.id_to_piece(token): token for token in range(self.vocab_size)}
        return special_by_spelling(pieces, {role: token for role, token in declared.items() if token >= 0})

    def find_space_mark(self) -> list[int] | None:
        """Byte tokens of a literal U+2581 in the text, which SentencePiece would take for a blank.

        None where the model cannot say it (no byte tokens), or puts a blank before every text so that it cannot be cut.
        """
        tokens = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        first = self.processor.encode("a", out_type=str)
        return tokens if all(map(self.processor.is_byte, tokens)) and first == ["a"] else None

    def encode(self, text: str) -> list[int]:
        if self.space_mark is None or SPACE_MARK not in text:
            return self.processor.encode(text)
        first, *rest = text.split(SPACE_MARK)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self.space_mark + self.processor.encode(part)
        return ids

    def decode_plain(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def token_starts_word(self, token: int) -> bool:
        if self.processor.is_control(token) or self.processor.is_unused(token):
            return True
        piece = self.processor.id_to_piece(token)
        return byte_begins_word(int(piece[1:-1], 16)) if self.processor.is_byte(token) else begins_word(piece)


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`: byte-level BPE (GPT-2, Llama 3), WordPiece (BERT), Unigram, ..."""

    kind = "json"

    def __init__(self, files: dict[str, bytes], special: SpecialTokens | None = None, names: dict[str, str] | None = None):
        super().__init__(files)
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(files[JSON_FILE].decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer: {JSON_FILE} is not a Hugging Face tokenizer ({first_line(error)})") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # spelled in a text, they are plain text
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        declared = {role: vocabulary[name] for role, name in (names or {}).items() if name in vocabulary}
        self.special = special or special_by_spelling(vocabulary, declared)
        model = json.loads(files[JSON_FILE])["model"]
        self.continuation = model["continuing_subword_prefix"] if model.get("type") == "WordPiece" else None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode_plain(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def token_starts_word(self, token: int) -> bool:
        piece = self.tokenizer.id_to_token(token) or ""
        if self.continuation is not None:
            return not piece.startswith(self.continuation)
        # Byte-level BPE writes blank, newline and tab as these letters.
        return piece[:1] in ("\u0120", "\u010a", "\u0109") or begins_word(piece)


class ByteTokenizer(Tokenizer):
    """Ids 0 - 255 are the bytes of UTF-8, then pad, bos (= cls), eos (= sep) and mask."""

    kind = "bytes"
    special = SpecialTokens(pad=256, bos=257, cls=257, eos=258, sep=258, mask=259)
    vocab_size = 260

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode_plain(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def token_starts_word(self, token: int) -> bool:
        return byte_begins_word(token)


class CharacterTokenizer(Tokenizer):
    """One id for each character of a text, in Unicode order, and nothing else, unless documents need an end mark."""

    kind = "characters"

    def __init__(self, files: dict[str, bytes], special: SpecialTokens):
        super().__init__(files)
        self.characters = sorted(json.loads(files[CHARACTERS_FILE]))
        self.code_points = np.array([ord(character) for character in self.characters], np.uint32)
        self.special = special
        self.vocab_size = len(self.characters) + len(special.ids)

    @staticmethod
    def of(characters: Iterable[str], end_mark: bool) -> "CharacterTokenizer":
        """For a text with these characters; `end_mark` adds eos."""
        characters = sorted(set(characters))
        content = json.dumps("".join(characters)).encode()
        return CharacterTokenizer({CHARACTERS_FILE: content}, SpecialTokens(eos=len(characters) if end_mark else None))

    def encode(self, text: str) -> list[int]:
        code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
        unknown = np.flatnonzero(~np.isin(code_points, self.code_points))
        if len(unknown):
            character = text[unknown[0]]
            raise UserError(f"character {character!r} (U+{ord(character):04X}) at position {unknown[0]} is not among the "
                            f"{len(self.characters)} characters of the tokenizer")
        return np.searchsorted(self.code_points, code_points).tolist()

    def decode_plain(self, ids: list[int]) -> str:
        return "".join(self.characters[token] for token in ids)

    def token_starts_word(self, token: int) -> bool:
        return begins_word(self.characters[token])


def build(kind: str, files: dict[str, bytes], special: SpecialTokens) -> Tokenizer:
    """The tokenizer of a saved description."""
    kinds = (SentencePieceTokenizer, JsonTokenizer, CharacterTokenizer)
    refuse_other_files(files)
    if kind == ByteTokenizer.kind:
        return ByteTokenizer(files)
    for tokenizer in kinds:
        if kind == tokenizer.kind:
            return tokenizer(files, special)
    names = [tokenizer.kind for tokenizer in (*kinds, ByteTokenizer)]
    raise UserError(f"tokenizer: unknown kind '{kind}', expected one of {', '.join(names)}{nearest(str(kind), names)}")


def refuse_other_files(names: Iterable[str]) -> None:
    """ValueError for names of files that no tokenizer has: they could lead to any file, to be read or written."""
    for name in names:
        if name not in FILES:
            raise ValueError(f"a file named '{name}'")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A saved folder, a SentencePiece .model, a Hugging Face tokenizer.json, or a folder that holds one of these.

    UserError when there is none, or when a saved folder's files are not those that were saved.
    """
    path = as_path(path)
    try:
        names = names_in(path)
        if names or is_special(path):
            return load_folder(path, names)
        if path.suffix == ".json":
            return JsonTokenizer({JSON_FILE: read_bytes(path)}, names=declared_names(path.parent))
        if exists(path):
            return SentencePieceTokenizer({MODEL_FILE: read_bytes(path)})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    kinds = TRAINED_TOKENIZERS + BUILT_IN_TOKENIZERS
    raise UserError(f"data.tokenizer: '{path}' is neither a kind ({', '.join(kinds)}) nor an existing file or folder"
                    f"{nearest(str(path), kinds)}")


def load_folder(folder: Location, names: list[str]) -> Tokenizer:
    if DESCRIPTION in names:
        return load_saved(folder)
    if JSON_FILE in names:
        return JsonTokenizer({JSON_FILE: read_bytes(folder / JSON_FILE)}, names=declared_names(folder))
    models = [name for name in names if name.endswith(".model")]
    if len(models) == 1:
        return SentencePieceTokenizer({MODEL_FILE: read_bytes(folder / models[0])})
    raise UserError(f"expected one of {DESCRIPTION}, {JSON_FILE} or one SentencePiece .model in this folder, "
                    f"found {len(models)} .model files")


def load_saved(folder: Location) -> Tokenizer:
    """A folder that `Tokenizer.save` wrote."""
    try:
        description = json.loads(read_text(folder / DESCRIPTION))
        refuse_other_files(description["files"])
        files = {name: read_bytes(folder / name) for name in description["files"]}
        tokenizer = build(description["kind"], files, SpecialTokens(**description["special"]))
        digest = description["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{DESCRIPTION} is damaged ({shown(error)})") from error
    if tokenizer.digest != digest:
        raise UserError(f"the files are not those that were saved: digest {tokenizer.digest[:12]}, expected {digest[:12]}")
    return tokenizer


def declared_names(folder: Location) -> dict[str, str]:
    """Special tokens by role as the JSON files that lie beside a tokenizer.json name them."""
    names: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        try:
            content = json.loads(read_text(file)) if exists(file) else {}
        except ValueError as error:
            raise UserError(f"{file.name} is not JSON ({error})") from error
        for role in SPELLINGS:
            token = content.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names[role] = token
    return names


def special_by_spelling(vocabulary: dict[str, int], declared: dict[str, int]) -> SpecialTokens:
    """Roles that are not declared go by the usual spellings; cls and bos, sep and eos stand in for each other."""
    roles: dict[str, int | None] = {field.name: declared.get(field.name) for field in fields(SpecialTokens)}
    for role, spellings in SPELLINGS.items():
        if roles[role] is None:
            roles[role] = next((vocabulary[spelling] for spelling in spellings if spelling in vocabulary), None)
    for one, other in (("cls", "bos"), ("sep", "eos")):
        roles[one], roles[other] = (roles[one] if roles[one] is not None else roles[other],
                                    roles[other] if roles[other] is not None else roles[one])
    return SpecialTokens(**roles)


def begins_word(piece: str) -> bool:
    """Blanks, punctuation and ideographs begin a word; letters and digits go on with one."""
    first = piece[:1]
    if not (first.isalnum() or first == "_"):
        return True
    return unicodedata.name(first, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))


def byte_begins_word(byte: int) -> bool:
    """Bytes from 128 on are parts of characters and go on with a word."""
    return byte < 128 and begins_word(chr(byte))


def first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0][:200]
