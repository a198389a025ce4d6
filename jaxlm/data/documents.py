"""The documents in units of raw text, in order: whole files, lines, and the wanted field of JSON, tables and columns.

UserError names the file, and the line where there is one: unreadable, truncated or corrupt, bad JSON, a row with too
many columns, a missing or ill-typed field or column.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from jaxlm.data.decoding import Decoding, Utf8Stream, byte_order_mark, has_plain_lines
from jaxlm.data.formats import SQUAD, Reading, is_cut
from jaxlm.data.source_file import CHUNK, SourceFile, open_arrow, open_parquet, opened
from jaxlm.data.sources import Part, Unit
from jaxlm.errors import UserError, clipped, nearest
from jaxlm.storage.files import open_bytes

SURROGATES = re.compile("[\ud800-\udfff]")
BLANKS = re.compile(r"[ \t\r\n\ufeff]*")
BATCH_ROWS = 256
MOST_NAMES = 12  # columns in a message
Decode = Callable[[bytes], tuple[str, int]]


class Document(NamedTuple):
    """One document as read. `text` is None when it is longer than allowed, which `bytes` then says (of its text, or
    of what holds it); `replaced`: characters that were none of the file's encoding."""

    text: str | None
    replaced: int = 0
    bytes: int = 0


def read_documents(unit: Unit, reading: Reading) -> Iterator[Document]:
    """The documents of a unit, in order, empty ones too."""
    for part in unit.parts:
        yield from part_documents(part, reading, Decoding(part.file.encoding))


def part_documents(part: Part, reading: Reading, decoding: Decoding) -> Iterator[Document]:
    """Those of a part of a file that has been looked at (see `formats`); what is decoded counts in `decoding`."""
    match part.file.kind:
        case "parquet":
            yield from parquet_documents(part, reading, decoding)
        case "arrow":
            yield from arrow_documents(part.file, reading, decoding)
        case "jsonl":
            yield from json_lines(part, reading, decoding)
        case "json":
            yield from json_records(part.file, reading, decoding)
        case "csv" | "tsv":
            yield from table_documents(part.file, reading, decoding)
        case _ if reading.document == "line":
            with text_stream(part.file, decoding) as (stream, decode):
                for line, size in read_lines(stream, part, reading.max_bytes):
                    yield document_of(line, size, decode)
        case _:
            yield whole_document(part.file, reading.max_bytes, decoding)


def document_of(content: bytes | None, size: int, decode: Decode) -> Document:
    return Document(None, bytes=size) if content is None else Document(*decode(content))


# ----------------------------------------------------------------------------------------------------------------- text

@contextmanager
def text_stream(file: SourceFile, decoding: Decoding) -> Iterator[tuple[IO[bytes], Decode]]:
    """The file's bytes, whose lines end with the byte 10, and how to decode them."""
    with opened(file) as stream:
        if has_plain_lines(file.encoding):
            yield stream, decoding.decode
        else:  # counted on the way
            yield io.BufferedReader(Utf8Stream(stream, decoding), CHUNK), lambda content: (content.decode(), 0)


def whole_document(file: SourceFile, max_bytes: int, decoding: Decoding) -> Document:
    """A file as one document, never read into memory when it is too long (but through to its end, where damage may
    show)."""
    with text_stream(file, decoding) as (stream, decode):
        content = stream.read(max_bytes + 1)
        if len(content) <= max_bytes:
            before = decoding.replaced
            text, _ = decode(content.removeprefix(byte_order_mark(file.encoding)))
            return Document(text, decoding.replaced - before if has_plain_lines(file.encoding) else decoding.replaced)
        size = len(content)
        while skipped := stream.read(CHUNK):
            size += len(skipped)
    return Document(None, bytes=size)


