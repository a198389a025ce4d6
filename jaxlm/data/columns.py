"""Which columns of a record file hold the text, its pair and the label.

`task.fields` says it, or it is found: by the usual names of columns, or, where no name is known, by what the columns
hold, if just one reading of them is possible. What is not clear is refused, with the columns and their first values.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jaxlm.console.units import counted
from jaxlm.data.decoding import Decoding
from jaxlm.data.documents import (
    cells,
    column_values,
    json_values,
    location,
    longest_record,
    named,
    parsed,
    read_lines,
    refuse_wrapped,
    text_stream,
)
from jaxlm.data.formats import Reading
from jaxlm.data.source_file import Columns, SourceFile, open_arrow, open_parquet, opened
from jaxlm.data.sources import Part
from jaxlm.errors import UserError, nearest
from jaxlm.settings import TaskSettings

TEXT, PAIR, LABEL = ROLES = ("text", "pair", "label")
SEEN = 200  # records, to see what the columns hold
SHOWN = 24  # letters of a value in a message

TEXTS = ("text", "sentence", "review", "content", "comment", "comment_text", "body", "message", "tweet", "document",
         "review_text", "review_body", "reviewtext", "utterance", "query", "question", "sentence1", "text1", "input", "inputs",
         "post", "headline", "abstract", "description", "phrase", "sms", "premise", "title")
PAIRS = (("text", "pair"), ("text", "text_pair"), ("sentence1", "sentence2"), ("sentence_1", "sentence_2"),
         ("sentence_a", "sentence_b"), ("text1", "text2"), ("text_1", "text_2"), ("text_a", "text_b"), ("premise", "hypothesis"),
         ("question1", "question2"), ("question", "sentence"), ("question", "answer"), ("question", "passage"),
         ("question", "context"), ("query", "document"), ("query", "passage"), ("#1_string", "#2_string"))
LABELS = ("label", "labels", "gold_label", "class", "category", "target", "score", "sentiment", "rating", "stars", "polarity",
          "intent", "topic", "emotion", "similarity", "similarity_score", "similarity_label", "relatedness_score", "is_duplicate",
          "quality", "label_text", "label_id", "categories", "classes", "tags", "y")
USUAL = frozenset((*TEXTS, *(name for pair in PAIRS for name in pair), *LABELS, "id", "idx", "index", "guid"))
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


def check_fields(task: TaskSettings) -> None:
    """Raises UserError for what a task does not read, and for several columns of text."""
    for role, column in task.fields.items():
        if role not in ROLES:
            turned = nearest(role, ROLES) or (f"; its column stands behind the colon: {{{column}: {role}}}" if column in ROLES
                                              else "")
            raise UserError(f"task.fields: '{role}' is nothing that {task.name} reads; expected {', '.join(ROLES)}{turned}")
        if isinstance(column, list) and (role != LABEL or len(column) < 2):
            raise UserError(f"task.fields: {role} is a list of {counted(len(column), 'column')}; expected one" + (
                ", or two and more with 0 and 1 (multi_label)" if role == LABEL else ""))
    if PAIR in task.fields and TEXT not in task.fields:
        raise UserError("task.fields: a pair without a text; name both, for example {text: premise, pair: hypothesis}")


# ---------------------------------------------------------------------------------------------------- what is in a file

@dataclass(frozen=True)
class Table:
    """The columns of a file and its first records."""

    file: SourceFile
    names: list[str]  # empty: a table whose first line is a record
    rows: list[list[Any]]  # None: a record that lacks the column
    metadata: dict[bytes, bytes] | None = None  # of Parquet and Arrow

    @property
    def is_text_table(self) -> bool:
        return self.file.kind in ("csv", "tsv")

    @property
    def width(self) -> int:
        return len(self.names) or max(map(len, self.rows), default=0)

    def column(self, name: str) -> str | int | None:
        """How a reader calls a column that is named, or numbered, by people; None: there is none.

        UserError where several have the name.
        """
        if self.names.count(name) > 1:
            raise UserError(f"{self.file.name}: more than one column '{name}'; rename one, or give the number of the one that is "
                            "meant, from 0 (task.fields)")
        if name in self.names:
            return self.names.index(name) if self.is_text_table else name
        if re.fullmatch(r"\d{1,6}", name) and int(name) < self.width:
            return int(name) if self.is_text_table else self.names[int(name)]
        return None

    def title(self, column: str | int) -> str:
        """A column's name, or its number, for people."""
        return column if isinstance(column, str) else self.names[column] if self.names else str(column)

    def quoted(self, column: str | int) -> str:
        return f"'{self.title(column)}'" if self.names else self.title(column)

    def values(self, number: int) -> list[str]:
        """What a column holds, as text."""
        values = [row[number] for row in self.rows if len(row) == self.width]
        return ["" if value is None else str(value) for value in values]

    def contents(self) -> str:
        """Columns with their first values, for people."""
        shown = [f"{self.names[number] if self.names else number} {short(next(iter(self.values(number)), ''))}"
                 for number in range(self.width)]
        return named(shown)

    def said(self, columns: Columns) -> str:
        """What was taken, in a line."""
        taken = [f"{role} from column {self.quoted(column)}" for role, column in zip(ROLES, columns.texts, strict=False)]
        if columns.label_names:
            taken.append(f"labels from the columns {named(columns.label_names)}")
        elif columns.label:
            taken.append(f"label from column {self.quoted(columns.label[0])}")
        else:
            taken.append("no label")
        used = {*columns.texts, *columns.label}
        left = [self.names[number] if self.names else str(number) for number in range(self.width)
                if (number if self.is_text_table else self.names[number]) not in used]
        return (f"{', '.join(taken)}{f' (not read: {named(left)})' if left else ''}"
                f"{' (no line names the columns: the first is a record)' if self.is_text_table and not columns.header else ''}")


