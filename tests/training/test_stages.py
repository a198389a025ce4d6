"""Runs in stages: one run, wherever it is stopped; each stage's batches, schedule and place; what no stage can say."""

import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxlm import config
from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.data.corpus import Corpus
from jaxlm.errors import UserError
from jaxlm.reporting.metrics import read_metrics
from jaxlm.reporting.report import write_report
from jaxlm.reporting.runs import read_run
from jaxlm.safety.supervisor import _is_finished
from jaxlm.settings import dump
from jaxlm.stages import stages_of
from jaxlm.tasks.find import find_task
from jaxlm.training.loop import Loop
from jaxlm.training.run import train
from jaxlm.training.stages import data_seed, lay_stages, open_stages

TIMES = ("time", "tokens_per_second", "slots_per_second", "step_seconds", "data_wait_seconds")
STAGES = [{"train.steps": 7, "data.sequence_length": 16, "data.global_batch_size": 16},
          {"train": {"steps": 5}, "data": {"sequence_length": 32, "global_batch_size": 8}, "model.dropout": 0.1,
           "schedule.warmup_steps": 1}]


@pytest.fixture
def staged(folder, run_file) -> Path:
    """The run file in two stages: short sequences, then long ones with dropout and a schedule of their own."""
    path = folder / "staged.yaml"
    values = yaml.safe_load(run_file.read_text()) | {"stages": STAGES}
    del values["train"]["steps"]
    values["schedule"] = {"name": "linear"}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def undisturbed(folder, staged, devices_are_there) -> Path:
    """That run in one go, on two devices."""
    run_dir = folder / "staged"
    if not run_dir.exists():
        train(config.load(staged, [f"run_dir={run_dir}", "devices.count=2"]))
    return run_dir


def rows(run_dir: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run_dir)]


def step_rows(run_dir: Path) -> list[dict]:
    return [row for row in rows(run_dir) if "loss" in row]


def state_of(run_dir: Path) -> dict:
    """Every array of the newest checkpoint, by its place."""
    with Checkpoints(run_dir) as checkpoints:
        step, everywhere = checkpoints.choose(None), jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = checkpoints.shapes(step)
        wanted = {place: jax.ShapeDtypeStruct(shape, np.float32, sharding=everywhere) for place, shape in shapes.items()}
        return jax.device_get(checkpoints.read(step, wanted))


def stop_at(monkeypatch: pytest.MonkeyPatch, method: str, step: int) -> None:
    """Ends the process's run, as a kill would, when the loop does `method` for a step."""
    plain = getattr(Loop, method)

    def stopping(self, of, *rest):
        last = [of, *rest][-1]
        if getattr(last, "step", last) == step or of == step:
            raise KeyboardInterrupt
        return plain(self, of, *rest)
    monkeypatch.setattr(Loop, method, stopping)


def assert_same(run_dir: Path, other: Path) -> None:
    assert rows(run_dir) == rows(other)
    jax.tree.map(np.testing.assert_array_equal, state_of(run_dir), state_of(other))


# ------------------------------------------------------------------------------------------------------------- one run

def test_stages_are_one_curve(undisturbed, staged):
    steps = step_rows(undisturbed)
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["stage"] for row in steps] == [1] * 7 + [2] * 5
    assert [row["tokens"] for row in steps] == list(itertools.accumulate([16 * 16] * 7 + [8 * 32] * 5))
    assert all(before["epoch"] < after["epoch"] for before, after in itertools.pairwise(steps))
    assert steps[-1]["loss"] < steps[0]["loss"]
    rates = [row["learning_rate"] for row in steps]
    np.testing.assert_allclose(rates[:7], [0.01 * (1 - step / 12) for step in range(7)], rtol=1e-5)  # the run's, over all 12
    np.testing.assert_allclose(rates[7:], [0.005, *(0.01 * (1 - step / 4) for step in range(4))], rtol=1e-5)  # its own
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["steps"], summary["length"]) == (12, "stages of train.steps=7, train.steps=5")
    assert _is_finished(config.load(undisturbed), lambda run_dir: 12)
    settings = config.load(undisturbed)
    assert [each.train.steps for each in stages_of(settings)] == [7, 5]
    report = write_report(undisturbed).read_text()
    line = next(line for line in report.partition("## Stages")[2].splitlines() if line.startswith("| 2 |"))
    assert "train.steps 5" in line and "data.sequence_length 32" in line and "to step 12" in line
    assert read_run(undisturbed).config["data.sequence_length"] == 32


@pytest.mark.parametrize(("method", "step"), [
    ("_finish", 3), ("_pause", 7), ("_next", 8), ("_finish", 10)],
    ids=["in the first", "before the first is saved", "between the two", "in the second"])
def test_stopped_anywhere_it_ends_as_if_it_had_not_been(undisturbed, folder, staged, monkeypatch, method, step):
    run_dir = folder / f"staged{method}{step}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, method, step)
        train(config.load(staged, [f"run_dir={run_dir}", "devices.count=2"]))
    assert max((row["step"] for row in rows(run_dir)), default=0) < 12
    train(config.load(run_dir))
    assert_same(run_dir, undisturbed)


