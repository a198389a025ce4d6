"""The stages between raw text and a corpus, each on its own; `prepare` runs them in order.

clean (a unit of raw text to cleaned documents) -> select (what becomes of each) -> tokenizer (given, or made of the
text) -> tokenize (a unit's documents to tokens) -> shards (stretches of a split's stream). Documents and tokens pass
from one stage to the next as files beside a task's stem (see work.py).
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import chain, repeat
from math import floor
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.console.progress import progress_bar
from jaxlm.data import cleaning
from jaxlm.data.corpus import SPLITS, stream_name
from jaxlm.data.decoding import MOST_REPLACED, Decoding, likely_encodings, refuse_foreign
from jaxlm.data.documents import LabelledDocument, location, part_documents
from jaxlm.data.formats import KINDS, Reading
from jaxlm.data.shards import block_checksums
from jaxlm.data.source_file import SourceFile
from jaxlm.data.sources import Part, Unit
from jaxlm.data.tokenizer_training import train_tokenizer
from jaxlm.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer, load_tokenizer, with_end_token
from jaxlm.data.workers import Result, beside
from jaxlm.errors import UserError, shown
from jaxlm.settings import BUILT_IN_TOKENIZERS, TRAINED_TOKENIZERS, CleaningSettings, DataSettings
from jaxlm.storage.files import open_bytes, write_atomically

TRAIN, VALIDATION, EXACT_DUPLICATE, NEAR_DUPLICATE = range(4)  # what becomes of a cleaned document
STRETCH_CHARACTERS = 2**20  # longer documents are tokenized in stretches: tokenizers need a hundred bytes of memory a character
SHOWN_CHARACTERS = 20  # of a word that became an unknown token
KEPT_UNKNOWN = 1000  # different ones that a unit remembers


# ---------------------------------------------------------------------------------------------------------------- clean

@dataclass(frozen=True)
class CleanTask:
    unit: Unit
    reading: Reading
    cleaning: CleaningSettings


def clean_unit(task: CleanTask, stem: Path) -> Result:
    """Reads a unit and keeps its clean documents: `.text` (UTF-8, one after the other, of a record all its texts),
    `.lengths.npy` (int64 [documents, texts], bytes), `.digests.npy` (S16), `.signatures.npy` (uint32, empty unless near
    duplicates are looked for), and of labelled records `.labels` (JSON, one a line) and `.places.npy` (int64
    [documents, 2]: the part of the unit, and the place in it)."""
    dropped: Counter[str] = Counter()
    count = repaired = characters = longest = 0
    damaged: list[Result] = []
    lengths, digests, signatures, places = array("q"), bytearray(), bytearray(), array("q")
    with open(beside(stem, ".text"), "wb") as file, open(beside(stem, ".labels"), "w", encoding="utf-8") as labels:
        for part_number, part in enumerate(task.unit.parts):
            decoding = Decoding(part.file.encoding)
            for document in part_documents(part, task.reading, decoding):
                texts, reason = clean_texts(document.texts, task.cleaning)
                count += 1
                repaired += reason is None and (document.replaced > 0 or texts != list(document.texts))
                if reason:
                    dropped[reason] += 1
                    longest = max(longest, document.bytes or len(texts[-1].encode()) if reason == "too_long" else 0)
                    continue
                lengths.extend(file.write(text.encode()) for text in texts)
                digests += cleaning.texts_digest(texts)
                if task.cleaning.near_duplicates is not None:
                    signatures += cleaning.signature("\n".join(texts)).tobytes()
                if part.file.columns is not None:
                    labels.write(f"{label_line(part, document)}\n")
                    places.extend((part_number, document.place))
            refuse_foreign(part.file.name, part.file.encoding, decoding.replaced, decoding.characters, decoding.sample)
            characters += decoding.characters
            if decoding.replaced:
                damaged.append(damage_of(part.file, decoding))
    kept = len(digests) // 16
    np.save(beside(stem, ".lengths.npy"), np.array(lengths, np.int64).reshape(kept, -1 if kept else 1))
    np.save(beside(stem, ".places.npy"), np.array(places, np.int64).reshape(-1, 2))
    np.save(beside(stem, ".digests.npy"), np.frombuffer(digests, "S16"))
    np.save(beside(stem, ".signatures.npy"), np.frombuffer(signatures, np.uint32).reshape(-1, cleaning.PERMUTATIONS))
    sources = [described(part.file) for part in task.unit.parts if part.start == 0]
    return {"documents": count, "kept": kept, "repaired": repaired, "dropped": dropped, "sources": sources,
            "longest_dropped": longest, "characters": characters, "damaged": damaged}


def clean_texts(given: tuple[str | None, ...], settings: CleaningSettings) -> tuple[list[str], str | None]:
    """The mended texts of a document, and the first reason to drop it: a record loses all of its texts or none."""
    texts = []
    for text in given:
        mended, reason = cleaning.clean(text, settings)
        texts.append(mended)
        if reason:
            return texts, reason
    return texts, None


def label_line(part: Part, document: LabelledDocument) -> str:
    """A label as JSON, whatever a column of numbers holds. UserError for what is no label at all."""
    def plain(value: object) -> object:
        if isinstance(value, Decimal):
            return float(value)
        raise TypeError

    try:
        return json.dumps(document.label, default=plain)
    except TypeError:
        raise UserError(f"{location(part, document.place)}: label {shown(document.label)} is {type(document.label).__name__}, "
                        "expected text, a number or a list of them") from None


def described(file: SourceFile) -> Result:
    """A file's entry in the manifest."""
    return {"path": file.name, "bytes": file.bytes, "version": file.version, "kind": KINDS[file.kind], "encoding": file.encoding,
            "sha256": file_digest(file.path)}


