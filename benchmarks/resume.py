"""Kills a run again and again with SIGKILL, lets it go on each time, and compares what it ends with, bit by bit.

    python benchmarks/resume.py [--kills 5] [--seed 0] [--text FILE] [KEY=VALUE ...]

Trains benchmarks/parity.yaml for 400 steps, a checkpoint every 10, with dropout: once undisturbed, and once killed at random
moments. Compared are the metrics of every step (but for the times) and every array of the last checkpoint.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from parity import CONFIG, TEXT

from jaxlm.reporting.metrics import read_metrics

TIMES = ("tokens_per_second", "step_seconds", "data_wait_seconds")
RUN = ["train.steps=400", "checkpoint.every_steps=10", "eval.every_steps=50", "model.dropout=0.1"]


def command(run_dir: Path, text: Path, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "jaxlm", "train", str(CONFIG), f"run_dir={run_dir}", f"data.raw={text}",
            f"data.corpus={run_dir.parent / 'corpus'}", *RUN, *overrides]


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")


def kill_at_random(arguments: list[str], run_dir: Path, draw: random.Random) -> int:
    """Starts the run and kills it within 3 seconds of its first line about a step. Returns the last step that it had logged."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    time.sleep(draw.uniform(0, 3))
    process.kill()
    process.communicate()
    return max(row["step"] for row in read_metrics(run_dir))


def metrics(run_dir: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run_dir)]


def arrays(run_dir: Path) -> dict:
    """Parameters, optimizer state, step and random key of the last checkpoint."""
    with ocp.training.Checkpointer(run_dir / "checkpoints") as checkpoints:
        return checkpoints.load_checkpointables(None, {"params": None, "optimizer": None, "clock": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)  # for the checkpoints of runs with as many, to be read as they were written
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        finish(command(whole, arguments.text, arguments.overrides))
        again = command(killed, arguments.text, arguments.overrides)
        steps = [kill_at_random(again, killed, draw) for _ in range(arguments.kills)]
        finish(again)
        print(f"killed after steps {steps}")
        print(f"metrics of {len(metrics(whole))} rows: {'equal' if metrics(whole) == metrics(killed) else 'DIFFERENT'}")
        pairs = jax.tree.leaves(jax.tree.map(np.array_equal, arrays(whole), arrays(killed)))
        print(f"arrays of the last checkpoint, bit by bit: {sum(pairs)} of {len(pairs)} equal")


if __name__ == "__main__":
    main()
