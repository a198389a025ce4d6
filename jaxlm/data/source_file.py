"""One file of raw text: what it is, and how its bytes are read, decompressed."""

import io
import lzma
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxlm.errors import UserError
from jaxlm.storage import remote
from jaxlm.storage.files import open_bytes

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz", ".lz4": "lz4"}
COMPRESSED = re.compile(rb"(?P<gzip>\x1f\x8b\x08)|(?P<zstd>\x28\xb5\x2f\xfd)|(?P<bz2>BZh[1-9]1AY&SY)|(?P<xz>\xfd7zXZ\0)"
                        rb"|(?P<lz4>\x04\x22\x4d\x18)")
PART_OF = re.compile(r"[-.]\d+-of-\d+$")  # x.jsonl-00000-of-00016
CHUNK = 2**20


@dataclass(frozen=True)
class Columns:
    """Where a file of labelled records holds what a task reads: names, or in a table numbers from 0."""

    texts: tuple[str | int, ...]  # the text; or it and its pair
    label: tuple[str | int, ...] = ()  # several: one for each label, true or false; (): it is not read
    label_names: tuple[str, ...] = ()  # of several
    header: bool = True  # the first line of a table names the columns
    others: bool = False  # all columns but the texts are read along
    class_names: tuple[str, ...] = ()  # of the labels' numbers, where the file has them (ClassLabel of Hugging Face's datasets)


@dataclass(frozen=True)
class SourceFile:
    """A file of raw text. `name` is how the user wrote it, and what manifests and messages call it.

    `version`: what changes whenever it is written; None: read from a pipe. `searched`: found in a folder, not named.
    The rest is what `jaxlm.data.formats` finds in it: `kind` is a key of KINDS there, `delimiter` and `quoted` are
    those of a table; and what `jaxlm.data.records` does: `columns`, None where texts have no labels.
    """

    name: str
    path: str
    bytes: int
    version: int | str | None = None
    searched: bool = False
    compression: str | None = None
    kind: str = "text"
    encoding: str = "utf-8"
    delimiter: str = ","
    quoted: bool = True
    columns: Columns | None = None


def suffix_of(name: str) -> str:
    """`.json` of c4-train.00000-of-01024.json.gz: lowercase, below that of a compression; '' where there is none."""
    path = Path(name)
    path = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return Path(PART_OF.sub("", path.name)).suffix.lower()


def compression_of(name: str, head: bytes) -> str | None:
    """By the first bytes, or else by the suffix (what is then not valid is refused when it is read)."""
    found = COMPRESSED.match(head)
    return found.lastgroup if found else COMPRESSIONS.get(Path(name).suffix.lower())


@contextmanager
def opened(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. OSError in here becomes a UserError that names the file."""
    import pyarrow

    try:
        if file.compression == "xz":
            with open_bytes(file.path) as source, lzma.open(source) as stream:
                yield stream
        elif file.compression:  # unlike zstandard, Arrow notices a truncated zst
            source = open_bytes(file.path) if remote.is_remote(file.path) else file.path
            with io.BufferedReader(pyarrow.input_stream(source, compression=file.compression), CHUNK) as stream:
                yield stream
        else:
            with open_bytes(file.path) as stream:
                yield stream
    except (OSError, EOFError, lzma.LZMAError) as error:
        problem = f"truncated or not valid {file.compression}" if file.compression and not getattr(error, "errno", None) else (
            "unreadable")
        raise UserError(f"{file.name}: {problem} ({one_line(error)})") from error


@contextmanager
def open_parquet(file: SourceFile) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile."""
    import pyarrow
    from pyarrow import parquet

    with refusing_damage(file, "Parquet"), opened(file) as stream:
        content = stream if remote.is_remote(file.path) else file.path
        content = pyarrow.BufferReader(stream.read()) if file.compression else content
        with parquet.ParquetFile(content) as reader:
            yield reader


@contextmanager
def open_arrow(file: SourceFile) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Schema and record batches of an Arrow file or stream (Feather 2 and the caches of Hugging Face's datasets are
    such)."""
    import pyarrow

    with refusing_damage(file, "Arrow"), opened(file) as stream:
        local = not file.compression and not remote.is_remote(file.path)
        content = pyarrow.memory_map(file.path) if local else pyarrow.BufferReader(stream.read())
        if content.read(6) == b"ARROW1":
            content.seek(0)
            with pyarrow.ipc.open_file(content) as reader:
                yield reader.schema, (whole(reader.get_batch(number)) for number in range(reader.num_record_batches))
        else:
            content.seek(0)
            with pyarrow.ipc.open_stream(content) as reader:
                yield reader.schema, map(whole, reader)


def whole(batch: Any) -> Any:
    """A record batch whose parts lie inside of it: Arrow believes what a file says of them, and reads anywhere. Raises
    pyarrow.ArrowInvalid."""
    import pyarrow

    batch.validate()
    for column in batch.columns:  # text that is no UTF-8 is another matter
        same = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}.get(column.type)
        (column.cast(same) if same else column).validate(full=True)
    return batch


@contextmanager
def refusing_damage(file: SourceFile, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(f"{file.name}: not a valid {kind} file ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or (str(error) or type(error).__name__).splitlines()[0]
