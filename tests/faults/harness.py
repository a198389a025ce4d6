"""Real runs that are broken on purpose: the workload, starting and killing it, and what is compared afterwards."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from orbax.checkpoint import v1 as ocp

from jaxlm.checkpoints.manifest import finished_steps
from jaxlm.reporting.goodput import goodput
from jaxlm.reporting.metrics import read_metrics

TIMES = ("time", "tokens_per_second", "slots_per_second", "step_seconds", "data_wait_seconds", "mfu")
INJECTED = Path(__file__).parent / "injected"
PATIENCE = 240.0  # seconds that anything may take on a busy machine
INTERVAL = 20  # steps between checkpoints
# Restarts are what takes time here: what has been compiled is kept. (The tests' conftest goes first: it compiles
# quickly.)
KEEP = {"JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/jaxlm/faults"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# processes x devices of each, and the mesh over them
LAYOUTS = {"1x2": (1, 2, {"data": 2}), "1x4": (1, 4, {"data": 2, "fsdp": 2}), "2x2": (2, 2, {"data": 2, "fsdp": 2}),
           "2x4": (2, 4, {"fsdp": 4, "tensor": 2}), "4x2": (4, 2, {"data": 4, "fsdp": 2})}


def write_workload(folder: Path, **changes: Any) -> Path:
    """Text and a run file of a tiny gpt with dropout, whose steps take some 50 ms here."""
    draw, words = random.Random(0), ["banana", "bean", "cabbage", "cocoa", "date"]
    lines = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(300)]
    (folder / "text.txt").write_text("\n".join([" ".join(words), *lines]), encoding="utf-8")
    settings = {
        "model": {"family": "gpt", "num_layers": 2, "num_heads": 8, "hidden_size": 64, "max_length": 64, "dropout": 0.1},
        "data": {"raw": str(folder / "text.txt"), "document": "line", "tokenizer": "characters", "validation": 0.1,
                 "sequence_length": 64, "global_batch_size": 16, "prepare_processes": 1},
        "train": {"steps": 120}, "optimizer": {"learning_rate": 1e-2}, "schedule": {"name": "constant", "warmup_steps": 2},
        "checkpoint": {"every_steps": INTERVAL}, "eval": {"every_steps": 50, "steps": 2},
        "logging": {"every_steps": 1, "tensorboard": False}, "generate": {"max_new_tokens": 2}, "devices": {"platform": "cpu"},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings[section][key] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def arguments_of(run_file: Path, run_dir: Path, layout: str = "1x2", *more: str) -> list[str]:
    """`train ...` of the workload on a layout."""
    processes, devices, mesh = LAYOUTS[layout]
    return ["train", str(run_file), f"run_dir={run_dir}", f"devices.count={devices}", "--processes", str(processes),
            *(f"mesh.{axis}={size}" for axis, size in mesh.items()), *more]


@dataclass
class Started:
    """`jaxlm ARGUMENTS` in a process of its own, whose output goes to a file."""

    arguments: list[str]
    log: Path
    faults: dict[str, Any] = field(default_factory=dict)  # see injected/sitecustomize.py

    def __post_init__(self) -> None:
        environment = KEEP | os.environ | {"PYTHONPATH": os.pathsep.join([str(INJECTED), os.environ.get("PYTHONPATH", "")]),
                                            "JAXLM_TEST_FAULTS": json.dumps(self.faults)}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.output = open(self.log, "ab")  # noqa: SIM115 (closed by end)
        self.process = subprocess.Popen([sys.executable, "-m", "jaxlm", *self.arguments], stdout=self.output, stderr=self.output,
                                        env=environment)

    def workers(self) -> list[int]:
        """The processes that train: those that a launcher has started, or itself."""
        children = [child for child in children_of(self.process.pid) if b"jaxlm" in command_of(child)]
        return children or [self.process.pid]

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(seconds)

    def wait_for(self, condition: Callable[[], Any], seconds: float = PATIENCE, pause: float = 0.002) -> bool:
        """Until the condition holds; False when it ended before. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"it never came: {self.text()[-2000:]}")
            time.sleep(pause)
        return True

    def end(self) -> None:
        """Kills what is left of it."""
        workers = self.workers() if self.process.poll() is None else []
        for process in (self.process.pid, *workers):
            kill(process)
        self.process.wait()
        wait_until(lambda: not any(map(is_running, workers)))
        self.output.close()

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ending(self) -> str:
        """What jaxlm said, and the last that anybody said."""
        said = [line for line in self.text().splitlines() if "jaxlm:" in line]
        return "\n".join([str(self.log), *said[-4:], self.text()[-2000:]])


def children_of(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def is_running(process: int) -> bool:
    """Whether it is there, and not only its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(process: int, number: int = signal.SIGKILL) -> None:
    """A signal to a process that may have ended meanwhile."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it never came")
        time.sleep(0.01)


# ---- what a run has left ---------------------------------------------------------------------------------------------

def last_step(run_dir: Path) -> int:
    """The last step that was logged."""
    return max((row["step"] for row in read_metrics(run_dir)), default=0)


def newest(run_dir: Path) -> int:
    """The step of the newest complete checkpoint."""
    return max(finished_steps(run_dir), default=0)


def half_written(run_dir: Path) -> list[Path]:
    """Folders of checkpoints that are being saved, or were."""
    return [path for path in run_dir.glob("checkpoints/*") if not (path / "manifest.json").exists()]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Every row of metrics, without the times."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run_dir)]


def arrays(run_dir: Path) -> dict[str, Any]:
    """All arrays of the newest checkpoint, on one device."""
    state, here = run_dir / "checkpoints" / str(newest(run_dir)) / "state", jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = ocp.checkpointables_metadata(state).metadata
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                          {name: saved[name] for name in ("params", "optimizer", "clock")})
    return jax.tree.map(np.asarray, ocp.load_checkpointables(state, wanted))


def differences(run_dir: Path, other: Path) -> list[str]:
    """In what two finished runs differ: the rows of metrics, and every array of the last checkpoint, bit by bit."""
    found = [f"row {mine} / {theirs}" for mine, theirs in zip(rows(run_dir), rows(other), strict=False) if mine != theirs]
    if len(rows(run_dir)) != len(rows(other)):
        found.append(f"{len(rows(run_dir))} rows / {len(rows(other))}")
    mine, theirs = (jax.tree_util.tree_flatten_with_path(arrays(folder))[0] for folder in (run_dir, other))
    return found + [jax.tree_util.keystr(path) for (path, leaf), (_, same) in zip(mine, theirs, strict=True)
                    if leaf.tobytes() != same.tobytes()]


def starts(run_dir: Path) -> int:
    """How often it was started, as far as it came to its first step."""
    return goodput(run_dir)["starts"]


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(path: Path, to: Path) -> Path:
    """A copy of a folder, in place of what was there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(path, to)
    return to


def recorded(folder: Path) -> Iterator[tuple[int, int, str]]:
    """(step, row, digest of its tokens) of every row that any process has put on its devices (fault `record`), in
    order."""
    seen = {tuple(json.loads(line)) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()}
    return iter(sorted(seen))
