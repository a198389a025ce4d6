"""Runs that end early, in any way, and go on: on the same mesh to the same bits, on any other with the same examples."""

import json
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.data.corpus import Corpus
from jaxlm.data.loading import training_batches
from jaxlm.errors import UserError
from jaxlm.reporting.metrics import read_metrics
from jaxlm.training.loop import train
from jaxlm.training.setup import on_devices

TIMES = ("tokens_per_second", "step_seconds", "data_wait_seconds")
LONG = ("train.steps=150", "checkpoint.every_steps=10", "eval.every_steps=25", "checkpoint.keep_last=3", "devices.count=8",
        "logging.tensorboard=false", "model.dropout=0.1")
PATIENCE = 120.0  # seconds that a process on a busy machine may take to get where it should be


def rows_without_times(run_dir: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run_dir)]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir) if "loss" in row]


def wait_for(condition, process) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def complete(run_dir: Path) -> list[int]:
    """Steps that have a finished checkpoint, from the names of the folders alone."""
    folders = run_dir.glob("checkpoints/*")
    return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


def half_written(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.glob("checkpoints/*") if not path.name.isdigit() and path.is_dir()]


@pytest.fixture
def undisturbed(folder, run_file, devices_are_there) -> Path:
    """150 steps with dropout on eight devices, in one go."""
    run_dir = folder / "undisturbed"
    if not run_dir.exists():
        train(config.load(run_file, [f"run_dir={run_dir}", *LONG]))
    return run_dir


def test_killed_twice_it_ends_as_if_it_had_not_been(undisturbed, folder, run_file, start_jaxlm, restore):
    run_dir, draw = folder / "killed", random.Random(1)

    process = start_jaxlm("train", run_file, f"run_dir={run_dir}", *LONG)
    wait_for(lambda: len(complete(run_dir)) >= 2, process)
    wait_for(lambda: half_written(run_dir), process)  # in the middle of a save
    process.kill()
    process.wait()
    assert complete(run_dir)

    process = start_jaxlm("train", run_dir)
    resumed_at = complete(run_dir)[-1]
    wait_for(lambda: complete(run_dir)[-1] > resumed_at, process)
    time.sleep(draw.random() / 5)  # anywhere
    process.kill()
    assert f"resuming from step {resumed_at} of 150" in process.communicate()[0]
    assert complete(run_dir)[-1] > resumed_at

    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 149, "lo')  # the worst moment to be killed
    train(config.load(run_dir))

    assert rows_without_times(run_dir) == rows_without_times(undisturbed)
    assert complete(run_dir) == complete(undisturbed)
    assert not half_written(run_dir)
    states = [jax.device_get(restore(directory)[1]) for directory in (run_dir, undisturbed)]
    assert int(states[0].step) == 150
    jax.tree.map(np.testing.assert_array_equal, *states)
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (run_dir, undisturbed)]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]


def test_another_mesh_gives_the_same_losses(folder, run_file, devices_are_there):
    whole, moved = folder / "whole", folder / "moved"
    train(config.load(run_file, [f"run_dir={whole}"]))
    for steps, mesh in ((4, ("devices.count=8", "mesh.fsdp=2", "mesh.tensor=2")), (8, ("devices.count=4", "mesh.tensor=4")),
                        (12, ("devices.count=1",))):
        train(config.load(run_file, [f"run_dir={moved}", f"train.steps={steps}", *mesh]))
    assert [row["step"] for row in read_metrics(moved) if "loss" in row] == list(range(1, 13))
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-5)


def test_every_mesh_gets_the_same_examples(folder, run_file, meshes, devices_are_there):
    settings = config.load(run_file, [f"run_dir={folder / 'whole'}"])
    corpus = [(Corpus(folder / "one"), 1.0)] if (folder / "one").exists() else None
    batches = training_batches(corpus, settings.data, family="gpt", seed=0)
    for mesh in meshes.values():
        with on_devices(batches, 5, 8, mesh, prefetch=2) as source:
            for step, batch in zip((5, 6, 7), source, strict=True):
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(batch), batches.batch(step))


def test_a_run_directory_refuses_another_run(undisturbed):
    for key, value in (("seed", 7), ("model.num_layers", 3), ("train.steps", 10)):
        with pytest.raises(UserError, match=f"^{key}={value}: the checkpoints in .*{undisturbed.name}"):
            train(config.load(undisturbed, [f"{key}={value}"]))
    with pytest.raises(UserError, match=r"^data\.corpus: not the text"):
        train(config.load(undisturbed, ["data.raw=null", f"data.corpus={{{undisturbed.parent / 'one'}: 2.0}}"]))


# ---- several processes -----------------------------------------------------------------------------------------------

def test_two_processes_equal_one_device(folder, run_file, start_jaxlm, devices_are_there, jaxlm, capsys):
    """Heads split over both, then, from the checkpoint of that, parameters and gradient pieces."""
    one, two = folder / "one_process", folder / "two_processes"
    if not one.exists():
        train(config.load(run_file, [f"run_dir={one}"]))
    for overrides in (("train.steps=8", "mesh.tensor=8"), ("mesh.data=2", "mesh.fsdp=4", "data.global_batch_size=8")):
        process = start_jaxlm("train", run_file, "--processes", 2, f"run_dir={two}", "devices.count=4", *overrides)
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, output
        assert output.count("2 process(es)") == 1  # only one of them speaks
    assert "resuming from step 8 of 12" in output
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    assert (two / "samples.txt").read_text()
    summary = json.loads((two / "summary.json").read_text())
    assert summary["devices"] == 8
    assert jaxlm("evaluate", two, "devices.count=1", "mesh.data=1", "mesh.fsdp=1", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)


def children(process_id: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_when_one_process_dies_all_end(folder, run_file, start_jaxlm):
    run_dir = folder / "orphans"
    process = start_jaxlm("train", run_file, "--processes", 2, f"run_dir={run_dir}", "train.steps=100000")
    wait_for(lambda: read_metrics(run_dir), process)
    first, second = children(process.pid)
    os.kill(second, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert not Path(f"/proc/{first}").exists()
