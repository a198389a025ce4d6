"""Runs that end early, in any way, and go on: on the same mesh to the same bits, on any other with the same examples."""

import fcntl
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.data.corpus import Corpus
from jaxlm.data.loading import training_batches
from jaxlm.errors import UserError
from jaxlm.models.model import Model
from jaxlm.reporting.metrics import read_metrics
from jaxlm.settings import CheckpointSettings, ModelSettings, OptimizerSettings, Settings, TrainSettings, to_dict
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.loop import train
from jaxlm.training.setup import on_devices
from jaxlm.training.step import make_trainer

TIMES = ("time", "tokens_per_second", "slots_per_second", "step_seconds", "data_wait_seconds")
STEPS = 60
LONG = (f"train.steps={STEPS}", "checkpoint.every_steps=6", "checkpoint.keep_last=3", "eval.every_steps=20", "eval.steps=2",
        "model.dropout=0.1", "devices.count=2", "logging.tensorboard=false")
ENDLESS = ("train.steps=100000", "eval.every_steps=100000", "checkpoint.every_steps=100000")
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
    """Steps that have a finished checkpoint, from the names of the files alone."""
    return sorted(int(path.parent.name) for path in run_dir.glob("checkpoints/*/manifest.json"))


def half_written(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.glob("checkpoints/*") if not (path / "manifest.json").exists()]


@pytest.fixture
def undisturbed(folder, run_file, devices_are_there) -> Path:
    """A run with dropout on two devices, in one go."""
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
    assert f"resuming from step {resumed_at} of {STEPS}" in process.communicate()[0]
    assert complete(run_dir)[-1] > resumed_at

    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 59, "lo')  # a line may be cut short, too
    train(config.load(run_dir))

    assert rows_without_times(run_dir) == rows_without_times(undisturbed)
    assert complete(run_dir) == complete(undisturbed)
    assert not half_written(run_dir)
    states = [jax.device_get(restore(directory)[1]) for directory in (run_dir, undisturbed)]
    assert int(states[0].step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, *states)
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (run_dir, undisturbed)]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]
    with Checkpoints(run_dir) as checkpoints:  # time counts from the first start on
        times = [checkpoints.metadata(step)["wall_seconds"] for step in checkpoints.steps]
    assert times == sorted(times) and summaries[0]["wall_seconds"] > times[-1]


def test_another_mesh_gives_the_same_losses(finished, folder, run_file, devices_are_there):
    run_dir = folder / "moved"
    for steps, mesh in ((4, ("devices.count=8", "mesh.fsdp=2", "mesh.tensor=2")), (8, ("devices.count=4", "mesh.tensor=4")),
                        (12, ("devices.count=1",))):
        train(config.load(run_file, [f"run_dir={run_dir}", f"train.steps={steps}", *mesh]))
    assert [row["step"] for row in read_metrics(run_dir) if "loss" in row] == list(range(1, 13))
    np.testing.assert_allclose(losses(run_dir), losses(finished), rtol=1e-5)


@pytest.mark.slow
def test_a_pipeline_and_one_device_take_over_from_each_other(folder, run_file, jaxlm, capsys):
    """Layers stand in another order in an interleaved pipeline; cut sequences in another order, too."""
    deep, run_dir = ["model.num_layers=4", "data.global_batch_size=16"], folder / "pipeline"
    want = folder / "deep"
    train(config.load(run_file, [f"run_dir={want}", *deep]))
    meshes = (
        ["devices.count=8", "mesh.stage=2", "mesh.data=2", "mesh.context=2", "train.stage_repeats=2",
         "train.gradient_accumulation=4"],
        ["devices.count=1"], ["devices.count=4", "mesh.stage=4", "train.gradient_accumulation=8"])
    for steps, mesh in zip((4, 8, 12), meshes, strict=True):
        train(config.load(run_file, [f"run_dir={run_dir}", f"train.steps={steps}", *deep, *mesh]))
    np.testing.assert_allclose(losses(run_dir), losses(want), rtol=1e-4)  # sums in another order, twelve steps long
    assert [row["val_loss"] for row in read_metrics(run_dir) if "val_loss" in row][-1] == pytest.approx(
        read_metrics(want)[-1]["val_loss"], rel=1e-4)
    texts = []
    for directory in (run_dir, want):
        assert jaxlm("generate", directory, "generate.temperature=0", "--json") == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0] == texts[1]


def test_every_mesh_gets_the_same_examples(finished, folder, meshes):
    settings = config.load(finished)
    batches = training_batches([(Corpus(folder / "one"), 1.0)], settings.data, family="gpt", seed=0)
    for mesh in meshes.values():
        with on_devices(batches, 5, 8, mesh, prefetch=2) as source:
            for step, batch in zip((5, 6, 7), source, strict=True):
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(batch), batches.batch(step))


