"""RUN_DIR/report.md, one page about a run, and a table that compares runs."""

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.console.units import counted, format_count, format_duration, format_milliseconds
from jaxlm.presets import shape_in_words
from jaxlm.reporting.evaluated import evaluation_told
from jaxlm.reporting.goodput import goodput
from jaxlm.reporting.markdown import encodable, fenced, table
from jaxlm.reporting.metrics import is_number
from jaxlm.reporting.runs import Run, read_run, yaml_scalar
from jaxlm.storage.files import Location, exists, read_text, write_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

UNKNOWN = "not known"


def write_report(run_dir: str | Path) -> Location:
    """Writes RUN_DIR/report.md and returns its path. Raises UserError when `run_dir` is no run."""
    run = read_run(run_dir)
    if run.summary:
        wall, diverged = run.figure("wall_seconds"), run.figure("diverged")
        state = f"Finished: {run.figure('steps')} steps" + (f" in {format_duration(wall)}." if wall is not None else ".")
        if diverged:
            state = f"Ended with a loss that is not a number, so what it had learned is lost. {state}"
    else:
        state = f"Not finished (running, or stopped): {way(run)}."
    sections = [f"# {run.name}", state]
    if exists(run.path / "loss.png"):
        sections.append("![Training and validation loss](loss.png)")
    sections += ["## Results", table(results(run)), *evaluation_told(run.path), "## What ran", table(what_ran(run))]
    if run.config.get("stages"):
        sections += ["## Stages", table(stages_told(run))]
    if changes := changes_told(run):
        sections += ["## What changed on the way", table(changes)]
    sections += ["## Speed", table(speed(run))]
    spent = goodput(run.path)
    if spent:
        sections += ["## Where the time went", table(time_spent(spent))]
    sections += ["## Again", again(run)]
    samples = run.path / "samples.txt"
    if exists(samples):
        sections += ["## Samples", fenced(read_text(samples))]
    path = run.path / "report.md"
    write_text(path, encodable("\n\n".join(sections) + "\n"))
    return path


def way(run: Run) -> str:
    """How much of a run is done: 40 of 100 steps; 40 steps, 1.2 of 3 epochs."""
    if stages := run.config.get("stages"):
        return f"{counted(run.steps, 'step')}, in stage {max(run.values('stage'), default=1)} of {len(stages)}"
    for name in ("epochs", "tokens", "hours"):
        if whole := run.config.get(f"train.{name}"):
            spent = goodput(run.path) or {}
            done = {"epochs": run.values("epoch")[-1:], "tokens": run.values("tokens")[-1:],
                    "hours": [(spent["wall_seconds"] - spent["restarts_seconds"]) / 3600] if spent else []}[name]
            return f"{counted(run.steps, 'step')}, {format_count(done[0]) if done else '?'} of {format_count(whole)} {name}"
    return f"{run.steps} of {run.config.get('train.steps', '?')} steps"


def results(run: Run) -> dict[str, str]:
    """Every figure of the last evaluation, the lowest validation loss, and the last training loss."""
    figures = {}
    losses = run.values("loss")
    if run.evaluations:
        last, best = run.evaluations[-1], min(run.evaluations, key=lambda row: row["val_loss"])
        figures["validation loss"] = f"{last['val_loss']:.4f} (step {last['step']})"
        figures["lowest validation loss"] = f"{best['val_loss']:.4f} (step {best['step']})"
        if not any("perplexity" in name for name in last) and any(name.endswith("bits_per_byte") for name in last):
            figures["perplexity"] = f"{math.exp(min(last['val_loss'], 700)):.4g}"  # of a run that an older version trained
        apart = ("step", "stage", "time", "tokens", "epoch", "val_loss", "loss")
        others = {key: value for key, value in last.items() if key not in apart and value is not None}
        figures |= {key.replace("_", " "): number(value) for key, value in others.items()}
        if last.get("val_bits_per_byte", 0) is None:
            figures["val bits per byte"] = f"{UNKNOWN}: the tokenizer lost some of the text"
        if run.best:
            figures["best checkpoint"] = run.best
    elif run.figure("val_loss") is not None:
        figures["validation loss"] = f"{run.figure('val_loss'):.4f}"
    if losses:
        figures["training loss"] = f"{losses[-1]:.4f} (first logged: {losses[0]:.4f})"
    for key, name in (("loss", "training loss"), ("val_loss", "validation loss")):
        unknown = [row["step"] for row in run.rows if key in row and not is_number(row[key])]
        if unknown:
            figures[f"{name} not a number"] = f"in {counted(len(unknown), 'row')}, the last at step {unknown[-1]}"
    skipped = run.figure("skipped_rows")
    if is_number(skipped) and skipped:
        figures["rows skipped for damage"] = f"{skipped:,}"
    return (figures or {"loss": "nothing logged yet"}) | baseline(run)


