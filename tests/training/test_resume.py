"""Runs that end early, in any way, and go on: on the same mesh to the same bits, on any other with the same
examples."""

import fcntl
import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import image

from jaxlm import config
from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.console.units import format_scientific
from jaxlm.data.corpus import Corpus
from jaxlm.errors import UserError
from jaxlm.models.model import Model
from jaxlm.reporting.metrics import read_metrics
from jaxlm.reporting.report import write_report
from jaxlm.settings import (
    CheckpointSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    Settings,
    TrainSettings,
    to_dict,
)
from jaxlm.tasks.find import find_task
from jaxlm.training.changes import refuse_rise
from jaxlm.training.feed import on_devices
from jaxlm.training.origin import origin_of
from jaxlm.training.run import train
from jaxlm.training.step import as_saved, from_saved, make_trainer

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
    batches = find_task(settings).training_batches([(Corpus(folder / "one"), 1.0)])
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
    """Line 13: the optimizer's tree has one more node with weight decay than without; the arrays are the same, to
    the bit."""
    model = ModelSettings(num_layers=2, num_heads=2, hidden_size=8, vocab_size=20, max_length=8)
    settings = Settings(model=model, optimizer=OptimizerSettings(name=name, weight_decay=before), train=TrainSettings(steps=4))
    trainers = []
    for decay in (before, after):
        own = replace(settings, optimizer=replace(settings.optimizer, weight_decay=decay))
        trainers.append(make_trainer(Model(model, own.train), own, meshes["one"]))
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype), trainers[0].layout.shapes)
    state = jax.device_put(state, trainers[0].layout.shardings)
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        checkpoints.save(as_saved(state), 2, {"settings": to_dict(settings), "mesh": {}}, None)
    with Checkpoints(tmp_path) as checkpoints:
        restored = from_saved(checkpoints.restore(2, trainers[1].saved))
    assert jax.tree.structure(restored) == jax.tree.structure(trainers[1].layout.shapes)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_another_rules_state_is_refused_by_its_arrays(meshes, tmp_path):
    """Insisted on with checkpoint.allow=[optimizer.name], what is missing is named."""
    model = ModelSettings(num_layers=2, num_heads=2, hidden_size=8, vocab_size=20, max_length=8)
    settings = Settings(model=model, optimizer=OptimizerSettings(name="sgd"), train=TrainSettings(steps=4))
    sgd = make_trainer(Model(model, settings.train), settings, meshes["one"])
    adam = replace(settings, optimizer=replace(settings.optimizer, name="adamw"))
    state = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), sgd.layout.shapes), sgd.layout.shardings)
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        checkpoints.save(as_saved(state), 2, {"settings": to_dict(settings), "mesh": {}}, None)
    message = r"2: not a checkpoint of this model \(its optimizer has"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(2, make_trainer(Model(model, adam.train), adam, meshes["one"]).saved)


def continued(folder: Path, run_file: Path, name: str, before: list[str], after: list[str]) -> Path:
    """A run of six steps, and what it becomes with other settings until step 12."""
    run_dir = folder / name
    quiet = ["logging.tensorboard=false", "checkpoint.every_steps=6"]
    train(config.load(run_file, [f"run_dir={run_dir}", "train.steps=6", *quiet, *before]))
    train(config.load(run_dir, ["train.steps=12", *after]))
    return run_dir


