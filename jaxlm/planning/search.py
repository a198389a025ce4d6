"""`jaxlm plan --search`: the mesh, micro-batches, rematerialization and attention that are predicted fastest and fit.

Arithmetic (`estimate.py`) looks at every choice, the compiler (`compiled.py`) at the best of them, one for each
rematerialization, and at what the config says where the target can hold that.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from jaxlm import config
from jaxlm.checks import require_vocabulary
from jaxlm.console.units import counted, format_seconds, format_size
from jaxlm.errors import RunError, UserError
from jaxlm.models.sizes import (
    attention_kernel,
    fits_fused_kernels,
    head_dim,
    is_recurrent,
    query_heads,
    recurrent_width,
)
from jaxlm.planning.describe import new_table
from jaxlm.planning.estimated_plan import estimated_plan
from jaxlm.planning.plan import Plan, what_helps
from jaxlm.planning.run_file import with_keys
from jaxlm.planning.targets import Target
from jaxlm.runtime.chips import products_peak
from jaxlm.settings import AXES, MeshSettings, Settings, flatten, to_dict
from jaxlm.storage.files import as_path, exists, read_text, write_text

REMATS: tuple[Any, ...] = ("none", "dots", {"query_key_value": "keep", "attention": "keep"}, {"mlp_hidden": "keep"}, "full")
SHORTEST = 4096  # tokens: shorter pieces of a sequence are not worth a context axis
FINALISTS = 3  # beside the config as it is
MARGIN = 0.95  # of a device's memory, for what the estimate does not see
FOUND, PREDICTED = "# Found by `jaxlm plan --search", "# Predicted: "  # how a config that was found begins
MAX_SECONDS = 600  # of compiling, after which no other one is begun


class Choice(NamedTuple):
    """One way to run, and what is known of it."""

    plan: Plan  # the compiler's, or else the estimate
    note: str  # why it stands where it stands


def search(settings: Settings, target: Target, report: Callable[[str], None]) -> list[Choice]:
    """The compiled choices that fit, fastest first, then those that do not.

    `report` is told what is being done. Raises UserError: model.vocab_size or the target's speed is not known, no
    mesh divides the run, or nothing fits.
    """
    require_vocabulary(settings)
    if target.chip.bandwidth is None or products_peak(target.device_kind, settings.train.precision) is None:
        raise UserError(f"target '{target.name}': its speed is not published, so nothing can be ranked; use a TPU or a GPU")
    estimates = list(estimated(settings, target))
    fitting = [plan for plan in estimates if plan.memory.total <= MARGIN * plan.capacity]
    fitting.sort(key=lambda plan: plan.roofline.total)
    report(f"{len(estimates):,} ways to lay out this run, {len(fitting):,} fit by the estimate")
    if not estimates:
        raise UserError(f"target '{target.name}': no mesh of {target.num_devices} devices divides it; make "
                        f"data.global_batch_size a multiple of {target.num_devices}, or take another target")
    if not fitting:
        least = min(estimates, key=lambda plan: plan.memory.total)
        raise UserError(f"target '{target.name}': nothing fits, the least needs {format_size(least.memory.total)} of "
                        f"{format_size(least.capacity)} on each device; use more devices, or a smaller model")
    best: dict[str, Plan] = {}  # of each way to save memory: what a mesh sends the estimate knows well, what is kept less so
    for plan in fitting:
        best.setdefault(str(plan.settings.train.remat), plan)
    own = _as_it_is(settings, target, report)
    seen = [describe_choice(one) for one in own]
    finalists = [plan.settings for plan in list(best.values())[:FINALISTS]]
    return _compiled([*own, *(one for one in finalists if describe_choice(one) not in seen)], target, report)


def _as_it_is(settings: Settings, target: Target, report: Callable[[str], None]) -> list[Settings]:
    """The config's own layout, its mesh said in full; none where the target cannot hold it."""
    try:
        return [estimated_plan(settings, target).settings]
    except UserError as error:
        report(f"the config's own layout is left out: {error}")
        return []


def _compiled(choices: list[Settings], target: Target, report: Callable[[str], None]) -> list[Choice]:
    from jaxlm.planning.compiled_plan import compiled_plan
    from jaxlm.planning.devices import devices_of

    devices_of(target)  # without its compiler nothing is begun
    found, refused, started = [], [], time.monotonic()
    for number, settings in enumerate(choices, start=1):
        if found and time.monotonic() - started > MAX_SECONDS:
            report(f"{MAX_SECONDS // 60} minutes of compiling: {counted(len(choices) - number + 1, 'layout')} left out")
            break
        report(f"compiling {number} of {len(choices)}: {describe_choice(settings)}")
        try:
            plan = compiled_plan(settings, target)
        except (UserError, RunError) as error:
            report(f"  {error}")
            refused.append(Choice(estimated_plan(settings, target), str(error)))
            continue
        (found if plan.fits else refused).append(Choice(plan, "" if plan.fits else "does not fit, says the compiler"))
    if not found:
        raise UserError(f"target '{target.name}': nothing fits, says the compiler of the {counted(len(refused), 'layout')} that "
                        f"looked best; what helps: {what_helps(settings, target.platform)}")
    found.sort(key=lambda choice: choice.plan.roofline.total)
    return [choice._replace(note=_reason(choice.plan, found[0].plan)) for choice in found] + refused


# ---- what there is to choose -----------------------------------------------------------------------------------------

