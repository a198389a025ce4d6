"""How fast are random training sequences read, and how large is the corpus: .npy shards against ArrayRecord.

    pip install array_record
    python benchmarks/corpus_format.py [MILLIONS_OF_TOKENS]

Tokens are drawn from Zipf's law over 50,257 ids (so that ArrayRecord has something to compress) and read as
sequences of 1,024 at random positions, in batches of 64. ArrayRecord can only be asked for the records it was
written with, so it gets one sequence a record; the .npy shards are read at any position: as a corpus is, with the
checksum of every block of 4,096 tokens; without the checksums, as corpora that were prepared before there were any;
and mapped into memory, as they once were. All take turns, and the median of their turns is shown. Everything fits
the page cache: this measures the formats, not the disk.
"""

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from jaxlm.data.corpus import Documents, checksum_file, shard_file
from jaxlm.data.shards import block_checksums

LENGTH, BATCH, SHARD_TOKENS, SECONDS, ROUNDS, VOCABULARY = 1024, 64, 2**24, 1.0, 5, 50_257
FORMATS = {
    "ArrayRecord, a record on its own, uncompressed": "group_size:1,uncompressed",
    "ArrayRecord, a record on its own, zstd": "group_size:1,zstd:3",
    "ArrayRecord, groups of 64 records, zstd": "group_size:64,zstd:3",
}


def zipf_tokens(generator: np.random.Generator, count: int) -> np.ndarray:
    weights = 1 / np.arange(1, VOCABULARY + 1)
    return np.searchsorted(np.cumsum(weights / weights.sum()), generator.random(count)).astype(np.uint16)


def write_shards(folder: Path, tokens: np.ndarray, with_checksums: bool) -> Documents:
    """The corpus format."""
    shards: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        shard = tokens[start:start + SHARD_TOKENS]
        np.save(folder / shard_file("train", number), shard)
        shards.append({"file": shard_file("train", number), "tokens": len(shard)})
        if with_checksums:
            path = folder / checksum_file("train", number)
            np.save(path, block_checksums(shard))
            shards[-1]["checksums"] = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    entry = {"documents": 1, "tokens": len(tokens), "bytes": 0, "shards": shards}
    return Documents(folder, "train", {"splits": {"train": entry}, "token_dtype": "<u2", "tokenizer": {"vocab_size": VOCABULARY},
                                       "settings": {"data.shard_tokens": SHARD_TOKENS}})


def write_records(folder: Path, tokens: np.ndarray, options: str) -> ArrayRecordDataSource:
    paths = []
    for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        paths.append(str(folder / f"{number:05d}.array_record"))
        writer = ArrayRecordWriter(paths[-1], options)
        for row in tokens[start:start + SHARD_TOKENS].reshape(-1, LENGTH):
            writer.write(row.tobytes())
        writer.close()
    return ArrayRecordDataSource(paths)


def read_windows(documents: Documents, starts: np.ndarray) -> np.ndarray:
    return np.stack([documents.read(start, start + LENGTH) for start in starts.tolist()])


def read_mapped(shards: list[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """What `Documents.read` did with mapped shards."""
    batch = np.empty((len(starts), LENGTH), np.int32)
    for row, position in zip(batch, starts.tolist(), strict=True):
        filled = 0
        while filled < LENGTH:
            number, inside = divmod(position + filled, SHARD_TOKENS)
            piece = shards[number][inside:inside + LENGTH - filled]
            row[filled:filled + len(piece)] = piece
            filled += len(piece)
    return batch


def read_rows(source: ArrayRecordDataSource, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.frombuffer(record, np.uint16).astype(np.int32) for record in source.__getitems__(rows.tolist())])


def sequences_per_second(read: Callable[[np.ndarray], np.ndarray], limit: int, seed: int) -> float:
    """`read` takes int64 [BATCH] positions below `limit` and gives int32 [BATCH, LENGTH]."""
    generator = np.random.default_rng(seed)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        batch = read(generator.integers(0, limit, BATCH))
        assert batch.shape == (BATCH, LENGTH) and batch.dtype == np.int32
        count += BATCH
    return count / elapsed


def main() -> None:
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 67
    tokens = zipf_tokens(np.random.default_rng(0), millions * 10**6 // SHARD_TOKENS * SHARD_TOKENS or SHARD_TOKENS)
    print(f"{len(tokens):,} tokens, sequences of {LENGTH}, batches of {BATCH}")
    with ExitStack() as stack:
        def new_folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))

        readers: dict[str, tuple[Path, Callable[[np.ndarray], np.ndarray], int]] = {}
        for label, checked in ((".npy shards with checksums", True), (".npy shards without checksums", False)):
            folder = new_folder()
            readers[label] = folder, partial(read_windows, write_shards(folder, tokens, checked)), len(tokens) - LENGTH
        shards = [np.load(path, mmap_mode="r") for path in sorted(folder.iterdir())]
        readers[".npy shards, memory-mapped"] = folder, partial(read_mapped, shards), len(tokens) - LENGTH
        for label, options in FORMATS.items():
            folder = new_folder()
            source = stack.enter_context(write_records(folder, tokens, options))
            readers[label] = folder, partial(read_rows, source), len(tokens) // LENGTH
        speeds = {label: [] for label in readers}
        for turn in range(ROUNDS):
            for label, (_, read, limit) in readers.items():
                speeds[label].append(sequences_per_second(read, limit, turn))
        for label, (folder, _, _) in readers.items():
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{label:55s} {statistics.median(speeds[label]):12,.0f} sequences/s {size / 2**20:10.1f} MiB")


if __name__ == "__main__":
    main()