def damage_of(file: SourceFile, decoding: Decoding) -> Result:
    """How many characters of a part of a file were replaced, and the likely encodings where that is no small share."""
    many = decoding.replaced > MOST_REPLACED * decoding.characters
    return {"path": file.name, "encoding": decoding.encoding, "replaced": decoding.replaced, "characters": decoding.characters,
            "likely": likely_encodings(decoding.sample) if many else []}


@dataclass(frozen=True)
class Cleaned:
    """The clean documents of all units, in order. Those of unit u are numbers first[u] .. first[u + 1]."""

    stems: list[Path]
    first: list[int]

    def lengths(self) -> np.ndarray:
        """int64 [documents]: bytes of UTF-8."""
        return np.concatenate([np.load(beside(stem, ".lengths.npy")).sum(axis=1) for stem in self.stems])

    def digests(self) -> np.ndarray:
        """S16 [documents]."""
        return np.concatenate([np.load(beside(stem, ".digests.npy")) for stem in self.stems])

    def labels(self) -> list[Any]:
        """Of each labelled record, as its file holds it."""
        return [json.loads(line) for stem in self.stems for line in beside(stem, ".labels").read_text("utf-8").split("\n")[:-1]]

    def place(self, number: int, units: list[Unit]) -> str:
        """Where a labelled record stands, for people."""
        unit = int(np.searchsorted(self.first, number, side="right")) - 1
        part, place = np.load(beside(self.stems[unit], ".places.npy"))[number - self.first[unit]].tolist()
        return location(units[unit].parts[part], place)

    def texts(self, wanted: np.ndarray) -> Iterator[list[str]]:
        """The texts of the documents at these (rising) numbers: of a record all of them."""
        for unit, stem in enumerate(self.stems):
            start, stop = np.searchsorted(wanted, self.first[unit:unit + 2])
            yield from unit_texts(stem, wanted[start:stop] - self.first[unit])


def unit_texts(stem: Path, wanted: np.ndarray) -> Iterator[list[str]]:
    """The texts of the clean documents of one unit at these (rising) numbers."""
    lengths = np.load(beside(stem, ".lengths.npy"))
    each = lengths.sum(axis=1)
    starts = np.cumsum(each) - each
    with open(beside(stem, ".text"), "rb") as file:
        for number in wanted:
            file.seek(starts[number])
            yield [file.read(length).decode() for length in lengths[number].tolist()]


# --------------------------------------------------------------------------------------------------------------- select

