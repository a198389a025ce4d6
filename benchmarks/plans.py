"""Every shipped config of a real run, compiled for its hardware, and what the estimate (`jaxlm plan --fast`) says of
it.

    python benchmarks/plans.py                  # all: an hour on 2 cores
    python benchmarks/plans.py llama_8b         # those whose line has this in it
    python benchmarks/plans.py --scaling        # weak scaling instead: the same work for each chip
    python benchmarks/plans.py --write          # also keep the figures, for tests/planning/test_estimated_plan.py
    python benchmarks/plans.py --programs DIR   # keep the compiled programs, compile none that is there

Prints docs/planning.md's tables. Needs libtpu and JAX's CUDA plugin, no accelerator.
"""

import argparse
import gzip
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

from jaxlm import config
from jaxlm.planning.estimated_plan import estimated_plan
from jaxlm.planning.targets import Target, find_target
from jaxlm.reporting.memory import Memory
from jaxlm.settings import Settings

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "tests" / "golden" / "plans.json"
PLANS = """
gpt2_124m h100:8
gpt3_125m v5e:4x4
gpt3_1.3b v5e:8x8
gpt3_6.7b v5p:4x4x4
gpt3_13b v5p:4x4x8
gpt3_175b v5p:8x8x16
llama_8b h100:8x8
llama_8b v5e:16x16
llama_8b v6e:16x16
llama_70b v5p:8x8x8
llama_70b h100:8x64
llama_8b_128k v5p:4x4x4
moe_8x7b v5p:4x4x4
bert_large v5e:4x4
bert_large h100:1 train.gradient_accumulation=4
bert_large_128 v5e:4x4
"""
# The same work for each chip, on more of them
SCALING = """
gpt3_6.7b v5p:4x4x4 mesh.fsdp=64 mesh.data=-1
gpt3_6.7b v5p:8x8x8 mesh.fsdp=64 mesh.data=-1 data.global_batch_size=8192
gpt3_6.7b v5p:16x16x16 mesh.fsdp=64 mesh.data=-1 data.global_batch_size=65536
"""
FIGURES = ("memory_per_device", "flops_per_device", "executed_flops_per_device", "collectives", "memory_traffic_per_device",
           "step_seconds", "mfu", "mfu_palm", "days")
GIB = 2**30


def settings_of(line: str) -> tuple[Settings, Target]:
    config_name, target, *overrides = line.split()
    return config.load(ROOT / "configs" / f"{config_name}.yaml", overrides), find_target(target)


def plan(line: str, programs: Path | None) -> dict:
    """The compiler's plan, by a process of its own: a target's devices and flags are the process's."""
    command = [sys.executable, __file__, "--one", line, *(["--programs", str(programs)] if programs else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def plan_here(line: str, programs: Path | None) -> dict:
    """The plan of a program that is kept, or else compiled now, and kept if there is a folder."""
    from jaxlm.planning.compiled_plan import Program, compile_program, read_program

    settings, target = settings_of(line)
    kept = programs and programs / (re.sub(r"[^\w.=]+", "_", line)[-200:] + ".json.gz")
    if kept and kept.exists():
        program = Program(**json.loads(gzip.decompress(kept.read_bytes())))
        program = program._replace(memory=Memory(*program.memory))
    else:
        program = compile_program(settings, target)
        if kept:
            programs.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(gzip.compress(json.dumps(program._asdict()).encode()))
    return read_program(program, settings, target).to_json()


def row(line: str, found: dict) -> str:
    memory, step = found["memory_per_device"], found["roofline"]
    sent = sum(one["bytes_per_device"] for one in found["collectives"])
    exposed = sum(one["exposed_bytes"] for one in found["collectives"])
    config, target, *overrides = line.split()
    name = " ".join([config, *overrides])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    columns = [f"`{name}`", target, f"{memory['total'] / GIB:.1f} of {memory['capacity'] / GIB:.1f} GiB", f"{sent / GIB:.1f} GiB",
               f"{exposed / GIB:.1f} GiB", _seconds(step["total"]), step["bound"], f"{found['mfu']:.0%}",
               f"{found['mfu_palm']:.0%}", f"{found['days']:.1f}",
               f"{found['compile_seconds']:.0f} s", f"{peak / GIB:.1f} GiB"]
    return "| " + " | ".join(columns) + " |"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def error(line: str, found: dict, estimate: dict) -> str:
    """The estimate as a share of what the compiler's program has."""
    def both(of) -> str:
        return f"{of(estimate) / of(found):.2f}" if of(found) else "-"

    columns = [
        f"`{line}`", both(lambda plan: plan["memory_per_device"]["total"]), both(lambda plan: plan["executed_flops_per_device"]),
        both(lambda plan: sum(one["bytes_per_device"] for one in plan["collectives"])),
        both(lambda plan: plan["memory_traffic_per_device"]), both(lambda plan: plan["step_seconds"])]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--programs", type=Path, metavar="DIR")
    parser.add_argument("--one", metavar="LINE", help=argparse.SUPPRESS)  # in this process, as JSON
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(plan_here(arguments.one, arguments.programs)))
        return
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    errors = []
    print("| config | target | memory | sent | not hidden | step at best | bound by | MFU | PaLM's "
          "| days | compiled in | compiler's memory |\n|" + " --- |" * 12)
    lines = (SCALING if arguments.scaling else PLANS).splitlines()
    for line in filter(lambda line: line and arguments.only in line, lines):
        found = plan(line, arguments.programs)
        print(row(line, found), flush=True)
        errors.append(error(line, found, estimated_plan(*settings_of(line)).to_json()))
        kept[line] = {name: found[name] for name in FIGURES}
        if arguments.write:
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    print("\n| estimate / compiler | memory | executed FLOPs | bytes sent | memory traffic | step |\n|" + " --- |" * 6)
    print("\n".join(errors))


if __name__ == "__main__":
    main()
