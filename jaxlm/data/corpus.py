"""A prepared corpus on disk: token streams of a train and a validation split, their documents' offsets, and of labelled
records a column of labels.

    manifest.json               format, tokenizer, settings, sources, and per split the counts, files and digests
    report.json                 documents in, dropped by reason, repaired, out
    tokenizer/                  see jaxlm.data.tokenizers
    train-00000.tokens.npy      uint16 (uint32 for a vocabulary above 65,536), shard after shard one stream
    train-00000.crc32.npy       uint32: the checksum of every block of 4,096 tokens (older corpora have none)
    train.offsets.npy           int64 [documents + 1]: document d is the stream's tokens offsets[d] .. offsets[d + 1]
    validation-00000.tokens.npy, validation-00000.crc32.npy, validation.offsets.npy

Labelled records have, where they are pairs, a second stream of the same number of documents, and their labels:

    train.pair-00000.tokens.npy, train.pair-00000.crc32.npy, train.pair.offsets.npy, and the same of validation
    train.label.npy             int32 (number of a label) or float32 (a score) [documents], or uint8 (0, 1)
                                [documents * labels]; validation.label.npy

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
TEXT = "text"  # the stream that every corpus has
SPLITS = ("train", "validation")
CHECKS = 16  # files at a time: what is far away takes its time to answer
MOST_UNKNOWN = 0.001  # share of a split's tokens, above which it is a warning
OPEN_SHARDS = 128  # of a split at a time: some systems let a process open no more than 256 files


def stream_name(split: str, stream: str) -> str:
    """What the files of a split's stream begin with: `train`, `train.pair`."""
    return split if stream == TEXT else f"{split}.{stream}"


def shard_file(name: str, number: int) -> str:
    return f"{name}-{number:05d}.tokens.npy"


def checksum_file(name: str, number: int) -> str:
    return f"{name}-{number:05d}.crc32.npy"


def offsets_file(name: str) -> str:
    return f"{name}.offsets.npy"


def column_file(split: str, column: str) -> str:
    return f"{split}.{column}.npy"


