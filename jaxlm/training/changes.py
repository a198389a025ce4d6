"""What a resume changes: found, told in one line each, kept in metrics.jsonl; refused where it would make another run
of it, or undo a decay."""

import dataclasses
from typing import Any

import numpy as np

from jaxlm.console.units import format_scientific
from jaxlm.errors import UserError, clipped, nearest
from jaxlm.reporting.runs import Changed, yaml_scalar
from jaxlm.settings import FREE_IN_MODEL, ModelSettings, OptimizerSettings, ScheduleSettings, Settings, TrainSettings, flatten
from jaxlm.storage.files import Location
from jaxlm.training.optimizers import make_schedule

SCHEDULE = "schedule"  # the word in checkpoint.allow
DECAYED = 0.9  # of its peak: whoever is below has come down
RISE = 1.25  # times: what is less is no surprise
LOOKS = 1000  # at a schedule, at most


# What may not change while a run goes on, and why. All else may: learning rate, dropout, mesh, precision, kernels, ...
MODEL_KEYS = {f"model.{field.name}": "the parameters were trained in that architecture"
              for field in dataclasses.fields(ModelSettings) if field.name not in FREE_IN_MODEL}
MODEL_KEYS |= dict.fromkeys(("task.name", "task.problem", "task.labels"), "the head was trained for that")
START_KEY = {"data.start_token": "the model knows documents that begin so"}
FIXED_KEYS = MODEL_KEYS | START_KEY | {
    "optimizer.name": "the optimizer's state is of that update rule",
    "optimizer.b1": "the optimizer's state holds a mean that decays by it",
} | dict.fromkeys(("seed", "data.global_batch_size", "data.sequence_length", "data.packing", "data.masking.probability",
                   "data.masking.whole_word", "data.masking.max_predictions"), "the examples of every step depend on it")


def find_changes(saved: dict[str, Any], own: dict[str, Any]) -> Changed:
    """{key: [before, after]} of what a checkpoint says of the run that made it, and of this one: every key of the
    settings, the sizes of the mesh, the versions of the packages, the corpus. A key that is younger than the checkpoint
    had no value then; where the run lies is no part of it."""
    before, after = flatten(as_now(saved["settings"])), flatten(own["settings"])
    changed = {key: [before[key], value] for key, value in after.items()
               if key in before and before[key] != value and key != "run_dir"}
    for axis, size in own["mesh"].items():
        if saved["mesh"].get(axis, 1) != size and f"mesh.{axis}" not in changed:
            changed[f"mesh.{axis}"] = [saved["mesh"].get(axis, 1), size]  # it follows the devices
    for name, version in own["versions"].items():
        if saved["versions"].get(name, version) != version:
            changed[f"version of {name}"] = [saved["versions"][name], version]
    if saved["corpora"] != own["corpora"]:
        changed["text or weights of data.corpus"] = [saved["corpora"], own["corpora"]]
    return changed


def describe_change(key: str, values: list[Any]) -> str:
    """optimizer.learning_rate 0.001 -> 0.0005"""
    before, after = (clipped(yaml_scalar(value)) for value in values)
    return f"{key} {before} -> {after}"


def refuse_rise(saved: dict[str, Any], settings: Settings, step: int, where: Location, begun: int = 0) -> None:
    """Refuses settings by which a learning rate that has come down until `step` would go up again, as when
    train.steps is raised after a finished cosine, unless checkpoint.allow has SCHEDULE.

    Arguments:
      saved: the settings of the checkpoint.
      step: its own, by the schedule, which may have `begun` after so many steps of the run.

    Raises UserError.
    """
    before = saved_section(ScheduleSettings, saved.get("schedule", {}))
    peak = saved_section(OptimizerSettings, saved.get("optimizer", {})).learning_rate
    steps = saved_section(TrainSettings, saved.get("train", {})).steps
    if steps is None or settings.train.steps is None:
        return  # by the clock: `jaxlm.training.length.Hours` sees to it
    own = (settings.schedule, settings.optimizer.learning_rate, settings.train.steps)
    if (before, peak, steps) == own or step >= settings.train.steps or SCHEDULE in settings.checkpoint.allow:
        return
    past = _rates((before, peak, steps), 0, step)
    highest = _rates(own, step, settings.train.steps).max()
    if past[-1] < DECAYED * past.max() and highest > RISE * past[-1]:
        raise UserError(
            f"schedule: the learning rate had come down to {format_scientific(past[-1])} at step {begun + step} ({where}), and "
            f"would rise again, to {format_scientific(highest)}, with these train.steps, schedule and optimizer.learning_rate; "
            f"set them back, choose another run_dir, or insist with 'checkpoint.allow=[{SCHEDULE}]'")


def check_allowed(keys: list[str]) -> None:
    """Refuses names in checkpoint.allow that allow nothing. Raises UserError."""
    known = [*FIXED_KEYS, "data.corpus", SCHEDULE]
    for key in keys:
        if key not in known:
            raise UserError(f"checkpoint.allow: {key} is no key that a run may not change{nearest(key, known)}")


def refuse_changes(keys: dict[str, str], saved: dict[str, Any], wanted: dict[str, Any], where: Location) -> None:
    """Refuses settings (nested plain values) that differ from those saved in one of `keys` (name: reason), but for
    those in checkpoint.allow. Raises UserError."""
    before, now = flatten(as_now(saved)), flatten(as_now(wanted))
    if before.get("model.causal") and before.get("data.packing") == "documents":
        before.setdefault("data.start_token", False)  # what older runs did, without the key
    for key, reason in keys.items():
        # a key that is not there is younger than the checkpoint
        if key in before and before[key] != now[key] and key not in now["checkpoint.allow"]:
            ways = "set it back or choose another run_dir" if key in MODEL_KEYS else (
                f"set it back, choose another run_dir, or insist with 'checkpoint.allow=[{key}]'")
            raise UserError(f"{key}={now[key]}: the checkpoints in {where} were made with {before[key]}, and {reason}; {ways}")


def as_now(saved: dict[str, Any]) -> dict[str, Any]:
    """Settings that a checkpoint has, with the model's nulls filled in as they are today."""
    return saved | {"model": dataclasses.asdict(saved_section(ModelSettings, saved["model"]))} if "model" in saved else saved


def saved_section(section: type, values: dict[str, Any]) -> Any:
    """A section as an older or newer version has saved it: what is missing has its default."""
    known = {field.name for field in dataclasses.fields(section)}
    return section(**{name: value for name, value in values.items() if name in known})


def _rates(schedule: tuple[ScheduleSettings, float, int], start: int, stop: int) -> np.ndarray:
    """Learning rates of the steps start .. stop, of many of them only some: the first, the last, and those evenly
    between."""
    counts = np.unique(np.linspace(start, stop - 1, min(stop - start, LOOKS)).round().astype(np.int32))
    return np.broadcast_to(np.asarray(make_schedule(*schedule)(counts), np.float64), counts.shape)