def select(cleaned: Cleaned, num_validation: int, data: DataSettings, why: Callable[[bool], str]) -> np.ndarray:
    """uint8 [documents]: TRAIN, VALIDATION, EXACT_DUPLICATE or NEAR_DUPLICATE.

    The first `num_validation` documents are the user's own validation text, if there is one: standing first, it
    stays, and training text that repeats it goes. UserError when a split ends up empty; `why(held_out)` says what
    was dropped of the user's validation text, or of the rest.
    """
    digests = cleaned.digests()
    fate = np.full(len(digests), TRAIN, np.uint8)
    fate[:num_validation] = VALIDATION
    if data.cleaning.exact_duplicates:
        fate[~cleaning.first_occurrences(digests)] = EXACT_DUPLICATE
    if data.cleaning.near_duplicates is not None:
        drop_near_duplicates(fate, cleaned, data.cleaning.near_duplicates)
    if not np.any(fate == TRAIN):
        repeated = np.count_nonzero(fate[num_validation:] >= EXACT_DUPLICATE)
        more = f", {repeated:,} repeat others (data.cleaning)" if repeated else ""
        raise UserError(f"data.raw: no document is left to train on: {why(False)}{more}")
    if isinstance(data.validation, str) and not np.any(fate == VALIDATION):
        raise UserError(f"data.validation: no document is left of '{data.validation}': {why(True)}")
    if not isinstance(data.validation, str) and data.validation > 0 and tail_share(data, fate) is None:
        hold_out(fate, digests, data.validation)
    return fate


def drop_near_duplicates(fate: np.ndarray, cleaned: Cleaned, threshold: float) -> None:
    known = cleaning.NearDuplicates(threshold)
    with progress_bar("compare", total=len(fate), unit="documents") as advance:
        for unit, stem in enumerate(cleaned.stems):
            numbers = range(*cleaned.first[unit:unit + 2])
            for number, values in zip(numbers, np.load(beside(stem, ".signatures.npy")), strict=True):
                if fate[number] != EXACT_DUPLICATE and not known.add(values):
                    fate[number] = NEAR_DUPLICATE
            advance(len(numbers))


def hold_out(fate: np.ndarray, digests: np.ndarray, share: float) -> None:
    """Moves a share of the documents from TRAIN to VALIDATION, at least one, and not all.

    Chosen by hash: equal texts share a side, and a document keeps its side as the corpus grows.
    """
    candidates = np.flatnonzero(fate == TRAIN)
    if len(candidates) == 1:
        raise UserError(f"data.validation: {share} of a single document cannot be held out as a whole "
                        "(data.validation_split=documents); use data.validation_split=tail to hold out the end of a text, or "
                        "data.validation=0")
    values = digest_numbers(digests[candidates])[:, 1]
    chosen = values < int(Fraction(repr(share)) * 2**64)
    if not chosen.any():
        chosen[np.argmin(values)] = True
    if chosen.all():
        chosen[np.argmax(values)] = False
    fate[candidates[chosen]] = VALIDATION


def digest_numbers(digests: np.ndarray) -> np.ndarray:
    """uint64 [documents, 2]: two independent random numbers for each digest."""
    return np.frombuffer(digests.tobytes(), "<u8").reshape(len(digests), 2)


def tail_share(data: DataSettings, fate: np.ndarray) -> Fraction | None:
    """What `split_text` holds out of every document; None when documents are held out whole, or nothing is.

    Unless the settings say which, it is documents, but a single one has none to spare.
    """
    if isinstance(data.validation, str) or data.validation == 0:
        return None
    split = data.validation_split or ("tail" if np.count_nonzero(fate <= VALIDATION) == 1 else "documents")
    return Fraction(repr(data.validation)) if split == "tail" else None


def split_text(text: str, fate: int, tail: Fraction | None) -> tuple[str, str]:
    """What of a document goes to the train and to the validation split.

    With a tail, the last share of its characters is held out. Exact: 0.1 means a tenth, not the nearest float.
    """
    if tail is not None:
        stop = floor(len(text) * (1 - tail))
        return text[:stop], text[stop:]
    return (text, "") if fate == TRAIN else ("", text)


# ------------------------------------------------------------------------------------------------------------ tokenizer

