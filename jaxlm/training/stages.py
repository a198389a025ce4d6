"""The stages of a run, laid out: each with its settings, mesh, corpora and batches, and its place among the steps.

A run without `stages` is one stage. What a stage does is a pure function of its checkpoint: a run that has ended one
begins the next from what it saved there, as a run does that was stopped between the two.
"""

import functools
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxlm.checkpoints.manifest import CHECKPOINTS, Damaged, newest_step, read_manifest
from jaxlm.data.batches import Batches
from jaxlm.data.corpus import TOKENIZER, Corpus
from jaxlm.data.manifest import MANIFEST
from jaxlm.data.randomness import STAGE, make_keys
from jaxlm.errors import UserError
from jaxlm.settings import ScheduleSettings, Settings, to_dict
from jaxlm.stages import STAGES, check_schedule, goes_its_own_way, in_stage, stages_of
from jaxlm.storage.files import Location, as_path, exists
from jaxlm.training.corpora import Corpora, Opened, open_corpora, usable
from jaxlm.training.length import schedule_of
from jaxlm.training.setup import lay


class Stage(NamedTuple):
    """Steps `start` + 1 to `stop` of a run."""

    number: int  # from 1
    count: int  # 0: a run without stages
    settings: Settings  # everything derived filled in; train.steps are its own
    mesh: Mesh
    corpora: Corpora
    batches: Batches  # batch 0 is that of step `start` + 1
    validation: Batches | None
    start: int = 0  # steps of the stages before it
    epochs: float = 0.0  # of the stages before it
    schedule_start: int = 0  # the step before the first of its schedule: the run's, or the stage's own
    schedule_steps: int | None = None  # None: by the clock

    @property
    def stop(self) -> int | None:
        """None: when the hours are over."""
        steps = self.settings.train.steps
        return None if steps is None else self.start + steps

    @property
    def is_last(self) -> bool:
        return self.number == max(1, self.count)

    def schedule(self) -> optax.Schedule:
        """The learning rate by the number of the run's update, from 0."""
        if not self.count:
            return schedule_of(self.settings)
        schedule = schedule_of(replace(self.settings, train=replace(self.settings.train, steps=self.schedule_steps)))
        return (lambda count: schedule(count - self.schedule_start)) if self.schedule_start else schedule

    def column(self) -> dict[str, int]:
        """The stage, in rows of metrics.jsonl; of a run without, nothing."""
        return {"stage": self.number} if self.count else {}

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of its stage."""
        return {"stage": {"number": self.number, "start": self.start, "schedule_start": self.schedule_start,
                          "schedule_steps": self.schedule_steps}} if self.count else {}


def lay_stages(settings: Settings, devices: list[jax.Device]) -> list[tuple[Settings, Mesh]]:
    """The settings and the mesh of each stage. Raises UserError for what does not fit."""
    laid = []
    for number, each in enumerate(stages_of(settings), 1):
        with in_stage(number if settings.stages else None):
            laid.append(lay(each, devices))
    return laid


def open_stages(settings: Settings, laid: Sequence[tuple[Settings, Mesh]]) -> list[Stage]:
    """The stages with their corpora, which are prepared where they are not there yet. Raises UserError."""
    stages: list[Stage] = []
    opened: dict[str, Corpora] = {}
    for number, (own, mesh) in enumerate(laid, 1):
        with in_stage(number if settings.stages else None), jax.set_mesh(mesh):
            alone = not settings.stages or goes_its_own_way(settings.stages[number - 1])
            checked = own if alone else replace(own, schedule=ScheduleSettings())  # the run's is longer than the stage
            own_order = replace(checked, seed=data_seed(own.seed, number))
            found = _opened(own_order, opened, stages[0].corpora[0][0] if stages else None)
            resolved = replace(found.settings, seed=own.seed, schedule=own.schedule)
        before = stages[-1] if stages else None
        stage = Stage(number, len(settings.stages), resolved, mesh, found.corpora, found.training, found.validation,
                      before.stop if before else 0,
                      before.epochs + before.settings.train.steps * _epochs(before.batches) if before else 0.0)
        stages.append(stage._replace(schedule_start=stage.start, schedule_steps=resolved.train.steps) if alone else stage)
    if settings.stages:
        check_schedule(settings, stages[-1].stop)
    return [stage if stage.schedule_steps else stage._replace(schedule_steps=stages[-1].stop) for stage in stages]


def data_seed(seed: int, number: int) -> int:
    """The seed of a stage's data order: the first has the run's own, so that a run may be given stages later on."""
    return seed if number == 1 else int(make_keys(seed, STAGE, number)[0])


def prepare_stages(settings: Settings) -> list[Corpora]:
    """The corpora of all stages, each once. Raises UserError."""
    opened: dict[str, Corpora] = {}
    first = None
    for number, own in enumerate(stages_of(settings), 1):
        with in_stage(number):
            found = _opened(replace(own, schedule=ScheduleSettings()), opened, first)
            first = first or found.corpora[0][0]
    return list(opened.values())


def _opened(own: Settings, opened: dict[str, Corpora], first: Corpus | None) -> Opened:
    """What a stage reads: the same corpora as an earlier stage where it names the same. `first`: of the first stage."""
    place = json.dumps([own.data.corpus, own.data.raw])
    if place in opened:
        return usable(own, opened[place])
    if first and isinstance(own.data.corpus, str) and not exists(as_path(own.data.corpus) / MANIFEST):
        own = replace(own, data=replace(own.data, tokenizer=str(first.directory / TOKENIZER)))  # the weights know it
    found = open_corpora(own, functools.partial(usable, own))
    opened[place] = found.corpora
    if first and found.corpora[0][0].tokenizer.digest != first.tokenizer.digest:
        raise UserError(f"data.corpus: {found.corpora[0][0].directory} was prepared with another tokenizer than "
                        f"{first.directory}; prepare it with data.tokenizer={first.directory / TOKENIZER}")
    return found


def _epochs(batches: Batches) -> float:
    """That a step takes."""
    return batches.global_batch_size / batches.sequences_per_epoch


def of_checkpoint(settings: Settings) -> Settings:
    """The settings of the stage that made the checkpoint which `evaluate` and `generate` choose."""
    if not settings.stages:
        return settings
    stages, number = stages_of(settings), len(settings.stages)
    step = settings.checkpoint.step or newest_step(settings.run_dir)
    with suppress(Damaged):  # who reads the checkpoint says so
        about = read_manifest(as_path(settings.run_dir) / CHECKPOINTS / str(step))["metadata"]
        number = about.get("stage", {"number": 1})["number"]
    return stages[min(number, len(stages)) - 1]


def stage_after(stages: Sequence[Stage], step: int) -> Stage:
    """The one that goes on from `step`; the last where no step is left."""
    return next((stage for stage in stages if stage.stop is None or step < stage.stop), stages[-1])


def stage_that_saved(stages: Sequence[Stage], step: int, saved: dict[str, Any], where: Location) -> Stage:
    """The stage of a checkpoint, as it is said today. Raises UserError: its steps have another place in the run now."""
    known = saved.get("stage", {"number": 1, "start": 0})
    stage = stages[known["number"] - 1] if known["number"] <= len(stages) else None
    if stage is None or stage.start != known["start"]:
        today = f"begins after step {stage.start} now" if stage else "is not there any more"
        raise UserError(f"{STAGES}: step {step} ({where}) is of stage {known['number']}, which began after step {known['start']} "
                        f"and {today}; set the stages before it back, or choose another run_dir")
    if stages[-1].count and stage.stop is not None and step > stage.stop:
        raise UserError(f"{STAGES}.{stage.number}: ends after step {stage.stop} now, and the checkpoints in {where} have {step} "
                        "steps already; expected at least as many, or choose another run_dir")
    return stage


def by_its_schedule(stage: Stage, saved: dict[str, Any], step: int) -> tuple[dict[str, Any], Settings, int]:
    """What `refuse_rise` compares: the checkpoint's settings, the stage's, and the step, all by the schedule's own
    steps. A stage that has just begun has none behind it."""
    if not stage.count:
        return saved["settings"], stage.settings, step
    known = saved.get("stage", {"number": 1, "schedule_start": 0, "schedule_steps": saved["settings"]["train"]["steps"]})
    own = replace(stage.settings, train=replace(stage.settings.train, steps=stage.schedule_steps))
    if known["number"] != stage.number:
        return to_dict(own), own, 0
    train = saved["settings"]["train"] | {"steps": known["schedule_steps"]}
    return saved["settings"] | {"train": train}, own, step - stage.schedule_start


def stage_lines(stages: Sequence[Stage], stage: Stage) -> list[str]:
    """What to say when a stage begins, or goes on."""
    said = stage.settings.train.length
    why = "" if said.startswith("train.steps=") else f" ({said})"
    schedule = "a schedule of its own" if stage.schedule_start == stage.start and stage.schedule_steps != stages[-1].stop else (
        "the run's schedule")
    return [f"stage {stage.number} of {stage.count}: steps {stage.start + 1:,} to {stage.stop:,} of {stages[-1].stop:,}{why}, "
            f"{schedule}"]
