"""The labels of clean records as numbers: the stage of `prepare` that text alone does not have, and what it tells."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.console.units import counted
from jaxlm.data.cleaning import first_occurrences
from jaxlm.data.corpus import SPLITS, column_file
from jaxlm.data.labels import MULTI, REGRESSION, Labels, find_labels
from jaxlm.data.sources import Unit
from jaxlm.data.stages import TRAIN, VALIDATION, Cleaned, file_digest
from jaxlm.data.workers import Result
from jaxlm.errors import UserError
from jaxlm.settings import TaskSettings
from jaxlm.storage.files import write_atomically

FEW_RECORDS = 100  # figures over fewer say little
FATES = dict(zip(SPLITS, (TRAIN, VALIDATION), strict=True))


def number_labels(task: TaskSettings, units: list[Unit], cleaned: Cleaned, num_validation: int,
                  fate: np.ndarray) -> tuple[Labels, np.ndarray, list[str]]:
    """What the labels are, their numbers, and lines about them.

    Args:
      num_validation: so many records are from the user's own validation file; they stand first. The others decide what
        the labels are.
      fate: see `stages.select`.

    Returns the labels of all clean records as `Labels.column` has them, zeros for those that are not kept. UserError,
    with file and line, for the first label that is missing, or none of those.
    """
    values, kept = cleaned.labels(), np.flatnonzero(fate <= VALIDATION).tolist()
    training = [number for number in kept if number >= num_validation]
    columns = units[-1].parts[-1].file.columns  # alike in all files
    class_names = next((part.file.columns.class_names for unit in reversed(units) for part in reversed(unit.parts)
                        if part.file.columns.class_names), ())
    labels, notes = find_labels([values[number] for number in training], task, columns.label_names, class_names,
                                lambda place: cleaned.place(training[place], units))
    numbers = []
    for number in kept:
        try:
            numbers.append(labels.number(values[number]))
        except UserError as error:
            raise UserError(f"{cleaned.place(number, units)}: {error}") from None
    column = labels.column(numbers)
    whole = np.zeros((len(fate), *column.shape[1:]), column.dtype)
    whole[kept] = column
    return labels, whole, notes


def write_column(split: str, column: np.ndarray, corpus: Path) -> Result:
    """The labels of a split as a file, and its entry in the manifest."""
    path = corpus / column_file(split, "label")
    flat = column.view(np.uint8).ravel() if column.dtype == bool else column
    write_atomically(path, lambda temporary: np.save(temporary, flat))
    width = {"width": column.shape[1]} if column.ndim > 1 else {}
    return {"file": path.name, "sha256": file_digest(path), "dtype": flat.dtype.str, **width}


def label_counts(labels: Labels, column: np.ndarray) -> dict[str, Any]:
    """How many records of a split have each label; of scores the least, the mean and the greatest."""
    if labels.problem == REGRESSION:
        figures = (column.min(), column.mean(dtype=np.float64), column.max()) if len(column) else (None, None, None)
        return {name: figure if figure is None else float(f"{figure:.6g}")
                for name, figure in zip(("least", "mean", "greatest"), figures, strict=True)}
    counts = column.sum(axis=0) if labels.problem == MULTI else np.bincount(column, minlength=len(labels.names))
    return dict(zip(labels.names, counts.tolist(), strict=True))


def doubts(labels: Labels, column: np.ndarray, digests: np.ndarray, num_validation: int, fate: np.ndarray) -> Iterator[str]:
    """Lines about records that a user may not have meant so."""
    train, validation = (np.flatnonzero(fate == which) for which in FATES.values())
    if labels.names:
        missing = [name for name, count in label_counts(labels, column[train]).items() if not count]
        if missing:
            yield f"no training record has the label {', '.join(map(repr, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
    if labels.problem == MULTI and (bare := int(np.count_nonzero(~column[train].any(axis=1)))):
        yield f"{counted(bare, 'training record')} {'has' if bare == 1 else 'have'} no label at all (multi_label)"
    repeats = train[~first_occurrences(digests[train])]
    if len(repeats):
        _, first, group = np.unique(digests[train], return_index=True, return_inverse=True)
        other = column[train] != column[train[first[group]]]
        other = int(np.count_nonzero(other.any(axis=1) if other.ndim > 1 else other))
        yield (f"{counted(len(repeats), 'training record')} {'repeats' if len(repeats) == 1 else 'repeat'} the texts of another"
               f"{f', {other:,} with another label' if other else ''}; data.cleaning.exact_duplicates=true keeps the first")
    if num_validation:
        leaked = int(np.isin(digests[train], digests[validation]).sum())
        if leaked:
            yield (f"{counted(leaked, 'training record')} {'has' if leaked == 1 else 'have'} the texts of validation records; "
                   "data.cleaning.exact_duplicates=true drops them")
    if 0 < len(validation) < FEW_RECORDS:
        yield (f"the validation split has only {counted(len(validation), 'record')}: its figures will say little; raise "
               "data.validation, or name a file for it")
