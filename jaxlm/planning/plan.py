"""What is known of a run before it starts, whoever found it out: the compiler (`compiled.py`) or arithmetic
(`estimate.py`)."""

import math
from typing import Any, NamedTuple

from jaxlm.models.sizes import attention_flops
from jaxlm.planning.targets import Target
from jaxlm.reporting.memory import Memory
from jaxlm.runtime.chips import products_peak
from jaxlm.settings import Settings
from jaxlm.training.footprint import training_flops


def what_helps(settings: Settings, platform: str) -> str:
    """Where memory is short: what this run does not do yet."""
    ways = ["train.precision=bfloat16"] if settings.train.precision == "float32" and platform != "cpu" else []
    ways += ["more devices", "more of mesh.fsdp or mesh.tensor"]
    ways += ["train.remat=full"] if settings.train.remat != "full" else []
    return ", ".join([*ways, "more train.gradient_accumulation"])


class Collective(NamedTuple):
    """One kind of exchange along some mesh axes."""

    kind: str
    axes: tuple[str, ...]
    bytes_per_device: float  # in one step: what a device sends, in the ring forms of the exchanges (Chan et al. 2007)
    count: int  # in one step
    exposed_bytes: float  # those of bytes_per_device that no matrix product hides


class Buffer(NamedTuple):
    """An array, from the operation that makes it to the last one that reads it."""

    label: str
    size: float


class Roofline(NamedTuple):
    """Seconds of one step."""

    compute: float
    memory: float
    fast_network: float  # inside a slice or node
    slow_network: float  # between them
    exposed: float  # of both networks: what nothing hides
    total: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"compute": self.compute, "memory": self.memory, "the network inside": self.fast_network,
                 "the network between slices or nodes": self.slow_network}
        return max(parts, key=parts.get)


class Plan(NamedTuple):
    """Everything that is known of a run's step. Sizes are bytes of one device, times seconds of one step."""

    settings: Settings
    target: Target
    mesh: dict[str, int]  # sizes of the axes
    parameters: int  # of the model
    state: dict[str, float]  # bytes of parameters, optimizer, gradients
    memory: Memory
    collectives: list[Collective]
    model_flops: float  # of one device: what the model asks for
    executed_flops: float  # with what is computed again
    traffic: float  # bytes read from and written to the device's memory
    roofline: Roofline | None  # None where speeds are not published
    largest: list[Buffer]  # at the peak
    compile_seconds: float | None  # None: all of it is estimated, but for what the compiler says where it refused
    refused: bool = False  # by the compiler: no device can hold the step
    assumed: str | None = None  # what the settings left open, in one line

    @property
    def capacity(self) -> float | None:
        """Bytes that a device has; None: not known (CPU)."""
        return self.target.chip.memory

    @property
    def fits(self) -> bool | None:
        """None: not known."""
        return False if self.refused else None if self.capacity is None else self.memory.total <= self.capacity

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization at the roofline's speed; of causal attention counts what a token sees, so it stays
        below 1."""
        return self._utilization(self.visible_flops)

    @property
    def visible_flops(self) -> float:
        """Of one device: what the model asks for, without the attention that its mask hides."""
        return self.model_flops - masked_flops(self.settings) / self.target.num_devices

    @property
    def mfu_palm(self) -> float | None:
        """The same as PaLM's authors count it, and `jaxlm train` and `bench`: attention of every token to every
        other one."""
        return self._utilization(self.model_flops)

    def _utilization(self, flops: float) -> float | None:
        peak = products_peak(self.target.device_kind, self.settings.train.precision)
        return flops / peak / self.roofline.total if self.roofline and peak else None

    @property
    def steps(self) -> int | None:
        """Of the run, as far as they are known without its corpus; of train.tokens, as if no slot were padding."""
        train = self.settings.train
        if train.tokens is not None:
            return max(1, math.ceil(train.tokens / self.tokens_per_step))
        if train.hours is not None:
            return self.roofline and int(train.hours * 3600 / self.roofline.total)
        return train.steps

    @property
    def run_seconds(self) -> float | None:
        """At best; None: unknown."""
        if self.settings.train.hours is not None:
            return self.settings.train.hours * 3600
        return self.roofline and self.steps and self.roofline.total * self.steps

    @property
    def tokens_per_step(self) -> int:
        return self.settings.data.global_batch_size * self.settings.data.sequence_length

    @property
    def activations(self) -> float:
        """What is left of the total: activations, and what is fetched from other devices."""
        return max(0.0, self.memory.total - sum(self.state.values()))

    def to_json(self) -> dict[str, Any]:
        """The contract's object, and more."""
        memory = self.state | {"activations": self.activations, "total": self.memory.total, "host": self.memory.host,
                               "capacity": self.capacity, "arguments": self.memory.arguments,
                               "temporaries": self.memory.temporaries}
        step = self.roofline and self.roofline.total
        seconds = self.run_seconds
        days = seconds and seconds / 86400
        return {
            "target": self.target.name, "devices": self.target.num_devices, "mesh": self.mesh, "parameters": self.parameters,
            "estimated": self.compile_seconds is None,
            "memory_per_device": memory, "fits": self.fits, "largest_at_the_peak": [one._asdict() for one in self.largest],
            "collectives": [one._asdict() | {"axis": "+".join(one.axes)} for one in self.collectives],
            "flops_per_device": self.model_flops, "visible_flops_per_device": self.visible_flops,
            "executed_flops_per_device": self.executed_flops,
            "memory_traffic_per_device": self.traffic,
            "roofline": self.roofline and self.roofline._asdict() | {"bound": self.roofline.bound},
            "step_seconds": step, "mfu": self.mfu, "mfu_palm": self.mfu_palm,
            "tokens_per_second": step and self.tokens_per_step / step, "days": days,
            "device_hours": days and days * 24 * self.target.num_devices, "assumed": self.assumed,
            "compile_seconds": self.compile_seconds,
        }


def model_flops(settings: Settings) -> float:
    """What the model asks for in a whole step on all devices (`jaxlm.training.footprint`)."""
    return settings.data.global_batch_size * training_flops(settings)


def masked_flops(settings: Settings) -> float:
    """What of `model_flops` a causal mask hides: half of the attention, scores and sums, forward and backward."""
    if not settings.model.causal:
        return 0.0
    _, attention = attention_flops(settings.model, settings.data.sequence_length)
    return settings.data.global_batch_size * settings.model.num_layers * 3 * attention / 2
