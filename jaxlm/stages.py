"""`stages:` of a run file: overrides that follow each other in one run.

    stages:
      - {train.steps: 900, data.sequence_length: 128, data.global_batch_size: 256}
      - {train.steps: 100, data.sequence_length: 512, data.global_batch_size: 64, schedule.warmup_steps: 10}

Each stage is the run file with some keys set anew: `Settings` of its own. The weights, the optimizer's state and the
count of steps go on from one to the next.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pydantic

from jaxlm.checks import check, refuse_first, schedule_problems
from jaxlm.errors import UserError
from jaxlm.settings import FREE_IN_MODEL, LENGTHS, ScheduleSettings, Settings, nest, sections, to_dict

SETTINGS = pydantic.TypeAdapter(Settings)
STAGES = "stages"

# What a stage may change, and why not the rest.
OF_A_BATCH = ("sequence_length", "global_batch_size", "packing", "masking", "prefetch", "damaged")  # of `data`: no new corpus
OF_THE_TOKENIZER = ("tokenizer", "end_token", "lowercase", "tokenizer_sample", "start_token")
IN_MODEL = (*FREE_IN_MODEL, "rope_theta", "local_rope_theta", "rope_scaling", "attention_window")
WHOLE_RUN = ("stages", "run_dir", "out", "init", "init_positions", "seed", "devices", "checkpoint", "logging", "guards",
             "generate", "bench")


def problem_with(key: str, rope: bool) -> str | None:
    """Why a stage cannot set a key; None: it can. `rope`: positions have no parameters."""
    section, _, name = key.partition(".")
    if key.startswith("data.") and name in OF_THE_TOKENIZER:
        return "the weights know their tokenizer; set it for the whole run"
    if section == "model" and name not in IN_MODEL and not (rope and name == "max_length"):
        longest = " (of the longest stage)" if name == "max_length" else ""
        return f"the parameters stay those of the whole run; set it there{longest}, or begin another run with init=RUN_DIR"
    if section == "task":
        return "another task has other heads; begin another run with init=RUN_DIR"
    if section in WHOLE_RUN:
        return "it is of the whole run; set it there"
    if key == "train.hours":
        return "a stage ends after train.steps, train.epochs or train.tokens"
    return None


def stages_of(settings: Settings) -> tuple[Settings, ...]:
    """The settings of each stage, in order; of a run without stages: its own."""
    if not settings.stages:
        return (settings,)
    whole = to_dict(settings) | {STAGES: []}
    whole["train"] |= dict.fromkeys(LENGTHS)
    return tuple(SETTINGS.validate_python(_with(whole, stage)) for stage in settings.stages)


def _with(whole: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """Nested values with those of a stage in their places."""
    def merged(below: dict[str, Any], over: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        known = {name for name, _ in sections()}
        return below | {name: merged(below[name], value, f"{prefix}{name}.") if f"{prefix}{name}" in known else value
                        for name, value in over.items()}
    return merged(whole, nest(stage))


def goes_its_own_way(stage: dict[str, Any]) -> bool:
    """Whether a stage has a schedule of its own, by its own steps; else it goes on with that of the run."""
    return "optimizer.learning_rate" in stage or any(name.startswith("schedule.") for name in stage)


def check_stages(settings: Settings) -> None:
    """What `jaxlm.checks.check` is for a run without stages. Raises UserError, which names the stage."""
    for number, (stage, each) in enumerate(zip(settings.stages, stages_of(settings), strict=True), 1):
        with in_stage(number):
            rope = settings.model.positions == "rope"
            for name in stage:
                if problem := problem_with(name, rope):
                    raise UserError(f"{name}: {problem}")
            if not any(stage.get(f"train.{name}") is not None for name in LENGTHS):
                raise UserError("how long? set train.steps, train.epochs or train.tokens")
            _check_corpus(stage, settings)
            check(each if goes_its_own_way(stage) else dataclasses.replace(each, schedule=ScheduleSettings()))
    steps = [each.train.steps for each in stages_of(settings)]
    if None not in steps:
        check_schedule(settings, sum(steps))


def check_schedule(settings: Settings, total: int) -> None:
    """Refuses a schedule of the run that does not fit in the steps of all stages, where any goes by it."""
    if not all(map(goes_its_own_way, settings.stages)):
        refuse_first(schedule_problems(settings.schedule, total, "the stages"))


def _check_corpus(stage: dict[str, Any], settings: Settings) -> None:
    """A corpus is prepared once: other text, or text read otherwise, needs a folder of its own."""
    anew = [name for name in stage if name.startswith("data.") and name.split(".")[1] not in (*OF_A_BATCH, "corpus")]
    if anew and (stage.get("data.corpus") is None or stage["data.corpus"] == settings.data.corpus):
        raise UserError(f"{anew[0]}: other text makes another corpus; name a folder for it, data.corpus=FOLDER")


@contextmanager
def in_stage(number: int | None) -> Iterator[None]:
    """Names the stage in what is refused inside; None: a run without."""
    try:
        yield
    except UserError as error:
        raise (UserError(f"{STAGES}.{number}: {error}") if number else error) from None