def read_lines(stream: IO[bytes], part: Part, max_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """The lines that begin inside the part, without their ends, and their bytes; None for one over `max_bytes`,
    which is never held whole."""
    stop = math.inf if part.stop is None else part.stop
    mark = byte_order_mark(part.file.encoding)
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
            content = content.removeprefix(mark)
        begin, size = position, len(content)
        position += len(line)
        if size > max_bytes:
            position = position if line.endswith(b"\n") else skip_line(stream, position, math.inf)
            content, size = None, max(size, position - begin - 1)
        yield content, size


def skip_line(stream: IO[bytes], position: int, stop: float) -> int:
    """Reads past the next line end, or to `stop` where that is not before; the position there."""
    while position < stop and (chunk := stream.readline(CHUNK)):
        position += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return position


# ----------------------------------------------------------------------------------------------------------------- JSON

def longest_record(reading: Reading) -> int:
    """Bytes: what holds more is too long, whatever its text would be."""
    return 2 * reading.max_bytes + 2**20


def json_lines(part: Part, reading: Reading, decoding: Decoding) -> Iterator[Document]:
    """One JSON object a line."""
    with text_stream(part.file, decoding) as (stream, decode):
        for number, (line, size) in enumerate(read_lines(stream, part, longest_record(reading)), 1):
            document = document_of(line, size, decode)
            if document.text is None or not document.text.strip():
                yield document
                continue
            try:
                record = parsed(document.text)
                refuse_wrapped(part.file, record, reading.text_field)
                yield record_document(record, reading.text_field, document.replaced, decoding)
            except UserError as error:
                raise UserError(f"{part.file.name}, line {lines_before(part) + number}: {error}") from None


def parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a JSON object ({error})") from error


def record_document(record: Any, field: str, replaced: int, decoding: Decoding) -> Document:
    """The text in a record's field. Half a surrogate pair is valid JSON, but no character."""
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, found {type(record).__name__}")
    if field not in record:
        raise UserError(f"no field '{field}' (data.text_field), only {named(record) or 'nothing'}{nearest(field, record)}")
    if not isinstance(record[field], str):
        raise UserError(f"field '{field}' (data.text_field) is {type(record[field]).__name__}, expected a string")
    text, halves = SURROGATES.subn("\ufffd", record[field])
    decoding.replaced += halves
    return Document(text, replaced + halves)


def lines_before(part: Part) -> int:
    """Lines that begin before the part: counted only for a message."""
    count, left = 0, part.start
    with open_bytes(part.file.path) as stream:
        while left and (chunk := stream.read(min(left, CHUNK))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count + (1 if part.start and not chunk.endswith(b"\n") else 0)


def json_records(file: SourceFile, reading: Reading, decoding: Decoding) -> Iterator[Document]:
    """The objects of arrays, or objects one behind the other, over any number of lines."""
    with opened(file) as stream:
        before = 0
        for number, record in enumerate(json_values(file, stream, decoding, longest_record(reading)), 1):
            try:
                if number == 1:
                    refuse_wrapped(file, record, reading.text_field)
                document = record_document(record, reading.text_field, 0, decoding)
            except UserError as error:
                raise UserError(f"{file.name}, record {number}: {error}") from None
            yield document._replace(replaced=decoding.replaced - before)
            before = decoding.replaced


def refuse_wrapped(file: SourceFile, record: Any, field: str) -> None:
    """Raises UserError, with the way out, for an object that holds a list of records instead of being one."""
    if not isinstance(record, dict) or field in record:
        return
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            kind = "SQuAD JSON" if SQUAD.search(json.dumps(value[0])) else "one object around a list"
            raise UserError(f"{kind}: the records are in '{name}'; take them out: jq -c '.{name}[]' {file.name} > {name}.jsonl")


def json_values(file: SourceFile, stream: IO[bytes], decoding: Decoding, most: int) -> Iterator[Any]:
    """The values, and those in arrays on the outside, read piece by piece: no more than one of them is held, of
    `most` characters at the most."""
    decode, decoder = decoding.in_pieces(), json.JSONDecoder()
    text, place, line, ended = "", 0, 1, False
    inside = behind = False  # an array; a value of it

    def fail(problem: object) -> UserError:
        return UserError(f"{file.name}, line {line + text.count(chr(10), 0, place)}: {problem}")

    while True:
        place = BLANKS.match(text, place).end()
        value, stop = None, None
        if place < len(text):
            letter = text[place]
            if letter == "[" and not inside:
                inside, behind, place = True, False, place + 1
                continue
            if inside and letter in "],":
                if letter == "," and not behind:
                    raise fail("not valid JSON (a comma without a value before it)")
                inside, behind, place = letter == ",", False, place + 1
                continue
            if behind:
                raise fail("not valid JSON (expected ',' or ']')")
            try:
                value, stop = decoder.raw_decode(text, place)
            except RecursionError as error:
                raise fail(f"not valid JSON ({error})") from None
            except json.JSONDecodeError as error:
                if ended or not is_cut(error, text):
                    raise fail(f"not valid JSON ({error.msg})") from None
        if stop is not None and (stop < len(text) or ended):
            yield value
            place, behind = stop, inside
        elif ended:
            if inside:
                raise fail("not valid JSON (the array has no end)")
            return
        elif len(text) - place > most:
            raise fail(f"a record of more than {most:,} characters; raise data.cleaning.max_bytes, or write a record a line "
                       "(JSON Lines), where too long ones are dropped")
        else:
            piece = stream.read(max(CHUNK, len(text) - place))
            line, ended = line + text.count("\n", 0, place), not piece
            text, place = text[place:] + decode(piece, ended), 0


# ------------------------------------------------------------------------------------------------------ tables, columns

def table_documents(file: SourceFile, reading: Reading, decoding: Decoding) -> Iterator[Document]:
    """The cells of a column of CSV or TSV, whose first line names the columns."""
    field = reading.text_field
    with text_stream(file, decoding) as (stream, decode):
        csv.field_size_limit(longest_record(reading))
        lines = table_lines(file, stream, decode, longest_record(reading))
        rows = csv.reader(lines, delimiter=file.delimiter, strict=True,
                          quoting=csv.QUOTE_MINIMAL if file.quoted else csv.QUOTE_NONE)
        try:
            header = [cell.strip() for cell in next(rows, [])]
            if header.count(field) != 1:
                raise UserError(f"{file.name}: {'no' if field not in header else 'more than one'} column '{field}' "
                                f"(data.text_field) in the first line, only {named(header)}{nearest(field, header)}; a table "
                                "without a header line needs one")
            column, before = header.index(field), decoding.replaced
            for row in rows:
                if row and len(row) != len(header):
                    raise UserError(f"{file.name}, line {rows.line_num}: {len(row)} columns, but the first has {len(header)}")
                text = row[column] if row else ""
                size = len(text.encode(errors="replace"))
                yield (Document(text, decoding.replaced - before) if size <= reading.max_bytes else Document(None, bytes=size))
                before = decoding.replaced
        except csv.Error as error:
            raise UserError(f"{file.name}, line {rows.line_num}: not a row of a table ({error}); a cell with a quote in it "
                            'stands in quotes, and the quote is doubled: "so ""quoted"" here"') from None


def table_lines(file: SourceFile, stream: IO[bytes], decode: Decode, most: int) -> Iterator[str]:
    """Decoded lines with their ends."""
    mark = byte_order_mark(file.encoding)
    while line := stream.readline(most):
        if len(line) == most and not line.endswith(b"\n"):
            raise UserError(f"{file.name}: a line of more than {most:,} bytes; expected a table")
        yield decode(line.removeprefix(mark))[0]
        mark = b""


def parquet_documents(part: Part, reading: Reading, decoding: Decoding) -> Iterator[Document]:
    with open_parquet(part.file) as parquet:
        check_column(part.file, parquet.schema_arrow, reading.text_field)
        groups = range(part.start, parquet.metadata.num_row_groups if part.stop is None else part.stop)
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=list(groups), columns=[reading.text_field]):
            yield from column_documents(batch.column(0), reading, decoding)


def arrow_documents(file: SourceFile, reading: Reading, decoding: Decoding) -> Iterator[Document]:
    with open_arrow(file) as (schema, batches):
        check_column(file, schema, reading.text_field)
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from column_documents(batch.column(reading.text_field).slice(start, BATCH_ROWS), reading, decoding)


def check_column(file: SourceFile, schema: Any, column: str) -> None:
    """Raises UserError unless there is a column of strings of that name."""
    import pyarrow

    if column not in schema.names:
        raise UserError(f"{file.name}: no column '{column}' (data.text_field), only {named(schema.names)}"
                        f"{nearest(column, schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise UserError(f"{file.name}: column '{column}' (data.text_field) is {kind}, expected string")


def column_documents(column: Any, reading: Reading, decoding: Decoding) -> Iterator[Document]:
    """The strings of a column; a null is an empty document."""
    import pyarrow

    for value in column.cast(pyarrow.large_binary()):
        content = value.as_buffer()
        if content is None:
            yield Document("")
        elif content.size > reading.max_bytes:
            yield Document(None, bytes=content.size)
        else:
            yield Document(*decoding.decode(content.to_pybytes()))


def named(names: Any) -> str:
    """Fields or columns for a message: one that is a whole text is cut, and so are very many."""
    names = [clipped(str(name)) if len(str(name)) <= 40 else f"{str(name)[:40]}..." for name in names]
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
