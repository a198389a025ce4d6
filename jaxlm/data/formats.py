"""What a file is: looked at, its name and its content together, before it is read.

Compression, Parquet, Arrow and everything binary go by the first bytes. Source code, Markdown and markup are text
whatever they begin with, for their suffix says so. In all other text, JSON and tables are found by how it begins:
`x.txt` full of JSON objects is JSON Lines. What holds records that cannot be read is refused by name; it is never
read as prose.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NoReturn

from jaxlm.data.decoding import Decoding, encoding_of, refuse_foreign, wide_encoding
from jaxlm.data.source_file import COMPRESSED, SourceFile, compression_of, opened, suffix_of
from jaxlm.errors import UserError
from jaxlm.storage.files import read_range
from jaxlm.storage.remote import is_remote

KINDS = {"text": "text", "jsonl": "JSON Lines", "json": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet",
         "arrow": "Arrow"}
MARKUP = (".html", ".htm", ".xhtml", ".xml")
AS_IT_STANDS = (".md", ".markdown", ".rst", ".tex", *MARKUP, ".py", ".pyi", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".hpp",
                ".cu", ".java", ".go", ".rs", ".rb", ".sh", ".sql")
BY_CONTENT = (".txt", ".text", ".jl")  # .jl: Julia, or JSON Lines
JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".json")
TABLES = {".csv": None, ".tsv": "\t", ".tab": "\t", ".psv": "|"}  # None: one of SEPARATORS
COLUMNS = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow"}
TREEBANKS = (".conll", ".conllu", ".conllx", ".iob", ".iob2", ".bio")
KNOWN = (*BY_CONTENT, *AS_IT_STANDS, *JSON_SUFFIXES, *TABLES, *COLUMNS)
SEPARATORS = (",", ";", "\t", "|")

LOOK = 2**16  # bytes
ZEROS = 8192  # bytes: text has no zero byte among the first of them (it is how git tells, too)
QUOTES = 16 * 2**20  # bytes of a TSV, to see what its quotes mean
LOOKERS = 16  # remote files at a time
SEEN_ROWS = 200  # of a table, to see what separates its columns
CLEARLY = 0.01  # of the characters that a file begins with: another encoding, before anything is read

UNPACK = "unpack it, and name the folder"
EXTRACT = "extract its text first"
STRANGE = {  # what can be told by the first bytes: its name, and the way out
    rb"%PDF-": ("a PDF document", f"{EXTRACT}, for example by pdftotext"),
    rb"PK\x03\x04|PK\x05\x06": ("a zip archive (.zip, .docx, .xlsx, .epub, .npz)", f"{UNPACK}, or save it as text or CSV"),
    rb"(?s:.{257}ustar)": ("a tar archive", UNPACK),
    rb"7z\xbc\xaf\x27\x1c|Rar!\x1a": ("a 7z or rar archive", UNPACK),
    rb"SQLite format 3\0": ("an SQLite database", "export a table as CSV"),
    rb"\x93NUMPY": ("a NumPy array", "expected text"),
    rb"\x80[\x02-\x05]": ("a Python pickle", "save it as JSON Lines: a pickle can run any code"),
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Microsoft Office document", "save it as text or CSV"),
    rb"\{\\rtf": ("an RTF document", "save it as text"),
    rb"WARC/\d": ("a WARC web archive", f"{EXTRACT}, for example by trafilatura or warcio"),
    rb"\x89HDF\r\n": ("an HDF5 file", "export a table as CSV or Parquet"),
    rb"FEA1": ("a Feather file of version 1", "write it as version 2 or as Parquet"),
    rb"Obj\x01": ("an Avro file", "write it as Parquet or JSON Lines"),
    rb"ORC[^\x20-\x7e\s]": ("an ORC file", "write it as Parquet or JSON Lines"),
    rb"GGUF|\x7fELF|\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a": ("a binary file", "expected text"),
}
STRANGE_BYTES = {re.compile(pattern): words for pattern, words in STRANGE.items()}
PAGE = re.compile(r"\s*(<!doctype html|<html[\s>])", re.IGNORECASE)
OBJECT_BEGINS = re.compile(r'\{\s*(\}|"(?:[^"\\]|\\.)*"\s*:)')
ARRAY_BEGINS = re.compile(r'\[\s*[\[{"\]]')
SQUAD = re.compile(r'"paragraphs"\s*:\s*\[')
TAGGED = re.compile(r"^\S+(?:[ \t]+\S+)*[ \t]+(?:O|[BIESLU]-[\w.:-]+)$")  # a word, perhaps more columns, and its tag
TREEBANK = re.compile(r"^\d+(?:[-.]\d+)?\t[^\t]*(?:\t[^\t]*){8}$")  # CoNLL-U: ten columns


@dataclass(frozen=True)
class Reading:
    """How documents are found in files: keys of DataSettings and CleaningSettings of the same names; and whether they
    are labelled records (see `jaxlm.data.records`)."""

    text_field: str = "text"
    document: str = "file"
    max_bytes: int = 64 * 2**20
    encoding: str = "utf-8"
    records: bool = False


def look_at(files: list[SourceFile], reading: Reading) -> list[SourceFile | None]:
    """Every file as what it is; None for JSON that was found in a folder and holds no records, but one object (a
    configuration).

    UserError naming the file: unreadable, binary, in another encoding, or records that cannot be read.
    """
    if any(is_remote(file.path) for file in files):
        with ThreadPoolExecutor(LOOKERS) as pool:
            return list(pool.map(lambda file: look(file, reading), files))
    return [look(file, reading) for file in files]


def look(file: SourceFile, reading: Reading) -> SourceFile | None:
    file = replace(file, compression=compression_of(file.name, begin_of(file, LOOK)))
    head = begin_of(file, LOOK)
    if head.startswith(b"PAR1"):
        return replace(file, kind="parquet")
    if head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")):
        return replace(file, kind="arrow")
    suffix = suffix_of(file.name)
    if suffix in COLUMNS:  # and is not; its reader says so
        return replace(file, kind=COLUMNS[suffix])
    file = replace(file, encoding=encoding_of(head, reading.encoding))
    refuse_strange(file, head)
    text = decoded(file, head)
    if suffix in AS_IT_STANDS:
        return file if not reading.records else refuse_prose(file)
    whole = len(head) < LOOK
    refuse_unreadable_records(file, suffix, text, reading.records)
    kind, lone = json_kind(text, whole, any_begin=suffix in JSON_SUFFIXES)
    if lone and file.searched and suffix == ".json" and (reading.records or f'"{reading.text_field}"' not in text):
        return None
    if kind or suffix in JSON_SUFFIXES:
        return replace(file, kind=kind or "jsonl")  # its reader says in which line it is no JSON
    if reading.records:
        separator = record_separator(text, whole, TABLES.get(suffix), named=suffix in TABLES) or refuse_prose(file)
    else:
        separator = find_separator(text, whole, reading.text_field, TABLES.get(suffix), named=suffix in TABLES)
    if separator is None:
        return file
    quoted = separator != "\t" or quotes_enclose(begin_of(file, QUOTES), file.encoding)
    return replace(file, kind="tsv" if separator == "\t" else "csv", delimiter=separator, quoted=quoted)


def begin_of(file: SourceFile, size: int) -> bytes:
    """The first bytes, decompressed where `compression` says so."""
    if file.compression:
        with opened(file) as stream:
            return stream.read(size)
    try:
        return read_range(file.path, 0, size)
    except OSError as error:
        raise UserError(f"{file.name}: unreadable ({error.strerror or error})") from error


def decoded(file: SourceFile, head: bytes) -> str:
    """The first characters. UserError where they are clearly another encoding's."""
    decoding = Decoding(file.encoding)
    text = decoding.in_pieces()(head, False).removeprefix("\ufeff")
    if decoding.replaced > CLEARLY * decoding.characters:
        refuse_foreign(file.name, file.encoding, decoding.replaced, decoding.characters, head)
    return text