def short(value: str) -> str:
    return repr(value if len(value) <= SHOWN else f"{value[:SHOWN]}...")


def head_of(file: SourceFile, reading: Reading, task: TaskSettings) -> Table:
    """Names and first records. UserError for a file without any."""
    decoding, max_bytes = Decoding(file.encoding), reading.max_bytes
    match file.kind:
        case "csv" | "tsv":
            lines = [row for _, row in islice(cells(file, max_bytes, decoding), SEEN) if row]
            header = bool(lines) and has_header(lines, task)
            table = Table(file, [cell.strip() for cell in lines[0]] if header else [], lines[header:])
        case "parquet":
            with open_parquet(file) as parquet:
                batch = next(parquet.iter_batches(batch_size=SEEN), None)
                table = of_batch(file, parquet.schema_arrow, batch)
        case "arrow":
            with open_arrow(file) as (schema, batches):
                table = of_batch(file, schema, next((batch for batch in batches if batch.num_rows), None))
        case _:
            table = of_objects(file, list(islice(objects(file, decoding, max_bytes), SEEN)))
    if not table.rows:
        below = " below its line of column names" if table.names and table.is_text_table else ""
        raise UserError(f"{file.name}: no record{below}")
    return table


def of_batch(file: SourceFile, schema: Any, batch: Any) -> Table:
    names, unique = schema.names, len(set(schema.names)) == len(schema.names)
    batch = batch.slice(0, SEEN) if batch is not None else None
    columns = [seen_values(file, batch, name) for name in names] if batch is not None and unique else []
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Table(file, names, rows or ([[None] * len(names)] if batch is not None else []), schema.metadata)


def seen_values(file: SourceFile, batch: Any, name: str) -> list[Any]:
    """A column, for a look at it: texts that are no UTF-8 with U+FFFD, and None where Python has no such values."""
    import pyarrow

    column = batch.column(name)
    if column.type in (pyarrow.string(), pyarrow.large_string()):
        return [value and value.decode(errors="replace") for value in column.cast(pyarrow.large_binary()).to_pylist()]
    try:
        return column_values(file, batch, name)
    except UserError:
        return [None] * batch.num_rows


def of_objects(file: SourceFile, records: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record))
    return Table(file, names, [[record.get(name) for name in names] for record in records])


