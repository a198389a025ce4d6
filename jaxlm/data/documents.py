"""The documents in units of raw text, in order: whole files, lines, and the wanted fields of JSON, tables and columns.

UserError names the file, and the line where there is one: unreadable, truncated or corrupt, bad JSON, a row with too
many columns, a missing or ill-typed field or column.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import IO, Any, NamedTuple

from jaxlm.data.decoding import Decoding, Utf8Stream, byte_order_mark, has_plain_lines
from jaxlm.data.formats import SQUAD, Reading, is_cut
from jaxlm.data.source_file import CHUNK, SourceFile, open_arrow, open_parquet, opened
from jaxlm.data.sources import Part, Unit
from jaxlm.errors import UserError, clipped, nearest, shown
from jaxlm.storage.files import open_bytes

SURROGATES = re.compile("[\ud800-\udfff]")
BLANKS = re.compile(r"[ \t\r\n\ufeff]*")
BATCH_ROWS = 256
MOST_NAMES = 12  # columns in a message
TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
Decode = Callable[[bytes], tuple[str, int]]


class Document(NamedTuple):
    """One document as read. `text` is None when it is longer than allowed, which `bytes` then says (of its text, or
    of what holds it); `replaced`: characters that were none of the file's encoding."""

    text: str | None
    replaced: int = 0
    bytes: int = 0

    @property
    def texts(self) -> tuple[str | None, ...]:
        return (self.text,)


class LabelledDocument(NamedTuple):
    """The same of a labelled record: its texts (one, None, where they are longer than allowed), its label as the file
    holds it (None: it has none), its place (the line that it begins in, or its number, counted from 1 in its part of
    the file: see `location`), and where they are read along all columns but the texts."""

    texts: tuple[str | None, ...]
    replaced: int
    bytes: int
    label: Any
    place: int
    columns: dict[str, Any] | None


class Row(NamedTuple):
    """The wanted values of a row or record of any format: first the texts, then its labels; None: too long.

    `columns`: those that are read along, by their names, or in a table without names by their numbers.
    """

    values: Sequence[Any] | None
    replaced: int = 0
    bytes: int = 0
    place: int = 0
    columns: dict[str, Any] | None = None


class Wanted(NamedTuple):
    """Which columns of a file are read."""

    texts: tuple[str | int, ...]
    columns: tuple[str | int, ...]  # the texts and their labels
    label_names: tuple[str, ...]  # of several
    header: bool
    key: str  # of the run file, which names them
    labelled: bool  # records that are blank are none; in text they are empty documents
    others: bool = False  # are read along

    @classmethod
    def of(cls, file: SourceFile, reading: Reading) -> "Wanted":
        if file.columns is None:
            return cls((reading.text_field,), (reading.text_field,), (), True, "data.text_field", False)
        found = file.columns
        return cls(found.texts, found.texts + found.label, found.label_names, found.header, "task.fields", True, found.others)

    def document(self, row: Row) -> Document | LabelledDocument:
        if not self.labelled:
            return Document(row.values and row.values[0], row.replaced, row.bytes)
        values = row.values or [None]
        label = self.label(values[len(self.texts):])
        return LabelledDocument(tuple(values[:len(self.texts)]), row.replaced, row.bytes, label, row.place, row.columns)

    def label(self, values: Sequence[Any]) -> Any:
        """The one label; of a column for each, the names of those that are true."""
        if not self.label_names or not values:
            return values[0] if values else None
        return [name for name, value in zip(self.label_names, values, strict=True) if is_true(name, value)]


def is_true(name: str, value: Any) -> bool:
    """Raises UserError for what is neither true nor false."""
    word = str(value).strip().lower()
    if word not in TRUTH:
        raise UserError(f"column '{name}' (task.fields) is {shown(value)}; expected 0 or 1")
    return TRUTH[word]


