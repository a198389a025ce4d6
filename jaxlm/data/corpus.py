"""A prepared corpus on disk, memory-mapped: token streams of a train and a validation split, and their documents' offsets.

    manifest.json               format, tokenizer, settings, sources, and per split the counts, files and digests
    report.json                 documents in, dropped by reason, repaired, out
    tokenizer/                  see jaxlm.data.tokenizers
    train-00000.tokens.npy      uint16 (uint32 for a vocabulary above 65,536), shard after shard one stream
    train.offsets.npy           int64 [documents + 1]: document d is the stream's tokens offsets[d] .. offsets[d + 1]
    validation-00000.tokens.npy, validation.offsets.npy

Every shard but the last holds the same number of tokens, so the shard of a position is one division; documents may cross shards.
A document ends with the tokenizer's eos where it has one.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.errors import UserError
from jaxlm.reporting.units import counted, format_count

FORMAT = 1
MANIFEST, REPORT, TOKENIZER = "manifest.json", "report.json", "tokenizer"
SPLITS = ("train", "validation")


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tokens.npy"


def offsets_file(split: str) -> str:
    return f"{split}.offsets.npy"


def token_type(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class Documents:
    """One split: a stream of tokens and where its documents begin. Opened anew when sent to another process."""

    def __init__(self, directory: Path, split: str, manifest: dict[str, Any]):
        self.directory = directory
        self.split = split
        self.entry = manifest["splits"][split]
        self.dtype = np.dtype(manifest["token_dtype"])
        self.shard_tokens: int = manifest["settings"]["data.shard_tokens"]
        self.num_documents: int = self.entry["documents"]
        self.num_tokens: int = self.entry["tokens"]
        self.num_bytes: int = self.entry["bytes"]  # of the text, in UTF-8

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [num_documents + 1], memory-mapped."""
        return np.load(self.directory / offsets_file(self.split), mmap_mode="r")

    @cached_property
    def shards(self) -> list[np.ndarray]:
        return [np.load(self.directory / shard["file"], mmap_mode="r") for shard in self.entry["shards"]]

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: tokens start .. stop of the split's stream; IndexError outside of it."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.num_tokens}")
        tokens = np.empty(stop - start, np.int32)
        position = start
        while position < stop:
            number, inside = divmod(position, self.shard_tokens)
            piece = self.shards[number][inside:inside + stop - position]
            tokens[position - start:position - start + len(piece)] = piece
            position += len(piece)
        return tokens

    def check(self) -> None:
        """UserError when a file is missing or not as long as the manifest says. Reads headers only."""
        for shard in self.entry["shards"]:
            check_array(self.directory / shard["file"], shard["tokens"], self.dtype)
        check_array(self.directory / offsets_file(self.split), self.num_documents + 1, np.dtype("<i8"))

    def __reduce__(self) -> tuple:
        return open_split, (self.directory, self.split)


def open_split(directory: Path, split: str) -> Documents:
    return getattr(Corpus(directory), split)


class Corpus:
    """A finished corpus. UserError when the folder is none, or lacks a part."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()
        self.manifest = read_manifest(self.directory)
        self.train = Documents(self.directory, "train", self.manifest)
        self.validation = Documents(self.directory, "validation", self.manifest)
        self.train.check()
        self.validation.check()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.directory / TOKENIZER)
        if tokenizer.digest != self.manifest["tokenizer"]["digest"]:
            raise UserError(f"{self.directory / TOKENIZER}: not the tokenizer that the corpus was prepared with")
        return tokenizer

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the content: tokenizer, tokens and document bounds; not of names, paths or settings."""
        content = {"tokenizer": self.manifest["tokenizer"]["digest"], "splits": {
            split: [[shard["sha256"] for shard in entry["shards"]], entry["offsets"]["sha256"]]
            for split, entry in self.manifest["splits"].items()}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def describe(self) -> list[str]:
        """Lines for people: what went in, what was dropped and why, what came out."""
        report, sources, tokenizer = read_json(self.directory / REPORT), self.manifest["sources"], self.manifest["tokenizer"]
        dropped = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in report["dropped"].items() if count]
        lines = [
            f"corpus      {self.directory}",
            f"sources     {counted(len(sources), 'file')}, {format_count(sum(source['bytes'] for source in sources))}B",
            f"documents   {report['documents_in']:,} read, {report['documents_out']:,} kept "
            f"({report['repaired']:,} of them mended or with invalid UTF-8 replaced)",
            f"dropped     {', '.join(dropped) or 'none'}",
        ]
        for documents in (self.train, self.validation):
            each = f", {documents.num_bytes / documents.num_tokens:.2f} bytes a token" if documents.num_tokens else ""
            lines.append(f"{documents.split:11} {counted(documents.num_documents, 'document')}, "
                         f"{counted(documents.num_tokens, 'token')}{each}")
        return [*lines, f"tokenizer   {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, digest {tokenizer['digest'][:12]}"]

    def __reduce__(self) -> tuple:
        return Corpus, (self.directory,)


def read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        unfinished = directory.with_name(directory.name + ".partial").is_dir()
        hint = "its preparation was not finished; start it again" if unfinished else f"expected a folder with {MANIFEST}"
        raise UserError(f"{directory}: not a corpus ({hint})")
    manifest = read_json(path)
    version = manifest.get("format")
    if version != FORMAT:
        raise UserError(f"{path}: corpus format {version}, expected {FORMAT}; prepare it again")
    missing = [key for key in ("tokenizer", "token_dtype", "splits", "settings", "sources") if key not in manifest]
    if missing:
        raise UserError(f"{path}: damaged (no {', '.join(missing)}); prepare the corpus again")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); prepare the corpus again") from error


def check_array(path: Path, length: int, dtype: np.dtype) -> None:
    """UserError unless the file is a whole one-dimensional .npy of this length and type."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            size = file.tell() + length * dtype.itemsize
        if (shape, found, path.stat().st_size) == ((length,), dtype, size):
            return
        problem = f"{path.stat().st_size:,} bytes, expected {size:,} ({length:,} of {dtype})"
    except FileNotFoundError:
        problem = "missing"
    except ValueError:
        problem = "not a .npy file"
    raise UserError(f"{path}: {problem}; the corpus is damaged, prepare it again")
