"""Text to token ids and back: one small interface over SentencePiece, Hugging Face `tokenizer.json`, bytes and
characters.

A tokenizer is its kind, its special tokens and the bytes of its files, nothing else: that is what `digest` covers,
what `save` writes and what travels in a checkpoint (`to_dict`). Reading one never runs code: the files are JSON or a
SentencePiece protobuf.
"""

import base64
import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxlm.data.special_tokens import Declared, SpecialTokens, declared_tokens, find_special
from jaxlm.errors import UserError, nearest, shown
from jaxlm.settings import BUILT_IN_TOKENIZERS, TRAINED_TOKENIZERS
from jaxlm.storage.files import Location, as_path, exists, is_special, names_in, read_bytes, read_text, write_bytes, write_json

DESCRIPTION = "jaxlm_tokenizer.json"  # in a saved folder: kind, special tokens, digest and file names
RUN_FILE = "config.yaml"
MODEL_FILE, JSON_FILE, CHARACTERS_FILE = FILES = ("tokenizer.model", "tokenizer.json", "characters.json")
SPACE_MARK = "\u2581"  # how SentencePiece writes a blank inside a piece
# Holds what tokenizers drop or change: blanks, lines, case, accents, ligatures, marks without width, rare and private
# characters.
PROBE = (" A  b\t\r\n\n c\u00a0d\u3000É e\u0301 ﬁ Ａ ª \u200b\ufeff\u00ad\u0007 . , n't a,b ##s <s> 日本か 한 ก็ 😀 "
         "\U0002a6a5 \ue000 \u2581 ")


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

    def token_text(self, token: int) -> str:
        """The text of a token that is not special, without what marks that it goes on a word."""
        return self.decode_plain([token])

    @property
    def vocabulary(self) -> dict[str, int]:
        """Tokens by name; empty where they have none."""
        return {}

    def unknown_pieces(self, text: str) -> list[str]:
        """What of a text its unknown tokens stand for, in order."""
        return []

    @cached_property
    def lossless(self) -> bool:
        """Whether a text that holds what tokenizers drop comes back from its tokens; then any text is taken to."""
        return self.decode(self.encode(PROBE)) == PROBE

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special ones are dropped."""
        return self.decode_plain([int(token) for token in ids if int(token) not in self.special.ids])

    def decode_after(self, ids: list[int], new: list[int], text: str) -> str:
        """The text of the tokens `new` behind `ids`, which `text` was encoded to.

        Decoded with them: many tokenizers drop the blank before the first token of a text. Where decoding changes
        `text` (case, blanks), what follows is found behind as many characters that are not blank.
        """
        before, whole = self.decode(ids), self.decode([*ids, *new])
        if whole.startswith(before):
            after = whole[len(before):]
        else:
            left, place = sum(not letter.isspace() for letter in before), 0
            while left and place < len(whole):
                left -= not whole[place].isspace()
                place += 1
            after = whole[place:]
        lost = text[len(text.rstrip()):] if not before[-1:].isspace() else ""  # blanks at its end that no token stands for
        return after[1:] if lost and after[:1].isspace() else after

    @cached_property
    def starts_word(self) -> np.ndarray:
        """bool [vocab_size]: the token begins a word (a blank, punctuation, an ideograph, or marked so by the
        tokenizer).

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

    def __init__(self, files: dict[str, bytes], special: SpecialTokens | None = None, declared: Declared | None = None):
        super().__init__(files)
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(files[MODEL_FILE])
        except RuntimeError as error:
            raise UserError(f"tokenizer: {MODEL_FILE} is not a SentencePiece model") from error
        self.vocab_size = self.processor.vocab_size()
        self.special = special or self.find_special(declared or {})
        self.space_mark = self.find_space_mark()

    @property
    def vocabulary(self) -> dict[str, int]:
        return {self.processor.id_to_piece(token): token for token in range(self.vocab_size)}

    def find_special(self, declared: Declared) -> SpecialTokens:
        """What lies beside the model declares, then what it declares itself."""
        model, vocabulary = self.processor, self.vocabulary
        own = {"pad": model.pad_id(), "unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id()}
        own_names = {role: [model.id_to_piece(token)] for role, token in own.items() if token >= 0}
        marks = [name for name, token in vocabulary.items() if model.is_control(token) or model.is_unknown(token)]
        every = {role: [*declared.get(role, ()), *own_names.get(role, ())] for role in {*declared, *own_names}}
        return find_special(vocabulary, marks, every | {"unk": own_names.get("unk", [])})

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

    def unknown_pieces(self, text: str) -> list[str]:
        pieces = self.processor.encode(text, out_type="immutable_proto").pieces
        return [piece.surface for piece in pieces if piece.id == self.special.unk]

    def token_starts_word(self, token: int) -> bool:
        if self.processor.is_control(token) or self.processor.is_unused(token):
            return True
        piece = self.processor.id_to_piece(token)
        return byte_begins_word(int(piece[1:-1], 16)) if self.processor.is_byte(token) else begins_word(piece)


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`: byte-level BPE (GPT-2, Llama 3), WordPiece (BERT), Unigram, ..."""

    kind = "json"

    def __init__(self, files: dict[str, bytes], special: SpecialTokens | None = None, declared: Declared | None = None):
        super().__init__(files)
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(files[JSON_FILE].decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer: {JSON_FILE} is not a Hugging Face tokenizer ({first_line(error)})") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # spelled in a text, they are plain text
        vocabulary, added = self.vocabulary, self.tokenizer.get_added_tokens_decoder()
        self.vocab_size = max(vocabulary.values()) + 1
        model = json.loads(files[JSON_FILE])["model"]
        self.continuation = model["continuing_subword_prefix"] if model.get("type") == "WordPiece" else None
        marks = [token.content for token in added.values()]
        self.special = special or find_special(vocabulary, marks, {**(declared or {}), **self.own_unknown(model)})
        # An added token that is not called special would be found in text that spells it.
        plain = [token.content for number, token in added.items() if number in self.special.ids and not token.special]
        self.tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in plain])

    def own_unknown(self, model: dict[str, Any]) -> Declared:
        """What the model itself puts for what it does not know, whatever is declared beside it."""
        token = model.get("unk_token")  # of Unigram an id
        token = self.tokenizer.id_to_token(model["unk_id"]) if model.get("unk_id") is not None else token
        return {"unk": [token]} if token else {}

    @property
    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode_plain(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def unknown_pieces(self, text: str) -> list[str]:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        unknown = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == self.special.unk]
        return [text[start:stop] for start, stop in unknown]

    def token_text(self, token: int) -> str:
        return super().token_text(token).removeprefix(self.continuation or "")

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
    lossless = True  # what it does not know, it refuses

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
            return JsonTokenizer({JSON_FILE: read_bytes(path)}, declared=declared_tokens(path.parent))
        if exists(path):
            return SentencePieceTokenizer({MODEL_FILE: read_bytes(path)}, declared=declared_tokens(path.parent))
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
    if RUN_FILE in names:  # a run directory: the tokenizer that it was trained with
        places = (folder / "tokenizer", folder / "corpus" / "tokenizer")
        own = next((place for place in places if exists(place / DESCRIPTION)), None)
        if own is None:
            raise UserError("a run directory without a tokenizer of its own; expected one in tokenizer/ or corpus/tokenizer/")
        return load_saved(own)
    if JSON_FILE in names:
        return JsonTokenizer({JSON_FILE: read_bytes(folder / JSON_FILE)}, declared=declared_tokens(folder))
    models = [name for name in names if name.endswith(".model")]
    if len(models) == 1:
        return SentencePieceTokenizer({MODEL_FILE: read_bytes(folder / models[0])}, declared=declared_tokens(folder))
    raise UserError(f"expected one of {DESCRIPTION}, {JSON_FILE} or one SentencePiece .model in this folder, "
                    f"found {len(models)} .model files")


def with_end_token(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The same tokenizer, but documents end with the token of this name. Raises UserError: it has none of this name."""
    vocabulary = tokenizer.vocabulary
    if name not in vocabulary:
        special = [token for token in vocabulary if token[:1] in ("<", "[")] or [*vocabulary]
        raise UserError(f"data.end_token: '{name}' is not a token of this tokenizer{nearest(name, special)}")
    end = vocabulary[name]
    special = replace(tokenizer.special, eos=end, sep=end if tokenizer.special.sep is None else tokenizer.special.sep)
    return build(tokenizer.kind, tokenizer.files, special)


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