def read_documents(unit: Unit, reading: Reading) -> Iterator[Document | LabelledDocument]:
    """The documents of a unit, in order, empty ones too."""
    for part in unit.parts:
        yield from part_documents(part, reading, Decoding(part.file.encoding))


def part_documents(part: Part, reading: Reading, decoding: Decoding) -> Iterator[Document | LabelledDocument]:
    """Those of a part of a file that has been looked at (see `formats`); what is decoded counts in `decoding`."""
    if part.file.kind != "text":
        wanted = Wanted.of(part.file, reading)
        for row in ROWS[part.file.kind](part, wanted, reading.max_bytes, decoding):
            try:
                yield wanted.document(row)
            except UserError as error:
                raise UserError(f"{location(part, row.place)}: {error}") from None
    elif reading.document == "line":
        with text_stream(part.file, decoding) as (stream, decode):
            for line, size in read_lines(stream, part, reading.max_bytes):
                yield document_of(line, size, decode)
    else:
        yield whole_document(part.file, reading.max_bytes, decoding)


def location(part: Part, place: int) -> str:
    """Where a record stands, for people: `x.tsv, line 3`."""
    match part.file.kind:
        case "jsonl":
            return f"{part.file.name}, line {lines_before(part) + place}"
        case "json":
            return f"{part.file.name}, record {place}"
        case "parquet" if part.start:
            with open_parquet(part.file) as parquet:
                place += sum(parquet.metadata.row_group(group).num_rows for group in range(part.start))
    return f"{part.file.name}, {'row' if part.file.kind in ('parquet', 'arrow') else 'line'} {place}"


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

def longest_record(max_bytes: int) -> int:
    """Bytes: what holds more is too long, whatever its text would be."""
    return 2 * max_bytes + 2**20


def json_lines(part: Part, wanted: Wanted, max_bytes: int, decoding: Decoding) -> Iterator[Row]:
    """One JSON object a line."""
    with text_stream(part.file, decoding) as (stream, decode):
        for number, (line, size) in enumerate(read_lines(stream, part, longest_record(max_bytes)), 1):
            document = document_of(line, size, decode)
            if document.text is None:
                yield Row(None, bytes=document.bytes, place=number)
            elif document.text.strip():
                try:
                    record = parsed(document.text)
                    values, halves = record_values(part.file, record, wanted)
                except UserError as error:
                    raise UserError(f"{location(part, number)}: {error}") from None
                decoding.replaced += halves
                yield Row(values, document.replaced + halves, place=number, columns=read_along(record, wanted))
            elif not wanted.labelled:
                yield Row([document.text], document.replaced, place=number)


def parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a JSON object ({error})") from error


def record_values(file: SourceFile, record: Any, wanted: Wanted) -> tuple[list[Any], int]:
    """What a record has in the wanted fields, and how many characters of it were replaced: half a surrogate pair is
    valid JSON, but no character."""
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, found {type(record).__name__}")
    values, replaced = [], 0
    for field in wanted.columns:
        value = record.get(field)
        if value is None and field not in record and (field in wanted.texts or not wanted.others):
            refuse_wrapped(file, record)
            raise UserError(f"no field '{field}' ({wanted.key}), only {named(record) or 'nothing'}{nearest(field, record)}")
        if isinstance(value, str):
            value, halves = (value, 0) if value.isascii() else SURROGATES.subn("\ufffd", value)
            replaced += halves
        elif field in wanted.texts:
            raise UserError(f"field '{field}' ({wanted.key}) is {type(value).__name__}, expected a string")
        values.append(value)
    return values, replaced


def read_along(record: dict[str, Any], wanted: Wanted) -> dict[str, Any] | None:
    return {name: value for name, value in record.items() if name not in wanted.texts} if wanted.others else None


