"""What XLA's flags (jaxlm/runtime/compiler.py) do to the training step: how much of what it sends no matrix product
hides.

    python benchmarks/overlap.py --target h100:8 fsdp=8

Compiles a step of 4 layers of a 1.3B model twice, with the flags and with each of them off, and reads the compiled
programs. Needs JAX's CUDA plugin and no accelerator; for TPUs there are no flags to compare.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace

from jaxlm.planning.collectives import collectives
from jaxlm.planning.hlo import parse
from jaxlm.planning.lowering import compile_step, lay
from jaxlm.planning.targets import GPUS, find_target
from jaxlm.reporting.memory import memory_of
from jaxlm.runtime.compiler import BACKENDS
from jaxlm.settings import DataSettings, MeshSettings, ModelSettings, Settings, TrainSettings

SETTINGS = Settings(
    model=ModelSettings(num_layers=4, num_heads=16, hidden_size=2048, vocab_size=32000, max_length=2048, positions="rope",
                        normalization="rmsnorm", activation="swiglu", intermediate_size=5632, bias=False),
    data=DataSettings(global_batch_size=16, sequence_length=2048), train=TrainSettings(precision="bfloat16", remat="full"))


def row(name: str, axes: dict[str, int]) -> str:
    """Sent and exposed bytes, and temporaries, of the step compiled in this process."""
    settings = replace(SETTINGS, mesh=MeshSettings(**axes))
    mesh, _ = lay(settings, find_target(name))
    compiled = compile_step(settings, mesh)
    found = collectives(parse(compiled.as_text()), mesh)
    sizes = (sum(one.bytes_per_device for one in found), sum(one.exposed_bytes for one in found), memory_of(compiled).temporaries)
    return " | ".join(f"{size / 2**20:,.0f}" for size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="+", metavar="AXIS=SIZE")
    parser.add_argument("--target", default="h100:8")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)  # one row, in this process
    arguments = parser.parse_args()
    if arguments.row:
        print(row(arguments.target, {axis: int(size) for axis, _, size in (one.partition("=") for one in arguments.axes)}))
        return
    if arguments.target.split(":")[0] not in GPUS:
        raise SystemExit(f"--target {arguments.target}: expected a GPU, one of {', '.join(GPUS)}; other backends get no flags")
    backend = BACKENDS["gpu"]
    off = " ".join(f"--{flag}=false" for flag in backend.flags)
    print("| target | mesh | flags | sent, MiB | not hidden, MiB | temporaries, MiB |\n| --- | --- | --- | --- | --- | --- |")
    for name, flags in {"on": "", "off": off}.items():
        command = [sys.executable, __file__, "--row", "--target", arguments.target, *arguments.axes]
        done = subprocess.run(command, env=os.environ | {backend.variable: flags}, stdout=subprocess.PIPE, text=True, check=True)
        print(f"| {arguments.target} | {', '.join(arguments.axes)} | {name} | {done.stdout.strip()} |", flush=True)


if __name__ == "__main__":
    main()