def objects(file: SourceFile, decoding: Decoding, max_bytes: int) -> Iterator[dict[str, Any]]:
    """The objects of JSON."""
    for number, record in values(file, decoding, max_bytes):
        if not isinstance(record, dict):
            raise UserError(f"{location(Part(file), number)}: expected a JSON object, found {type(record).__name__}")
        yield record


def values(file: SourceFile, decoding: Decoding, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """The values of JSON, with their places."""
    if file.kind == "json":
        with opened(file) as stream:
            yield from enumerate(json_values(file, stream, decoding, longest_record(max_bytes)), 1)
        return
    with text_stream(file, decoding) as (stream, decode):
        for number, (line, _) in enumerate(read_lines(stream, Part(file), longest_record(max_bytes)), 1):
            if line and line.strip():
                try:
                    yield number, parsed(decode(line)[0])
                except UserError as error:
                    raise UserError(f"{location(Part(file), number)}: {error}") from None


def has_header(lines: list[list[str]], task: TaskSettings) -> bool:
    """Whether the first line of a table names its columns.

    It does where task.fields names columns, not just numbers them; where it has usual names; where it counts the
    columns, as pandas does without names; where it is no number above numbers alone; and where it is short, and above
    labels that all come again but is none of them. It does not where a cell stands again below.
    """
    first = [cell.strip() for cell in lines[0]]
    given = [name for column in task.fields.values() for name in (column if isinstance(column, list) else [column])]
    if any(not name.isdecimal() for name in given):
        return True  # if they are not there, that is what to say
    below = [Counter(row[place].strip() for row in lines[1:] if len(row) == len(first)) for place in range(len(first))]
    if any(cell in values for cell, values in zip(first, below, strict=True) if cell):
        return False
    if any(plain(cell) in USUAL for cell in first) or first == [str(number) for number in range(len(first))] != ["0"]:
        return True
    if any(cell and not NUMBER.fullmatch(cell) and values and all(map(NUMBER.fullmatch, values))
           for cell, values in zip(first, below, strict=True)):
        return True
    short_names = all(0 < len(cell) <= 30 and len(cell.split()) <= 3 and not NUMBER.fullmatch(cell) for cell in first)
    return short_names and any(values and min(values.values()) > 1 and holds_labels(list(values.elements())) for values in below)


def plain(name: str) -> str:
    """A column's name without what does not tell it apart: `Review Text` is review_text."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


# ------------------------------------------------------------------------------------------------- which column is what

def columns_of(table: Table, task: TaskSettings, labelled: bool, streams: tuple[str, ...] | None) -> Columns:
    """Raises UserError where a column is missing, or not clear."""
    texts = given_texts(table, task) or usual_texts(table, streams)
    label = given_label(table, task, labelled) or usual_label(table, texts)
    if not texts or not label:
        found_texts, found_label = by_contents(table, texts, label, streams)
        texts = texts or found_texts
        label = label or (found_label if labelled or not table.names else ())
    if not texts or (labelled and not label):
        if table.file.kind in ("json", "jsonl"):
            try:
                refuse_wrapped(table.file, dict(zip(table.names, table.rows[0], strict=True)))
            except UserError as error:
                raise UserError(f"{location(Part(table.file), 1)}: {error}") from None
        raise unclear(table, task, labelled, texts)
    if streams is not None and len(texts) != len(streams):
        want = "a text and its pair" if len(streams) > 1 else "one text"
        raise UserError(f"{table.file.name}: the model was trained on {want} in a record, and here are {table.contents()}; "
                        "name the columns with task.fields")
    if len({*texts, *label}) < len(texts) + len(label):
        raise UserError(f"task.fields: {table.file.name}: one column is named twice")
    return Columns(texts, label, tuple(map(table.title, label)) if len(label) > 1 else (), header=bool(table.names),
                   class_names=class_names(table.metadata, label[0]) if len(label) == 1 else ())


def class_names(metadata: dict[bytes, bytes] | None, column: str | int) -> tuple[str, ...]:
    """What Hugging Face's datasets call the numbers of a column's labels; () where they say nothing."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        names = (feature.get("feature") or feature)["names"]  # of a list of labels, or of one
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def given_texts(table: Table, task: TaskSettings) -> tuple[str | int, ...]:
    return tuple(given(table, role, task.fields[role]) for role in (TEXT, PAIR) if role in task.fields)


def given_label(table: Table, task: TaskSettings, labelled: bool) -> tuple[str | int, ...]:
    """() where none is given, or where labels need not be there, and are not."""
    names = task.fields.get(LABEL, [])
    names = names if isinstance(names, list) else [names]
    if not labelled and any(table.column(name) is None for name in names):
        return ()
    return tuple(given(table, LABEL, name) for name in names)


def given(table: Table, role: str, name: str) -> str | int:
    column = table.column(name)
    if column is None:
        there = f"only {named(table.names)}{nearest(name, table.names)}" if table.names else (
            f"only {table.contents()} (no line names the columns: they have numbers, from 0)")
        raise UserError(f"{table.file.name}: no column '{name}' (task.fields.{role}), {there}")
    return column


def usual_texts(table: Table, streams: tuple[str, ...] | None) -> tuple[str | int, ...]:
    """By the usual names; () where there is none. A pair goes before a single text, unless that is called `text`."""
    known = {plain(name): table.column(name) for name in reversed(table.names)}
    pair = next((pair for pair in PAIRS if known.keys() >= set(pair)), None)
    if pair and (streams is None or len(streams) == 2) and (TEXT in pair or TEXT not in known):
        return known[pair[0]], known[pair[1]]
    one = next((name for name in TEXTS if name in known), None)
    return () if one is None else (known[one],)


def usual_label(table: Table, texts: tuple[str | int, ...]) -> tuple[str | int, ...]:
    known = {plain(name): table.column(name) for name in reversed(table.names)}
    found = next((name for name in LABELS if name in known and known[name] not in texts), None)
    return () if found is None else (known[found],)


def by_contents(table: Table, texts: tuple[str | int, ...], label: tuple[str | int, ...],
                streams: tuple[str, ...] | None) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Texts and label by what the columns hold, where one is clear: of those that are neither yet, just one or two
    hold texts, and just one what may be labels. () for what is not clear."""
    columns = {number: number if table.is_text_table else table.names[number] for number in range(table.width)}
    left = {number: column for number, column in columns.items() if column not in (*texts, *label)}
    labels = [column for number, column in left.items() if holds_labels(table.values(number))]
    numbers = [column for number, column in left.items() if all(map(NUMBER.fullmatch, table.values(number)))]
    if len(left) == 2 and len(labels) == 2 and len(numbers) == 1:  # texts that come again, and numbers
        labels = numbers
    others = [column for column in left.values() if column not in labels]
    most = 2 if streams is None else len(streams)
    if streams == (TEXT,) and table.width == 1:
        return tuple(columns.values()), ()
    return tuple(others) if len(others) <= most else (), tuple(labels) if len(labels) == 1 else ()


def holds_labels(values: list[str]) -> bool:
    """Numbers, or a few short words that come again; in very few records, single words."""
    values = [value.strip() for value in values if value.strip()]
    if not values or all(map(NUMBER.fullmatch, values)):
        return bool(values)
    words = max(len(value.split()) for value in values)
    longest, different = max(map(len, values)), len(Counter(values))
    if longest > 40 or words > 3:
        return False
    return 2 * different <= len(values) or (len(values) < 10 and words == 1 and longest <= 20)


def unclear(table: Table, task: TaskSettings, labelled: bool, texts: tuple[str | int, ...]) -> UserError:
    names = [name if table.names else str(number) for number, name in enumerate(table.names or range(table.width))]
    if table.width == 1 and labelled:
        separator = " (is it a table, with another separator?)" if table.is_text_table else ""
        return UserError(f"{table.file.name}: one column alone, {table.contents()}{separator}; expected a text and its label")
    what = "the text" if not labelled else "the label" if texts else "the text and which the label"
    example = f"{{text: {names[0]}{f', label: {names[-1]}' if labelled else ''}}}"
    return UserError(f"{table.file.name}: which column is {what} is not clear: {table.contents()}; name them, for example "
                     f"task.fields={example}")