def lines_before(part: Part) -> int:
    """Lines that begin before the part: counted only for a message."""
    count, left = 0, part.start
    with open_bytes(part.file.path) as stream:
        while left and (chunk := stream.read(min(left, CHUNK))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count + (1 if part.start and not chunk.endswith(b"\n") else 0)


def json_records(part: Part, wanted: Wanted, max_bytes: int, decoding: Decoding) -> Iterator[Row]:
    """The objects of arrays, or objects one behind the other, over any number of lines."""
    with opened(part.file) as stream:
        before = 0
        for number, record in enumerate(json_values(part.file, stream, decoding, longest_record(max_bytes)), 1):
            try:
                values, halves = record_values(part.file, record, wanted)
            except UserError as error:
                raise UserError(f"{location(part, number)}: {error}") from None
            decoding.replaced += halves
            yield Row(values, decoding.replaced - before, place=number, columns=read_along(record, wanted))
            before = decoding.replaced


def refuse_wrapped(file: SourceFile, record: dict[str, Any]) -> None:
    """Raises UserError, with the way out, for an object that holds a list of records instead of being one."""
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

def table_rows(part: Part, wanted: Wanted, max_bytes: int, decoding: Decoding) -> Iterator[Row]:
    """The cells in some columns of CSV or TSV."""
    file, before = part.file, decoding.replaced
    rows = cells(file, max_bytes, decoding)
    first = next(rows, (1, []))
    places, width = column_places(file, wanted, first[1]), len(first[1])
    names = {place: cell.strip() if wanted.header else str(place) for place, cell in enumerate(first[1])
             if wanted.others and place not in places[:len(wanted.texts)]}
    for line, row in rows if wanted.header else chain([first], rows):
        if row and len(row) != width:
            raise UserError(f"{file.name}, line {line}: {len(row)} columns, but the first has {width}")
        if row or not wanted.labelled:
            values = [row[place] for place in places] if row else [""]
            too_long = bytes_over(max_bytes, values[:len(wanted.texts)])
            columns = {name: row[place] for place, name in names.items()} if wanted.others else None
            yield Row(None if too_long else values, decoding.replaced - before, too_long, line, columns)
        before = decoding.replaced


def bytes_over(max_bytes: int, texts: list[str]) -> int:
    """Bytes of the longest text where they are more than allowed; else 0."""
    if 4 * max(map(len, texts)) <= max_bytes:  # of a character 4 at the most
        return 0
    longest = max(len(text.encode(errors="replace")) for text in texts)
    return longest if longest > max_bytes else 0


def cells(file: SourceFile, max_bytes: int, decoding: Decoding) -> Iterator[tuple[int, list[str]]]:
    """Every row of a table, with the line that it begins in (from 1); a blank line is an empty row."""
    with text_stream(file, decoding) as (stream, decode):
        csv.field_size_limit(longest_record(max_bytes))
        lines = table_lines(file, stream, decode, longest_record(max_bytes))
        rows = csv.reader(lines, delimiter=file.delimiter, strict=True,
                          quoting=csv.QUOTE_MINIMAL if file.quoted else csv.QUOTE_NONE)
        try:
            line = 1
            for row in rows:
                yield line, row
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(f"{file.name}, line {rows.line_num}: not a row of a table ({error}); a cell with a quote in it "
                            'stands in quotes, and the quote is doubled: "so ""quoted"" here"') from None


def column_places(file: SourceFile, wanted: Wanted, first: list[str]) -> list[int]:
    """Where in a row the wanted columns stand. UserError where the first row does not name one of them exactly once."""
    header = [cell.strip() for cell in first]
    for column in wanted.columns:
        if isinstance(column, int):
            if column >= len(header):
                raise UserError(f"{file.name}: no column {column} ({wanted.key}); line 1 has {len(header)}, counted from 0")
        elif header.count(column) != 1:
            raise UserError(f"{file.name}: {'no' if column not in header else 'more than one'} column '{column}' "
                            f"({wanted.key}) in the first line, only {named(header)}{nearest(column, header)}; a table "
                            "without a header line needs one" + (", or columns named by number" if wanted.labelled else ""))
    return [column if isinstance(column, int) else header.index(column) for column in wanted.columns]


def table_lines(file: SourceFile, stream: IO[bytes], decode: Decode, most: int) -> Iterator[str]:
    """Decoded lines with their ends."""
    mark = byte_order_mark(file.encoding)
    while line := stream.readline(most):
        if len(line) == most and not line.endswith(b"\n"):
            raise UserError(f"{file.name}: a line of more than {most:,} bytes; expected a table")
        yield decode(line.removeprefix(mark))[0]
        mark = b""


def parquet_rows(part: Part, wanted: Wanted, max_bytes: int, decoding: Decoding) -> Iterator[Row]:
    with open_parquet(part.file) as parquet:
        check_columns(part.file, parquet.schema_arrow, wanted)
        groups = range(part.start, parquet.metadata.num_row_groups if part.stop is None else part.stop)
        batches = parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=list(groups),
                                       columns=None if wanted.others else list(wanted.columns))
        yield from batch_rows(part.file, batches, wanted, max_bytes, decoding)


