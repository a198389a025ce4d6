"""How long a run is: epochs, tokens and hours, worked out once, said, and the same after a stop as without one."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxlm import config
from jaxlm.checks import check
from jaxlm.data.corpus import Corpus
from jaxlm.errors import UserError
from jaxlm.reporting.goodput import Account
from jaxlm.reporting.metrics import read_metrics
from jaxlm.reporting.report import write_report
from jaxlm.safety.supervisor import _is_finished
from jaxlm.settings import DataSettings, ScheduleSettings, Settings, TrainSettings
from jaxlm.tasks.find import find_task
from jaxlm.training.length import SHARES, Hours, with_steps
from jaxlm.training.loop import Loop
from jaxlm.training.run import train

TIMES = ("time", "tokens_per_second", "slots_per_second", "step_seconds", "data_wait_seconds")


def rows(run_dir: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run_dir)]


def steps_of(sequences: int = 100, batch: int = 8, length: int = 32, padding: float = 0.0, **said) -> int:
    batches = SimpleNamespace(global_batch_size=batch, sequences_per_epoch=sequences, padding_share=padding)
    data = DataSettings(sequence_length=length, global_batch_size=batch)
    settings = Settings(data=data, train=TrainSettings(**said), schedule=ScheduleSettings(name="constant"))
    return with_steps(settings, batches).train.steps


# ---------------------------------------------------------------------------------------------------- steps of a corpus

@pytest.mark.parametrize(("said", "want"), [
    ({}, 1000), ({"steps": 7}, 7), ({"epochs": 1}, 13), ({"epochs": 2}, 25), ({"epochs": 0.5}, 7), ({"epochs": 1e-9}, 1),
    ({"tokens": 1}, 1), ({"tokens": 256}, 1), ({"tokens": 257}, 2), ({"tokens": 300_000_000_000}, 1171875000),
    ({"tokens": 256, "padding": 0.5}, 2), ({"epochs": 3, "sequences": 2**40, "batch": 2**10}, 3 * 2**30)])
def test_steps_by_arithmetic(said, want):
    assert steps_of(**said) == want


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_an_epoch_is_every_sequence_and_tokens_are_no_padding(finished, folder, run_file, devices_are_there, packing):
    """Counted in the arrays of the batches themselves."""
    settings = config.load(run_file, [f"data.packing={packing}", "train.epochs=1.5"])
    corpora = [(Corpus(folder / "one"), 1.0)]
    batches = find_task(settings).training_batches(corpora)
    steps = with_steps(settings, batches).train.steps
    assert steps * 8 >= 1.5 * batches.sequences_per_epoch > (steps - 1) * 8
    epoch = batches.samples(range(batches.sequences_per_epoch))
    tokens = (epoch["segment_ids"] > 0).sum() if packing == "documents" else epoch["tokens"].size
    by_tokens = with_steps(config.load(run_file, [f"data.packing={packing}", f"train.tokens={2 * tokens}"]), batches).train.steps
    assert by_tokens == math.ceil(2 * batches.sequences_per_epoch / 8)


def test_a_run_of_epochs_says_its_steps_and_is_found_finished(folder, run_file, jaxlm, capsys):
    run_dir, epochs = folder / "epochs", 0.12
    assert jaxlm("train", run_file, f"run_dir={run_dir}", f"train.epochs={epochs}", "devices.count=2") == 0
    said = capsys.readouterr().err
    last = read_metrics(run_dir)[-1]
    assert f"train.epochs={epochs}: {last['step']} steps" in said
    per_step = last["epoch"] / last["step"]
    assert epochs <= last["epoch"] < epochs + per_step
    settings = config.load(run_dir)
    assert (settings.train.epochs, settings.train.steps) == (epochs, None)  # the user's words
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["length"]) == (last["step"], f"train.epochs={epochs}")
    assert _is_finished(settings, lambda run_dir: last["step"])
    assert not _is_finished(config.load(run_dir, ["train.epochs=9"]), lambda run_dir: last["step"])

    assert jaxlm("train", run_dir, "devices.count=4") == 0  # on another mesh, too
    assert f"finished, all {last['step']} steps are done; raise train.epochs to go on" in capsys.readouterr().err
    assert jaxlm("train", run_dir, "train.epochs=0.2", "schedule.name=constant") == 0
    assert read_metrics(run_dir)[-1]["epoch"] >= 0.2
    assert jaxlm("train", run_dir, "train.epochs=0.08") == 2
    assert "train.epochs=0.08, which is 4 steps: the checkpoints in" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_the_users_words(run_file, jaxlm, capsys, folder):
    assert jaxlm("train", run_file, f"run_dir={folder / 'short'}", "train.tokens=256", "schedule.warmup_steps=5") == 2
    assert "schedule.warmup_steps=5 leaves nothing of the 1 step of train.tokens=256; expected fewer" in capsys.readouterr().err
    assert not (folder / "short" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------------------- run file

def test_one_length_and_the_command_lines_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 300}\n")
    assert config.load(path).train.steps == 300
    replaced = config.load(path, ["train.epochs=2"]).train
    assert (replaced.steps, replaced.epochs, replaced.length) == (None, 2, "train.epochs=2")
    assert config.load(path, ["train.epochs=null"]).train.steps == 300
    path.write_text("train: {epochs: 3}\n")
    assert config.load(path, ["train.steps=5"]).train == TrainSettings(steps=5)
    for text, overrides in (("train: {epochs: 3, steps: 5}\n", []), ("", ["train.hours=1", "train.tokens=5B"])):
        path.write_text(text)
        with pytest.raises(UserError, match="a run has one length"):
            config.load(path, overrides)


def test_hours_take_no_decay_in_steps():
    with pytest.raises(UserError, match=r"schedule.decay_steps=10: nobody knows how many steps train.hours=2 will be"):
        check(Settings(train=TrainSettings(hours=2), schedule=ScheduleSettings(decay_steps=10)))


# ---------------------------------------------------------------------------------------------------------------- hours

def run_by(seconds_of, hours: float, warmup: int, first: int = 0, saved: dict | None = None, clock: float = 0.0):
    """Every step's place of a run whose step s takes seconds_of(s); the clock at its end; what each look saved."""
    settings = Settings(train=TrainSettings(hours=hours), schedule=ScheduleSettings(warmup_steps=warmup))
    time = [clock]
    own, places, looks = Hours(settings, first, saved or {}, lambda: time[0]), {}, {}
    own.begin()
    step = first
    while step != own.last:
        places[step] = own.place(step)
        step += 1
        time[0] += seconds_of(step)
        if own.looks_at(step):
            own.look(step)
            looks[step] = {"hours": own.saved()}
    return places, time[0], looks