def test_what_a_resume_changes_is_told_kept_and_marked(folder, run_file, devices_are_there, capsys):
    """Line 13: one line each; the report does not claim a changed rate for the whole run."""
    run_dir = continued(folder, run_file, "changed", [], ["optimizer.learning_rate=0.005", "optimizer.b2=0.9"])
    told = capsys.readouterr().err.splitlines()
    assert "new weights (seed 0)" in told and any(line.startswith("resuming from step 6 of 12") for line in told)
    changes = [line for line in told if line.startswith("changed at step 6: ")]
    assert [line.partition(": ")[2] for line in changes] == [
        "train.steps 6 -> 12", "optimizer.learning_rate 0.01 -> 0.005", "optimizer.b2 0.95 -> 0.9"]
    rows = read_metrics(run_dir)
    [kept] = [row for row in rows if "changed" in row]
    assert kept["step"] == 6 and kept["changed"] == {
        "train.steps": [6, 12], "optimizer.learning_rate": [0.01, 0.005], "optimizer.b2": [0.95, 0.9]}
    rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    assert [rates[6], rates[7]] == pytest.approx([0.01, 0.005])  # the change is real, and so is its place

    report = write_report(run_dir).read_text()
    assert "learning rate 0.01 to step 6, then 0.005," in report
    assert "| from step 6 | train.steps 6 -> 12; optimizer.learning_rate 0.01 -> 0.005; optimizer.b2 0.95 -> 0.9 |" in report
    red = (0.839, 0.153, 0.157)
    assert (np.abs(image.imread(run_dir / "loss.png")[..., :3] - red).max(axis=-1) < 0.05).any()
    train(config.load(run_dir))  # from step 12, with what is there: nothing has changed
    assert [row for row in read_metrics(run_dir) if "changed" in row] == [kept]


DECAYING = ["schedule.name=cosine", "schedule.warmup_steps=0"]


def test_a_finished_decay_does_not_rise_again_unasked(folder, run_file, devices_are_there, capsys):
    """Line 13: train.steps raised after a finished cosine; both rates are named, by the formula."""
    last, next_one = (0.01 * 0.5 * (1 + math.cos(math.pi * step / steps)) for step, steps in ((5, 6), (6, 12)))
    with pytest.raises(UserError) as error:
        continued(folder, run_file, "decayed", DECAYING, [])
    said = str(error.value)
    assert format_scientific(last) in said and format_scientific(next_one) in said and "checkpoint.allow=[schedule]" in said
    assert len(said.splitlines()) == 1
    run_dir = folder / "decayed"
    assert max(row["step"] for row in read_metrics(run_dir)) == 6 and config.load(run_dir).train.steps == 6  # nothing was written
    train(config.load(run_dir, ["train.steps=12", "checkpoint.allow=[schedule]"]))
    assert {row["step"]: row["learning_rate"] for row in read_metrics(run_dir) if "loss" in row}[7] == pytest.approx(next_one)


@pytest.mark.parametrize(("before", "after", "refused"), [
    ({"name": "cosine"}, {"steps": 200}, True),
    ({"name": "linear", "final_ratio": 0.1}, {"steps": 200}, True),
    ({"name": "linear", "decay_steps": 50}, {"decay_steps": 100}, True),
    ({"name": "cosine"}, {"name": "constant", "steps": 200}, True),
    ({"name": "warmup_stable_decay", "decay_steps": 40}, {"steps": 200}, True),
    ({"name": "cosine", "final_ratio": 0.1}, {"rate": 2e-2}, True),
    ({"name": "cosine"}, {"name": "constant", "warmup_steps": 90, "steps": 200}, True),  # it comes back later
    ({"name": "constant"}, {"rate": 1e-3}, False),
    ({"name": "constant"}, {"rate": 2e-2}, False),  # has never come down
    ({"name": "cosine", "final_ratio": 0.1}, {"rate": 1e-3}, False),
    ({"name": "cosine"}, {"steps": 85}, False),  # shorter: it comes down sooner
    ({"name": "warmup_stable_decay", "decay_steps": 10}, {"steps": 200}, False),  # still at the peak
    ({"name": "inverse_square_root"}, {"steps": 200}, False),
])
def test_which_schedules_rise_again(before, after, refused, tmp_path):
    """Line 13, the kind: after 80 of 100 steps at a peak of 1e-2."""
    def settings(steps=100, rate=1e-2, **schedule):
        return Settings(schedule=ScheduleSettings(**schedule), optimizer=OptimizerSettings(learning_rate=rate),
                        train=TrainSettings(steps=steps))

    saved, own = to_dict(settings(**before)), settings(**before | after)
    if refused:
        with pytest.raises(UserError, match=r"^schedule: the learning rate had come down .* at step 80 .*allow=\[schedule\]'$"):
            refuse_rise(saved, own, 80, tmp_path)
    else:
        refuse_rise(saved, own, 80, tmp_path)
    refuse_rise(saved, replace(own, checkpoint=CheckpointSettings(allow=["schedule"])), 80, tmp_path)
    refuse_rise(saved, settings(**before), 80, tmp_path)


