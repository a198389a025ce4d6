"""RUN_DIR/evaluation.json: what the last evaluation of a labelled set found, beside the figures of metrics.jsonl.

    {"step": 300, "rows": 872, "figures": {"val_accuracy": 0.83},
     "classes": [{"class": "negative", "rows": 428, "predicted": 432, "precision": 0.82, "recall": 0.83, "f1": 0.83}],
     "confusion": {"classes": ["negative", "positive"], "counts": [[356, 72], [76, 368]]},    [true][predicted]
     "mistakes": [{"probability": 0.99, "predicted": "positive", "label": "negative", "text": "one long string"}, ...]}

What a task does not have is left out: where a row has several labels there is no confusion matrix, and scores have no
classes. confusion.png beside it is the matrix as a picture.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.console.progress import optional
from jaxlm.errors import UserError, printable
from jaxlm.reporting.markdown import columns, fenced, grid
from jaxlm.reporting.plots import plot_confusion
from jaxlm.storage.files import as_path, delete, exists, plain, read_text, write_json

FILE_NAME, PICTURE = "evaluation.json", "confusion.png"
LINE = 120  # characters of a text
Evaluation = dict[str, Any]


def write_evaluation(run_dir: str | Path, evaluation: Evaluation) -> None:
    """Replaces evaluation.json, and confusion.png where there is a matrix; each is written whole or not at all."""
    folder = as_path(run_dir)
    delete(folder / PICTURE)  # of an earlier evaluation
    write_json(folder / FILE_NAME, plain(evaluation))
    if "confusion" in evaluation:
        with optional(f"{PICTURE} is not drawn"):
            confusion = evaluation["confusion"]
            plot_confusion(confusion["classes"], np.array(confusion["counts"]), folder / PICTURE)


def evaluation_told(run_dir: str | Path) -> list[str]:
    """The evaluation as sections of report.md; [] where the run has none. Raises UserError: it cannot be read."""
    path = as_path(run_dir) / FILE_NAME
    try:
        evaluation = json.loads(read_text(path))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError):
        evaluation = None
    try:
        return _sections(evaluation, exists(path.parent / PICTURE))
    except (TypeError, KeyError, AttributeError, ValueError, IndexError):
        raise UserError(f"{path}: expected what `jaxlm train` writes there; delete the file to report without it") from None


def _sections(evaluation: Evaluation, has_picture: bool) -> list[str]:
    sections, where = [], f"step {evaluation['step']}, {evaluation['rows']:,} validation rows"
    if classes := evaluation.get("classes"):
        sections += [f"## Each class ({where})", grid(classes)]
    if has_picture:
        sections.append(f"![True and predicted classes]({PICTURE})")
    if mistakes := evaluation.get("mistakes"):
        lines = [{**mistake, "text": in_a_line(mistake["text"])} for mistake in mistakes]
        sections += ["## Worst mistakes", fenced(columns(lines))]
    return sections


def in_a_line(text: str) -> str:
    """A text of any length, as far as a line has room."""
    line = printable(" ".join(text[: 4 * LINE].split()))
    return line if len(line) <= LINE else f"{line[: LINE - 3]}..."
