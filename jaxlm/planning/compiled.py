"""A plan from the compiled step itself: nothing in it is assumed but the speeds of the hardware."""

import math
import time
from typing import Any

import jax

from jaxlm.models.sizes import num_parameters, visible_blocks
from jaxlm.planning import hlo
from jaxlm.planning.buffers import largest_live
from jaxlm.planning.chips import CHIPS
from jaxlm.planning.collectives import collectives
from jaxlm.planning.compilation import compiled, lay, lower, trace_step
from jaxlm.planning.flops import executed_flops
from jaxlm.planning.plan import Plan, model_flops
from jaxlm.planning.roofline import network_of_mesh, roofline
from jaxlm.planning.targets import Target
from jaxlm.planning.traffic import memory_traffic
from jaxlm.reporting.hardware import products_peak
from jaxlm.reporting.memory import memory_of
from jaxlm.settings import Settings
from jaxlm.training.step import Trainer


def compiled_plan(settings: Settings, target: Target) -> Plan:
    """Compiles the step of `settings` for a target.

    Raises:
      UserError: its compiler is not here, the run cannot be laid out on the devices, or the compiler finds that it does not fit.
    """
    mesh, island = lay(settings, target)
    traced, trainer = trace_step(settings, mesh)
    started = time.monotonic()
    program = compiled(lower(traced, mesh))
    seconds = time.monotonic() - started
    module = hlo.parse(program.as_text())
    found, traffic = collectives(module, mesh), memory_traffic(module)
    visible = visible_blocks(settings.model, settings.data.sequence_length) if target.platform == "tpu" else 1.0
    executed = executed_flops(traced.jaxpr, mesh.size, visible)
    chip, peak = CHIPS.get(target.device_kind), products_peak(target.device_kind, settings.train.precision)
    speed = roofline(executed, peak, traffic, found, chip, network_of_mesh(mesh, chip, island)) if peak and chip else None
    return Plan(settings, target, dict(mesh.shape), num_parameters(settings.model), state_sizes(trainer), memory_of(program),
                found, model_flops(settings) / mesh.size, executed, traffic, speed, largest_live(module), seconds)


def state_sizes(trainer: Trainer) -> dict[str, float]:
    """Bytes on one device, of parameters, gradients (laid out like them) and what of the optimizer is not on the host."""
    def held(shapes: Any, shardings: Any) -> float:
        pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
        return sum(leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
                   for leaf, sharding in pairs if sharding.memory_kind != "pinned_host")

    shapes, layout = trainer.state_shapes, trainer.state_shardings
    parameters = held(shapes.params, layout.params)
    return {"parameters": parameters, "optimizer": held(shapes.optimizer, layout.optimizer), "gradients": parameters}