# ------------------------------------------------------------------------------------------------------------- refusals

def refuse_strange(file: SourceFile, head: bytes) -> None:
    """Raises UserError for what is no text, and says what it is."""
    if file.compression and (inside := COMPRESSED.match(head)):
        raise UserError(f"{file.name}: compressed twice ({file.compression}, and {inside.lastgroup} inside); unpack it once")
    for pattern, (what, way_out) in STRANGE_BYTES.items():
        if pattern.match(head):
            raise UserError(f"{file.name}: {what}; {way_out}")
    if not file.encoding.startswith(("utf-16", "utf-32")) and (place := head[:ZEROS].find(0)) >= 0:
        wide = wide_encoding(head)
        if wide:
            raise UserError(f"{file.name}: byte {place} is zero: it looks like {wide} without a byte order mark; "
                            f"set data.encoding={wide}")
        raise UserError(f"{file.name}: byte {place} is zero: binary; expected UTF-8 text")


def refuse_prose(file: SourceFile) -> NoReturn:
    """Where labels are learned, nothing is read as prose."""
    what = "empty" if not file.bytes else "plain text, without columns"
    raise UserError(f"{file.name}: {what}; expected labelled records: TSV, CSV, JSON Lines, JSON, Parquet or Arrow")


def refuse_unreadable_records(file: SourceFile, suffix: str, text: str, records: bool) -> None:
    """Raises UserError for a web page that is called something else, and for labelled words and questions."""
    if PAGE.match(text):
        raise UserError(f"{file.name}: a web page (HTML); {EXTRACT}, or name it .html to read it with its tags")
    lines = [line.rstrip("\r") for line in islice(text.split("\n"), 60) if line.strip()][:-1]
    words = [line for line in lines if not line.startswith(("#", "-DOCSTART-"))]
    tagged = len(words) >= 5 and (all(map(TAGGED.match, words)) or all(map(TREEBANK.match, words)))
    if records and tagged:  # labels may look like tags, but words have no blanks
        tagged = not any(re.search(r"\S \S.*\t", word) for word in words)
    if suffix in TREEBANKS or text.startswith("-DOCSTART-") or tagged:
        raise UserError(f"{file.name}: CoNLL (a word a line, with its labels), " + (
            "which labels words; expected records that label whole texts" if records else
            "which is no text to pretrain on; join its words to sentences in a .txt file"))
    if text.lstrip().startswith("{") and '"data"' in text and SQUAD.search(text):
        if records:
            raise UserError(f"{file.name}: SQuAD JSON (questions about paragraphs), whose answers are no labels; expected "
                            "records that label whole texts")
        raise UserError(f"{file.name}: SQuAD JSON (questions about paragraphs), which is no text to pretrain on; write its "
                        f"paragraphs as JSON Lines: jq -c '.data[].paragraphs[] | {{text: .context}}' {file.name} > "
                        "paragraphs.jsonl")