def estimated(settings: Settings, target: Target) -> Iterator[Plan]:
    """The estimate of every layout that the run divides over, with every way to save memory."""
    for mesh in meshes(settings, target):
        for attention, accumulation in itertools.product(attentions(settings, mesh, target), micro_batches(settings, mesh)):
            model = replace(settings.model, attention=attention)
            for remat in REMATS:
                train = replace(settings.train, gradient_accumulation=accumulation, remat=remat)
                try:
                    yield estimated_plan(replace(settings, model=model, mesh=mesh, train=train), target)
                except UserError:  # does not divide
                    break


def meshes(settings: Settings, target: Target) -> Iterator[MeshSettings]:
    """Every mesh worth a thought: tensor inside an island, sequences not cut too short, experts only where there are
    some."""
    model, total = settings.model, target.num_devices
    for tensor in _divisors(min(total, target.island_size), query_heads(model) or recurrent_width(model)):
        longest = 1 if is_recurrent(model) else settings.data.sequence_length // SHORTEST
        for context in _divisors(total // tensor, longest or 1):
            for expert in _divisors(total // tensor // context, model.num_experts or 1):
                for stage in _divisors(total // tensor // context // expert, 1 if is_recurrent(model) else model.num_layers // 2):
                    left = total // tensor // context // expert // stage
                    for fsdp in _divisors(left, model.hidden_size):
                        sizes = dict(data=left // fsdp, stage=stage, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
                        yield MeshSettings(**sizes)


def _divisors(number: int, other: int) -> list[int]:
    """Common divisors."""
    return [size for size in range(1, min(number, other) + 1) if number % size == 0 and other % size == 0]


def attentions(settings: Settings, mesh: MeshSettings, target: Target) -> set[str]:
    """What the config says, the choice that is left to the backend, and where sequences are cut its fused kernel:
    around that, heads are exchanged for whole sequences, instead of a ring."""
    model = settings.model
    kinds = {model.attention, "auto"}
    if mesh.context > 1:
        kinds.add(attention_kernel(target.platform, settings.train.precision, settings.data.sequence_length, head_dim(model),
                                   fused=fits_fused_kernels(model)))
    return kinds - {"xla"}


def micro_batches(settings: Settings, mesh: MeshSettings) -> list[int]:
    """Into how many the batch can be cut: powers of 2, in a pipeline times its stages."""
    rows = settings.data.global_batch_size // (mesh.data * mesh.fsdp * mesh.expert)
    counts = [mesh.stage * 2**power for power in range(rows.bit_length())]
    return [count for count in counts if count <= rows and rows % count == 0]


# ---- what is told ----------------------------------------------------------------------------------------------------

def describe_choice(settings: Settings) -> str:
    """`fsdp 64, 2 micro-batches, remat dots`."""
    axes = [f"{axis} {size}" for axis in AXES if (size := getattr(settings.mesh, axis)) not in (None, 1)]
    remat, pieces = settings.train.remat, settings.train.gradient_accumulation
    kernel = [] if settings.model.attention == "auto" else [f"attention {settings.model.attention}"]
    shown = remat if isinstance(remat, str) else "{" + ", ".join(f"{name}: {choice}" for name, choice in remat.items()) + "}"
    return ", ".join([*axes, *([f"{pieces} micro-batches"] if pieces > 1 else []), *kernel, f"remat {shown}"])


def _reason(plan: Plan, best: Plan) -> str:
    """Where a plan loses its time against the best."""
    step, least = plan.roofline, best.roofline
    if plan is best:
        return f"fastest; bound by {step.bound}"
    lost = {"arithmetic": step.compute - least.compute, "memory traffic": step.memory - least.memory,
            "exchanges that nothing hides": step.exposed - least.exposed}
    worst = max(lost, key=lost.get)
    return f"{step.total / least.total - 1:+.1%}: {format_seconds(max(0.0, lost[worst]))} more of {worst}"


def ranking(choices: list[Choice]) -> Table:
    """The choices, the first the best."""
    table = new_table("", "layout", "memory", "step at best", "MFU", "why")
    for place, (plan, note) in enumerate(choices, start=1):
        table.add_row(str(place) if plan.fits else "-", describe_choice(plan.settings), format_size(plan.memory.total),
                      format_seconds(plan.roofline.total), f"{plan.mfu:.1%}", note)
    return table


def write_config(plan: Plan, path: Path, source: str | Path) -> None:
    """A run file of the plan's settings: the text of the run file (or run directory) `source`, with the keys that
    the search, or the command line, has set otherwise."""
    given = as_path(source)
    given = given / "config.yaml" if exists(given / "config.yaml") else given
    wanted, before = (flatten(to_dict(settings)) for settings in (plan.settings, config.load(source)))
    if plan.assumed:
        wanted["model.vocab_size"] = before["model.vocab_size"]
    values = {name: value for name, value in wanted.items() if value != before[name]}
    step = plan.roofline.total
    header = (f"{FOUND} --target {plan.target.name}`: {describe_choice(plan.settings)}.\n"
              f"{PREDICTED}{format_size(plan.memory.total)} of {format_size(plan.capacity)} on each device, "
              f"{format_seconds(step)} a step at best (MFU {plan.mfu:.0%}).\n")
    lines = read_text(given).splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith((FOUND, PREDICTED)))
    write_text(path, header + with_keys(text, values))
