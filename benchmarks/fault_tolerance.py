"""What it costs to be safe: asynchronous saves, verified restores, and the guards around every step.

    python benchmarks/fault_tolerance.py saves [--hidden-size 512] [--layers 8] [--steps 12]  # stall, bandwidths
    python benchmarks/fault_tolerance.py memory [--processes 2]  # host memory of each process
    python benchmarks/fault_tolerance.py guards --rounds 60 --steps 2 [--batch-size 32]  # step time with and without
    python benchmarks/fault_tolerance.py compiled --target v5p:2x2x1 --config configs/gpt2_124m.yaml  # programs

All but the last on emulated CPU devices, whose memory is the host's. Ratios are of one run, alternating.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxlm import config
from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.planning.lowering import compile_step, lay
from jaxlm.planning.targets import find_target
from jaxlm.safety.launcher import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from jaxlm.safety.preemption import Preemption
from jaxlm.safety.watch import Watch
from jaxlm.settings import (
    CheckpointSettings,
    DataSettings,
    DevicesSettings,
    GuardSettings,
    MeshSettings,
    ModelSettings,
    Settings,
    to_dict,
)
from jaxlm.storage.files import sizes_below
from jaxlm.training.bench import random_batch
from jaxlm.training.setup import lay_mesh
from jaxlm.training.step import Trainer, as_saved, start


def settings_of(arguments: argparse.Namespace, **changes: Any) -> Settings:
    model = ModelSettings(num_layers=arguments.layers, num_heads=8, hidden_size=arguments.hidden_size, vocab_size=8192,
                          max_length=128)
    return Settings(model=model, data=DataSettings(global_batch_size=arguments.batch_size, sequence_length=128),
                    devices=DevicesSettings(platform="cpu", count=arguments.devices), **changes)


def prepared(settings: Settings) -> tuple[Trainer, Any, Any]:
    """The run, its first state and a batch."""
    settings, mesh = lay_mesh(settings)
    trainer = start(settings, mesh)
    with jax.set_mesh(mesh):
        return trainer, trainer.init(0), random_batch(settings, mesh)


def metadata(settings: Settings, trainer: Trainer) -> dict[str, Any]:
    return {"settings": to_dict(settings), "mesh": dict(trainer.mesh.shape)}


def state_bytes(state: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def timed(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    jax.block_until_ready(action())
    return time.monotonic() - began


# ---- saves -----------------------------------------------------------------------------------------------------------

def saves(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments, mesh=MeshSettings(fsdp=arguments.devices))
    trainer, state, batch = prepared(settings)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, jax.set_mesh(trainer.mesh):
        step = trainer.step.lower(state, batch).compile()
        plain, beside, stalls, seconds, alone = [], [], [], [], []
        with Checkpoints(name, CheckpointSettings(keep_last=1)) as checkpoints:
            for number in range(1, 2 * arguments.rounds, 2):
                for _ in range(arguments.steps):
                    began = time.monotonic()
                    state, metrics = step(state, batch)
                    jax.block_until_ready(metrics)
                    plain.append(time.monotonic() - began)
                began = time.monotonic()
                checkpoints.save(as_saved(state), number, metadata(settings, trainer), None)
                stalls.append(time.monotonic() - began)
                while not checkpoints._saving.done():
                    since = time.monotonic()
                    state, metrics = step(state, batch)
                    jax.block_until_ready(metrics)
                    beside.append(time.monotonic() - since)
                seconds.append(time.monotonic() - began)
                checkpoints.wait()
                began = time.monotonic()
                checkpoints.save(as_saved(state), number + 1, metadata(settings, trainer), None)
                checkpoints.wait()
                alone.append(time.monotonic() - began)
        folder = Path(name) / "checkpoints" / str(2 * arguments.rounds)
        on_disk = sum((folder / file).stat().st_size for file in sizes_below(folder))
        copies = [timed(lambda: copied(folder, Path(name) / "copy")) for _ in range(arguments.rounds)]
        with Checkpoints(name) as checkpoints:
            checks = [timed(lambda: checkpoints.choose(None)) for _ in range(arguments.rounds)]
            restores = [timed(lambda: checkpoints.restore(2 * arguments.rounds, trainer.saved)) for _ in range(arguments.rounds)]
    usual, size = statistics.median(plain), state_bytes(state)
    stall, whole, single, copy, check, restore = map(statistics.median, (stalls, seconds, alone, copies, checks, restores))
    print(f"state of {size / 2**20:,.0f} MiB, {on_disk / 2**20:,.0f} on disk; step {1000 * usual:,.0f} ms")
    print(f"the step waits {1000 * stall:,.0f} ms for a save: {stall / usual:.2f} steps")
    print(f"steps while it is written: {statistics.median(beside) / usual if beside else float('nan'):.2f} times as long")
    print(f"save, complete and digested: {whole:.2f} s beside the steps; alone {single:.2f} s, {size / single / 2**20:,.0f} "
          f"MiB/s, {single / copy:.2f} times a plain copy with fsync ({on_disk / copy / 2**20:,.0f} MiB/s)")
    print(f"restore: {check:.2f} s to check every byte, {restore:.2f} s to read, together {(check + restore) / copy:.2f} times "
          "that copy")


def copied(folder: Path, to: Path) -> None:
    """A plain copy that is on disk when it is done, as a checkpoint is."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    for name in sizes_below(to):
        with open(to / name, "rb") as file:
            os.fsync(file.fileno())


# ---- memory ----------------------------------------------------------------------------------------------------------

