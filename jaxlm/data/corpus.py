"""A prepared corpus on disk: token streams of a train and a validation split, and their documents' offsets.

    manifest.json               format, tokenizer, settings, sources, and per split the counts, files and digests
    report.json                 documents in, dropped by reason, repaired, out
    tokenizer/                  see jaxlm.data.tokenizers
    train-00000.tokens.npy      uint16 (uint32 for a vocabulary above 65,536), shard after shard one stream
    train-00000.crc32.npy       uint32: the checksum of every block of 4,096 tokens (older corpora have none)
    train.offsets.npy           int64 [documents + 1]: document d is the stream's tokens offsets[d] .. offsets[d + 1]
    validation-00000.tokens.npy, validation-00000.crc32.npy, validation.offsets.npy

Every shard but the last holds the same number of tokens, so the shard of a position is one division; documents may
cross shards. A document ends with the tokenizer's eos where it has one.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from jaxlm.data.damage import DamagedData
from jaxlm.data.manifest import MANIFEST, read_manifest, read_report
from jaxlm.data.shards import CHECKSUM, Shard, check_array, load_array, num_blocks, open_shard
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.errors import UserError
from jaxlm.storage.files import Location, absolute

TOKENIZER = "tokenizer"
SPLITS = ("train", "validation")
CHECKS = 16  # files at a time: what is far away takes its time to answer
MOST_UNKNOWN = 0.001  # share of a split's tokens, above which it is a warning
OPEN_SHARDS = 128  # of a split at a time: some systems let a process open no more than 256 files


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tokens.npy"


def checksum_file(split: str, number: int) -> str:
    return f"{split}-{number:05d}.crc32.npy"


def offsets_file(split: str) -> str:
    return f"{split}.offsets.npy"


def token_type(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class Documents:
    """One split: a stream of tokens and where its documents begin. For any thread; opened anew when sent to another
    process."""

    def __init__(self, directory: Location, split: str, manifest: dict[str, Any]):
        self.directory = directory
        self.split = split
        self.entry = manifest["splits"][split]
        refuse_strange_names(directory, split, self.entry["shards"])
        self.dtype = token_type(manifest["tokenizer"]["vocab_size"])
        self.shard_tokens: int = manifest["settings"]["data.shard_tokens"]
        self.num_documents: int = self.entry["documents"]
        self.num_tokens: int = self.entry["tokens"]
        self.num_bytes: int = self.entry["bytes"]  # of the text, in UTF-8
        vocab_size = manifest["tokenizer"]["vocab_size"]
        self.opened = lru_cache(OPEN_SHARDS)(partial(open_shard, directory, self.entry["shards"], self.dtype, vocab_size))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [num_documents + 1], read-only; compared with its digest when first asked for. UserError where it
        differs."""
        with refusing_damage():
            return load_array(self.directory / offsets_file(self.split), self.num_documents + 1, np.dtype("<i8"),
                              self.entry["offsets"]["sha256"])

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: tokens start .. stop of the split's stream.

        IndexError outside of it. DamagedData when a file is gone or too short, the checksum of a block that holds
        one of these tokens differs, or a token is not in the vocabulary.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.num_tokens}")
        tokens = np.empty(stop - start, np.int32)
        position = start
        while position < stop:
            number, inside = divmod(position, self.shard_tokens)
            piece = self.shard(number).read(inside, min(inside + stop - position, self.shard_tokens))
            tokens[position - start:position - start + len(piece)] = piece
            position += len(piece)
        return tokens

    def shard(self, number: int) -> Shard:
        """An open shard; opened anew if its file was removed, replaced or cut, so that all processes see the same."""
        shard = self.opened(number)
        if not shard.is_current():
            self.opened.cache_clear()
            shard = self.opened(number)
        return shard

    def check(self) -> None:
        """UserError when a file is missing or not as long as the manifest says. Reads headers only."""
        arrays = [(offsets_file(self.split), self.num_documents + 1, np.dtype("<i8"))]
        for shard in self.entry["shards"]:
            arrays.append((shard["file"], shard["tokens"], self.dtype))
            if "checksums" in shard:
                arrays.append((shard["checksums"]["file"], num_blocks(shard["tokens"]), CHECKSUM))
        with refusing_damage(), ThreadPoolExecutor(CHECKS) as pool:
            for _ in pool.map(lambda array: check_array(self.directory / array[0], *array[1:]), arrays):
                pass

    def __reduce__(self) -> tuple:
        return open_split, (self.directory, self.split)


def refuse_strange_names(directory: Location, split: str, shards: list[dict[str, Any]]) -> None:
    """UserError unless the manifest names its files as they are named here: nothing outside the folder is ever
    opened."""
    for number, shard in enumerate(shards):
        names = [shard["file"], *([shard["checksums"]["file"]] if "checksums" in shard else [])]
        for name, expected in zip(names, (shard_file(split, number), checksum_file(split, number)), strict=False):
            if name != expected:
                raise UserError(f"{directory / MANIFEST}: damaged (names a file '{name}', expected {expected}); "
                                "prepare the corpus again")


