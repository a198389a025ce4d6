"""What moves while the user waits: one live line on a terminal, plain lines in a pipe or a log file. All on stderr.

rich is imported only once a terminal is there, because the worker processes of data/ import this module too.
"""

import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from jaxlm.console.units import format_count, format_duration, format_milliseconds, format_scientific
from jaxlm.errors import reason

PLAIN_INTERVAL_SECONDS = 15.0


def on_terminal() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def print_line(text: str) -> None:
    """One line on stderr, visible at once even in a log file."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def print_once(text: str) -> None:
    """The same, the first time only."""
    print_line(text)


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Around what a run can do without: where it fails, one line says what is missing and why, and the run goes on."""
    try:
        yield
    except Exception as error:
        print_line(f"WARNING: {what}: {reason(error)}")


@contextmanager
def progress_bar(description: str, total: int | None, unit: str, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Counts work of a known (`total`) or unknown (None) amount; yields `advance(n=1)`.

    With `enabled=False` (every process but the first) nothing is shown.
    """
    if not enabled:
        yield lambda n=1: None
    elif on_terminal():
        with live_bar(description, total, unit) as advance:
            yield advance
    else:
        counter = PlainCounter(description, total, unit)
        yield counter.advance
        counter.finish()  # an exception ends without this line: nothing was finished


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Shows for how long something has been going on of which nobody can say how much is left."""
    if on_terminal():
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True, force_terminal=True), transient=True) as progress:
            progress.add_task(description, total=None)
            yield
        return
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(PLAIN_INTERVAL_SECONDS):
            print_line(f"{description}: {format_duration(time.monotonic() - started)} so far")

    print_line(f"{description}: started")
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
    print_line(f"{description}: done in {format_duration(time.monotonic() - started)}")


@contextmanager
def live_bar(description: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """A rich bar with count, rate and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class CountColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            count, elapsed = int(task.completed), task.elapsed or 0.0
            parts = [count_text(count, total, unit)]
            if count and elapsed:
                parts.append(f"{format_count(task.finished_speed or task.speed or count / elapsed)}/s")
            if task.finished or task.time_remaining is None:
                parts.append(format_duration(elapsed))
            else:
                parts.append(f"eta {format_duration(task.time_remaining)}")
            return Text("  ".join(parts))

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), CountColumn())
    with Progress(*columns, console=Console(stderr=True, force_terminal=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n=1: progress.advance(task, n)
        progress.update(task, total=progress.tasks[0].completed)  # full also where the amount was unknown


def count_text(count: int, total: int | None, unit: str) -> str:
    return f"{count:,} {unit}" if total is None else f"{count:,}/{total:,} {unit}"


class PlainCounter:
    """Plain lines: one at the start, at most one every 15 s, one at the end."""

    def __init__(self, description: str, total: int | None, unit: str):
        self.description, self.total, self.unit = description, total, unit
        self.count = 0
        self.started = self.printed = time.monotonic()
        print_line(f"{description}: started" if total is None else f"{description}: {total:,} {unit}")

    def advance(self, n: int = 1) -> None:
        self.count += n
        now = time.monotonic()
        if now - self.printed >= PLAIN_INTERVAL_SECONDS:
            self.printed = now
            rate = self.count / (now - self.started)
            line = f"{self.description}: {count_text(self.count, self.total, self.unit)}  {format_count(rate)}/s"
            if self.total is not None and self.count:
                line += f"  eta {format_duration(max(self.total - self.count, 0) / rate)}"
            print_line(line)

    def finish(self) -> None:
        elapsed = time.monotonic() - self.started
        rate = f" ({format_count(self.count / elapsed)}/s)" if elapsed > 0 else ""
        print_line(f"{self.description}: {count_text(self.count, self.total, self.unit)} in {format_duration(elapsed)}{rate}")


class TrainingProgress:
    """The training loop's line: step, loss, learning rate, tokens/s, MFU if known, step time, time left.

    A context manager. `update` redraws the one line of a terminal, or prints a line elsewhere; evaluations stay visible
    above the line. `print` writes a note in between. With `enabled=False` nothing is shown.
    """

    def __init__(self, total_steps: int | None, start_step: int = 0, enabled: bool = True):
        self.total_steps = total_steps  # None: not known yet
        self.start_step = start_step
        self.enabled = enabled
        self.first: tuple[int, float] | None = None  # (step, time) of the first update: compiling is over
        self.live: Any = None

    def __enter__(self) -> Self:
        if self.enabled and on_terminal():
            self.live = training_line(self.total_steps, self.start_step)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Shows a metrics row: keys as in metrics.jsonl, any of them may be missing or None."""
        if not self.enabled:
            return
        parts = row_parts(row)
        if "loss" in row and self.total_steps is not None:
            parts.append(f"eta {format_duration(self.seconds_left(step, row.get('step_seconds')))}")
        if self.live and "loss" in row:
            self.live.update(self.live.task_ids[0], completed=step, total=self.total_steps, text="  ".join(parts))
        else:
            self.print("  ".join([f"step {step}" + (f"/{self.total_steps}" if self.total_steps else ""), *parts]))

    def print(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.enabled:
            print_line(text)

    def seconds_left(self, step: int, step_seconds: float | None) -> float:
        """From the wall clock since the first update, so that evaluation and checkpoints count."""
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        first_step, first_time = self.first
        per_step = (now - first_time) / (step - first_step) if step > first_step else step_seconds or 0.0
        return per_step * max(self.total_steps - step, 0)


def training_line(total_steps: int | None, start_step: int) -> Any:
    """A rich display of one line; the bar takes the width that the figures leave."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    columns = (
        TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
    )
    progress = Progress(*columns, console=Console(stderr=True, force_terminal=True), expand=True)
    progress.add_task("train", total=total_steps, completed=start_step, text="compiling")
    return progress


SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4g}" if math.isfinite(value) else f"loss {value}",
    "learning_rate": lambda value: f"lr {format_scientific(value)}",
    "tokens_per_second": lambda value: f"{format_count(value)} tokens/s",
    "slots_per_second": lambda value: f"of {format_count(value)} slots/s",
    "mfu": lambda value: f"mfu {100 * value:.1f}%",
    "step_seconds": lambda value: f"{format_milliseconds(value)}/step",
    "skipped_steps": lambda value: f"{value:,} steps skipped",
    "skipped_rows": lambda value: f"{value:,} rows skipped",
}
NOT_SHOWN = ("step", "stage", "time", "tokens", "epoch", "grad_norm", "data_wait_seconds")


def row_parts(row: dict[str, Any]) -> list[str]:
    """The figures of a metrics row that fit on a line; a validation row shows all it has, under its own names."""
    parts = [write(row[key]) for key, write in SHOWN.items() if row.get(key) is not None and not (
        key == "slots_per_second" and format_count(row[key]) == format_count(row.get("tokens_per_second") or 0))]
    if "loss" in row:
        return parts
    others = {key: value for key, value in row.items() if key not in SHOWN and key not in NOT_SHOWN}
    return parts + [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in others.items() if value is not None]