def given_tokenizer(data: DataSettings) -> Tokenizer | None:
    """The tokenizer that needs no text; None when one is trained or made of the text's characters."""
    if data.tokenizer == "bytes":
        return ByteTokenizer({})
    if data.tokenizer in TRAINED_TOKENIZERS + BUILT_IN_TOKENIZERS:
        return None
    try:
        tokenizer = load_tokenizer(data.tokenizer)
    except UserError as error:
        said = str(error)
        if said.startswith("data.tokenizer: "):
            raise
        raise UserError(f"data.tokenizer={data.tokenizer}: {said.removeprefix(f'{data.tokenizer}: ')}") from None
    return tokenizer if data.end_token is None else with_end_token(tokenizer, data.end_token)


def make_tokenizer(cleaned: Cleaned, fate: np.ndarray, data: DataSettings, vocab_size: int | None) -> Tokenizer:
    """Trained on a sample of the training text, or made of all characters of all that was kept."""
    kept = np.flatnonzero(fate <= VALIDATION)
    if data.tokenizer == "characters":
        characters: set[str] = set()
        for text in chain.from_iterable(cleaned.texts(kept)):
            characters.update(text)
        return CharacterTokenizer.of(characters, end_mark=len(kept) > 1)
    sample = sample_texts(cleaned, np.flatnonzero(fate == TRAIN), data.tokenizer_sample,
                          tail_share(data, fate))
    with progress_bar(f"train {data.tokenizer} tokenizer", total=None, unit="characters") as advance:
        tokenizer = train_tokenizer(data.tokenizer, sample, vocab_size, data.lowercase)
        advance(sum(map(len, sample)))
    return tokenizer


def sample_texts(cleaned: Cleaned, candidates: np.ndarray, max_bytes: int, tail: Fraction | None) -> list[str]:
    """Training documents chosen by their hash until `max_bytes` are reached, the last one cut; in the order of the
    corpus."""
    by_hash = candidates[np.argsort(digest_numbers(cleaned.digests()[candidates])[:, 0], kind="stable")]
    reached = np.cumsum(cleaned.lengths()[by_hash])
    last = min(int(np.searchsorted(reached, max_bytes)), len(by_hash) - 1)
    room = max_bytes - int(reached[last - 1] if last else 0)
    wanted = np.sort(by_hash[:last + 1])
    texts = [[split_text(text, TRAIN, tail)[0] for text in record] for record in cleaned.texts(wanted)]
    place = int(np.searchsorted(wanted, by_hash[last]))
    for number, text in enumerate(texts[place]):
        texts[place][number] = text.encode()[:room].decode(errors="ignore")
        room = max(0, room - len(text.encode()))
    return list(chain.from_iterable(texts))


# ------------------------------------------------------------------------------------------------------------- tokenize

@dataclass(frozen=True)
class TokenizeTask:
    cleaned: Path  # the unit's stem
    fate: np.ndarray  # of the unit's documents
    tokenizer: Path
    tail: Fraction | None
    dtype: np.dtype
    streams: tuple[str, ...]  # one for each text of a document