# ----------------------------------------------------------------------------------------------------------------- JSON

def json_kind(text: str, whole: bool, any_begin: bool) -> tuple[str | None, bool]:
    """(`jsonl`: an object a line, `json`: arrays or objects over several lines, None: neither; whether it is a
    single object).

    Args:
      text: the first characters.
      whole: there are no more.
      any_begin: the name says JSON: how it begins is enough. Otherwise every line of it, or all of it, must be JSON.
    """
    text = text.lstrip()
    lines = [line for line in text.split("\n") if line.strip()]
    seen = lines if whole else lines[:-1]
    if OBJECT_BEGINS.match(text):
        if not seen:  # the first line is longer than what was looked at
            return ("jsonl" if any_begin or is_begun(text) else None), False
        if is_object(seen[0]):
            return ("jsonl" if any_begin or all(map(is_object, seen)) else None), whole and len(seen) == 1
    elif any_begin and text.startswith("["):
        return "json", False
    elif not ARRAY_BEGINS.match(text):
        return None, False
    value, is_json = first_value(text, whole)
    return ("json" if is_json else None), is_json and not isinstance(value, list)


def is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def is_begun(text: str) -> bool:
    return first_value(text, whole=False)[1]


def first_value(text: str, whole: bool) -> tuple[Any, bool]:
    """The JSON value that a text begins with (None, where it goes on behind the text, and [] for an array), and
    whether it is one. A value that others follow is a list of them."""
    try:
        value, stop = json.JSONDecoder().raw_decode(text)
        return (value if not text[stop:].strip() else []), True
    except json.JSONDecodeError as error:
        return ([] if text.startswith("[") else None), not whole and is_cut(error, text)
    except RecursionError:
        return [], True


