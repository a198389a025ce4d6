"""loss.png, the loss curves of several runs in one picture, and which classes a classifier takes for which.
matplotlib is imported when a picture is made."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.console.units import format_count
from jaxlm.reporting.metrics import is_number, read_metrics
from jaxlm.storage.files import Location, as_path, name_of, write_atomically

TRAIN_COLOR, VALIDATION_COLOR, CHANGE_COLOR = "tab:blue", "tab:orange", "tab:red"
MARKED = 4  # steps that a label names
LOSS = "loss (nats per predicted token)"
MOST_CLASSES = 50  # of a confusion matrix in which the names can still be read
NUMBERED = 20  # classes whose cells have room for a number
LONGEST_NAME = 24  # letters of a class


def plot_loss(run_dir: str | Path, figure_name: str | None = None, loss_label: str = LOSS) -> Location | None:
    """Writes RUN_DIR/loss.png: training loss, light and smoothed, the validation points, and where the settings
    changed. None: nothing to show yet.

    Args:
      run_dir: the run.
      figure_name: a column of metrics.jsonl that gets a panel of its own below, e.g. val_accuracy.
      loss_label: what the loss is in.
    """
    rows = read_metrics(run_dir)
    steps, losses = series(rows, "loss")
    validation_steps, validation_losses = series(rows, "val_loss")
    if not len(steps) and not len(validation_steps):
        return None
    figure_steps, figures = series(rows, figure_name) if figure_name else ((), ())
    figure, (axes, *below) = new_figure(panels=1 + bool(len(figures)))
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
    finish(axes, name_of(run_dir), np.concatenate([losses, validation_losses]), loss_label)
    for panel in below:
        panel.plot(figure_steps, figures, "o-", color=VALIDATION_COLOR, markersize=4, linewidth=1.2,
                   label=f"validation, last {figures[-1]:.3f}, highest {figures.max():.3f}, lowest {figures.min():.3f}")
        finish(panel, "", figures, figure_name.removeprefix("val_").replace("_", " "))
        panel.set_xlim(axes.get_xlim())
    path = as_path(run_dir) / "loss.png"
    save(figure, path)
    return path


def plot_comparison(run_dirs: list[str | Path], path: str | Path) -> None:
    """Writes one picture with a color for each run: smoothed training loss as a line, validation loss as points."""
    figure, [axes] = new_figure()
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
    finish(axes, "training (lines) and validation (points) loss", np.concatenate(everything), LOSS)
    save(figure, path)


def plot_confusion(names: list[str], counts: np.ndarray, path: str | Path) -> None:
    """Writes a picture of a confusion matrix: a row for each true class, colored by the share of its rows that each
    class was predicted for. Of more than 50 classes the most frequent are shown, and the title says so.

    Args:
      names: of the C classes.
      counts: [C, C], [true class, predicted class].
      path: of the picture.
    """
    counts = np.asarray(counts)
    shown = np.sort(np.argsort(-(counts.sum(0) + counts.sum(1)), kind="stable")[:MOST_CLASSES])
    names, kept = [_short(names[place]) for place in shown], counts[np.ix_(shown, shown)]
    shares = kept / np.maximum(counts.sum(1)[shown], 1)[:, None]
    side = min(3.2 + 0.42 * len(shown), 16)
    figure, [axes] = new_figure((side + 1.4, side))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the class's rows", fraction=0.046, pad=0.03)
    for (true, predicted), count in np.ndenumerate(kept) if len(shown) <= NUMBERED else ():
        axes.text(predicted, true, str(count) if count < 10**5 else format_count(count), ha="center", va="center",
                  fontsize=10 if len(shown) <= 8 else 7, color="white" if shares[true, predicted] > 0.5 else "0.25")
    places, size = np.arange(len(shown)), 10 if len(shown) <= NUMBERED else 8
    axes.set_xticks(places, names, rotation=0 if len(shown) <= 3 else 90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    left_out = f"; the {len(shown)} most frequent of {len(counts)} classes" if len(shown) < len(counts) else ""
    axes.set(xlabel="predicted", ylabel="true", title=f"{counts.sum():,} rows{left_out}")
    axes.spines[:].set_visible(False)
    save(figure, path)


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\u2026"


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


def new_figure(size: tuple[float, float] = (8, 4.8), panels: int = 1) -> tuple[Any, Any]:
    """A figure of `panels` one below the other, each `size` inches, and their axes."""
    os.environ.pop("MPLBACKEND", None)  # of windows; matplotlib cannot be imported where it does not know the name
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of a home folder that it cannot write to
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, always the Agg canvas

    matplotlib.rcParams["text.parse_math"] = False  # a run may be called a$b$c
    figure = Figure(figsize=(size[0], size[1] * panels), dpi=150, layout="constrained")
    return figure, figure.subplots(panels, squeeze=False)[:, 0]


def finish(axes: Any, title: str, values: np.ndarray, label: str) -> None:
    """Labels, and a vertical range that a few wild values cannot squash the rest of the curve with."""
    axes.set(xlabel="step", ylabel=label, title=title)
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