def baseline(run: Run) -> dict[str, str]:
    """What `jaxlm evaluate --baseline` found on the run's validation text, a row for each yardstick."""
    kept = run.figure("baseline")
    rows = {name: figures for name, figures in kept.items() if isinstance(figures, dict)} if isinstance(kept, dict) else {}
    return {name: ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in figures.items() if value is not None)
            for name, figures in rows.items()}


def what_ran(run: Run) -> dict[str, str]:
    config = run.config
    parameters, tokens = run.figure("parameters"), run.figure("tokens")
    batch = f"{run.setting('data.global_batch_size')} sequences of {run.setting('data.sequence_length')} tokens"
    optimizer = (f"{run.setting('optimizer.name')}, learning rate {run.setting('optimizer.learning_rate')}, "
                 f"{run.setting('schedule.name')} schedule")
    return {
        "model": shape_in_words(config),
        "parameters": UNKNOWN if parameters is None else f"{parameters:,}",
        "tokens": UNKNOWN if tokens is None else f"{format_count(tokens)} ({tokens:,})" + in_slots(tokens, run.figure("slots")),
        "batch": batch,
        "optimizer": optimizer,
        "precision": run.setting("train.precision"),
        "devices": " x ".join(plain(run.figure(key)) for key in ("devices", "device_kind") if run.figure(key)) or UNKNOWN,
        "mesh": plain(run.figure("mesh")),
        "seed": run.setting("seed"),
    }


def in_slots(tokens: float, slots: float | None) -> str:
    """What padding leaves of the places that were computed."""
    return f", {tokens / slots:.1%} of {slots:,.0f} slots; the rest is padding" if slots and tokens < slots else ""