# ---- where the weights come from -------------------------------------------------------------------------------------

def test_a_start_says_where_its_weights_come_from(finished, devices_are_there, tmp_path, jaxlm, capsys):
    """Line 14: a new run_dir on the same text, one that is nearly an old one's name, one whose checkpoints are all
    damaged."""
    shutil.copytree(finished / "checkpoints", tmp_path / "quickstart" / "checkpoints")
    settings = config.load(finished, ["seed=3"])

    def origin(name: str, set_aside=(), rows=0) -> str:
        if rows:
            (tmp_path / name).mkdir()
            (tmp_path / name / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, rows + 1)))
        return origin_of(replace(settings, run_dir=str(tmp_path / name)), 0, None, list(set_aside), [])[0]

    assert origin("another") == "new weights (seed 3)"
    assert origin("quickstar") == (f"new weights (seed 3); {tmp_path / 'quickstart'} has checkpoints: to go on from them, "
                                   f"run_dir={tmp_path / 'quickstart'}")
    assert origin("quickstart_bert") == origin("quickstart2") == "new weights (seed 3)"  # meant to be others
    assert origin("damaged", ["12.damaged"]).endswith("checkpoints has no good checkpoint, only 12.damaged")
    assert origin("stopped", rows=7).endswith("; steps 1 to 7, which no checkpoint holds, are done again")

    for verb in ("evaluate", "generate"):  # they say which weights they take, beside their JSON
        assert jaxlm(verb, finished, "--json") == 0
        captured = capsys.readouterr()
        assert f"weights: step 12 ({finished / 'checkpoints' / '12'})" in captured.err.splitlines()
        assert all(json.loads(line) for line in captured.out.splitlines())


def test_padding_counts_as_no_token(folder, run_file, devices_are_there):
    """Line 15: tokens against the sequences themselves, also over a resume and on a mesh that cuts the rows. A pair of
    sentences has a row for itself: two thirds are padding."""
    run_dir = folder / "padded"
    padded = ["model.family=bert", "model.next_sentence=true", "model.vocab_size=40", "data.tokenizer=wordpiece",
              f"data.corpus={folder / 'pairs'}", "logging.tensorboard=false", "logging.every_steps=2"]
    train(config.load(run_file, [f"run_dir={run_dir}", "train.steps=5", *padded]))
    train(config.load(run_dir, ["train.steps=12", "devices.count=4", "mesh.data=2", "mesh.fsdp=2"]))
    settings = config.load(run_dir)
    corpus = Corpus(folder / "pairs")
    batches = find_task(settings).training_batches([(corpus, 1.0)])
    pad = corpus.tokenizer.special.pad
    real = np.cumsum([(batches.batch(step)["tokens"] != pad).sum() for step in range(12)])
    assert real[-1] < 0.5 * 12 * 8 * 32
    rows = [row for row in read_metrics(run_dir) if "tokens" in row]
    assert rows and all(row["tokens"] == real[row["step"] - 1] for row in rows)
    assert all(row["epoch"] == pytest.approx(row["step"] * 8 / batches.sequences_per_epoch) for row in rows)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["tokens"], summary["slots"]) == (real[-1], 12 * 8 * 32)
    assert summary["tokens_per_second"] / summary["slots_per_second"] == pytest.approx(real[-1] / (12 * 8 * 32))
    trained = [row for row in rows if "loss" in row]
    since = np.diff([0, *(row["tokens"] for row in trained)]) / np.diff([0, *(row["step"] for row in trained)])
    share = [row["tokens_per_second"] / row["slots_per_second"] for row in trained]
    alone = [number for number, row in enumerate(trained) if row["step"] in (2, 4, 8, 10, 12)]  # intervals between two rows
    np.testing.assert_allclose(np.array(share)[alone], since[alone] / (8 * 32), rtol=1e-6)
    assert f"{real[-1] / (12 * 8 * 32):.1%} of 3,072 slots; the rest is padding" in write_report(run_dir).read_text()