def test_a_run_directory_refuses_another_run(finished, devices_are_there):
    for key, value in (("seed", 7), ("model.num_layers", 3), ("train.steps", 10)):
        with pytest.raises(UserError, match=f"^{key}={value}: the checkpoints in .*{finished.name}"):
            train(config.load(finished, [f"{key}={value}"]))
    with pytest.raises(UserError, match=r"^data\.corpus: not the text"):
        train(config.load(finished, ["data.raw=null", f"data.corpus={{{finished.parent / 'one'}: 2.0}}"]))


def test_two_runs_cannot_share_a_directory(finished, devices_are_there):
    with open(finished / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `jaxlm train` is at work"):
            train(config.load(finished))
    train(config.load(finished))


# ---- several processes -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_processes_go_on_where_one_device_stopped(finished, folder, run_file, start_jaxlm, jaxlm, capsys):
    run_dir = folder / "two_processes"
    train(config.load(run_file, [f"run_dir={run_dir}", "train.steps=4"]))
    process = start_jaxlm("train", run_file, "--processes", 2, f"run_dir={run_dir}", "devices.count=4", "mesh.tensor=8")
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert output.count("resuming from step 4 of 12") == 1  # one of them speaks
    np.testing.assert_allclose(losses(run_dir), losses(finished), rtol=1e-5)
    assert (run_dir / "samples.txt").exists() and json.loads((run_dir / "summary.json").read_text())["devices"] == 8

    assert jaxlm("evaluate", run_dir, "devices.count=1", "mesh.tensor=1", "--json") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["val_loss"] == pytest.approx(read_metrics(run_dir)[-1]["val_loss"], rel=1e-5)


def children(process_id: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_when_one_process_dies_the_others_end(finished, folder, run_file, start_jaxlm):
    run_dir = folder / "one_dies"
    launcher = start_jaxlm("train", run_file, "--processes", 2, f"run_dir={run_dir}", *ENDLESS, "devices.count=4", "mesh.fsdp=8")
    wait_for(lambda: len(losses(run_dir)) > 4, launcher)
    np.testing.assert_allclose(losses(run_dir)[:4], losses(finished)[:4], rtol=1e-5)
    os.kill(children(launcher.pid)[1], signal.SIGKILL)
    launcher.communicate(timeout=PATIENCE)  # reads to the end, which comes when the last of them has ended
    assert launcher.returncode == 1


def test_no_process_outlives_the_one_that_started_them(folder, run_file, start_jaxlm):
    run_dir = folder / "launcher_dies"
    launcher = start_jaxlm("train", run_file, "--processes", 2, f"run_dir={run_dir}", *ENDLESS)
    wait_for((run_dir / ".lock").exists, launcher)  # both have joined
    launcher.kill()
    launcher.communicate(timeout=PATIENCE)


# ---- settings that change at a resume --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lamb", "sgd", "muon"))])
@pytest.mark.parametrize(("before", "after"), [(0.0, 0.1), (0.1, 0.0)])
def test_weight_decay_may_come_and_go(name, before, after, meshes, tmp_path):
    """Line 13: the optimizer's tree has one more node with weight decay than without; the arrays are the same, to the bit."""
    model = ModelSettings(num_layers=2, num_heads=2, hidden_size=8, vocab_size=20, max_length=8)
    settings = Settings(model=model, optimizer=OptimizerSettings(name=name, weight_decay=before), train=TrainSettings(steps=4))
    trainers = []
    for decay in (before, after):
        own = replace(settings, optimizer=replace(settings.optimizer, weight_decay=decay))
        trainers.append(make_trainer(Model(model, own.train), own, meshes["one"]))
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype), trainers[0].state_shapes)
    state = jax.device_put(state, trainers[0].state_shardings)
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        checkpoints.save(state, 2, {"settings": to_dict(settings), "mesh": {}}, None)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(2, trainers[1])
    assert jax.tree.structure(restored) == jax.tree.structure(trainers[1].state_shapes)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_another_rules_state_is_refused_by_its_arrays(meshes, tmp_path):
    """Insisted on with checkpoint.allow=[optimizer.name], what is missing is named."""
    model = ModelSettings(num_layers=2, num_heads=2, hidden_size=8, vocab_size=20, max_length=8)
    settings = Settings(model=model, optimizer=OptimizerSettings(name="sgd"), train=TrainSettings(steps=4))
    sgd = make_trainer(Model(model, settings.train), settings, meshes["one"])
    adam = replace(settings, optimizer=replace(settings.optimizer, name="adamw"))
    state = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), sgd.state_shapes), sgd.state_shardings)
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        checkpoints.save(state, 2, {"settings": to_dict(settings), "mesh": {}}, None)
    message = r"2: not a checkpoint of this model \(its optimizer has"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(2, make_trainer(Model(model, adam.train), adam, meshes["one"]))
