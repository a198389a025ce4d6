"""Memory of one device in the training step, read from compiled programs.

    python benchmarks/memory.py scaling                      # each axis alone over 1, 2, 4, 8 emulated devices
    python benchmarks/memory.py context --target v5e:2x4     # 131,072 tokens in one sequence: one device, and context 8
    python benchmarks/memory.py remat --target v5e:2x4       # what keeping, recomputing and moving activations costs

Prints markdown tables. The second and third need libtpu (or, for a GPU target, JAX's CUDA plugin), and no accelerator.
"""

import argparse
from dataclasses import replace

from jaxlm.errors import UserError
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.devices import Devices, devices_of
from jaxlm.planning.lowering import compile_step
from jaxlm.planning.targets import find_target
from jaxlm.reporting.memory import Memory, memory_of
from jaxlm.settings import DataSettings, MeshSettings, ModelSettings, OptimizerSettings, Settings, TrainSettings

SIZES = (1, 2, 4, 8)
SMALL = Settings(
    model=ModelSettings(num_layers=8, num_heads=8, hidden_size=256, vocab_size=1024, max_length=256, bias=False),
    data=DataSettings(global_batch_size=64, sequence_length=256))
EXPERTS = replace(SMALL, model=replace(SMALL.model, num_experts=8, capacity_factor=1.0, num_layers=4))
PIPELINE = replace(SMALL, train=TrainSettings(gradient_accumulation=32))
AXES = {"data": SMALL, "fsdp": SMALL, "tensor": SMALL, "context": SMALL, "stage": PIPELINE, "expert": EXPERTS}

LONG = Settings(
    model=ModelSettings(num_layers=32, num_heads=8, num_kv_heads=8, head_dim=128, hidden_size=1024, vocab_size=32000,
                        max_length=131072, positions="rope", normalization="rmsnorm", activation="swiglu", intermediate_size=2816,
                        bias=False),
    data=DataSettings(global_batch_size=1, sequence_length=131072), train=TrainSettings(precision="bfloat16", remat="full"))

LAYERS = Settings(
    model=ModelSettings(num_layers=16, num_heads=16, hidden_size=2048, vocab_size=32000, max_length=2048, positions="rope",
                        normalization="rmsnorm", activation="swiglu", intermediate_size=5632, bias=False),
    data=DataSettings(global_batch_size=16, sequence_length=2048), train=TrainSettings(precision="bfloat16"))
REMAT = {
    "`dots`": ("dots", False),
    "`{query_key_value: keep, attention: keep}`": ({"query_key_value": "keep", "attention": "keep"}, False),
    "`{attention: keep, residual: host}`": ({"attention": "keep", "residual": "host"}, False),
    "`full`": ("full", False),
    "`{residual: host}`": ({"residual": "host"}, False),
    "`full`, `optimizer.offload`": ("full", True),
}


def measure(settings: Settings, devices: Devices, count: int | None = None, **axes: int) -> Memory:
    """The step's memory on the first `count` of a target's devices."""
    mesh = make_mesh(MeshSettings(**axes), devices.all[:count], devices.island)
    return memory_of(compile_step(settings, mesh))


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def scaling() -> None:
    devices = devices_of(find_target("cpu:8"))
    print("| axis | state, MiB on 1, 2, 4, 8 devices | 8 x on 8 / on 1 | activations and gradients, MiB | 8 x on 8 / on 1 |")
    print("| --- | --- | --- | --- | --- |")
    for axis, settings in AXES.items():
        # one device takes the batch at once: a pipeline holds all its micro-batches, too
        first = SMALL if settings is PIPELINE else settings
        rows = [measure(first if size == 1 else settings, devices, size, **{axis: size}) for size in SIZES]
        columns = []
        for kind in ("arguments", "temporaries"):
            sizes = [getattr(row, kind) for row in rows]
            columns += [", ".join(map(mebibytes, sizes)), f"{8 * sizes[-1] / sizes[0]:.2f}"]
        print(f"| {axis} | {' | '.join(columns)} |", flush=True)


def context(devices: Devices) -> None:
    print(f"| {devices.all[0].device_kind} | needed by a device |\n| --- | --- |")
    for size in (1, 8):
        try:
            found = f"{measure(LONG, devices, size, context=size).total / 2**30:.1f} GiB"
        except UserError as error:
            found = str(error)
        print(f"| context {size} | {found} |", flush=True)


def remat(devices: Devices) -> None:
    print("| train.remat | state, MiB | temporaries, MiB | in host memory, MiB | all on the device, MiB |")
    print("| --- | --- | --- | --- | --- |")
    for name, (choice, offload) in REMAT.items():
        settings = replace(LAYERS, train=replace(LAYERS.train, remat=choice), optimizer=OptimizerSettings(offload=offload))
        memory = measure(settings, devices, fsdp=len(devices.all))
        sizes = (memory.arguments, memory.temporaries, memory.host, memory.total)
        print(f"| {name} | {' | '.join(map(mebibytes, sizes))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("scaling", "context", "remat"))
    parser.add_argument("--target", default="v5e:2x4")
    arguments = parser.parse_args()
    if arguments.table == "scaling":
        scaling()
    else:
        {"context": context, "remat": remat}[arguments.table](devices_of(find_target(arguments.target)))


if __name__ == "__main__":
    main()
