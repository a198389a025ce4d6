"""What the tests of whole runs share: a little text, a run file for a tiny model, and `jaxlm`, here or in its own
process."""

import functools
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from jaxlm import cli, config
from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.models.model import Model
from jaxlm.parallel.mesh import make_mesh
from jaxlm.runtime import processes
from jaxlm.settings import MeshSettings
from jaxlm.training.step import Trainer, TrainState, from_saved, make_trainer

NUM_DOCUMENTS, ROWS, LENGTH = 300, 8, 32


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a session's runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def run_file(folder: Path) -> Path:
    """A tiny gpt on 8 heads, one sequence for each of 8 devices, over documents that are shorter than a sequence or
    longer."""
    draw = random.Random(0)
    words = ["banana", "bean", "cabbage", "cocoa", "date"]  # few letters, unevenly used: learnt within a few steps
    for name in ("one", "two"):
        lines = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(NUM_DOCUMENTS)]
        (folder / f"{name}.txt").write_text("\n".join([" ".join(words), *lines]), encoding="utf-8")
    settings = {
        "model": {"family": "gpt", "num_layers": 2, "num_heads": 8, "hidden_size": 32, "max_length": LENGTH},
        "data": {"raw": str(folder / "one.txt"), "corpus": str(folder / "one"), "document": "line", "tokenizer": "characters",
                 "validation": 0.1, "sequence_length": LENGTH, "global_batch_size": ROWS, "prepare_processes": 1},
        "train": {"steps": 12}, "optimizer": {"learning_rate": 1e-2}, "schedule": {"name": "constant", "warmup_steps": 2},
        "checkpoint": {"every_steps": 4}, "eval": {"every_steps": 6}, "logging": {"every_steps": 1},
        "generate": {"max_new_tokens": 4}, "devices": {"platform": "cpu", "count": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture
def devices_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """devices.count of this process's eight devices are used; a backend starts only once."""
    monkeypatch.setattr(processes, "initialize", lambda settings: jax.devices()[: settings.count or 1])


@pytest.fixture
def jaxlm(devices_are_there: None) -> Callable[..., int]:
    """`jaxlm("train", config, "a.b=c")` in this process; its exit code."""
    return lambda *arguments: cli.main([str(argument) for argument in arguments])


@pytest.fixture
def finished(folder: Path, run_file: Path, jaxlm: Callable[..., int]) -> Path:
    """The run directory of a gpt trained for 12 steps on one device; the first test that asks trains it."""
    run_dir = folder / "finished"
    if not run_dir.exists():
        assert jaxlm("train", run_file, f"run_dir={run_dir}") == 0
    return run_dir


@pytest.fixture
def start_jaxlm(folder: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """`start_jaxlm("train", config, "a.b=c")`: a process of its own. Ended with the test."""
    start = functools.partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = []

    def start_one(*arguments: Any) -> subprocess.Popen:
        started.append(start([sys.executable, "-m", "jaxlm", *map(str, arguments)]))
        return started[-1]

    yield start_one
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def restore() -> Callable[..., tuple[Trainer, TrainState]]:
    """`restore(run_dir)`: the newest checkpoint's state on one device, and the run's functions there."""
    def restore_one(run_dir: Path) -> tuple[Trainer, TrainState]:
        settings = config.load(run_dir)
        trainer = make_trainer(Model(settings.model, settings.train), settings, make_mesh(MeshSettings(), jax.devices()[:1]))
        with Checkpoints(run_dir) as checkpoints:
            return trainer, from_saved(checkpoints.restore(checkpoints.choose(None), trainer.saved))

    return restore_one