def test_each_stage_has_batches_of_its_own(undisturbed, staged, folder, devices_are_there):
    """A function of corpus, seed, stage and step in it; the first is what a run without stages has."""
    settings = config.load(staged, [f"run_dir={folder / 'unused'}"])
    stages = open_stages(settings, lay_stages(settings, jax.devices()[:1]))
    assert [(stage.start, stage.stop) for stage in stages] == [(0, 7), (7, 12)]
    alone = config.load(staged, ["stages=[]", "data.sequence_length=16", "data.global_batch_size=16"])
    plain = find_task(alone).training_batches([(Corpus(folder / "one"), 1.0)])
    for step in (0, 6):
        np.testing.assert_array_equal(stages[0].batches.batch(step)["tokens"], plain.batch(step)["tokens"])
    twice = config.load(staged, ["stages=[{train.steps: 3}, {train.steps: 3}]"])
    first, second = (stage.batches.batch(0)["tokens"] for stage in open_stages(twice, lay_stages(twice, jax.devices()[:1])))
    assert not np.array_equal(first, second)
    assert len({data_seed(0, number) for number in range(1, 100)}) == 99 and data_seed(5, 1) == 5


def test_the_optimizers_state_goes_on_unless_its_rule_is_another(staged, folder, devices_are_there, capsys):
    run_dir = folder / "another_rule"
    said = ["devices.count=1", "stages=[{train.steps: 3}, {train.steps: 2, optimizer.name: lion, optimizer.learning_rate: 1e-3}]"]
    train(config.load(staged, [f"run_dir={run_dir}", *said]))
    assert "optimizer.name=lion: its state begins anew; that of adamw is left behind" in capsys.readouterr().err
    assert [row["step"] for row in step_rows(run_dir)] == [1, 2, 3, 4, 5]
    train(config.load(run_dir, ["stages.2.train.steps=3", "checkpoint.allow=[schedule]"]))  # in the second, its own goes on
    assert "begins anew" not in capsys.readouterr().err


def test_a_run_can_be_given_stages_but_not_another_past(undisturbed, staged, folder, run_file, devices_are_there):
    run_dir = folder / "given_stages"
    base = ["devices.count=1", "schedule.warmup_steps=0"]
    train(config.load(run_file, [f"run_dir={run_dir}", "train.steps=4", *base]))
    path = run_dir / "config.yaml"
    settings = config.load(path, ["train.steps=null", "stages=[{train.steps: 6}, {train.steps: 2, data.sequence_length: 16}]"])
    train(settings)
    assert [row["step"] for row in step_rows(run_dir)] == list(range(1, 9))
    for stages, said in (("[{train.steps: 5}, {train.steps: 9, data.sequence_length: 16}]",
                          "is of stage 2, which began after step 6 and begins after step 5 now"),
                         ("[{train.steps: 50}]", "is of stage 2, which began after step 6 and is not there any more"),
                         ("[{train.steps: 6}, {train.steps: 1, data.sequence_length: 16}]", "stages.2: ends after step 7 now"),
                         ("[{train.steps: 6}, {train.steps: 9, data.sequence_length: 8}]",
                          "data.sequence_length=8: the checkpoints")):
        with pytest.raises(UserError, match=said):
            train(config.load(run_dir, [f"stages={stages}"]))


@pytest.mark.slow
def test_on_eight_devices_and_on_a_mesh_for_each_stage_the_losses_are_the_same(undisturbed, staged, folder, devices_are_there):
    meshes = {"eight": ["devices.count=8", "mesh.fsdp=2", "mesh.tensor=2"],
              "each": ["devices.count=8", "stages.1.mesh.fsdp=4", "stages.2.mesh.tensor=4", "stages.2.mesh.data=2"]}
    for name, mesh in meshes.items():
        run_dir = folder / f"staged_{name}"
        train(config.load(staged, [f"run_dir={run_dir}", *mesh]))
        np.testing.assert_allclose([row["loss"] for row in step_rows(run_dir)], [row["loss"] for row in step_rows(undisturbed)],
                                   rtol=1e-5)


@pytest.mark.slow
def test_killed_on_eight_devices_it_ends_as_if_it_had_not_been(staged, folder, start_jaxlm):
    """kill -9, wherever it is when a step of either stage is seen."""
    meshes = ["devices.count=8", "mesh.data=4", "mesh.tensor=2", "stages.1.train.steps=40", "stages.2.train.steps=40",
              "checkpoint.every_steps=7", "logging.tensorboard=false"]
    whole, killed = folder / "staged_whole", folder / "staged_killed"
    assert start_jaxlm("train", staged, f"run_dir={whole}", *meshes).wait() == 0
    for after in (5, 20, 40, 45, 70):
        process = start_jaxlm("train", *([killed] if killed.exists() else [staged, f"run_dir={killed}", *meshes]))
        end = time.monotonic() + 120
        while max((row["step"] for row in read_metrics(killed)), default=0) < after and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert start_jaxlm("train", killed).wait() == 0
    assert_same(killed, whole)