@pytest.mark.parametrize("seconds_of", [
    lambda step: 1.0, lambda step: 5.0 if step < 20 else 1.0, lambda step: 1.0 if step < 1500 else 3.0,
    lambda step: 30.0 if step % 500 == 0 else 1.0], ids=["even", "slow at first", "slow later", "with evaluations"])
def test_hours_end_in_time_with_the_schedule_at_its_end(seconds_of):
    places, seconds, looks = run_by(seconds_of, hours=1, warmup=10)
    assert seconds == pytest.approx(3600, rel=0.02)
    order = [places[step] for step in sorted(places)]
    assert order[:11] == list(range(11))  # the warmup goes by steps
    assert all(before <= after for before, after in itertools.pairwise(order))
    assert order[-1] >= 10 + SHARES * 0.99  # nothing of the decay is left
    assert len(looks) < 30


def test_between_two_looks_nothing_goes_by_the_clock():
    places, _, looks = run_by(lambda step: 1.0, hours=0.5, warmup=3)
    at, saved = list(looks.items())[5]
    following = list(looks)[6]
    slower, _, _ = run_by(lambda step: 7.0, hours=0.5, warmup=3, first=at, saved=json.loads(json.dumps(saved)), clock=at)
    assert {step: slower[step] for step in range(at, following)} == {step: places[step] for step in range(at, following)}


def test_a_run_of_hours_that_is_stopped_goes_on_as_if_it_had_not_been(folder, run_file, devices_are_there, monkeypatch, capsys):
    """With a clock that goes by steps. Stopped between two looks."""
    clock = [0.0]

    def at(step_of, method):
        def timed(self, *step):
            clock[0] = 36.0 * step_of(self, *step)
            return method(self, *step)
        return timed
    monkeypatch.setattr(Account, "spent", property(lambda self: clock[0]))
    monkeypatch.setattr(Hours, "begin", at(lambda self: self.began[0], Hours.begin))
    monkeypatch.setattr(Hours, "look", at(lambda self, step: step, Hours.look))
    said = ["train.hours=0.3", "schedule.name=linear", "eval.every_steps=100", "checkpoint.every_steps=100", "devices.count=2"]
    whole, stopped = folder / "hours", folder / "hours_stopped"
    train(config.load(run_file, [f"run_dir={whole}", *said]))
    last = rows(whole)[-1]["step"]
    assert abs(last - 30) <= 2  # a step is 0.01 hours
    rates = [row["learning_rate"] for row in rows(whole) if "loss" in row]
    assert max(rates) <= 0.01 and rates[-1] < 0.001 and sorted(rates[3:], reverse=True) == rates[3:]

    def stop(self, pending, finish=Loop._finish):
        finish(self, pending)
        if pending and pending.step == 14:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_finish", stop)
        train(config.load(run_file, [f"run_dir={stopped}", *said]))
    assert "hours" in write_report(stopped).read_text().split("Not finished")[1].partition("\n")[0]
    train(config.load(stopped))
    assert rows(stopped) == rows(whole)

    capsys.readouterr()
    assert train(config.load(whole))["steps"] == last and "raise train.hours to go on" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"train.hours=0.5: the learning rate of the run in .* had come down .* at step {last}"):
        train(config.load(whole, ["train.hours=0.5"]))
    assert config.load(whole).train.hours == 0.3  # nothing was written
    train(config.load(whole, ["train.hours=0.35", "checkpoint.allow=[schedule]"]))
    assert rows(whole)[-1]["step"] > last
