"""The estimate (`jaxlm plan --fast`) against programs: the kept figures of shipped configs, and small ones compiled here."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxlm import config
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.collectives import collectives
from jaxlm.planning.compilation import compiled, lower, trace_step
from jaxlm.planning.compiled import state_sizes
from jaxlm.planning.estimate import BOUNDS, estimated_plan
from jaxlm.planning.flops import executed_flops
from jaxlm.planning.hlo import parse
from jaxlm.planning.targets import find_target
from jaxlm.settings import DataSettings, MeshSettings, ModelSettings, OptimizerSettings, Settings, TrainSettings

ROOT = Path(__file__).parents[2]
PLANS = json.loads((ROOT / "tests" / "golden" / "plans.json").read_text())  # by benchmarks/plans.py
SETTINGS = Settings(
    model=ModelSettings(num_layers=4, num_heads=8, hidden_size=64, vocab_size=384, max_length=32),
    data=DataSettings(sequence_length=32, global_batch_size=16))
CPUS = find_target("cpu:8")


@pytest.mark.parametrize("line", PLANS)
def test_shipped_configs_are_as_near_to_the_compiler_as_is_said(line):
    name, target, *overrides = line.split()
    found = PLANS[line]
    estimate = estimated_plan(config.load(ROOT / "configs" / f"{name}.yaml", overrides), find_target(target)).to_json()

    def error(of):
        return abs(of(estimate) / of(found) - 1)

    assert error(lambda plan: plan["memory_per_device"]["total"]) <= BOUNDS["memory"]
    assert error(lambda plan: plan["executed_flops_per_device"]) <= BOUNDS["arithmetic"]
    assert error(lambda plan: plan["memory_traffic_per_device"]) <= BOUNDS["memory traffic"]
    assert error(lambda plan: plan["step_seconds"]) <= BOUNDS["step"]
    sent = [sum(one["bytes_per_device"] for one in plan["collectives"]) for plan in (estimate, found)]
    assert abs(sent[0] - sent[1]) <= BOUNDS["sent"] * max(sent[1], 2**20)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 4}],
                         ids=str)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_a_small_step_computes_and_sends(mesh, remat):
    settings = replace(SETTINGS, mesh=MeshSettings(**mesh), train=TrainSettings(remat=remat))
    estimate = estimated_plan(settings, CPUS)
    laid = make_mesh(settings.mesh, jax.devices())
    traced, trainer = trace_step(settings, laid)
    assert estimate.state == pytest.approx(state_sizes(trainer), abs=8)  # counters
    if "context" not in mesh:
        assert estimate.executed_flops == pytest.approx(executed_flops(traced.jaxpr, 8), rel=0.02)
    found = collectives(parse(compiled(lower(traced, laid)).as_text()), laid)
    kinds = {(kind, (axis,)) for kind in ("all-gather", "reduce-scatter") for axis in ("fsdp", "tensor")}
    sent = {(one.kind, one.axes): one.bytes_per_device for one in found if (one.kind, one.axes) in kinds}
    expected = {(one.kind, one.axes): one.bytes_per_device for one in estimate.collectives if (one.kind, one.axes) in kinds}
    assert expected.keys() == sent.keys()
    for kind, size in sent.items():
        assert expected[kind] == pytest.approx(size, rel=0.2), kind  # vectors, and what is shared between two uses


def test_no_jax_is_needed():
    code = "import sys, jaxlm.planning.estimate, jaxlm.planning.describe, jaxlm.planning.explain; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_the_optimizers_state_is_the_size_it_has(name):
    settings = replace(SETTINGS, mesh=MeshSettings(fsdp=8), optimizer=OptimizerSettings(name=name))
    _, trainer = trace_step(settings, make_mesh(settings.mesh, jax.devices()))
    assert estimated_plan(settings, CPUS).state["optimizer"] == pytest.approx(state_sizes(trainer)["optimizer"], rel=0.1)
