"""`jaxlm plan --search`: what it looks at, and what it chooses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jaxlm import cli, config
from jaxlm.errors import UserError
from jaxlm.planning import compiled_plan, devices, search
from jaxlm.planning.estimated_plan import estimated_plan
from jaxlm.planning.targets import find_target
from jaxlm.settings import AXES, DataSettings, MeshSettings, ModelSettings, Settings, TrainSettings

SETTINGS = Settings(
    model=ModelSettings(num_layers=8, num_heads=16, hidden_size=2048, vocab_size=32000, max_length=2048),
    data=DataSettings(sequence_length=2048, global_batch_size=64), train=TrainSettings(remat="full"))
NODE = find_target("h100:8")


@pytest.fixture
def by_arithmetic(monkeypatch):
    """The compiler says what the estimate says; that it is asked at all is for the real one (benchmarks)."""
    asked = []

    def plan(settings, target):
        asked.append(settings)
        return estimated_plan(settings, target)._replace(compile_seconds=1.0)

    monkeypatch.setattr(compiled_plan, "compiled_plan", plan)
    monkeypatch.setattr(devices, "devices_of", lambda target: None)
    return asked


def test_every_mesh_is_whole_and_thought_of_once():
    found = [tuple(getattr(mesh, axis) for axis in AXES) for mesh in search.meshes(SETTINGS, NODE)]
    assert len(set(found)) == len(found)
    for sizes in found:
        product = 1
        for size in sizes:
            product *= size
        assert product == 8
    axes = dict(zip(AXES, zip(*found, strict=True), strict=True))
    assert set(axes["tensor"]) == {1, 2, 4, 8} and set(axes["context"]) == {1} and set(axes["expert"]) == {1}


def test_the_best_is_at_least_as_fast_as_what_the_config_says_and_fits(by_arithmetic):
    choices = search.search(replace(SETTINGS, mesh=MeshSettings(tensor=8)), NODE, report=lambda line: None)
    best, times = choices[0].plan, [choice.plan.roofline.total for choice in choices]
    assert best.fits and times == sorted(times)
    assert by_arithmetic[0].mesh.tensor == 8 and best.roofline.total <= estimated_plan(by_arithmetic[0], NODE).roofline.total
    assert choices[0].note.startswith("fastest") and choices[-1].note.startswith("+")
    fitting = [plan for plan in search.estimated(by_arithmetic[0], NODE) if plan.memory.total <= search.MARGIN * plan.capacity]
    fastest = min(plan.roofline.total for plan in fitting)
    assert times[0] == fastest and by_arithmetic[1:] == sorted(
        by_arithmetic[1:], key=lambda settings: estimated_plan(settings, NODE).roofline.total)


def test_a_mesh_that_the_target_cannot_hold_is_left_out(by_arithmetic):
    lines = []
    choices = search.search(replace(SETTINGS, mesh=MeshSettings(fsdp=64)), NODE, report=lines.append)
    assert any("own layout is left out: mesh.fsdp=64 does not make 8 device(s)" in line for line in lines)
    without = list(by_arithmetic)
    assert choices[0].note.startswith("fastest") and len(choices) == len(without) > 1
    search.search(replace(SETTINGS, mesh=MeshSettings(tensor=8)), NODE, report=lines.append)
    assert by_arithmetic[len(without) + 1 :] == without  # beside the config's own layout, the same are looked at


def test_what_the_compiler_refuses_comes_last(monkeypatch, by_arithmetic):
    plan = compiled_plan.compiled_plan

    def refuse_the_first(settings, target):
        made = plan(settings, target)
        if len(by_arithmetic) == 1:
            raise UserError("does not fit: too much")
        return made

    monkeypatch.setattr(compiled_plan, "compiled_plan", refuse_the_first)
    choices = search.search(SETTINGS, NODE, report=lambda line: None)
    assert choices[-1].note == "does not fit: too much" and choices[0].note.startswith("fastest")


def test_time_is_not_spent_for_ever(monkeypatch, by_arithmetic):
    clock = SimpleNamespace(monotonic=iter(range(0, 10**6, 601)).__next__)
    monkeypatch.setattr(search, "time", clock)
    search.search(SETTINGS, NODE, report=lambda line: None)
    assert len(by_arithmetic) == 1


def test_the_command_writes_a_config_that_says_the_same(by_arithmetic, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {num_layers: 8, num_heads: 16, hidden_size: 2048, vocab_size: 32000, max_length: "
                                       "2048}\ndata: {sequence_length: 2048, global_batch_size: 64}\n")
    assert cli.main(["plan", "run.yaml", "--target", "h100:8", "--search", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = config.load(tmp_path / "run_h100_8.yaml")
    assert {axis: getattr(written.mesh, axis) for axis in AXES} == printed[0]["mesh"]
    assert written.model == config.load(tmp_path / "run.yaml").model


def test_the_written_config_keeps_comments_and_overrides_and_no_vocabulary_that_was_assumed(by_arithmetic, tmp_path, monkeypatch):
    """Line 21; a second search replaces what the first has said at the top."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("# Ours.\nmodel: {num_layers: 8, num_heads: 16, hidden_size: 2048}  # small\ndata:\n"
                                       "  sequence_length: 1024  # for now\n  global_batch_size: 64\n")
    assert cli.main(["plan", "run.yaml", "--target", "h100:8", "--search", "train.precision=bfloat16"]) == 0
    text = (tmp_path / "run_h100_8.yaml").read_text()
    assert all(comment in text for comment in ("# Ours.\n", "# small\n", "# for now\n")) and "vocab_size" not in text
    assert config.load(tmp_path / "run_h100_8.yaml").train.precision == "bfloat16"
    assert cli.main(["plan", "run_h100_8.yaml", "--target", "h100:8", "--search"]) == 0
    assert (tmp_path / "run_h100_8_h100_8.yaml").read_text().count("# Found by") == 1


@pytest.mark.parametrize(("settings", "target", "message"), [
    (SETTINGS, "cpu:8", "speed is not published"),
    (replace(SETTINGS, data=DataSettings(sequence_length=2048, global_batch_size=3)), "h100:8x8", "no mesh of 64 devices"),
    (replace(SETTINGS, model=replace(SETTINGS.model, num_layers=400, hidden_size=8192)), "v5e:2x2", "nothing fits, the least"),
])
def test_where_nothing_is_to_be_found(settings, target, message):
    with pytest.raises(UserError, match=message):
        search.search(settings, find_target(target), report=lambda line: None)
