"""What labels are: one name of several, several of them, or a number; and which number a name has.

The training file decides, once, over all of its labels; the validation file has to follow.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxlm.errors import UserError, nearest, shown
from jaxlm.settings import TaskSettings

SINGLE, MULTI, REGRESSION = "single_label", "multi_label", "regression"
WHOLE = re.compile(r"([+-]?)(0|[1-9]\d*)(?:\.0*)?", re.ASCII)  # 1, -1, 1.0; not 01, which is a name
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
FEW = 20  # records may have a label of its own each
MANY = 100  # different labels, and a tenth of the records: perhaps the wrong column
MOST_SHOWN = 12


@dataclass(frozen=True)
class Labels:
    """The labels of a task: `names` by their numbers, None for a regression."""

    problem: str
    names: tuple[str, ...] | None
    by_number: bool = False  # files may have a label's number in the place of its name
    separator: str | None = None

    def number(self, value: Any) -> int | float | list[int]:
        """What a file's label is to a model: the number of its name, a number, or the rising numbers of its names.

        UserError: it is missing, no number, not finite in float32, or none of the names.
        """
        if self.problem == REGRESSION:
            return score(value)
        if self.problem == SINGLE:
            return self.number_of(name_of(value))
        return sorted({self.number_of(name) for name in names_of(value, self.separator)})

    def number_of(self, name: str) -> int:
        if name in self.numbers:
            return self.numbers[name]
        if self.by_number and name in {str(number) for number in range(len(self.names))}:
            return int(name)
        hint = "; -1 often marks records without a label" if name == "-1" else nearest(name, self.names)
        raise UserError(f"label {shown(name)} is none of {told(self.names)}{hint}")

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def column(self, values: Sequence[int | float | list[int]]) -> np.ndarray:
        """int32 [n], float32 [n], or bool [n, labels] for several, of what `number` gives."""
        if self.problem != MULTI:
            return np.array(values, np.int32 if self.problem == SINGLE else np.float32)
        column = np.zeros((len(values), len(self.names)), bool)
        for row, chosen in zip(column, values, strict=True):
            row[chosen] = True
        return column


# ---- one label -------------------------------------------------------------------------------------------------------

def name_of(value: Any) -> str:
    """A single label by name. Whole numbers are named alike however they are written: 1, 1.0 and "1"."""
    refuse_missing(value)
    if isinstance(value, list | dict):
        raise UserError(f"label {shown(value)} is no single name or number; several labels are task.problem=multi_label")
    if isinstance(value, bool):
        return "true" if value else "false"
    name = str(value).strip()
    whole = WHOLE.fullmatch(name)
    return f"{whole[1].replace('+', '')}{whole[2]}" if whole else name


def names_of(value: Any, separator: str | None) -> list[str]:
    """Several labels by name; a list may be empty."""
    if isinstance(value, list):
        return [name_of(item) for item in value]
    if isinstance(value, str) and separator is not None:
        return [name_of(item) for item in value.split(separator) if item.strip()]
    refuse_missing(value)
    raise UserError(f"label {shown(value)} is one, expected several (task.problem=multi_label): a list in JSON, Parquet or "
                    "Arrow; in a table say what stands between them, for example task.label_separator=';'")


def score(value: Any) -> float:
    """A number to be predicted."""
    refuse_missing(value)
    word = str(value).strip()
    if isinstance(value, bool | list | dict) or not (DECIMAL.fullmatch(word) or re.fullmatch("[+-]?inf(inity)?", word, re.I)):
        raise UserError(f"label {shown(value)} is no number, expected one (task.problem=regression)")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(word)):
            raise UserError(f"label {shown(value)} is not finite in float32")
    return float(word)


def refuse_missing(value: Any) -> None:
    is_missing = value is None or (isinstance(value, float) and math.isnan(value))
    if is_missing or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        raise UserError("no label" + ("" if value is None or value == "" else f" ({shown(value)})"))


# ---- all labels ------------------------------------------------------------------------------------------------------

def find_labels(values: Sequence[Any], task: TaskSettings, columns: tuple[str, ...], class_names: tuple[str, ...],
                where: Callable[[int], str]) -> tuple[Labels, list[str]]:
    """What the labels of the training file are, and lines that say so.

    Args:
      values: as the file holds them.
      columns: names of a label's own column each; () where one column holds the label.
      class_names: what the file says the numbers of labels are called; () where it does not, or they have names.
      where: the place of a value, by its number, for messages.

    UserError: a label is missing, or not of the kind of the others; the names do not fit; there is but one.
    """
    problem, why = find_problem(values, task, columns, where)
    notes = [f"labels: {problem}{f', {why}' if why else ''}"]
    if problem == REGRESSION:
        if task.labels is not None:
            raise UserError(f"task.labels: names, but the labels are numbers ({why or 'task.problem=regression'}); leave it "
                            "away, or say task.problem=single_label")
        if len({score_at(number, value, where) for number, value in enumerate(values)}) == 1:
            raise UserError(f"data.raw: every record has the label {shown(values[0])}: there is nothing to learn")
        return Labels(REGRESSION, None), notes
    found = named_labels(values, problem, task, where)
    given = task.labels or class_names
    names = given or columns or tuple(sorted(found, key=order(found)))
    by_number = bool(given) and not found.keys() & set(names) and all(WHOLE.fullmatch(name) for name in found)
    check_names(names)
    if len(names) < 2 and problem == SINGLE:
        hint = "-1 often marks records without a label" if names[0] == "-1" else "expected two labels or more"
        raise UserError(f"data.raw: every record has the label {shown(names[0])}: there is nothing to learn; {hint}")
    if len(found) == len(values) > FEW and problem == SINGLE:
        raise UserError(f"data.raw: each of {len(values):,} records has a label of its own ({told(names)}): it is the wrong "
                        "column (task.fields), or a number to predict (task.problem=regression)")
    if not names:
        raise UserError("data.raw: no record has a label")
    notes[0] += f"; {told(tuple(names))}{', by number in the file' if by_number else ''}"
    notes += doubts(found, len(values))
    return Labels(problem, tuple(names), by_number, task.label_separator), notes


def find_problem(values: Sequence[Any], task: TaskSettings, columns: tuple[str, ...],
                 where: Callable[[int], str]) -> tuple[str, str]:
    """`single_label`, `multi_label` or `regression`, and why; '' where the settings say so."""
    if columns and task.problem not in (None, MULTI):
        raise UserError(f"task.problem={task.problem}: task.fields.label names several columns, which is multi_label")
    if task.problem is not None:
        return task.problem, ""
    if columns:
        return MULTI, "a column each"
    if task.label_separator is not None:
        return MULTI, f"separated by {task.label_separator!r}"
    if any(isinstance(value, list) for value in values):
        return MULTI, "lists"
    words = [str(value).strip() for value in values]
    fractions = [word for word in words if DECIMAL.fullmatch(word) and not float(word).is_integer()]
    if not fractions:
        comma = next((number for number, word in enumerate(words) if DECIMAL_COMMA.fullmatch(word)), None)
        if comma is not None and all(DECIMAL_COMMA.fullmatch(word) or WHOLE.fullmatch(word) for word in words):
            raise UserError(f"{where(comma)}: label {shown(values[comma])} has a decimal comma; expected a point, or "
                            "task.problem=single_label for names")
        return SINGLE, ""
    for number, value in enumerate(values):
        try:
            score(value)
        except UserError as error:
            raise UserError(f"{where(number)}: {str(error).partition(', expected')[0]}, but others have a fraction "
                            f"({fractions[0]}); expected numbers, or task.problem=single_label") from None
    return REGRESSION, f"since there are fractions ({fractions[0]})"


def score_at(number: int, value: Any, where: Callable[[int], str]) -> float:
    try:
        return score(value)
    except UserError as error:
        raise UserError(f"{where(number)}: {error}") from None


def named_labels(values: Iterable[Any], problem: str, task: TaskSettings, where: Callable[[int], str]) -> Counter[str]:
    """How often each name occurs."""
    found: Counter[str] = Counter()
    for number, value in enumerate(values):
        try:
            found.update([name_of(value)] if problem == SINGLE else names_of(value, task.label_separator))
        except UserError as error:
            raise UserError(f"{where(number)}: {error}") from None
    return found


def check_names(names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"task.labels: '{twice}' stands there twice")


def order(names: Iterable[str]) -> Callable[[str], Any]:
    """Numbers in the order of numbers, all else in that of letters."""
    if all(map(DECIMAL.fullmatch, names)):
        return lambda name: (float(name), name)
    return str


def doubts(found: Counter[str], num_records: int) -> list[str]:
    """Lines about labels that may not be what was meant."""
    notes = []
    alike: dict[str, list[str]] = {}
    for name in sorted(found):
        alike.setdefault(name.casefold(), []).append(name)
    notes += [f"labels {told(names)} differ in case alone, and are different labels" for names in alike.values() if names[1:]]
    if len(found) > MANY and len(found) > num_records / 10:
        notes.append(f"{len(found):,} different labels in {num_records:,} records: is it the right column (task.fields), or a "
                     "number to predict (task.problem=regression)?")
    if "-1" in found and found.keys() - {"-1"} == {str(number) for number in range(len(found) - 1)}:
        notes.append(f"label -1 ({found['-1']:,} records) is learned like the others; where it marks records without a label, "
                     "leave them out")
    return notes


def told(names: Sequence[str]) -> str:
    """Names for a message."""
    more = f" and {len(names) - MOST_SHOWN:,} more" if len(names) > MOST_SHOWN else ""
    return f"{', '.join(names[:MOST_SHOWN])}{more}"