def arrow_rows(part: Part, wanted: Wanted, max_bytes: int, decoding: Decoding) -> Iterator[Row]:
    with open_arrow(part.file) as (schema, batches):
        check_columns(part.file, schema, wanted)
        pieces = (batch.slice(start, BATCH_ROWS) for batch in batches for start in range(0, batch.num_rows, BATCH_ROWS))
        yield from batch_rows(part.file, pieces, wanted, max_bytes, decoding)


def check_columns(file: SourceFile, schema: Any, wanted: Wanted) -> None:
    """Raises UserError unless there are columns of these names, one of each, and the texts are strings."""
    import pyarrow

    for column in wanted.columns:
        if column not in schema.names:
            raise UserError(f"{file.name}: no column '{column}' ({wanted.key}), only {named(schema.names)}"
                            f"{nearest(column, schema.names)}")
        if schema.names.count(column) > 1:
            raise UserError(f"{file.name}: more than one column '{column}' ({wanted.key}); rename one")
    for column in wanted.texts:
        kind = schema.field(column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise UserError(f"{file.name}: column '{column}' ({wanted.key}) is {kind}, expected string")


def batch_rows(file: SourceFile, batches: Iterable[Any], wanted: Wanted, max_bytes: int, decoding: Decoding) -> Iterator[Row]:
    """The rows of Arrow's record batches; of a text, a null is an empty document."""
    import pyarrow

    place = 0
    for batch in batches:
        texts = [batch.column(name).cast(pyarrow.large_binary()) for name in wanted.texts]
        labels = [column_values(file, batch, name) for name in wanted.columns[len(texts):]]
        others = {name: column_values(file, batch, name) for name in batch.schema.names
                  if wanted.others and name not in wanted.texts}
        for number in range(batch.num_rows):
            place += 1
            contents = [text[number].as_buffer() for text in texts]
            longest = max(content.size if content else 0 for content in contents)
            if longest > max_bytes:
                yield Row(None, bytes=longest, place=place)
                continue
            decoded = [decoding.decode(content.to_pybytes()) if content else ("", 0) for content in contents]
            yield Row([text for text, _ in decoded] + [label[number] for label in labels], sum(many for _, many in decoded),
                      place=place, columns={name: column[number] for name, column in others.items()} if wanted.others else None)


def column_values(file: SourceFile, batch: Any, name: str) -> list[Any]:
    """A column as Python has it."""
    try:
        return batch.column(name).to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError) as error:  # a day beyond Python's, say
        raise UserError(f"{file.name}: column '{name}' cannot be read ({error})") from None


ROWS = {"parquet": parquet_rows, "arrow": arrow_rows, "jsonl": json_lines, "json": json_records, "csv": table_rows,
        "tsv": table_rows}


def named(names: Any) -> str:
    """Fields or columns for a message: one that is a whole text is cut, and so are very many."""
    names = [clipped(str(name)) if len(str(name)) <= 40 else f"{str(name)[:40]}..." for name in names]
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
