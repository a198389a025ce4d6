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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxlm.console.progress import print_once
from jaxlm.data.framing import Framing, framing_of, usual_framing
from jaxlm.data.huggingface_files import BESIDE, MERGES, MODEL_CONFIG, NOT_READ, VOCABULARY, WORDS, refuse_contradictions
from jaxlm.data.older_tokenizers import older_tokenizer
from jaxlm.data.special_tokens import Declared, SpecialTokens, declared_tokens, find_special
from jaxlm.errors import UserError, nearest, shown
from jaxlm.settings import BUILT_IN_TOKENIZERS, TRAINED_TOKENIZERS
from jaxlm.storage.files import Location, as_path, exists, is_special, names_in, read_bytes, read_text, write_bytes, write_json

DESCRIPTION = "jaxlm_tokenizer.json"  # in a saved folder: kind, special tokens, digest and file names
MOST_SPARE = 100  # ids for each token that there is
BESIDE_FOLDER = "huggingface"  # in a saved folder: the files that it came with
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
        self.beside: dict[str, bytes] = {}  # the other files of the Hugging Face folder that it is of

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
    def framing(self) -> Framing:
        """What stands around the texts of a row."""
        return usual_framing(self.special)

    @cached_property
    def lossless(self) -> bool:
        """Whether a text that holds what tokenizers drop comes back from its tokens; then any text is taken to."""
        try:
            return self.decode(self.encode(PROBE)) == PROBE
        except UserError:  # of characters that it does not know
            return False

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
        beside = {"beside": in_text(self.beside)} if self.beside else {}
        return {"kind": self.kind, "special": asdict(self.special), "files": in_text(self.files), **beside}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "Tokenizer":
        """The tokenizer that `to_dict` described; UserError when it is damaged."""
        try:
            special, beside = SpecialTokens(**value["special"]), in_bytes(value.get("beside", {}))
            return build(value["kind"], in_bytes(value["files"]), special, beside)
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
        for name, content in self.beside.items():
            (directory / BESIDE_FOLDER).mkdir(exist_ok=True)
            write_bytes(directory / BESIDE_FOLDER / name, content)
        beside = {"beside": sorted(self.beside)} if self.beside else {}
        write_json(directory / DESCRIPTION, {"kind": self.kind, "digest": self.digest, "special": asdict(self.special),
                                             "files": sorted(self.files), **beside})


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

        with refusing(f"{JSON_FILE} is not a Hugging Face tokenizer"):
            self.tokenizer = tokenizers.Tokenizer.from_str(files[JSON_FILE].decode())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # spelled in a text, they are plain text
        vocabulary, added = self.vocabulary, self.tokenizer.get_added_tokens_decoder()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        refuse_gaps(vocabulary, self.vocab_size)
        model = json.loads(files[JSON_FILE])["model"]
        self.continuation = model["continuing_subword_prefix"] if model.get("type") == "WordPiece" else None
        marks = [token.content for token in added.values()]
        self.special = special or find_special(vocabulary, marks, {**(declared or {}), **self.own_unknown(model)})
        # An added token that is not called special would be found in text that spells it.
        plain = [token.content for number, token in added.items() if number in self.special.ids and not token.special]
        self.tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in plain])

    @cached_property
    def has_framing(self) -> bool:
        """Whether the file itself puts tokens around texts."""
        return self.own_framing is not None

    @cached_property
    def own_framing(self) -> Framing | None:
        with refusing(f"{JSON_FILE}: its post_processor fails"):
            return framing_of(self.tokenizer)

    @cached_property
    def framing(self) -> Framing:
        """As the file's post-processor has it."""
        return self.own_framing or usual_framing(self.special)

    def own_unknown(self, model: dict[str, Any]) -> Declared:
        """What the model itself puts for what it does not know, whatever is declared beside it."""
        token = model.get("unk_token")  # of Unigram an id
        token = self.tokenizer.id_to_token(model["unk_id"]) if model.get("unk_id") is not None else token
        return {"unk": [token]} if token else {}

    @property
    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        with refusing("a text cannot be encoded"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with refusing("a text cannot be encoded"):
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


@contextmanager
def refusing(problem: str) -> Iterator[None]:
    """A failure of the library `tokenizers` as a UserError: it raises bare Exception, and its panics are not even
    those."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"tokenizer: {problem} ({first_line(error)})") from error


def refuse_gaps(vocabulary: dict[str, int], size: int) -> None:
    """UserError for a tokenizer without tokens, or with an id that no table could have a row for."""
    if not vocabulary:
        raise UserError("tokenizer: it has no tokens")
    if size > MOST_SPARE * len(vocabulary):
        last = max(vocabulary, key=vocabulary.get)
        raise UserError(f"tokenizer: the token {shown(last)} has the id {size - 1:,}, but there are only {len(vocabulary):,} "
                        "tokens")


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


def build(kind: str, files: dict[str, bytes], special: SpecialTokens, beside: dict[str, bytes] | None = None) -> Tokenizer:
    """The tokenizer of a saved description."""
    kinds = (SentencePieceTokenizer, JsonTokenizer, CharacterTokenizer)
    refuse_other_files(files, FILES)
    refuse_other_files(beside or {}, BESIDE)
    for tokenizer in kinds:
        if kind == tokenizer.kind:
            return with_files_beside(tokenizer(files, special), beside or {})
    if kind == ByteTokenizer.kind:
        return ByteTokenizer(files)
    names = [tokenizer.kind for tokenizer in (*kinds, ByteTokenizer)]
    raise UserError(f"tokenizer: unknown kind '{kind}', expected one of {', '.join(names)}{nearest(str(kind), names)}")


def with_files_beside(tokenizer: Tokenizer, files: dict[str, bytes]) -> Tokenizer:
    tokenizer.beside = files
    return tokenizer


def refuse_other_files(names: Iterable[str], known: Sequence[str]) -> None:
    """ValueError for names of files that no tokenizer has: they could lead to any file, to be read or written."""
    for name in names:
        if name not in known:
            raise ValueError(f"a file named '{name}'")


def in_text(files: dict[str, bytes]) -> dict[str, str]:
    """Files as JSON can hold them: JSON as it is, others in base 64."""
    return {name: content.decode() if name.endswith(".json") else base64.b64encode(content).decode()
            for name, content in files.items()}


def in_bytes(files: dict[str, str]) -> dict[str, bytes]:
    """The files of `in_text`."""
    return {name: content.encode() if name.endswith(".json") else base64.b64decode(content, validate=True)
            for name, content in files.items()}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A saved folder, a SentencePiece .model, a Hugging Face tokenizer.json, or a folder of Hugging Face files, older
    ones included.

    UserError when there is none, or when a saved folder's files are not those that were saved.
    """
    path = as_path(path)
    try:
        names = names_in(path)
        if names or is_special(path):
            return load_folder(path, names)
        if path.name in (WORDS, VOCABULARY, MERGES) and exists(path):  # of several files that make a tokenizer, one
            return load_folder(path.parent, names_in(path.parent))
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
    wanted = [name for name in names if name in (*BESIDE, JSON_FILE, MODEL_CONFIG) or name.endswith(".model")]
    files = {name: read_bytes(folder / name) for name in wanted}
    content = files.get(JSON_FILE) or older_tokenizer(files)
    if content is not None:
        tokenizer = JsonTokenizer({JSON_FILE: content}, declared=declared_tokens(folder))
        refuse_contradictions(files, tokenizer.vocabulary)
        return with_files_beside(tokenizer, {name: files[name] for name in BESIDE if name in files})
    models = [name for name in names if name.endswith(".model")]
    if len(models) == 1:
        return SentencePieceTokenizer({MODEL_FILE: files[models[0]]}, declared=declared_tokens(folder))
    found = ", ".join([*files.keys() - {MODEL_CONFIG}, *(name for name in names if name.endswith(NOT_READ))])
    raise UserError(f"expected one of {DESCRIPTION}, {JSON_FILE}, {WORDS}, {VOCABULARY} with {MERGES}, or one SentencePiece "
                    f".model in this folder, found {found or 'none of them'} (transformers' save_pretrained writes {JSON_FILE})")


def vocabulary_size(wanted: int | None, tokenizer: Tokenizer, given: bool) -> int:
    """model.vocab_size for a tokenizer: its own; for one that was `given`, `wanted` may have spare rows behind its
    tokens, as Qwen2 has, which no text comes to.

    Raises UserError where the two do not belong together.
    """
    size = tokenizer.vocab_size
    if wanted is None or wanted == size:
        return size
    if wanted < size or not given:
        raise UserError(f"model.vocab_size={wanted}: the tokenizer has {size} tokens; set that, or null (the table is padded to "
                        "a multiple of 128 by itself)")
    print_once(f"model.vocab_size={wanted:,}: the tokenizer has {size:,} tokens; {wanted - size:,} rows of the table are spare")
    return wanted


def with_end_token(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The same tokenizer, but documents end with the token of this name. Raises UserError: it has none of this name."""
    vocabulary = tokenizer.vocabulary
    if name not in vocabulary:
        special = [token for token in vocabulary if token[:1] in ("<", "[")] or [*vocabulary]
        raise UserError(f"data.end_token: '{name}' is not a token of this tokenizer{nearest(name, special)}")
    end = vocabulary[name]
    special = replace(tokenizer.special, eos=end, sep=end if tokenizer.special.sep is None else tokenizer.special.sep)
    return build(tokenizer.kind, tokenizer.files, special, tokenizer.beside)


def load_saved(folder: Location) -> Tokenizer:
    """A folder that `Tokenizer.save` wrote."""
    try:
        description = json.loads(read_text(folder / DESCRIPTION))
        refuse_other_files(description["files"], FILES)
        refuse_other_files(description.get("beside", []), BESIDE)
        files = {name: read_bytes(folder / name) for name in description["files"]}
        beside = {name: read_bytes(folder / BESIDE_FOLDER / name) for name in description.get("beside", [])}
        tokenizer = build(description["kind"], files, SpecialTokens(**description["special"]), beside)
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


def first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0][:200]
