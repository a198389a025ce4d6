"""The files of a corpus, read without trust: headers and lengths when they are opened, checksums with every read.

Tokens are read with `pread`, never mapped: where a mapped file loses its end, the process dies of SIGBUS instead of
an error. Of a shard in a bucket, just the blocks that are needed are fetched.
"""

import errno
import hashlib
import os
import re
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.data.damage import DamagedData
from jaxlm.storage.files import Location, file_size, read_bytes, read_range
from jaxlm.storage.remote import is_remote

BLOCK_TOKENS = 4096  # under one checksum
CHECKSUM = np.dtype("<u4")
# As `np.save` writes it. NumPy's own reader gives it to Python's parser, which trusts too much, and not in several
# threads.
HEADER = re.compile(rb"\x93NUMPY\x01\x00(?P<length>..){'descr': '(?P<type>[^']{1,8})', 'fortran_order': False, "
                    rb"'shape': \((?P<elements>\d{1,18}),\), } *\n", re.DOTALL)
PREFIX, HEADER_BYTES = 10, 256  # bytes: before the braces, and of all of it at most


def block_checksums(tokens: np.ndarray) -> np.ndarray:
    """uint32 [blocks]: crc32 of every block of a shard's tokens."""
    return np.array([zlib.crc32(tokens[start:start + BLOCK_TOKENS]) for start in range(0, len(tokens), BLOCK_TOKENS)], CHECKSUM)


def num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard file, open (see `open_shard`). What is read is checked against its checksums, or else against the
    vocabulary."""

    path: Location
    descriptor: int | None  # None: in a bucket
    identity: tuple[int, int, int] | None
    begin: int  # byte of the first token
    num_tokens: int
    dtype: np.dtype
    vocab_size: int
    checksums: np.ndarray | None  # uint32 [blocks]

    def is_current(self) -> bool:
        """Whether it is still the file of that name, and as long as it was. (A removed file could be read while it
        is open; one in a bucket could not.)"""
        if self.descriptor is None:
            return True
        try:
            return file_identity(os.stat(self.path)) == self.identity
        except OSError:
            return False

    def byte(self, token: int) -> int:
        return self.begin + token * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop of this shard, of the file's type. DamagedData, also for damage elsewhere in their
        blocks."""
        if self.checksums is None:
            tokens = np.frombuffer(self.read_bytes(start, stop), self.dtype)
            self.check_tokens(start, tokens)
            return tokens
        first, last = start - start % BLOCK_TOKENS, min(stop + -stop % BLOCK_TOKENS, self.num_tokens)
        data = self.read_bytes(first, last)
        self.check_blocks(first, data)
        return np.frombuffer(data, self.dtype)[start - first:stop - first]

    def read_bytes(self, start: int, stop: int) -> bytes:
        """The bytes of tokens start .. stop. DamagedData when not all of them can be read."""
        position, end, data = self.byte(start), self.byte(stop), b""
        problem = "the file ends before them"
        try:
            while more := self.read_some(position + len(data), end):
                data += more
                if len(data) == end - position:
                    return data
        except OSError as error:
            problem = error.strerror
        raise DamagedData(self.path, f"cannot read bytes {position:,} to {end:,}: {problem}", start // BLOCK_TOKENS)

    def read_some(self, start: int, stop: int) -> bytes:
        """From byte `start` on, at most to byte `stop`; nothing where the file has ended."""
        if self.descriptor is None:
            return read_range(self.path, start, stop)
        return os.pread(self.descriptor, stop - start, start)  # 2 GiB at most

    def check_blocks(self, start: int, data: bytes) -> None:
        """DamagedData unless `data`, which begins with token `start` and a block, has the checksums that were
        written."""
        view, size = memoryview(data), BLOCK_TOKENS * self.dtype.itemsize
        for block, begin in enumerate(range(0, len(data), size), start // BLOCK_TOKENS):
            if zlib.crc32(view[begin:begin + size]) != self.checksums[block]:
                position = self.byte(block * BLOCK_TOKENS)
                raise DamagedData(self.path, f"bytes {position:,} to {min(position + size, self.byte(self.num_tokens)):,} "
                                             "differ from their checksum", block)

    def check_tokens(self, start: int, tokens: np.ndarray) -> None:
        """DamagedData where one of the tokens, of which the first is number `start`, is not in the vocabulary."""
        if len(tokens) and tokens.max() >= self.vocab_size:
            place = int(np.argmax(tokens >= self.vocab_size))
            raise DamagedData(self.path, f"token {tokens[place]:,} at byte {self.byte(start + place):,}, in a vocabulary of "
                                         f"{self.vocab_size:,}", (start + place) // BLOCK_TOKENS)


def open_shard(directory: Location, shards: list[dict[str, Any]], dtype: np.dtype, vocab_size: int, number: int) -> Shard:
    """Shard `number` of those that the manifest lists. DamagedData when it, or the file of its checksums, is not whole.

    It is closed when nobody refers to it any more, so that no thread reads from a descriptor that has become another
    file's.
    """
    entry, checksums = shards[number], None
    if "checksums" in entry:
        kept = entry["checksums"]
        checksums = load_array(directory / kept["file"], num_blocks(entry["tokens"]), CHECKSUM, kept["sha256"])
    path = directory / entry["file"]
    begin = check_array(path, entry["tokens"], dtype)
    if is_remote(path):
        return Shard(path, None, None, begin, entry["tokens"], dtype, vocab_size, checksums)
    with _as_damage(path):
        descriptor = os.open(path, os.O_RDONLY)
    shard = Shard(path, descriptor, file_identity(os.fstat(descriptor)), begin, entry["tokens"], dtype, vocab_size, checksums)
    weakref.finalize(shard, os.close, descriptor).atexit = False  # threads may be reading until the very end
    return shard


def file_identity(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_dev, state.st_ino, state.st_size


def check_array(path: Location, length: int, dtype: np.dtype) -> int:
    """The byte at which the first element stands. Reads the header only.

    DamagedData unless the file is a whole one-dimensional .npy of this length and type.
    """
    with _as_damage(path):
        size, header = file_size(path), HEADER.match(read_range(path, 0, HEADER_BYTES))
    if header is None or header.end() != PREFIX + int.from_bytes(header["length"], "little"):
        raise DamagedData(path, "not a .npy file")
    expected = header.end() + length * dtype.itemsize
    if (header["type"], int(header["elements"]), size) != (dtype.str.encode(), length, expected):
        raise DamagedData(path, f"{size:,} bytes, expected {expected:,} ({length:,} of {dtype})")
    return header.end()


def load_array(path: Location, length: int, dtype: np.dtype, digest: str) -> np.ndarray:
    """The array in memory, read-only. DamagedData as in `check_array`, and when the file's sha256 (hex) is not
    `digest`."""
    begin = check_array(path, length, dtype)
    with _as_damage(path):
        data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamagedData(path, "differs from its digest in the manifest")
    return np.frombuffer(data, dtype, length, begin)


@contextmanager
def _as_damage(path: Location) -> Iterator[None]:
    """What goes wrong with a file inside, as DamagedData."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedData(path, "missing") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # nothing is wrong with the file
            raise
        raise DamagedData(path, error.strerror) from None
