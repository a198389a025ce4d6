"""`jaxlm plan`: what a run needs and how fast it can be on devices that are not here, from their own compiler."""

import math
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxlm.checks import check_kernel, check_layout
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning import hlo
from jaxlm.planning.buffers import Buffer, largest_live
from jaxlm.planning.chips import CHIPS
from jaxlm.planning.collectives import Collective, collectives
from jaxlm.planning.compilation import compiled, trace_step
from jaxlm.planning.flops import executed_flops
from jaxlm.planning.roofline import Roofline, roofline
from jaxlm.planning.targets import Target, find_target
from jaxlm.planning.traffic import memory_traffic
from jaxlm.reporting.hardware import peak_flops
from jaxlm.reporting.memory import Memory, memory_of
from jaxlm.settings import Settings
from jaxlm.training.setup import batch_shapes
from jaxlm.training.step import Trainer


class Plan(NamedTuple):
    """Everything that is known of a run's step before it starts. Sizes are bytes of one device, times seconds of one step."""

    settings: Settings
    target: Target
    mesh: Mesh
    parameters: int  # of the model
    state: dict[str, float]  # bytes of parameters, optimizer, gradients
    memory: Memory
    collectives: list[Collective]
    model_flops: float  # of one device: what the model asks for
    executed_flops: float  # with what is computed again
    traffic: float  # bytes read from and written to the device's memory
    roofline: Roofline | None  # None where speeds are not published
    compile_seconds: float
    largest: list[Buffer]  # at the peak

    @property
    def capacity(self) -> float | None:
        """Bytes that a device has; None: not known (CPU)."""
        chip = CHIPS.get(self.target.devices[0].device_kind)
        return chip and chip.memory

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization at the roofline's speed."""
        peak = peak_flops(self.target.devices[0].device_kind)
        return self.model_flops / peak / self.roofline.total if self.roofline and peak else None

    @property
    def tokens_per_step(self) -> int:
        return self.settings.data.global_batch_size * self.settings.data.sequence_length

    def to_json(self) -> dict[str, Any]:
        """The contract's object, and more."""
        memory = self.state | {"activations": self.activations, "total": self.memory.total, "host": self.memory.host,
                               "capacity": self.capacity}
        step = self.roofline and self.roofline.total
        days = step and step * self.settings.train.steps / 86400
        return {
            "target": self.target.name, "devices": self.mesh.size, "mesh": dict(self.mesh.shape), "parameters": self.parameters,
            "memory_per_device": memory, "fits": None if self.capacity is None else self.memory.total <= self.capacity,
            "collectives": [one._asdict() | {"axis": "+".join(one.axes)} for one in self.collectives],
            "flops_per_device": self.model_flops, "executed_flops_per_device": self.executed_flops,
            "memory_traffic_per_device": self.traffic,
            "roofline": self.roofline and self.roofline._asdict() | {"bound": self.roofline.bound},
            "step_seconds": step, "mfu": self.mfu, "tokens_per_second": step and self.tokens_per_step / step, "days": days,
            "device_hours": days and days * 24 * self.mesh.size, "compile_seconds": self.compile_seconds,
        }

    @property
    def activations(self) -> float:
        """What is left of the total: activations, and what is fetched from other devices."""
        return max(0.0, self.memory.total - sum(self.state.values()))


def make_plan(settings: Settings, target_name: str) -> Plan:
    """Compiles the step of `settings` for a target.

    Raises:
      UserError: no such target or compiler, or the run does not fit its devices in number.
    """
    target = find_target(target_name)
    return plan_on(settings, target, lay(settings, target))


def lay(settings: Settings, target: Target) -> Mesh:
    """The mesh of a run over a target's devices. Raises UserError."""
    mesh = make_mesh(settings.mesh, target.devices, target.island)
    check_layout(settings, mesh.shape)
    check_kernel(settings, mesh.devices.flat[0].platform)
    return mesh


def plan_on(settings: Settings, target: Target, mesh: Mesh) -> Plan:
    """The plan of a run on a mesh of the target's devices."""
    traced, trainer = trace_step(settings, mesh)
    started = time.monotonic()
    program = compiled(traced, mesh)
    seconds = time.monotonic() - started
    module = hlo.parse(program.as_text())
    found, traffic = collectives(module, mesh), memory_traffic(module)
    executed = executed_flops(traced.jaxpr, mesh.size)
    kind = target.devices[0].device_kind
    peak = peak_flops(kind)
    speed = roofline(executed, peak, traffic, found, mesh, target.island) if peak and kind in CHIPS else None
    return Plan(settings, target, mesh, trainer.model.num_parameters(), state_sizes(trainer), memory_of(program), found,
                model_flops(trainer, settings) / mesh.size, executed, traffic, speed, seconds, largest_live(module))


def state_sizes(trainer: Trainer) -> dict[str, float]:
    """Bytes on one device, of parameters, gradients (laid out like them) and what of the optimizer is not on the host."""
    def held(shapes: Any, shardings: Any) -> float:
        pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
        return sum(leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
                   for leaf, sharding in pairs if sharding.memory_kind != "pinned_host")

    shapes, layout = trainer.state_shapes, trainer.state_shardings
    parameters = held(shapes.params, layout.params)
    return {"parameters": parameters, "optimizer": held(shapes.optimizer, layout.optimizer), "gradients": parameters}


def model_flops(trainer: Trainer, settings: Settings) -> float:
    """Of the whole step on all devices (`Model.training_flops`)."""
    batch = batch_shapes(settings)
    predictions = batch.get("masked_positions", batch["tokens"]).shape[1]
    return settings.data.global_batch_size * trainer.model.training_flops(settings.data.sequence_length, predictions)
