"""How long a run is: what train.epochs and train.tokens come to in steps, and when train.hours are over.

Steps are worked out once, of the corpus, before the first of them: the same on every mesh and at every resume. Hours
are looked at now and then (`Hours`); between two looks nothing goes by the clock.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import broadcast_one_to_all

from jaxlm.checks import refuse_first, schedule_problems
from jaxlm.console.units import counted, format_duration
from jaxlm.data.batches import Batches
from jaxlm.errors import UserError
from jaxlm.settings import DEFAULT_STEPS, Settings
from jaxlm.storage.files import Location
from jaxlm.training.optimizers import make_schedule

SHARES = 2**16  # places in a schedule that goes by time, after its warmup
FIRST_LOOK = 4  # steps after the start of a run
LAST_LOOK = 8  # steps before its end: from there on it is counted, not timed
BY_TIME = ("linear", "cosine", "warmup_stable_decay")  # schedules that come down towards the end
HOUR = 3600.0  # seconds


def with_steps(settings: Settings, batches: Batches) -> Settings:
    """The settings with train.steps, of a run whose training batches are these; with train.hours as they are.

    train.tokens counts what rows hold on the average, padding not (`Batches.padding_share`).

    Raises:
      UserError: the schedule does not fit in so few steps.
    """
    train = settings.train
    if train.steps is not None or train.hours is not None:
        return settings
    rows = batches.global_batch_size
    if train.epochs is not None:
        steps = Fraction(train.epochs) * batches.sequences_per_epoch / rows
    else:
        steps = train.tokens / (rows * settings.data.sequence_length * (1 - Fraction(batches.padding_share)))
    steps = max(1, math.ceil(steps))
    refuse_first(schedule_problems(settings.schedule, steps, train.length))
    return replace(settings, train=replace(train, steps=steps))


def with_any_steps(settings: Settings) -> Settings:
    """For what trains nothing, and needs no length: a run file's epochs and tokens are worked out of a corpus only."""
    if settings.train.steps is not None:
        return settings
    return replace(settings, train=replace(settings.train, steps=DEFAULT_STEPS, hours=None))


def is_said(settings: Settings) -> bool:
    """Whether the run file says the number of steps itself."""
    return settings.train.length.startswith("train.steps=")


def length_lines(settings: Settings) -> list[str]:
    """What to say of a run whose steps are not said by the run file."""
    train = settings.train
    if train.hours is not None:
        return [f"{train.length}: how many steps that is turns out on the way; the last evaluation and save come on top"]
    return [] if is_said(settings) else [f"{train.length}: {counted(train.steps, 'step')}"]


def last_step(settings: Settings, saved: dict[str, Any]) -> int | None:
    """The last step of a run whose newest checkpoint says `saved`; None: it is not known yet."""
    if settings.train.hours is None:
        return settings.train.steps
    known = saved.get("hours")
    return known["last"] if known and known["limit"] == settings.train.hours else None


def refuse_length(settings: Settings, step: int, saved: dict[str, Any], where: Location) -> None:
    """Refuses a length that the checkpoints in `where` are beyond, and more hours for a schedule that has come to its
    end. `saved`: what the newest, of `step`, says. Raises UserError."""
    train = settings.train
    if train.steps is not None and step > train.steps:
        said = train.length + ("" if is_said(settings) else f", which is {counted(train.steps, 'step')}")
        raise UserError(f"{said}: the checkpoints in {where} have {step} steps already; expected at least as many, or choose "
                        "another run_dir")
    known = saved.get("hours")
    if has_ended(known, step, settings) and settings.schedule.name in BY_TIME and "schedule" not in settings.checkpoint.allow:
        raise UserError(f"{train.length}: the learning rate of the run in {where} had come down to its end at step {step}, and "
                        "would rise again; set train.hours back, choose another run_dir, or insist with "
                        "'checkpoint.allow=[schedule]'")


def has_ended(known: dict[str, Any] | None, step: int, settings: Settings) -> bool:
    """Whether other hours than these were over at `step`; `known`: of its checkpoint."""
    return bool(known) and step == known["last"] and settings.train.hours not in (None, known["limit"])


