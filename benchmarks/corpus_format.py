"""How fast are random training sequences read, and how large is the corpus: memory-mapped .npy shards against ArrayRecord.

    pip install array_record
    python benchmarks/corpus_format.py [MILLIONS_OF_TOKENS]

Tokens are drawn from Zipf's law over 50,257 ids (so that ArrayRecord has something to compress) and read as sequences of 1,024 at
random positions, in batches of 64. ArrayRecord can only be asked for the records it was written with, so it gets one sequence a
record; the .npy shards are read at any position. Everything fits the page cache: this measures the formats, not the disk.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from jaxlm.data.corpus import Documents, offsets_file, shard_file

LENGTH, BATCH, SHARD_TOKENS, SECONDS = 1024, 64, 2**24, 3.0
FORMATS = {
    "ArrayRecord, a record on its own, uncompressed": "group_size:1,uncompressed",
    "ArrayRecord, a record on its own, zstd": "group_size:1,zstd:3",
    "ArrayRecord, groups of 64 records, zstd": "group_size:64,zstd:3",
}


def zipf_tokens(generator: np.random.Generator, count: int) -> np.ndarray:
    weights = 1 / np.arange(1, 50_258)
    return np.searchsorted(np.cumsum(weights / weights.sum()), generator.random(count)).astype(np.uint16)


def write_shards(folder: Path, tokens: np.ndarray) -> Documents:
    """The corpus format, one document."""
    shards = []
    for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        shard = tokens[start:start + SHARD_TOKENS]
        np.save(folder / shard_file("train", number), shard)
        shards.append({"file": shard_file("train", number), "tokens": len(shard)})
    np.save(folder / offsets_file("train"), np.array([0, len(tokens)]))
    entry = {"documents": 1, "tokens": len(tokens), "bytes": 0, "shards": shards}
    return Documents(folder, "train", {"splits": {"train": entry}, "token_dtype": "<u2",
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


def read_rows(source: ArrayRecordDataSource, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.frombuffer(record, np.uint16).astype(np.int32) for record in source.__getitems__(rows.tolist())])


def sequences_per_second(read: Callable[[np.ndarray], np.ndarray], limit: int) -> float:
    """`read` takes int64 [BATCH] positions below `limit` and gives int32 [BATCH, LENGTH]."""
    generator = np.random.default_rng(1)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        batch = read(generator.integers(0, limit, BATCH))
        assert batch.shape == (BATCH, LENGTH) and batch.dtype == np.int32
        count += BATCH
    return count / elapsed


def show(name: str, folder: Path, speed: float) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name:55s} {speed:12,.0f} sequences/s {size / 2**20:10.1f} MiB", flush=True)


def main() -> None:
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 67
    tokens = zipf_tokens(np.random.default_rng(0), millions * 10**6 // SHARD_TOKENS * SHARD_TOKENS or SHARD_TOKENS)
    print(f"{len(tokens):,} tokens, sequences of {LENGTH}, batches of {BATCH}")
    with tempfile.TemporaryDirectory() as name:
        documents = write_shards(Path(name), tokens)
        speed = sequences_per_second(partial(read_windows, documents), len(tokens) - LENGTH)
        show("memory-mapped .npy shards (uint16)", Path(name), speed)
    for label, options in FORMATS.items():
        with tempfile.TemporaryDirectory() as name:
            with write_records(Path(name), tokens, options) as source:
                speed = sequences_per_second(partial(read_rows, source), len(tokens) // LENGTH)
            show(label, Path(name), speed)


if __name__ == "__main__":
    main()
