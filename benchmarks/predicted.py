"""What `jaxlm plan` says beforehand against what `jaxlm bench` then measures on the same devices.

    python benchmarks/predicted.py cpu:8     # six meshes of emulated devices
    python benchmarks/predicted.py h100:1    # four configs, on a machine with one H100

Memory: the plan's total against the running program's, and the bytes of the state's arrays on one device. Time: on
GPUs the plan's step; emulated devices share this machine's cores, so there a mesh's time is predicted as the sum of
its arithmetic, its memory traffic and what it sends, each over this machine's own speed, measured first. Prints a
markdown table, and Spearman's rank correlation of predicted and measured times.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = ["model.num_layers=4", "model.num_heads=8", "model.hidden_size=256", "model.vocab_size=4096", "model.max_length=128",
         "data.sequence_length=128", "data.global_batch_size=16", "bench.steps=5", "bench.warmup_steps=2"]
RUNS = {
    "cpu": {" ".join(mesh): ["configs/quickstart.yaml", *MODEL, "devices.count=8", "devices.platform=cpu", *mesh] for mesh in (
        ["mesh.data=8"], ["mesh.fsdp=8"], ["mesh.tensor=8"], ["mesh.data=2", "mesh.fsdp=4"], ["mesh.fsdp=4", "mesh.tensor=2"],
        ["mesh.fsdp=2", "mesh.context=4"])},
    "h100": {" ".join(run): run for run in (
        ["configs/gpt2_124m.yaml"], ["configs/gpt2_1.5b.yaml", "data.global_batch_size=16"],
        ["configs/bert_large.yaml", "train.gradient_accumulation=4"], ["configs/gpt3_1.3b.yaml", "data.global_batch_size=16"])},
}


def jaxlm(*arguments: str) -> dict:
    command = [sys.executable, "-m", "jaxlm", *arguments, "--json"]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def host_speed() -> tuple[float, float]:
    """FLOP/s of float32 products and bytes/s of copies on this machine."""
    side, large = np.ones((1024, 1024), np.float32), np.ones(2**26, np.float32)
    return 2 * 1024**3 * 20 / _seconds(lambda: [side @ side for _ in range(20)]), 2 * large.nbytes / _seconds(large.copy)


def _seconds(work) -> float:
    work()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("cpu:8", "h100:1"))
    target = parser.parse_args().target
    flops, copied = host_speed()
    print("| run | memory predicted, MiB | measured | state predicted, MiB | measured | step predicted, ms | measured |\n|"
          + " --- |" * 7)
    predicted, measured = [], []
    for name, (config, *overrides) in RUNS[target.split(":")[0]].items():
        plan, bench = jaxlm("plan", config, "--target", target, *overrides), jaxlm("bench", config, *overrides)
        if plan["step_seconds"]:
            step = plan["step_seconds"]
        else:
            sent = sum(one["bytes_per_device"] for one in plan["collectives"])
            step = 8 * (plan["executed_flops_per_device"] / flops + (plan["memory_traffic_per_device"] + sent) / copied)
        predicted.append(1e3 * step)
        measured.append(bench["median_step_ms"])
        memory = plan["memory_per_device"]
        state = memory["parameters"] + memory["optimizer"]
        found = (memory["total"], bench["peak_memory_bytes"], state, bench["state_bytes"])
        sizes = " | ".join(f"{size / 2**20:,.2f}" for size in found)
        print(f"| `{name}` | {sizes} | {predicted[-1]:,.0f} | {measured[-1]:,.0f} |", flush=True)
    ratios = ", ".join(f"{guess / real:.2f}" for guess, real in zip(predicted, measured, strict=True))
    print(f"\nSpearman: {np.corrcoef(ranks(predicted), ranks(measured))[0, 1]:.2f}; predicted / measured: {ratios}")


if __name__ == "__main__":
    main()