# ------------------------------------------------------------------------------------------------------- the run file

def test_stages_are_read_and_written_back(staged, tmp_path):
    settings = config.load(staged)
    first, second = stages_of(settings)
    assert (first.train.steps, first.data.global_batch_size, first.model.dropout, first.stages) == (7, 16, 0.0, [])
    assert (second.train.steps, second.data.sequence_length, second.model.dropout) == (5, 32, 0.1)
    (tmp_path / "again.yaml").write_text(dump(settings))
    assert config.load(tmp_path / "again.yaml") == settings
    changed = config.load(staged, ["stages.2.train.epochs=0.5", "optimizer.learning_rate=1e-3"])
    assert [(each.train.length, each.optimizer.learning_rate) for each in stages_of(changed)] == [
        ("train.steps=7", 1e-3), ("train.epochs=0.5", 1e-3)]


@pytest.mark.parametrize(("stages", "said"), [
    ("[{data.sequence_length: 8}]", "stages.1: how long?"), ("[5]", "stages.1='5': expected a mapping"), ("x", "expected a list"),
    ("[{train.steps: 2}, {train.steps: -2}]", "stages.2: train.steps=-2: expected integer > 0"),
    ("[{train.steps: 2, train.epochs: 2}]", "stages.1: train.steps=2 and train.epochs=2.0: a run has one length"),
    ("[{train.steps: 2, trian.remat: full}]", "stages.1: unknown key 'trian.remat'; did you mean 'train.remat'"),
    ("[{train.hours: 2}]", "stages.1: train.hours: a stage ends after train.steps"),
    *((f"[{{train.steps: 2}}, {{train.steps: 2, {key}: {value}}}]", f"stages.2: {key}: ") for key, value in (
        ("run_dir", "x"), ("seed", 1), ("model.num_layers", 3), ("model.max_length", 64), ("model.family", "bert"),
        ("data.tokenizer", "bytes"), ("task.name", "causal_lm"), ("checkpoint.every_steps", 3), ("devices.count", 2),
        ("init", "x"), ("stages", "[]"), ("data.raw", "x.txt"), ("data.cleaning.scripts", "[latin]"))),
    ("[{train.steps: 2, data.sequence_length: 999}]", "stages.1: data.sequence_length=999 is longer than"),
    ("[{train.steps: 2, schedule.warmup_steps: 3}]", "stages.1: schedule.warmup_steps=3 leaves nothing of train.steps=2"),
])
def test_what_no_stage_can_say(staged, stages, said):
    with pytest.raises(UserError) as error:
        config.load(staged, [f"stages={stages}"])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("override", "said"), [
    ("train.steps=5", "train.steps=5: each of the stages says for itself"),
    ("data.global_batch_size=4", "data.global_batch_size=4: stage 1 has it 16; set it there, stages.1.data.global_batch_size=4"),
    ("stages.3.seed=1", "the run file has 2 stages"), ("stages.2.sed=1", "unknown key 'sed'"),
    ("schedule.decay_steps=50", "stages.2: schedule.decay_steps=50 is more than train.steps=5")])
def test_what_the_command_line_cannot_say_of_them(staged, override, said):
    with pytest.raises(UserError, match=said):
        config.load(staged, [override])


def test_the_runs_schedule_has_the_steps_of_all_stages(staged):
    said = ["stages=[{train.steps: 2}, {train.steps: 10}]", "schedule.warmup_steps=11"]
    assert config.load(staged, said).schedule.warmup_steps == 11
    with pytest.raises(UserError, match=r"^schedule.warmup_steps=12 leaves nothing of the 12 steps of the stages"):
        config.load(staged, [*said, "schedule.warmup_steps=12"])


def test_a_mistake_in_a_stage_has_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("stages:\n  - {train.steps: 3}\n  - train:\n      steps: 4\n      remta: full\n")
    with pytest.raises(UserError, match=r"run.yaml:5: stages.2: unknown key 'train.remta'"):
        config.load(path)


@pytest.mark.slow
def test_two_processes_stop_in_the_second_stage_together(staged, folder, start_jaxlm):
    """Each stage listens for a stop anew."""
    run_dir = folder / "staged_two"
    process = start_jaxlm("train", staged, f"run_dir={run_dir}", "stages.2.train.steps=100000", "eval.every_steps=100000",
                          "checkpoint.every_steps=100000", "devices.count=1", "--processes", 2)
    end = time.monotonic() + 120
    while max((row["step"] for row in read_metrics(run_dir)), default=0) < 20:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.terminate()
    said = process.communicate()[0]
    assert process.returncode == 143 and "preempted after step" in said, said
    with Checkpoints(run_dir) as checkpoints:
        step = checkpoints.choose(None)
        assert step >= 20 and checkpoints.metadata(step)["stage"]["number"] == 2