def memory(arguments: argparse.Namespace) -> None:
    """Each process of an fsdp run saves and restores, and says how much memory it had at most."""
    if arguments.worker:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        environment = os.environ | {COORDINATOR: "127.0.0.1:23987", NUM_PROCESSES: str(arguments.processes)}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment | {PROCESS_ID: str(number)})
            for number in range(arguments.processes)]
        for number, process in enumerate(processes):
            figures = json.loads(process.communicate()[0].splitlines()[-1])
            print(f"process {number}: state of the whole model {figures['whole']:,.0f} MiB, its own part {figures['own']:,.0f}; "
                  f"resident before saving {figures['before']:,.0f}, at most while saving {figures['saving']:,.0f}, and while "
                  f"restoring {figures['restoring']:,.0f}")


def worker(arguments: argparse.Namespace) -> None:
    def most() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    settings = settings_of(arguments, mesh=MeshSettings(fsdp=-1))
    trainer, state, _ = prepared(settings)
    own = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards) / 2**20
    figures = {"whole": state_bytes(state) / 2**20, "own": own, "before": most()}
    with jax.set_mesh(trainer.mesh), Checkpoints(arguments.worker, CheckpointSettings()) as checkpoints:
        checkpoints.save(as_saved(state), 1, metadata(settings, trainer), None)
        checkpoints.wait()
        figures["saving"] = most()
        jax.tree.map(lambda leaf: leaf.delete(), state)
        jax.block_until_ready(checkpoints.restore(checkpoints.choose(None), trainer.saved))
        figures["restoring"] = most()
    print(json.dumps(figures))


# ---- guards ----------------------------------------------------------------------------------------------------------

@contextmanager
def without_guards() -> Iterator[None]:
    """Steps that are traced meanwhile take every step as good, and remember nothing."""
    with (mock.patch("jaxlm.training.step.is_good", lambda *_: jnp.bool_(True)),
          mock.patch("jaxlm.training.step.remembered", lambda recent, *_: recent)):
        yield


def guards(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments, mesh=MeshSettings(data=arguments.devices), guards=GuardSettings(spike_sigma=6.0))
    with without_guards():
        trainer, state, batch = prepared(settings)
        with jax.set_mesh(trainer.mesh):
            bare = trainer.step.lower(state, batch).compile()
    with jax.set_mesh(trainer.mesh), tempfile.TemporaryDirectory() as name, Watch(name) as watch, Preemption() as preemption:
        guarded = start(settings, trainer.mesh).step.lower(state, batch).compile()

        def plain(state: Any) -> Any:
            pending = None
            for _ in range(arguments.steps):
                state, metrics = bare(state, batch)
                jax.block_until_ready(pending)
                pending = metrics
            return jax.block_until_ready(state)

        def watched(state: Any) -> Any:
            pending = None
            for number in range(arguments.steps):
                with watch.phase(f"step {number}", 60.0):
                    state, metrics = guarded(state, batch)
                    with watch.phase(f"waiting for step {number}"):
                        jax.block_until_ready(pending)
                    if not preemption.may_go_on():
                        raise SystemExit("told to stop")
                if pending is not None and int(pending["skipped_in_a_row"]) > 10:
                    raise SystemExit("bad numbers")
                pending = metrics
            return jax.block_until_ready(state)

        times: dict[str, list[float]] = {"plain": [], "watched": []}
        for round_ in range(arguments.rounds + 1):
            for loop in (plain, watched) if round_ % 2 else (watched, plain):
                began = time.monotonic()
                state = loop(state)
                if round_:
                    times[loop.__name__].append((time.monotonic() - began) / arguments.steps)
    ratios = sorted(mine / other for mine, other in zip(times["watched"], times["plain"], strict=True))
    middle, spread = len(ratios) / 2, 0.98 * len(ratios)**0.5  # the median is between these two ranks 19 times of 20
    low, high = ratios[max(0, int(middle - spread))], ratios[min(len(ratios) - 1, int(middle + spread))]
    without, with_ = (1000 * statistics.median(times[name]) for name in ("plain", "watched"))
    print(f"step {without:.1f} ms without guards, {with_:.1f} with: median ratio {statistics.median(ratios):.4f} of "
          f"{len(ratios)} rounds of {arguments.steps} steps (95 % interval of the median: {low:.4f} to {high:.4f})")


def compiled(arguments: argparse.Namespace) -> None:
    """The step for a TPU or GPU that is not here (needs the compiler's package, and jax 0.12 to read its programs)."""
    target, settings = find_target(arguments.target), config.load(arguments.config, arguments.overrides)
    for name, guarded in (("without", without_guards), ("with", nullcontext)):
        with guarded():
            step = compile_step(settings, lay(settings, target)[0])
        text = step.as_text()
        entry = text[text.index("\nENTRY"):]
        moved = (step.cost_analysis() or {}).get("bytes accessed")
        print(f"{name} guards: {step.memory_analysis().temp_size_in_bytes / 2**20:,.2f} MiB of temporary memory, "
              f"{entry.count(' fusion(')} fusions and {entry.count(' copy(')} copies outside of loops"
              + (f", {moved / 1e9:.2f} GB read and written, loops counted once" if moved else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("saves", "memory", "guards", "compiled"))
    parser.add_argument("overrides", nargs="*", help="compiled: keys of the config, as for `jaxlm`")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 128 tokens a step")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder of temporary files)")
    parser.add_argument("--target", help="compiled: as for `jaxlm plan`")
    parser.add_argument("--config")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    {"saves": saves, "memory": memory, "guards": guards, "compiled": compiled}[arguments.what](arguments)


if __name__ == "__main__":
    main()
