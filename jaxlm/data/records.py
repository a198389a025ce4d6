"""Labelled records: files with their columns, and records as they stand in them, for what needs no corpus."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxlm.console.units import counted
from jaxlm.data.columns import check_fields, columns_of, head_of
from jaxlm.data.decoding import Decoding
from jaxlm.data.documents import location, named, part_documents
from jaxlm.data.formats import Reading, look_at
from jaxlm.data.source_file import SourceFile
from jaxlm.data.sources import Part, find_sources
from jaxlm.errors import UserError
from jaxlm.settings import RECORD_TASKS, DataSettings, TaskSettings

HELD_OUT_NAME = re.compile(r"(^|[-_.])(dev|val|valid|validation|test|eval)([-_.]|$)")


class Record(NamedTuple):
    """A record as it stands in its file."""

    texts: tuple[str, ...]
    label: Any  # None: it has none, or a column for each
    place: str  # for people: `dev.tsv, line 3`
    columns: dict[str, Any]  # all but the texts, by their names, or in a table without names by their numbers: as JSON has them


def reads_records(task: TaskSettings) -> bool:
    return task.name in RECORD_TASKS


def read_records(raw: str | list[str], data: DataSettings, task: TaskSettings, streams: Sequence[str] | None,
                 key: str = "data.raw") -> Iterator[Record]:
    """Every record of some files, in order, empty texts too; labels are read where there are any, and not checked.

    Args:
      raw: files, as in data.raw.
      streams: which texts a record must have: `text`, or `text` and `pair`; None: a pair where there is one.
      key: of the run file, for messages.

    UserError: a file cannot be read, a column is missing, or a text is longer than data.cleaning.max_bytes.
    """
    reading = reading_of(data, records=True)
    files = find_sources(raw, key)
    for file in files:
        if file.version is None:
            raise UserError(f"{key}: {file.name} is a pipe, and records are read twice; write it into a file first")
    files = [file for file in look_at(files, reading) if file]
    for file in lay_out(files, reading, task, labelled=False, streams=streams and tuple(streams))[0]:
        label = file.columns.label if len(file.columns.label) == 1 else ()  # several are among the columns
        file = replace(file, columns=replace(file.columns, label=label, label_names=(), others=True))
        part, decoding = Part(file), Decoding(file.encoding)
        for document in part_documents(part, reading, decoding):
            place = location(part, document.place)
            if None in document.texts:
                raise UserError(f"{place}: a text of {document.bytes:,} bytes; the most is data.cleaning.max_bytes="
                                f"{data.cleaning.max_bytes}")
            columns = {name: plain(value) for name, value in document.columns.items()}
            yield Record(document.texts, document.label, place, columns)


def plain(value: Any) -> Any:
    """A value of a column as JSON can have it; a day, say, as text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return None if isinstance(value, float) else str(value)
    return value


def reading_of(data: DataSettings, records: bool) -> Reading:
    return Reading(data.text_field, data.document, data.cleaning.max_bytes, data.encoding, records)


def lay_out(files: list[SourceFile], reading: Reading, task: TaskSettings, labelled: bool = True,
            streams: tuple[str, ...] | None = None) -> tuple[list[SourceFile], list[str]]:
    """The files with their columns, and lines that say which were taken.

    Args:
      files: as `look_at` gives them.
      labelled: a file without labels is refused.
      streams: which texts are wanted; None: a pair where there is one, which is then in all files.
    """
    check_fields(task)
    laid, said = [], {}
    for file in files:
        table = head_of(file, reading, task)
        columns = columns_of(table, task, labelled, streams)
        first = laid[0].columns if laid else columns
        if len(columns.texts) != len(first.texts):
            both = ("a pair of texts", "one text") if len(columns.texts) > 1 else ("one text", "a pair of texts")
            raise UserError(f"{file.name}: {both[0]} in a record, but {laid[0].name} has {both[1]}; name the columns with "
                            "task.fields")
        named_alike = len({names for names in (columns.class_names, first.class_names) if names}) < 2
        if not named_alike and task.labels is None:
            raise UserError(f"{file.name}: its numbers of labels have other names than those of {laid[0].name}; say which are "
                            "meant with task.labels")
        laid.append(replace(file, columns=columns))
        said.setdefault(table.said(columns), {})[file.name] = None  # once, though a file may come twice
    return laid, [f"{named(names)}: {line}" for line, names in said.items()]


def refuse_keys_of_text(data: DataSettings) -> None:
    """Raises UserError for keys that mean nothing to labelled records."""
    if data.text_field != DataSettings.text_field:
        raise UserError(f"data.text_field={data.text_field}: columns of labelled records are named with task.fields={{text: "
                        f"{data.text_field}}}")
    if data.document != DataSettings.document:
        raise UserError(f"data.document={data.document}: every labelled record is a document; leave the key away")
    if data.validation_split == "tail":
        raise UserError("data.validation_split=tail: labelled records are held out whole; leave the key away")


def without_validation(raw: list[SourceFile], held_out: list[SourceFile]) -> tuple[list[SourceFile], list[str]]:
    """The training files that are not also validation files, and a line about those; and about others that are called
    as if they were none."""
    own = {file.path for file in held_out}
    kept, notes = [file for file in raw if file.path not in own], []
    if not kept:
        raise UserError("data.raw: its files are those of data.validation; name the training file")
    if len(kept) < len(raw):
        notes.append(f"{counted(len(raw) - len(kept), 'file')} of data.raw {'is' if len(raw) - len(kept) == 1 else 'are'} "
                     "data.validation, and not trained on")
    others = [file.name for file in kept if file.searched and HELD_OUT_NAME.search(os.path.basename(file.name).lower())]
    if others:
        notes.append(f"trained on, too: {named(others)}; if {'it is' if len(others) == 1 else 'they are'} for validation or "
                     "tests, name the training file alone (data.raw)")
    return kept, notes
