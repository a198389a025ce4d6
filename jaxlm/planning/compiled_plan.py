"""A plan from the compiled step itself: nothing in it is assumed but the speeds of the hardware."""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxlm.console.progress import waiting
from jaxlm.models.sizes import visible_blocks
from jaxlm.planning import hlo
from jaxlm.planning.buffers import largest_live
from jaxlm.planning.collectives import collectives
from jaxlm.planning.estimated_plan import estimated_plan
from jaxlm.planning.flops import Arithmetic, executed_flops, kernels_of
from jaxlm.planning.lowering import DoesNotFit, compiled, compiler_failures, lay, lower, trace_step
from jaxlm.planning.names import names_of
from jaxlm.planning.plan import Plan, model_flops
from jaxlm.planning.roofline import network_of_mesh, roofline
from jaxlm.planning.targets import Target
from jaxlm.planning.traffic import memory_traffic
from jaxlm.reporting.memory import Memory, memory_of
from jaxlm.settings import Settings
from jaxlm.training.footprint import count_parameters
from jaxlm.training.step import Trainer


class Program(NamedTuple):
    """A compiled step: all that a plan reads of it."""

    text: str  # the optimized program
    kernels: dict[str, Sequence[float]]  # FLOPs of one call of each Pallas kernel (`jaxlm.planning.flops.Arithmetic`)
    state: dict[str, float]  # bytes of parameters, optimizer, gradients on a device
    memory: Memory
    seconds: float  # of compiling


def compiled_plan(settings: Settings, target: Target) -> Plan:
    """Compiles the step of `settings` for a target, and reads what came out; where the compiler refuses to make a
    program that no device can hold, the estimate with the memory that it says is needed.

    Raises:
      UserError: its compiler is not here, or the run cannot be laid out on the devices.
      RunError: the compiler itself fails.
    """
    try:
        return read_program(compile_program(settings, target), settings, target)
    except DoesNotFit as error:  # then there is no program to read
        estimate = estimated_plan(settings, target)
        return estimate._replace(memory=_refused(estimate.memory, error), refused=True)


def _refused(estimate: Memory, error: DoesNotFit) -> Memory:
    """With what the compiler says is needed, where it says that."""
    total = (error.needed or 0) + (estimate.arguments if error.temporaries else 0)
    total = round(total) or estimate.total
    return estimate._replace(temporaries=max(0, total - estimate.arguments), total=total)


def compile_program(settings: Settings, target: Target) -> Program:
    """The step of `settings`, compiled for a target. Raises UserError and RunError as `compiled_plan`, and
    DoesNotFit."""
    mesh, _ = lay(settings, target)
    with waiting(f"compiling for {target.name}"):
        traced, trainer = trace_step(settings, mesh)
        started = time.monotonic()
        program = compiled(lower(traced, mesh), mesh)
        seconds = time.monotonic() - started
    visible = visible_blocks(settings.model, settings.data.sequence_length) if target.platform == "tpu" else 1.0
    with compiler_failures(mesh):  # a program of a compiler that is newer than JAX may not be readable
        return Program(program.as_text(), kernels_of(traced.jaxpr, visible), state_sizes(trainer), memory_of(program), seconds)


def read_program(program: Program, settings: Settings, target: Target) -> Plan:
    """The plan that a program of `compile_program` shows."""
    mesh, island = lay(settings, target)
    module = hlo.parse(program.text)
    found, traffic = collectives(module, mesh), memory_traffic(module)
    executed = executed_flops(module, target.platform, {name: Arithmetic(*one) for name, one in program.kernels.items()})
    largest = largest_live(module, names_of(settings, mesh.shape))
    chip, compute = target.chip, executed.seconds(target.device_kind)
    speed = roofline(compute, traffic, found, chip, network_of_mesh(mesh, chip, island)) if compute and chip.bandwidth else None
    return Plan(settings, target, dict(mesh.shape), count_parameters(settings), program.state, program.memory,
                found, model_flops(settings) / mesh.size, executed.total, traffic, speed, largest,
                program.seconds)


def state_sizes(trainer: Trainer) -> dict[str, float]:
    """Bytes on one device, of parameters, gradients (laid out like them) and what of the optimizer is not on the
    host."""
    def held(shapes: Any, shardings: Any) -> float:
        pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
        return sum(leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
                   for leaf, sharding in pairs if sharding.memory_kind != "pinned_host")

    shapes, layout = trainer.layout.shapes, trainer.layout.shardings
    parameters = held(shapes.params, layout.params)
    return {"parameters": parameters, "optimizer": held(shapes.optimizer, layout.optimizer), "gradients": parameters}
