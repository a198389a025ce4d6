"""Every shipped config of a real run, compiled for its hardware, and what the estimate (`jaxlm plan --fast`) says of it.

    python benchmarks/plans.py                  # all: an hour on 2 cores
    python benchmarks/plans.py llama_8b         # those whose line has this in it
    python benchmarks/plans.py --scaling        # weak scaling instead: the same work for each of 64, 512 and 4,096 chips
    python benchmarks/plans.py --write          # also keep the figures, against which tests/planning/test_estimate.py tests

Prints docs/planning.md's tables. Needs libtpu and JAX's CUDA plugin, no accelerator.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

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
           "step_seconds", "mfu", "days")
GIB = 2**30


def plan(line: str, *options: str) -> dict:
    """What `jaxlm plan --json` prints."""
    config, target, *overrides = line.split()
    command = [sys.executable, "-m", "jaxlm", "plan", f"configs/{config}.yaml", "--target", target, "--json", *options]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{line}: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(line: str, found: dict) -> str:
    memory, step = found["memory_per_device"], found["roofline"]
    sent = sum(one["bytes_per_device"] for one in found["collectives"])
    exposed = sum(one["exposed_bytes"] for one in found["collectives"])
    config, target, *overrides = line.split()
    name = " ".join([config, *overrides])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    columns = [f"`{name}`", target, f"{memory['total'] / GIB:.1f} of {memory['capacity'] / GIB:.1f} GiB", f"{sent / GIB:.1f} GiB",
               f"{exposed / GIB:.1f} GiB", f"{step['total']:.2f} s", step["bound"], f"{found['mfu']:.0%}", f"{found['days']:.1f}",
               f"{found['compile_seconds']:.0f} s", f"{peak / GIB:.1f} GiB"]
    return "| " + " | ".join(columns) + " |"


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
    arguments = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    errors = []
    print("| config | target | memory of a device | sent by a device in a step | not hidden | step at best | bound by "
          "| MFU at most | days | compiled in | compiler's memory at most |\n|" + " --- |" * 11)
    lines = (SCALING if arguments.scaling else PLANS).splitlines()
    for line in filter(lambda line: line and arguments.only in line, lines):
        found = plan(line)
        print(row(line, found), flush=True)
        errors.append(error(line, found, plan(line, "--fast")))
        kept[line] = {name: found[name] for name in FIGURES}
        if arguments.write:
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    print("\n| estimate / compiler | memory | executed FLOPs | bytes sent | memory traffic | step |\n|" + " --- |" * 6)
    print("\n".join(errors))


if __name__ == "__main__":
    main()
