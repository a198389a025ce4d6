"""loss.png, and the loss curves of several runs in one picture. matplotlib is imported when a picture is made."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.reporting.metrics import is_number, read_metrics
from jaxlm.storage.files import Location, as_path, name_of, write_atomically

TRAIN_COLOR, VALIDATION_COLOR, CHANGE_COLOR = "tab:blue", "tab:orange", "tab:red"
MARKED = 4  # steps that a label names


def plot_loss(run_dir: str | Path) -> Location | None:
    """Writes RUN_DIR/loss.png: training loss, light and smoothed, the validation points, and where the
    settings changed. None: nothing to show yet."""
    rows = read_metrics(run_dir)
    steps, losses = series(rows, "loss")
    validation_steps, validation_losses = series(rows, "val_loss")
    if not len(steps) and not len(validation_steps):
        return None
    figure, axes = new_figure()
    if len(steps):
        axes.plot(steps, losses, color=TRAIN_COLOR, alpha=0.3, linewidth=1)
        axes.plot(*smooth(steps, losses), color=TRAIN_COLOR, linewidth=1.8, label="training",
                  marker="o" if len(steps) == 1 else None)
    if len(validation_steps):
        label = f"validation, lowest {validation_losses.min():.3f}"
        axes.plot(validation_steps, validation_losses, "o-", color=VALIDATION_COLOR, markersize=4, linewidth=1.2, label=label)
    changed = sorted({row["step"] for row in rows if "changed" in row})
    for number, step in enumerate(changed):
        at = ", ".join(map(str, changed[:MARKED])) + (", ..." if len(changed) > MARKED else "")
        label = None if number else f"settings changed at step {at}"
        axes.axvline(step, color=CHANGE_COLOR, linestyle="--", linewidth=1, label=label)
    finish(axes, name_of(run_dir), np.concatenate([losses, validation_losses]))
    path = as_path(run_dir) / "loss.png"
    save(figure, path)
    return path


def plot_comparison(run_dirs: list[str | Path], path: str | Path) -> None:
    """Writes one picture with a color for each run: smoothed training loss as a line, validation loss as points."""
    figure, axes = new_figure()
    everything = []
    for number, run_dir in enumerate(run_dirs):
        rows = read_metrics(run_dir)
        (steps, losses), (validation_steps, validation_losses) = series(rows, "loss"), series(rows, "val_loss")
        color = f"C{number % 10}"
        label = name_of(run_dir)
        if len(validation_losses):
            label += f", validation {validation_losses[-1]:.3f}"
        axes.plot(*smooth(steps, losses), color=color, linewidth=1.5, label=label)
        axes.plot(validation_steps, validation_losses, "o", color=color, markersize=4)
        everything += [losses, validation_losses]
    finish(axes, "training (lines) and validation (points) loss", np.concatenate(everything))
    save(figure, path)


def series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one key, as arrays of equal length."""
    points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, int), np.array(values, float)


def smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At each of at most 1000 points the level of 5 % of the curve around it, along the window's own slope.

    Medians, because a mean turns one wild value into a plateau. Near the ends the window stays as wide and lies to one
    side: it follows the curve by its slope, where a window that shrinks would end in the last value itself, noise and
    all. float32.
    """
    if not len(values):
        return steps, values
    width = min(2 * max(len(values) // 40, 1) + 1, len(values))
    centers = np.unique(np.linspace(0, len(values) - 1, min(len(values), 1000)).round().astype(int))
    starts = np.clip(centers - width // 2, 0, len(values) - width)
    return steps[centers], np.array([_level(values[start : start + width], center - start)
                                     for start, center in zip(starts, centers, strict=True)], np.float32)


def _level(window: np.ndarray, place: int) -> float:
    """What the window is at `place`, by the line through the medians of its halves; exact on a straight line."""
    half = len(window) // 2
    slope = (np.median(window[-half:]) - np.median(window[:half])) / (len(window) - half) if half else 0.0
    return float(np.median(window - slope * (np.arange(len(window)) - place)))


def new_figure() -> tuple[Any, Any]:
    os.environ.pop("MPLBACKEND", None)  # of windows; matplotlib cannot be imported where it does not know the name
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of a home folder that it cannot write to
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, always the Agg canvas

    matplotlib.rcParams["text.parse_math"] = False  # a run may be called a$b$c
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    return figure, figure.subplots()


def finish(axes: Any, title: str, values: np.ndarray) -> None:
    """Labels, and a vertical range that a few wild values cannot squash the rest of the curve with."""
    axes.set(xlabel="step", ylabel="loss (nats per predicted token)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(values):
        low, high = values.min(), max(np.percentile(values, 99.5), values[: max(len(values) // 100, 1)].max())
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
        axes.legend(frameon=False)


def save(figure: Any, path: str | Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # letters of a run's name that no font here has
        write_atomically(path, lambda temporary: figure.savefig(temporary))
