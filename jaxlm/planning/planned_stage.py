"""Which stage of a staged run is planned: the one that needs the most memory, for that one has to fit."""

from jaxlm.console.units import format_seconds, format_size
from jaxlm.planning.estimated_plan import estimated_plan
from jaxlm.planning.plan import Plan
from jaxlm.planning.targets import Target
from jaxlm.planning.vocabulary import with_vocabulary
from jaxlm.settings import Settings
from jaxlm.stages import in_stage, stages_of


def to_plan(settings: Settings, target: Target) -> tuple[Settings, str | None]:
    """The settings to plan a run with, and a line that says what was assumed; None: they say all.

    Raises:
      UserError: a stage does not fit on the target's mesh.
    """
    settings, assumed = with_vocabulary(settings)
    if not settings.stages:
        return settings, assumed
    stages, plans = stages_of(settings), []
    for number, stage in enumerate(stages, 1):
        with in_stage(number):
            plans.append(estimated_plan(stage, target))
    number = max(range(len(plans)), key=lambda index: plans[index].memory.total)
    line = (f"planned is stage {number + 1} of {len(plans)}, which needs the most memory; as estimated: "
            + ", ".join(f"stage {index} {_in_short(plan)}" for index, plan in enumerate(plans, 1)))
    return stages[number], "; ".join(filter(None, (assumed, line)))


def _in_short(plan: Plan) -> str:
    """5.50 GiB, 152 ms a step."""
    return format_size(plan.memory.total) + (f" and {format_seconds(plan.roofline.total)} a step" if plan.roofline else "")