def schedule_of(settings: Settings) -> optax.Schedule:
    """The learning rate of a run's update by its number, from 0; of a run with train.hours by its place
    (`Hours.place`)."""
    schedule, steps = settings.schedule, settings.train.steps
    if settings.train.hours is not None:
        steps = schedule.warmup_steps + SHARES
        last_fifth = schedule.name == "warmup_stable_decay"
        schedule = replace(schedule, decay_steps=SHARES // 5 if last_fifth else schedule.decay_steps)
    return make_schedule(schedule, settings.optimizer.learning_rate, steps)


class Hours:
    """When the hours of a run are over, and where in its schedule a step is until then.

    After some steps the run is looked at: how many steps are left at the pace of this start, or of the time since the
    last look where that was slower, evaluations and saves included; and so which step is the last. The schedule moves
    on evenly from its place there to its end at that step. A look is saved with its step, as a checkpoint: what comes
    after it, up to the next look, is the same however often it is done again. Looks are rarer the more steps the run
    has had, and closer together towards the end.

    All processes call the same methods at the same steps; the first one's clock counts.
    """

    def __init__(self, settings: Settings, first: int, saved: dict[str, Any], spent: Callable[[], float]):
        """Of a start that goes on from step `first`, whose checkpoint says `saved`; `spent`: seconds of all starts so
        far."""
        self.limit, self.warmup, self.spent = settings.train.hours, settings.schedule.warmup_steps, spent
        self.by_time = settings.schedule.name in BY_TIME
        self.look_at, self.start = first, 0.0  # of the last look: its step, and its place in the schedule
        self.last: int | None = None  # step, as far as it is known
        self.next_look: int | None = first + FIRST_LOOK
        self.began = self.looked = first, 0.0  # of this start, and of its last look: step and seconds
        known = saved.get("hours")
        if known:
            self.look_at, self.start, self.last = known["looked_at"], known["place"], known["last"]
            self.next_look = known["next_look"] if known["limit"] == self.limit else first + 1
            if has_ended(known, first, settings):
                share = min(1.0, spent() / (self.limit * HOUR))
                self.look_at, self.start, self.last = first, self.warmup + share * SHARES, None
        elif saved:  # it went by steps until now
            before = saved["settings"]["train"]["steps"]
            share = (first - self.warmup) / max(1, before - self.warmup)
            self.start = float(first if first <= self.warmup else self.warmup + SHARES * min(1.0, share))

    def begin(self) -> None:
        """The first step is next: the pace counts from now on."""
        self.began = self.looked = self.began[0], self.spent()

    def place(self, count: int) -> float:
        """Where in the schedule update number `count` is, from 0."""
        if count <= self.warmup or not self.by_time:
            return float(count)
        start, place = (self.look_at, self.start) if self.look_at >= self.warmup else (self.warmup, float(self.warmup))
        if self.last is None or self.last <= start:
            return place
        return place + (self.warmup + SHARES - place) * min(1.0, (count - start) / (self.last - start))

    def looks_at(self, step: int) -> bool:
        return step == self.next_look

    def look(self, step: int) -> str:
        """Estimates the last step, now that `step` is done. Returns the line that says it."""
        spent = self.spent()
        pace = max((spent - seconds) / max(1, step - at) for at, seconds in (self.began, self.looked))
        self.looked = step, spent
        left = max(0, int((self.limit * HOUR - spent) / max(pace, 1e-9)))
        if jax.process_count() > 1:
            left = int(broadcast_one_to_all(np.int32(min(left, 2**31 - 1 - step))))
        place = self.place(step)
        self.look_at, self.start, self.last = step, place, step + left
        self.next_look = step + max(FIRST_LOOK, min(step, left // 2)) if left > LAST_LOOK else None
        about = f"about {self.last:,}" if self.next_look else f"{self.last:,}"
        return f"train.hours={self.limit:g}: {format_duration(spent)} over after {counted(step, 'step')}; {about} in all"

    def saved(self) -> dict[str, Any]:
        """What a checkpoint says of the last look."""
        return {"limit": self.limit, "looked_at": self.look_at, "place": self.start, "last": self.last,
                "next_look": self.next_look}
