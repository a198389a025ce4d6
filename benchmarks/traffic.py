"""Bytes that a device sends in one training step, beside the textbook's minimum, for each axis of the mesh by itself.

    python benchmarks/traffic.py [AXIS ...]

Compiles the training step of a small GPT (float32, no remat) for 8 emulated CPU devices and reads its collectives,
loops multiplied by their trip counts (`jaxlm.planning.collectives`). Prints a markdown table. Minimum: see
`minimum`.
"""

import math
import sys

import jax

from jaxlm.models.model import Model
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.collectives import Collective, collectives
from jaxlm.planning.hlo import parse
from jaxlm.planning.lowering import compile_step
from jaxlm.settings import DataSettings, MeshSettings, ModelSettings, Settings, TrainSettings

ROWS, LENGTH = 64, 128
DENSE = {"num_layers": 8, "num_heads": 8, "hidden_size": 256, "vocab_size": 1024, "max_length": LENGTH, "bias": False}
EXPERTS = {"num_experts": 8, "experts_per_token": 2, "capacity_factor": 1.0, "num_layers": 2}
RUNS = {
    "data": ({}, {}, {"data": 8}),
    "fsdp": ({}, {}, {"fsdp": 8}),
    "tensor": ({}, {}, {"tensor": 8}),
    "context": ({}, {}, {"context": 8}),
    "stage": ({}, {"gradient_accumulation": 32, "stage_repeats": 2}, {"stage": 4}),
    "expert": (EXPERTS, {}, {"expert": 8}),
}


def minimum(axis: str, model: Model, train: TrainSettings, devices: int) -> float:
    """Bytes a device has to send in a step, by the formulas of the papers in docs/sharding.md; s = (N - 1) / N.

    Each sum over devices of something that all need costs 2 s of it, each gather or scatter s. Pure axes: all rows
    are on all devices but for data, fsdp and expert, which cut them.

    data: gradients once. fsdp: parameters for the forward and again for the backward pass, gradients once. tensor:
    states between the parts of a block are gathered and scattered (2 + 2 forward, 2 + 2 backward), and gathered
    again for the kernels' gradients since only the cut ones are kept (2; Korthikanti et al. 2022, 4.2.2); embedding
    and head 2 + 2.
    context: keys and values go round forward and backward, their gradients once; parameters' gradients once. stage:
    states cross each boundary forward and backward for every micro-batch and repeat; the last ones are dealt out to
    all stages and their gradients collected, so that the head is cut, too; the gradients of the tables, which all
    stages have, once. expert: the chosen tokens there and back, forward and backward; gradients of all other
    parameters once.
    """
    settings, s = model.settings, (devices - 1) / devices
    parameters = {path: 4 * math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(model.shapes)[0]}
    total = sum(parameters.values())
    outside = sum(size for path, size in parameters.items() if path[0].key != "blocks")
    states = 4 * ROWS * LENGTH * settings.hidden_size
    match axis:
        case "data":
            return 2 * s * total
        case "fsdp":
            return 3 * s * total
        case "tensor":
            return s * states * (10 * settings.num_layers + 4)
        case "context":
            return settings.num_layers * 6 * (devices - 1) * states / devices + 2 * s * total
        case "stage":
            return 2 * states * train.stage_repeats + 2 * s * states + 2 * s * outside
        case "expert":
            chosen = states / devices * settings.experts_per_token * settings.capacity_factor
            experts = sum(size for path, size in parameters.items() if {"up", "gate", "down"} & {entry.key for entry in path})
            return 4 * s * settings.num_layers * chosen + 2 * s * (total - experts)
    raise ValueError(axis)


def measure(axis: str) -> tuple[list[Collective], float, int]:
    """The exchanges of a step, the least bytes, and the devices."""
    model, train, shape = RUNS[axis]
    settings = Settings(model=ModelSettings(**DENSE | model), train=TrainSettings(steps=10, **train),
                        data=DataSettings(global_batch_size=ROWS, sequence_length=LENGTH))
    [devices] = shape.values()
    mesh = make_mesh(MeshSettings(**shape), jax.devices()[:devices])
    found = collectives(parse(compile_step(settings, mesh).as_text()), mesh)
    return found, minimum(axis, Model(settings.model, settings.train), settings.train, devices), devices


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    print("| axis | devices | sent by a device in a step | textbook minimum | ratio | of what |")
    print("| --- | --- | --- | --- | --- | --- |")
    for axis in sys.argv[1:] or RUNS:
        found, least, devices = measure(axis)
        sent = sum(one.bytes_per_device for one in found)
        parts = ", ".join(f"{one.kind} {one.bytes_per_device / 2**20:.1f} ({one.count})" for one in found)
        figures = f"{sent / 2**20:.1f} MiB | {least / 2**20:.1f} MiB | {sent / least:.3f}"
        print(f"| {axis} | {devices} | {figures} | {parts} |", flush=True)


if __name__ == "__main__":
    main()
