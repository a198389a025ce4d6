"""A plan as text for people, and as a picture."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from jaxlm.console.units import counted, format_count, format_duration, format_seconds, format_size
from jaxlm.errors import UserError
from jaxlm.planning.estimated_plan import BOUNDS, SMALLEST
from jaxlm.planning.plan import Plan, what_helps
from jaxlm.reporting.plots import save
from jaxlm.runtime.chips import FLOAT32_PASSES

GIB = 2**30
PICTURES = (".png", ".svg", ".pdf")
WRAPPED = (  # where a terminal is narrow
    "memory of a device", "shape", "axes", "cut over", "layout", "exchange, forward / backward", "why")
NUMBERS = ("", "share", "bytes", "not hidden", "times", "takes")
LEGEND = (
    "at best: at published speeds; arithmetic, memory and network work at the same",
    "  time, only what is sent while no product runs is added. No forecast.",
    "fsdp, tensor, ...: axes of the mesh. Sent is listed as what was asked for.",
    "MFU: the model's FLOPs, without recomputation, as a share of the peak. PaLM's,",
    "  `jaxlm train`'s and `bench`'s counts masked attention, too.",
)


def describe(plan: Plan) -> RenderableType:
    """Verdict, memory, exchanges, time, and what the words mean."""
    parts = ("\n".join(_head(plan)), _memory(plan), _exchanges(plan), _time(plan), "\n".join(_run(plan)), "\n".join(LEGEND))
    return Group(*(part for one in parts for part in (one, "")))


def _head(plan: Plan) -> Iterator[str]:
    settings, kind = plan.settings, plan.target.device_kind
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    yield (f"{settings.model} of {format_count(plan.parameters)} parameters on {plan.target.name}: "
           f"{counted(plan.target.num_devices, f'{kind} device')}; {axes}")
    yield (f"{counted(settings.data.global_batch_size, 'sequence')} of {settings.data.sequence_length:,} = "
           f"{format_count(plan.tokens_per_step)} tokens a step; {settings.train.precision}")
    if plan.assumed:
        yield plan.assumed
    if plan.refused:
        yield "the compiler refuses: no device can hold this step. Memory is what it says is needed, all else is ESTIMATED"
    elif plan.compile_seconds is None:
        yield f"ESTIMATED, no compiler asked; {_how_far_off(plan)}"
    if plan.capacity is None:
        yield f"needs {format_size(plan.memory.total)} on each device"
        return
    spare = plan.capacity - plan.memory.total
    verdict = f"FITS, {format_size(spare)} to spare" if plan.fits else f"DOES NOT FIT, {format_size(max(0, -spare))} too much"
    yield f"{verdict}: needs {format_size(plan.memory.total)} of {format_size(plan.capacity)} on each device"
    if not plan.fits:
        yield f"what helps: {what_helps(plan.settings, plan.target.platform)}; or let --search find it"


def _how_far_off(plan: Plan) -> str:
    """What is known of the estimate's error: of the shipped configs, from the smallest on, each on hardware of its
    own."""
    if plan.parameters < SMALLEST:
        return f"how far off is not known of models of less than {format_count(SMALLEST)} parameters"
    if plan.settings.model.num_experts and plan.target.platform != "tpu":
        return "how far off is not known of experts on GPUs"
    return "for the shipped configs " + ", ".join(f"{name} within {bound:.0%}" for name, bound in BOUNDS.items())


def _memory(plan: Plan) -> Table:
    table = new_table("memory of a device", "", "share")
    parts = plan.state | {"activations and what is fetched": plan.activations}
    for name, part in parts.items():
        table.add_row(name, format_size(part), f"{part / plan.memory.total:.0%}")
    source = "estimated" if plan.compile_seconds is None and not plan.refused else "by the compiler"
    table.add_row(f"total ({source})", format_size(plan.memory.total), "")
    if plan.memory.host:
        table.add_row("in the host's memory", format_size(plan.memory.host), "")
    largest = [one for one in plan.largest if one.size >= 2**20]
    if largest:
        table.add_row("largest when most is needed:", "", "")
    for buffer in largest:
        table.add_row(f"  {buffer.label}", format_size(buffer.size), "")
    return table


def _exchanges(plan: Plan) -> Table:
    table = new_table("sent by a device in a step", "axis", "bytes", "not hidden", "times")
    if not plan.collectives:
        table.add_row("nothing")
    for one in plan.collectives:
        if one.bytes_per_device >= 1024:
            table.add_row(one.kind, " + ".join(one.axes), format_size(one.bytes_per_device), format_size(one.exposed_bytes),
                          f"{one.count:,}")
    return table


def _time(plan: Plan) -> RenderableType:
    """Of what a step is made, and how long each of it takes at the published speeds."""
    step = plan.roofline
    table = new_table("of a device in a step", "", "takes")
    again = f" ({plan.executed_flops / plan.visible_flops - 1:+.0%} on the model's)"
    if plan.target.platform == "tpu" and plan.settings.train.precision == "float32":
        again = f" (of each float32 product {FLOAT32_PASSES} passes)"
    sent = sum(one.bytes_per_device for one in plan.collectives)
    rows = [
        ("arithmetic" + again, f"{plan.executed_flops / 1e12:,.2f} TFLOP", step and step.compute),
        ("memory traffic", format_size(plan.traffic), step and step.memory),
        ("network inside a slice or node", format_size(sent) if step and step.fast_network else "", step and step.fast_network),
        ("network between them", format_size(sent) if step and step.slow_network else "", step and step.slow_network),
        ("of the networks, not hidden", format_size(sum(one.exposed_bytes for one in plan.collectives)), step and step.exposed),
        ("a step at best", f"bound by {step.bound}" if step else "", step and step.total)]
    for name, amount, seconds in rows:
        if amount:
            table.add_row(name, amount, format_seconds(seconds) if seconds is not None else "not published")
    return table


def _run(plan: Plan) -> Iterator[str]:
    step = plan.roofline
    if step is None:
        yield "time: the speed of these devices is not published"
    else:
        yield f"MFU {plan.mfu:.1%} at most (as PaLM counts it {plan.mfu_palm:.1%}); {_rate(plan)} tokens/s"
        yield _length(plan)
    if plan.compile_seconds is not None:
        yield f"compiled in {plan.compile_seconds:.0f} s"


def _length(plan: Plan) -> str:
    """How long the run takes, in a line."""
    said = plan.settings.train.length
    if plan.run_seconds is None:
        return f"{said}: how many steps that is, and so how long it takes, is known with the corpus"
    hours = f"{plan.run_seconds / 3600 * plan.target.num_devices:,.0f} device-hours"
    if plan.settings.train.hours is not None:
        return f"{said}: {hours}, at best {plan.steps:,} steps"
    why = "" if said.startswith("train.steps=") else f" ({said}, without padding)"
    return f"{plan.steps:,} steps{why} take {format_duration(plan.run_seconds)}, {hours}"


def _rate(plan: Plan) -> str:
    return format_count(plan.tokens_per_step / plan.roofline.total)


def new_table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in NUMBERS else "left", no_wrap=column not in WRAPPED)
    return table


def check_picture(path: Path) -> None:
    """Refuses a picture that could not be written, before minutes are spent on what it shows. Raises UserError."""
    if path.suffix not in PICTURES:
        raise UserError(f"--picture {path}: expected a name that ends in one of {', '.join(PICTURES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: there is no folder {path.parent}")


def draw(plan: Plan, path: Path) -> None:
    """Memory as a stack against the device's capacity, and the times of a step as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5 if plan.roofline else 2), dpi=150, layout="constrained")
    heights = (1, 3) if plan.roofline else (1,)
    memory, *rest = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    left = 0.0
    for name, part in (plan.state | {"activations": plan.activations}).items():
        memory.barh(["a device"], [part / GIB], left=left, label=name)
        left += part / GIB
    if plan.capacity:
        memory.axvline(plan.capacity / GIB, color="black", linestyle="--", label="capacity")
    memory.set_xlabel("GiB")
    memory.legend(fontsize="small", ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    if plan.roofline:
        step, [times] = plan.roofline, rest
        parts = {"compute": step.compute, "memory": step.memory, "network inside": step.fast_network,
                 "network between": step.slow_network, "not hidden": step.exposed, "step": step.total}
        bars = times.barh(list(parts), list(parts.values()), color=["tab:gray"] * 5 + ["tab:blue"])
        times.bar_label(bars, [format_seconds(part) for part in parts.values()], padding=3, fontsize="small")
        times.margins(x=0.12)
        times.invert_yaxis()
        times.set_xlabel("seconds in a step, at best")
    figure.suptitle(f"{format_count(plan.parameters)} parameters on {plan.target.name}")
    save(figure, path)
