"""RUN_DIR/metrics.jsonl and TensorBoard: one object a line, the same numbers in both."""

import json
import sys
from pathlib import Path
from typing import Any, Self

from jaxlm.console.progress import optional
from jaxlm.storage.files import as_path, json_text, read_bytes, write_text
from jaxlm.storage.mirror import Mirror

FILE_NAME, SAMPLES = "metrics.jsonl", "samples"


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the order they were written; [] when there is no file yet.

    A line that a killed process left half-written is passed over.
    """
    try:
        content = read_bytes(as_path(run_dir) / FILE_NAME)
    except FileNotFoundError:
        return []
    rows = (parse_row(line) for line in content.splitlines())
    return [row for row in rows if row is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The object on one line, or None if the line was torn, or is no row: without a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and abs(row["step"]) < 2**63 else None


def is_number(value: Any) -> bool:
    """Whether it is one, as JSON has them; Python's JSON also reads NaN, and bool is an int."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max


class MetricsWriter:
    """Appends rows to metrics.jsonl and, if asked, the same scalars to TensorBoard. A context manager.

    A run that goes on from `resume_step` loses the rows after it, because it writes them again, and what an earlier
    start said to have changed there (`changed`: {key: [before, after]}). Only process 0 has a writer.
    In a bucket, rows can be seen half a minute late, and earlier only after `flush` (see jaxlm.storage.mirror).
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool, resume_step: int):
        kept = [row for row in read_metrics(run_dir) if row["step"] < resume_step + ("changed" not in row)]
        self.mirror = Mirror(run_dir)
        write_text(self.mirror.folder / FILE_NAME, "".join(f"{json_text(row)}\n" for row in kept))
        self.file = open(self.mirror.folder / FILE_NAME, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.events = open_tensorboard(self.mirror.folder, resume_step) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, row: dict[str, Any]) -> None:
        """`row` holds `step` and numbers (Python's, NumPy's or 0-d arrays), text, mappings or None. Readable at
        once."""
        self.file.write(f"{json_text(row)}\n")
        self.file.flush()
        if self.events:
            for key, value in row.items():
                if key not in ("step", "time") and not isinstance(value, str | dict | None):  # an event has a time of its own
                    self.events.add_scalar(key, float(value), int(row["step"]))
            self.events.flush()
        self.mirror.changed()

    def write_samples(self, step: int, text: str) -> None:
        """RUN_DIR/samples/STEP.txt, and the same in TensorBoard."""
        folder = self.mirror.folder / SAMPLES
        folder.mkdir(exist_ok=True)
        write_text(folder / f"{step}.txt", text)
        if self.events:
            self.events.add_text(SAMPLES, f"```text\n{text}```", step)
        self.mirror.changed()

    def flush(self) -> None:
        """Until all rows can be read by everybody."""
        self.mirror.flush()

    def close(self) -> None:
        self.file.close()
        if self.events:
            self.events.close()
        self.mirror.close()


def open_tensorboard(folder: Path, resume_step: int) -> Any:
    """A writer that hides what earlier writers said about the steps after `resume_step`; None where it cannot be
    had."""
    with optional("no TensorBoard events are written"):
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1, filename_suffix=f".from{resume_step}")
