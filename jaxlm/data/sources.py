"""Raw text: which files `data.raw` means, how they are cut into units of work, and the documents in them, in one fixed order.

A unit is what one worker process reads at a time: some small files, a byte range of a big file of lines, or row groups of a
Parquet file. Reading unit after unit gives the same documents in the same order however the files were cut.
"""

import codecs
import glob
import io
import json
import math
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxlm import remote
from jaxlm.errors import UserError, nearest
from jaxlm.reporting.files import open_bytes

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".py", ".pyi", ".js", ".ts", ".c", ".h",
                 ".cc", ".cpp", ".hpp", ".cu", ".java", ".go", ".rs", ".rb", ".sh", ".sql")
FORMATS = {".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
STDLIB = "python://stdlib"
STDLIB_SKIPPED = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"))
UNIT_BYTES = 4 * 2**20  # long enough to make a process worth while, short enough to share the work and to lose little of it
MOST_UNITS = 4096  # a large corpus gets larger units instead of more of them
CHUNK = 2**20
SURROGATES = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One document as read. `text` is None when it is longer than allowed; `repaired`: invalid UTF-8 was replaced."""

    text: str | None
    repaired: bool = False


@dataclass(frozen=True)
class SourceFile:
    """A file of raw text. `name` is how the user wrote it, and what manifests and messages call it."""

    name: str
    path: str
    bytes: int

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(Path(self.path).suffix.lower())

    @property
    def format(self) -> str:
        """`jsonl`, `parquet` or `text`, by the suffix below that of the compression."""
        return FORMATS.get(below_compression(self.path).suffix.lower(), "text")


@dataclass(frozen=True)
class Part:
    """A stretch of a file: bytes of a file of lines, row groups of a Parquet file; the whole file where `stop` is None."""

    file: SourceFile
    start: int = 0
    stop: int | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time."""

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Reading:
    """How documents are found in files: keys of DataSettings and CleaningSettings of the same names."""

    text_field: str = "text"
    document: str = "file"
    max_bytes: int = 64 * 2**20


# ---------------------------------------------------------------------------------------------------------------- files

def find_sources(raw: str | list[str], key: str = "data.raw") -> list[SourceFile]:
    """The files of a path, folder, glob, `python://stdlib` or a list of these: items in the given order, sorted inside each.

    Paths, folders and globs may be in a bucket (s3://, gs://). Folders are searched for known suffixes, below hidden folders not
    at all; a file named outright is text whatever its suffix. A file that is met twice is read once. UserError (naming `key`)
    when an item matches nothing.
    """
    found: dict[str, SourceFile] = {}
    for item in [raw] if isinstance(raw, str) else raw:
        files = list(stdlib_files(item, key) if item.startswith("python://") else matching_files(item, key))
        if not files:
            raise UserError(f"{key}: no text file in '{item}'; known suffixes, each also with .gz or .zst: "
                            f"{' '.join((*TEXT_SUFFIXES, *FORMATS))}")
        for file in files:
            found.setdefault(os.path.realpath(file.path), file)
    return list(found.values())


def stdlib_files(item: str, key: str) -> Iterator[SourceFile]:
    """The interpreter's own library without its tests and without installed packages."""
    if item != STDLIB:
        raise UserError(f"{key}: '{item}' is unknown, expected {STDLIB}{nearest(item, [STDLIB])}")
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not STDLIB_SKIPPED.intersection(inside.parts[:-1]):
            yield SourceFile(f"{STDLIB}/{inside.as_posix()}", str(path), path.stat().st_size)


def matching_files(item: str, key: str) -> Iterator[SourceFile]:
    if remote.is_remote(item):
        yield from remote_files(item, key)
        return
    paths = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
    if not paths:
        folder = Path(item).parent
        beside = [str(folder / name) for name in os.listdir(folder)] if folder.is_dir() else []
        raise UserError(f"{key}: '{item}' matches no file{nearest(item, beside)}")
    if len(paths) > 1 and not Path(item).suffix:  # `folder/*` is like the folder, `folder/*.log` means just those
        paths = [path for path in paths if os.path.isdir(path) or has_known_suffix(path)]
    for path in paths:
        for name in folder_files(path) if os.path.isdir(path) else [path]:
            yield SourceFile(Path(name).as_posix(), os.path.abspath(name), os.path.getsize(name))


def remote_files(item: str, key: str) -> Iterator[SourceFile]:
    """The same in a bucket."""
    item = item.rstrip("/")
    if set("*?[").intersection(item):
        found = remote.sizes_matching(item)
        chosen = found if Path(item).suffix else filter(has_known_suffix, found)
    else:
        found = {f"{item}/{name}": size for name, size in remote.sizes_below(item).items()}
        chosen = [url for url in found if has_known_suffix(url) and "/." not in url.removeprefix(item)]
        if not found and remote.exists(item):
            found = {item: remote.size(item)}
            chosen = [item]
    if not found:
        raise UserError(f"{key}: '{item}' matches no file")
    for url in chosen:
        yield SourceFile(url, url, found[url])


def folder_files(folder: str) -> list[str]:
    """Files with a known suffix below a folder, sorted by path. Linked folders are followed, each real one once."""
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            found += [os.path.join(root, name) for name in names if not name.startswith(".") and has_known_suffix(name)]
        visited.add(real)
    return sorted(path for path in found if os.path.isfile(path))


def has_known_suffix(name: str) -> bool:
    suffix = below_compression(name).suffix.lower()
    return suffix in FORMATS or suffix in TEXT_SUFFIXES


def below_compression(name: str) -> Path:
    path = Path(name)
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


# ---------------------------------------------------------------------------------------------------------------- units

def plan_units(files: list[SourceFile], document: str, unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes` of input, in the order of the files."""
    unit_bytes = max(unit_bytes, sum(file.bytes for file in files) // MOST_UNITS)
    units: list[Unit] = []
    parts: list[Part] = []
    size = 0
    for file in files:
        for part in file_parts(file, document, unit_bytes):
            parts.append(part)
            size += part.bytes
            if size >= unit_bytes:
                units.append(Unit(tuple(parts)))
                parts, size = [], 0
    return units + [Unit(tuple(parts))] if parts else units


def file_parts(file: SourceFile, document: str, unit_bytes: int) -> Iterator[Part]:
    """A file whole, or cut where that is possible without reading it."""
    if file.bytes <= unit_bytes or file.compression:
        yield Part(file, bytes=file.bytes)
    elif file.format == "parquet":
        yield from row_group_parts(file, unit_bytes)
    elif file.format == "jsonl" or document == "line":
        for start in range(0, file.bytes, unit_bytes):
            stop = min(start + unit_bytes, file.bytes)
            yield Part(file, start, stop, stop - start)
    else:
        yield Part(file, bytes=file.bytes)


def row_group_parts(file: SourceFile, unit_bytes: int) -> Iterator[Part]:
    with open_parquet(file) as parquet:
        groups = parquet.metadata.num_row_groups
    each = max(1, round(groups * unit_bytes / file.bytes))
    for start in range(0, groups, each):
        stop = min(start + each, groups)
        yield Part(file, start, stop, file.bytes * (stop - start) // groups)


# ------------------------------------------------------------------------------------------------------------ documents

def read_documents(unit: Unit, reading: Reading) -> Iterator[Document]:
    """The documents of a unit, in order, empty ones too.

    UserError naming the file, and the line where there is one: unreadable, binary, truncated or corrupt file, bad JSON line,
    missing or ill-typed field or column.
    """
    for part in unit.parts:
        if part.file.format == "text" and part.start == 0:
            refuse_binary(part.file)
        if part.file.format == "parquet":
            yield from parquet_documents(part, reading)
        elif part.file.format == "jsonl":
            yield from json_documents(part, reading)
        elif reading.document == "line":
            yield from (decode(line) for line in read_lines(part, reading.max_bytes))
        else:
            yield whole_document(part, reading.max_bytes)


def refuse_binary(file: SourceFile) -> None:
    """Raises UserError where the first 8 KiB hold a zero byte, which UTF-8 text has no use for (it is how git tells, too)."""
    with opened(file) as stream:
        place = stream.read(8192).find(0)
    if place >= 0:
        raise UserError(f"{file.name}: byte {place} is zero: binary, or UTF-16; expected UTF-8 text")


def decode(content: bytes | None) -> Document:
    """UTF-8; what is invalid becomes U+FFFD."""
    if content is None:
        return Document(None)
    try:
        return Document(content.decode())
    except UnicodeDecodeError:
        return Document(content.decode(errors="replace"), repaired=True)


def whole_document(part: Part, max_bytes: int) -> Document:
    """A file as one document, never read into memory when it is too long (but through to its end, where damage may show)."""
    with opened(part.file) as stream:
        content = stream.read(max_bytes + 1)
        if len(content) <= max_bytes:
            return decode(content.removeprefix(codecs.BOM_UTF8))
        if part.file.compression:
            skip(stream)
    return Document(None)


def read_lines(part: Part, max_bytes: int) -> Iterator[bytes | None]:
    """The lines that begin inside the part, without their ends; None for one over `max_bytes`, which is never held whole."""
    stop = math.inf if part.stop is None else part.stop
    with opened(part.file) as stream:
        position = part.start
        if part.start:  # a line that begins before the part is of the part before
            stream.seek(part.start - 1)
            position = skip_line(stream, part.start - 1, stop)
        while position < stop:
            line = stream.readline(max_bytes + 2)
            if not line:
                return
            content = line.removesuffix(b"\n").removesuffix(b"\r")
            if position == 0:
                content = content.removeprefix(codecs.BOM_UTF8)
            position += len(line)
            if len(content) > max_bytes:
                position = position if line.endswith(b"\n") else skip_line(stream, position, stop)
                content = None
            yield content


def skip_line(stream: IO[bytes], position: int, stop: float) -> int:
    """Reads past the next line end, or to `stop` where that is not before; the position there."""
    while position < stop and (chunk := stream.readline(CHUNK)):
        position += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return position


def skip(stream: IO[bytes]) -> None:
    while stream.read(CHUNK):
        pass


def json_documents(part: Part, reading: Reading) -> Iterator[Document]:
    """One JSON object a line. A line of more than twice `max_bytes` (and 1 MiB) is too long whatever its text would be."""
    for number, line in enumerate(read_lines(part, 2 * reading.max_bytes + 2**20), 1):
        document = decode(line)
        if document.text is None or not document.text.strip():
            yield document
            continue
        try:
            text = json_text(document.text, reading.text_field)
        except UserError as error:
            raise UserError(f"{part.file.name}, line {lines_before(part) + number}: {error}") from None
        whole = SURROGATES.sub("\ufffd", text)  # half a pair is valid JSON, but no character
        yield Document(whole, document.repaired or whole != text)


def json_text(line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a JSON object ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, found {type(record).__name__}")
    if field not in record:
        raise UserError(f"no field '{field}' (data.text_field), only {', '.join(record) or 'nothing'}{nearest(field, record)}")
    if not isinstance(record[field], str):
        raise UserError(f"field '{field}' (data.text_field) is {type(record[field]).__name__}, expected a string")
    return record[field]


def lines_before(part: Part) -> int:
    """Lines that begin before the part: counted only for a message."""
    count, left = 0, part.start
    with open_bytes(part.file.path) as stream:
        while left and (chunk := stream.read(min(left, CHUNK))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count + (1 if part.start and not chunk.endswith(b"\n") else 0)


def parquet_documents(part: Part, reading: Reading) -> Iterator[Document]:
    """The strings of a column; a null is an empty document."""
    import pyarrow

    name, column = part.file.name, reading.text_field
    with open_parquet(part.file) as parquet:
        schema = parquet.schema_arrow
        if column not in schema.names:
            raise UserError(f"{name}: no column '{column}' (data.text_field), only {', '.join(schema.names)}"
                            f"{nearest(column, schema.names)}")
        kind = schema.field(column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise UserError(f"{name}: column '{column}' (data.text_field) is {kind}, expected string")
        groups = range(part.start, parquet.metadata.num_row_groups if part.stop is None else part.stop)
        for batch in parquet.iter_batches(batch_size=256, row_groups=list(groups), columns=[column]):
            values = batch.column(0).cast(pyarrow.large_binary())
            for value in values:
                content = value.as_buffer()
                if content is None:
                    yield Document("")
                else:
                    yield decode(content.to_pybytes() if content.size <= reading.max_bytes else None)


# ---------------------------------------------------------------------------------------------------------------- opening

@contextmanager
def opened(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. OSError in here becomes a UserError that names the file."""
    import pyarrow

    try:
        if file.compression:  # unlike zstandard, Arrow notices a truncated zst
            source = open_bytes(file.path) if remote.is_remote(file.path) else file.path
            with io.BufferedReader(pyarrow.input_stream(source, compression=file.compression), CHUNK) as stream:
                yield stream
        else:
            with open_bytes(file.path) as stream:
                yield stream
    except OSError as error:
        problem = f"truncated or not valid {file.compression}" if file.compression and not error.errno else "unreadable"
        raise UserError(f"{file.name}: {problem} ({one_line(error)})") from error


@contextmanager
def open_parquet(file: SourceFile) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with opened(file) as stream:
            content = stream if remote.is_remote(file.path) else file.path
            content = pyarrow.BufferReader(stream.read()) if file.compression else content
            with parquet.ParquetFile(content) as reader:
                yield reader
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(f"{file.name}: not a valid Parquet file ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or (str(error) or type(error).__name__).splitlines()[0]