def is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a text is no JSON only because it ends too early."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16


# --------------------------------------------------------------------------------------------------------------- tables

def find_separator(text: str, whole: bool, field: str, given: str | None, named: bool) -> str | None:
    """What separates the columns; None: no table.

    A file that is not named as a table is one where its first line names the wanted field among others, and the
    second line has as many columns.
    """
    if not text:
        return None
    rows = {separator: first_rows(text, whole, separator) for separator in ([given] if given else SEPARATORS)}
    with_field = [separator for separator, found in rows.items() if found and field in [cell.strip() for cell in found[0]]]
    if named:
        return next(iter(with_field), max(rows, key=lambda separator: len(rows[separator][0]) if rows[separator] else 0))
    return next((separator for separator in with_field
                 if len(rows[separator]) == 2 and len(rows[separator][0]) == len(rows[separator][1]) > 1), None)


def first_rows(text: str, whole: bool, separator: str, count: int = 2) -> list[list[str]]:
    lines = io.StringIO(text, newline="\n").readlines()
    try:
        return list(islice(csv.reader(lines if whole else lines[:-1] or lines, delimiter=separator), count))
    except csv.Error:
        return []


def record_separator(text: str, whole: bool, given: str | None, named: bool) -> str | None:
    """What separates the columns of records, also where no line names them; None: no table.

    It is the one that gives most rows the same number of columns. In a file that is not named as a table that must be
    all of them, and more than one.
    """
    if given or not text.strip():
        return given and (given if text.strip() else None)
    agreeing = {separator: agreement(text, whole, separator) for separator in SEPARATORS}
    if named:  # a file of texts alone has one column
        return max(SEPARATORS, key=agreeing.__getitem__)
    return next((separator for separator in ("\t", *SEPARATORS) if agreeing[separator] == 1), None)


def agreement(text: str, whole: bool, separator: str) -> float:
    """The largest share of the rows that have equally many columns, more than one."""
    readings = [first_rows(text, whole, separator, SEEN_ROWS)]
    if separator == "\t":  # its quotes may be letters
        lines = text.split("\n")[:SEEN_ROWS]
        readings.append([line.split("\t") for line in (lines if whole else lines[:-1] or lines) if line.strip()])

    def share(rows: list[list[str]]) -> float:
        columns = Counter(len(row) for row in rows if row)
        return max((count for number, count in columns.items() if number > 1), default=0) / max(1, columns.total())

    return max(map(share, readings))


def quotes_enclose(content: bytes, encoding: str) -> bool:
    """Whether the quotes of a TSV enclose cells, as pandas writes them, or are letters like any other, as in GLUE.

    Letters: every line has as many columns as the first, and a cell that begins with a quote does not end with one.
    """
    text = codecs.getincrementaldecoder(encoding)("replace").decode(content)
    rows = [line.rstrip("\r").split("\t") for line in text.split("\n")[:-1]]
    if any(len(row) != len(rows[0]) for row in rows if row != [""]):
        return True
    begun = (cell for row in rows for cell in row if cell.startswith('"'))
    return not any(not re.fullmatch(r'"(?:[^"]|"")*"', cell) for cell in begun)