def token_type(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class Documents:
    """One split: a stream of tokens and where its documents begin. For any thread; opened anew when sent to another
    process.

    Of labelled records it is the stream of their texts; `streams` has all of them, `column` the labels.
    """

    def __init__(self, directory: Location, split: str, manifest: dict[str, Any], stream: str = TEXT):
        self.directory = directory
        self.split, self.stream = split, stream
        self.manifest = manifest
        self.entry = manifest["splits"][split] if stream == TEXT else manifest["splits"][split]["streams"][stream]
        self.name = stream_name(split, stream)
        refuse_strange_names(directory, self.name, self.entry)
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
            return load_array(self.directory / offsets_file(self.name), self.num_documents + 1, np.dtype("<i8"),
                              self.entry["offsets"]["sha256"])

    @property
    def streams(self) -> "dict[str, Documents]":
        """The texts of every record: a stream for each, which have the same number of documents."""
        return {self.stream: self} | self.others

    @cached_property
    def others(self) -> "dict[str, Documents]":
        names = self.entry.get("streams", {})
        return {name: Documents(self.directory, self.split, self.manifest, name) for name in names}

    def total(self, figure: str) -> int:
        """A figure of the manifest (tokens, bytes, unknown_tokens), over all streams; 0 where an older one has none."""
        return sum(stream.entry.get(figure, 0) for stream in self.streams.values())

    @property
    def columns(self) -> tuple[str, ...]:
        """What stands beside every record: `label`."""
        return tuple(self.entry.get("columns", {}))

    def column(self, name: str) -> np.ndarray:
        """int32 or float32 [num_documents], or bool [num_documents, labels]; read-only, compared with its digest.

        UserError where it is damaged, KeyError where there is none of this name.
        """
        entry = self.entry["columns"][name]
        width = entry.get("width", 1)
        with refusing_damage():
            array = load_array(self.directory / column_file(self.split, name), self.num_documents * width,
                               np.dtype(entry["dtype"]), entry["sha256"])
        array = array.view(bool).reshape(-1, width) if "width" in entry else array
        names = self.manifest["labels"]["names"]
        if array.dtype == np.int32 and len(array) and not 0 <= array.min() <= array.max() < len(names):
            raise UserError(f"{self.directory / column_file(self.split, name)}: a label outside of the {len(names)} that there "
                            "are; the corpus is damaged, prepare it again")
        return array

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
        arrays = []
        for stream in self.streams.values():
            arrays.append((offsets_file(stream.name), stream.num_documents + 1, np.dtype("<i8")))
            for shard in stream.entry["shards"]:
                arrays.append((shard["file"], shard["tokens"], self.dtype))
                if "checksums" in shard:
                    arrays.append((shard["checksums"]["file"], num_blocks(shard["tokens"]), CHECKSUM))
        for column in self.entry.get("columns", {}).values():
            arrays.append((column["file"], self.num_documents * column.get("width", 1), np.dtype(column["dtype"])))
        with refusing_damage(), ThreadPoolExecutor(CHECKS) as pool:
            for _ in pool.map(lambda array: check_array(self.directory / array[0], *array[1:]), arrays):
                pass

    def __reduce__(self) -> tuple:
        return open_split, (self.directory, self.split, self.stream)


def refuse_strange_names(directory: Location, name: str, entry: dict[str, Any]) -> None:
    """UserError unless the manifest names the files of a stream, and of the columns beside it, as they are named here:
    nothing outside the folder is ever opened."""
    wanted = [(column["file"], column_file(name, column_name)) for column_name, column in entry.get("columns", {}).items()]
    for number, shard in enumerate(entry["shards"]):
        wanted.append((shard["file"], shard_file(name, number)))
        wanted += [(shard["checksums"]["file"], checksum_file(name, number))] if "checksums" in shard else []
    for found, expected in wanted:
        if found != expected:
            raise UserError(f"{directory / MANIFEST}: damaged (names a file '{found}', expected {expected}); "
                            "prepare the corpus again")


def open_split(directory: Location, split: str, stream: str) -> Documents:
    return getattr(Corpus(directory, whole=False), split).streams[stream]


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

    @property
    def streams(self) -> tuple[str, ...]:
        """The texts of a record: `text`, perhaps `pair`. Plain text has one stream, too."""
        return tuple(self.train.streams)

    @property
    def problem(self) -> str | None:
        """What its labels are: single_label, multi_label or regression; None: it is plain text, without labels."""
        return self.manifest["labels"]["problem"] if "labels" in self.manifest else None

    @property
    def labels(self) -> list[str] | None:
        """Names of the labels, by their numbers; None for a regression, and for plain text."""
        return self.manifest["labels"]["names"] if "labels" in self.manifest else None

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the content: tokenizer, tokens, document bounds, labels; not of names, paths or settings."""
        content = {"tokenizer": self.manifest["tokenizer"]["digest"], "splits": {
            split: content_of(entry) for split, entry in self.manifest["splits"].items()}}
        if "labels" in self.manifest:
            content["labels"] = self.manifest["labels"]
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
            unknown, tokens = documents.total("unknown_tokens"), documents.total("tokens")
            if unknown > MOST_UNKNOWN * tokens:
                words = read_report(self.directory).get("splits", {}).get(documents.split, {}).get("unknown", {})
                commonest = ", ".join(f"{word!r} {count:,}" for word, count in itertools.islice(words.items(), 5))
                lines.append(f"WARNING: {self.directory}: {share(unknown, tokens)} of the {documents.split} tokens "
                             f"are unknown, their text is lost{f' (most often {commonest})' if commonest else ''}; "
                             "data.tokenizer=bpe, unigram or bytes loses none")
        if self.tokenizer.special.eos is None and self.train.num_documents > 1 and self.problem is None:
            lines.append(f"WARNING: {self.directory}: the tokenizer has no end token that is known, so documents run together "
                         f"({self.train.num_documents:,} of them); name one with data.end_token")
        return lines

    @property
    def notes(self) -> list[str]:
        """What a user would not expect of the text that was prepared, a line each."""
        return read_report(self.directory).get("notes", [])

    def __reduce__(self) -> tuple:
        return Corpus, (self.directory, self.whole)


def content_of(entry: dict[str, Any]) -> list[Any]:
    """Digests of all files of a split, or of another stream of it."""
    files = [[shard["sha256"] for shard in entry["shards"]], entry["offsets"]["sha256"]]
    more = {name: content_of(stream) for name, stream in entry.get("streams", {}).items()}
    more |= {name: column["sha256"] for name, column in entry.get("columns", {}).items()}
    return [*files, more] if more else files


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