def tokenize_unit(task: TokenizeTask, stem: Path) -> Result:
    """Writes, for each stream of each split, the unit's `.tokens` (raw) and `.lengths.npy` (int64, tokens of each
    document)."""
    tokenizer = tokenizer_at(task.tokenizer)
    end = [] if tokenizer.special.eos is None else [tokenizer.special.eos]
    wanted = np.flatnonzero(task.fate <= VALIDATION)
    names = [stream_name(split, stream) for split in SPLITS for stream in task.streams]
    lengths = {name: array("q") for name in names}
    num_bytes = dict.fromkeys(names, 0)
    losses = {name: Losses() for name in names}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(beside(stem, f".{name}.tokens"), "wb")) for name in names}
        for number, texts in zip(wanted, unit_texts(task.cleaned, wanted), strict=True):
            for stream, text in zip(task.streams, texts, strict=True):
                for split, piece in zip(SPLITS, split_text(text, task.fate[number], task.tail), strict=True):
                    if piece:
                        name = stream_name(split, stream)
                        encoded = map(losses[name].encode, repeat(tokenizer), stretches(piece))
                        size = sum(files[name].write(np.array(ids, task.dtype)) for ids in chain(encoded, [end]))
                        lengths[name].append(size // task.dtype.itemsize)
                        num_bytes[name] += len(piece.encode())
    for name in names:
        np.save(beside(stem, f".{name}.lengths.npy"), np.array(lengths[name], np.int64))
    return {name: {"documents": len(lengths[name]), "tokens": sum(lengths[name]), "bytes": num_bytes[name],
                   **losses[name].result()} for name in names}


class Losses:
    """Counts what of a split's text its tokens no longer say."""

    def __init__(self):
        self.unknown_tokens = self.lost_characters = 0
        self.unknown: Counter[str] = Counter()  # what the unknown tokens stand for

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        ids = tokenizer.encode(text)
        if not tokenizer.lossless:
            self.lost_characters += count_lost(text, tokenizer.decode(ids))
            if unknown := ids.count(tokenizer.special.unk):
                self.unknown_tokens += unknown
                self.unknown.update(piece[:SHOWN_CHARACTERS] for piece in tokenizer.unknown_pieces(text))
        return ids

    def result(self) -> Result:
        return {"unknown_tokens": self.unknown_tokens, "lost_characters": self.lost_characters,
                "unknown": dict(self.unknown.most_common(KEPT_UNKNOWN))}


def count_lost(text: str, decoded: str) -> int:
    """Characters in which two texts differ, whatever their order; at least 1 if they differ at all."""
    if text == decoded:
        return 0
    before, after = Counter(text), Counter(decoded)
    return max((before - after).total(), (after - before).total(), 1)


@lru_cache(maxsize=1)
def tokenizer_at(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def stretches(text: str) -> Iterator[str]:
    """The text; a very long one in stretches that end with a line or a word."""
    start = 0
    while len(text) - start > STRETCH_CHARACTERS:
        limit = start + STRETCH_CHARACTERS
        stop = text.rfind("\n", start, limit) + 1 or max(text.rfind(" ", start + 1, limit), 0) or limit
        yield text[start:stop]
        start = stop
    yield text[start:]


# --------------------------------------------------------------------------------------------------------------- shards

Span = tuple[Path, int, int]  # raw token file, first token, end


@dataclass(frozen=True)
class ShardTask:
    spans: list[Span]
    path: Path
    checksums: Path
    dtype: np.dtype

    @property
    def tokens(self) -> int:
        return sum(stop - start for _, start, stop in self.spans)


def shard_spans(stems: list[Path], counts: list[int], name: str, shard_tokens: int) -> list[list[Span]]:
    """The stream of the units' tokens, cut every `shard_tokens`."""
    shards: list[list[Span]] = []
    position = 0
    for stem, count in zip(stems, counts, strict=True):
        start = 0
        while start < count:
            if position % shard_tokens == 0:
                shards.append([])
            stop = min(count, start + shard_tokens - position % shard_tokens)
            shards[-1].append((beside(stem, f".{name}.tokens"), start, stop))
            position += stop - start
            start = stop
    return shards


def write_shard(task: ShardTask, stem: Path) -> Result:
    """Copies the spans into one .npy, and puts the checksums of its blocks beside it."""
    def write(path: Path) -> None:
        tokens = np.lib.format.open_memmap(path, mode="w+", dtype=task.dtype, shape=(task.tokens,))
        position = 0
        for file, start, stop in task.spans:
            tokens[position:position + stop - start] = np.memmap(file, task.dtype, mode="r")[start:stop]
            position += stop - start
        tokens.flush()

    write_atomically(task.path, write)
    checksums = block_checksums(np.load(task.path, mmap_mode="r"))
    write_atomically(task.checksums, lambda path: np.save(path, checksums))
    return {"file": task.path.name, "tokens": task.tokens, "sha256": file_digest(task.path),
            "checksums": {"file": task.checksums.name, "sha256": file_digest(task.checksums)}}


def document_offsets(stems: list[Path], name: str) -> np.ndarray:
    """int64 [documents + 1]: where each document begins in a stream (see `stream_name`), and the end of the last."""
    lengths = [np.load(beside(stem, f".{name}.lengths.npy")) for stem in stems]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])


def file_digest(path: str | Path) -> str:
    """sha256 (hex) of a file."""
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