def open_split(directory: Location, split: str) -> Documents:
    return getattr(Corpus(directory, whole=False), split)


class Corpus:
    """A finished corpus. UserError when the folder is none, or lacks a part.

    whole=False: files of tokens may be missing or too short; DamagedData comes when they are read.
    """

    def __init__(self, directory: str | os.PathLike, whole: bool = True):
        self.directory, self.whole = absolute(directory), whole
        self.manifest = read_manifest(self.directory)
        self.train = Documents(self.directory, "train", self.manifest)
        self.validation = Documents(self.directory, "validation", self.manifest)
        if whole:
            self.train.check()
            self.validation.check()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.directory / TOKENIZER)
        entry = self.manifest["tokenizer"]
        if (tokenizer.digest, tokenizer.vocab_size) != (entry["digest"], entry["vocab_size"]):
            raise UserError(f"{self.directory / TOKENIZER}: not the tokenizer that the corpus was prepared with")
        return tokenizer

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the content: tokenizer, tokens and document bounds; not of names, paths or settings."""
        content = {"tokenizer": self.manifest["tokenizer"]["digest"], "splits": {
            split: [[shard["sha256"] for shard in entry["shards"]], entry["offsets"]["sha256"]]
            for split, entry in self.manifest["splits"].items()}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def end_token(self) -> str:
        """Which token ends a document, for people."""
        token, names = self.tokenizer.special.eos, self.tokenizer.vocabulary
        if token is None:
            return "no end token"
        return f"end token {next((name for name, number in names.items() if number == token), token)}"

    @property
    def loses_text(self) -> bool:
        """Whether validation text cannot be had back from its tokens: a share of its bits is then no bits per byte
        of it.

        Counted when the corpus was prepared; of an older one, whether its tokenizer loses text of some kind.
        """
        lost = self.validation.entry.get("lost_characters")
        return self.validation.num_tokens > 0 and (lost > 0 if lost is not None else not self.tokenizer.lossless)

    @property
    def lost(self) -> str:
        """How much of the validation text is lost, for people."""
        lost = self.validation.entry.get("lost_characters")
        what = "the tokenizer does not give every text back" if lost is None else (
            f"{lost:,} characters of the validation text do not come back from its tokens")
        return f"{what} (unknown, or changed in case, accents or blanks), so bits per byte are null"

    def warnings(self) -> list[str]:
        """Lines about text that a model cannot learn from this corpus."""
        lines = []
        for documents in (self.train, self.validation):
            unknown = documents.entry.get("unknown_tokens", 0)
            if unknown > MOST_UNKNOWN * documents.num_tokens:
                words = read_report(self.directory).get("splits", {}).get(documents.split, {}).get("unknown", {})
                commonest = ", ".join(f"{word!r} {count:,}" for word, count in itertools.islice(words.items(), 5))
                lines.append(f"WARNING: {self.directory}: {share(unknown, documents.num_tokens)} of the {documents.split} tokens "
                             f"are unknown, their text is lost{f' (most often {commonest})' if commonest else ''}; "
                             "data.tokenizer=bpe, unigram or bytes loses none")
        if self.tokenizer.special.eos is None and self.train.num_documents > 1:
            lines.append(f"WARNING: {self.directory}: the tokenizer has no end token that is known, so documents run together "
                         f"({self.train.num_documents:,} of them); name one with data.end_token")
        return lines

    @property
    def notes(self) -> list[str]:
        """What a user would not expect of the text that was prepared, a line each."""
        return read_report(self.directory).get("notes", [])

    def __reduce__(self) -> tuple:
        return Corpus, (self.directory, self.whole)


def bytes_per_token(corpora: Sequence[Corpus]) -> float | None:
    """UTF-8 bytes of validation text for each of its tokens, for bits per byte. None where the tokenizer lost text: the
    bits left out would be those of what was lost."""
    if any(corpus.loses_text for corpus in corpora):
        return None
    return sum(corpus.validation.num_bytes for corpus in corpora) / sum(corpus.validation.num_tokens for corpus in corpora)


def share(part: int, whole: int) -> str:
    """As a percentage with two digits that count: 0.012 %, 3.4 %."""
    return f"{float(f'{100 * part / whole:.2g}'):g} %"


@contextmanager
def refusing_damage() -> Iterator[None]:
    """What is damaged when a corpus is opened is bad input."""
    try:
        yield
    except DamagedData as damage:
        raise UserError(f"{damage.path}: {damage.problem}; the corpus is damaged, prepare it again") from None