def stages_told(run: Run) -> dict[str, str]:
    """Each stage: what it sets, and how far it has come."""
    told = {}
    for number, stage in enumerate(run.config["stages"], 1):
        rows = [row for row in run.rows if row.get("stage") == number]
        steps = [row["step"] for row in rows if "loss" in row]
        losses = {name: next((row[key] for row in reversed(rows) if is_number(row.get(key))), None)
                  for key, name in (("loss", "training loss"), ("val_loss", "validation loss"))}
        came = [f"to step {max(steps)}"] if steps else ["not begun"]
        came += [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
        told[f"{number}"] = f"{', '.join(f'{key} {yaml_scalar(value)}' for key, value in stage.items())}: {', '.join(came)}"
    return told


def changes_told(run: Run) -> dict[str, str]:
    """Step -> what it went on with, and what had been before."""
    return {f"from step {step}": "; ".join(f"{key} {yaml_scalar(before)} -> {yaml_scalar(after)}"
                                           for key, (before, after) in changed.items())
            for step, changed in run.changes}


def speed(run: Run) -> dict[str, str]:
    """Medians over the logged rows; the wait for data is a part of the step time."""
    tokens_per_second, mfu, compile_seconds = (run.figure(key) for key in ("tokens_per_second", "mfu", "compile_seconds"))
    step_seconds, waits = run.values("step_seconds"), run.values("data_wait_seconds")
    figures = {"tokens per second": UNKNOWN if tokens_per_second is None else
               f"{tokens_per_second:,.0f}" + in_slots(tokens_per_second, run.figure("slots_per_second"))}
    if step_seconds:
        figures["step time"] = format_milliseconds(statistics.median(step_seconds))
    if waits and sum(step_seconds) > 0:
        figures["waiting for data"] = f"{100 * sum(waits) / sum(step_seconds):.1f} % of the step time"
    figures["MFU"] = f"{UNKNOWN}: no published peak for this device" if mfu is None else f"{100 * mfu:.1f} %"
    figures["compiling"] = UNKNOWN if compile_seconds is None else format_duration(compile_seconds)
    return figures


TIME_SPENT = {
    "productive_seconds": "steps that count", "startup_seconds": "starting up", "compile_seconds": "compiling",
    "data_wait_seconds": "waiting for data", "evaluation_seconds": "evaluating", "checkpoint_seconds": "waiting for checkpoints",
    "repeated_seconds": "steps done again", "skipped_seconds": "steps skipped", "restarts_seconds": "between two starts",
    "other_seconds": "other"}


def time_spent(spent: dict[str, Any]) -> dict[str, str]:
    """Wall time by what it went into (`jaxlm.reporting.goodput`)."""
    wall = spent["wall_seconds"]
    figures = {"goodput": f"{spent['goodput']:.1%} of {format_duration(wall)}, in {counted(spent['starts'], 'start')}"}
    for key, name in TIME_SPENT.items():
        share = spent[key] / wall if wall > 0 else 0.0
        if share >= 0.0005:
            figures[name] = f"{format_duration(spent[key])} ({share:.1%})"
    for kind in ("repeated", "skipped"):
        if spent[f"{kind}_steps"]:
            figures[f"{kind} steps"] = f"{spent[f'{kind}_steps']:,}"
    return figures


def again(run: Run) -> str:
    config_file = run.path / "config.yaml"
    return (f"`jaxlm train {config_file} run_dir=NEW_FOLDER` repeats the run, from the folder that it was started in; "
            f"without `run_dir` it goes on where this one stopped. `jaxlm report {run.path} OTHER_RUN` compares.")


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {size}" for key, size in value.items() if is_number(size) and size > 1) or "one device"
    return UNKNOWN if value is None else str(value)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compare(run_dirs: list[str | Path]) -> "Table":
    """A rich table, one column a run: the config keys in which they differ, then results and speed.

    Raises UserError when a folder is no run.
    """
    from rich.markup import escape
    from rich.table import Table

    def cell(text: str) -> str:  # [/b] stands for itself
        return escape(encodable(text))

    runs = [read_run(run_dir) for run_dir in run_dirs]
    grid = Table(show_edge=False)
    grid.add_column("")
    for run in runs:
        grid.add_column(cell(str(run.path) if len({other.name for other in runs}) < len(runs) else run.name), overflow="fold")
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    for key in keys:
        values = [run.setting(key) if key in run.config else "-" for run in runs]
        if key != "run_dir" and any(value != values[0] for value in values):
            grid.add_row(*map(cell, [key, *values]))
    grid.add_section()
    for key, write in COMPARED.items():
        figures = [run.steps if key == "steps" else run.best if key == "best" else run.figure(key) for run in runs]
        if key not in OF_SOME_TASKS or any(figure is not None for figure in figures):
            grid.add_row(key, *("-" if figure is None else write(figure) for figure in figures))
    return grid


def fitted(grid: "Table", width: int) -> "RenderableType":
    """The table where its columns have room side by side, else a paragraph for each of its rows, a line for each
    run."""
    from rich.console import Console

    if Console(width=10**4).measure(grid).maximum <= width:
        return grid
    names, *columns = grid.columns
    runs = [str(column.header) for column in columns]
    indent = 2 + max(map(len, runs)) + 2 if max(map(len, runs)) <= width // 2 else 0
    lines = []
    for name, *values in zip(names.cells, *(column.cells for column in columns), strict=True):
        lines.append(str(name))
        lines += [f"  {run:{indent - 4}}  {value}" if indent else f"  {run}:\n      {value}"
                  for run, value in zip(runs, values, strict=True)]
    return "\n".join(lines)


OF_SOME_TASKS = ("best", "val_bits_per_byte")
COMPARED = {
    "steps": "{:,}".format,
    "val_loss": "{:.4f}".format,
    "best": str,
    "val_bits_per_byte": "{:.4f}".format,
    "tokens_per_second": "{:,.0f}".format,
    "mfu": "{:.1%}".format,
    "wall_seconds": format_duration,
}
