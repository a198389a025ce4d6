"""The estimate (`jaxlm plan --fast`) against programs: the kept figures of shipped configs, and small ones compiled
here."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxlm import cli, config
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.collectives import collectives
from jaxlm.planning.compiled_plan import state_sizes
from jaxlm.planning.estimated_plan import BOUNDS, estimated_plan
from jaxlm.planning.flops import executed_flops
from jaxlm.planning.hlo import parse
from jaxlm.planning.lowering import compiled, lower, trace_step
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
    module = parse(compiled(lower(traced, laid), laid).as_text())
    if "context" not in mesh:
        assert estimate.executed_flops == pytest.approx(executed_flops(module, "cpu").total, rel=0.02)
    found = collectives(module, laid)
    kinds = {(kind, (axis,)) for kind in ("all-gather", "reduce-scatter") for axis in ("fsdp", "tensor")}
    sent = {(one.kind, one.axes): one.bytes_per_device for one in found if (one.kind, one.axes) in kinds}
    expected = {(one.kind, one.axes): one.bytes_per_device for one in estimate.collectives if (one.kind, one.axes) in kinds}
    assert expected.keys() == sent.keys()
    for kind, size in sent.items():
        assert expected[kind] == pytest.approx(size, rel=0.2), kind  # vectors, and what is shared between two uses


def test_no_device_is_asked():
    """An estimate reads the modules, but starts no backend and compiles nothing: it also works beside a run."""
    code = ("import sys; from jaxlm import cli; cli.main(['plan', sys.argv[1], '--target', 'h100:8', '--fast']); "
            "from jax._src import xla_bridge; assert not xla_bridge._backends")
    subprocess.run([sys.executable, "-c", code, str(ROOT / "configs" / "gpt2_124m.yaml")], check=True)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_the_optimizers_state_is_the_size_it_has(name):
    settings = replace(SETTINGS, mesh=MeshSettings(fsdp=8), optimizer=OptimizerSettings(name=name))
    _, trainer = trace_step(settings, make_mesh(settings.mesh, jax.devices()))
    assert estimated_plan(settings, CPUS).state["optimizer"] == pytest.approx(state_sizes(trainer)["optimizer"], rel=0.1)


def test_small_models_claim_no_bounds(capsys, tmp_path):
    """Line 21: how far off the estimate can be is known of the shipped configs, from 120 million parameters on."""
    (tmp_path / "run.yaml").write_text("{}")
    small = ["model.num_layers=2", "model.num_heads=2", "model.hidden_size=64", "model.vocab_size=300"]
    for keys, words in ((small, "not known of models of less than 120M"), (["model.hidden_size=1536"], "memory within 10%")):
        assert cli.main(["plan", str(tmp_path / "run.yaml"), "--target", "h100:8", "--fast", *keys]) == 0
        assert words in " ".join(capsys.readouterr().out.split())


def test_float32_takes_six_passes_on_a_tpu_and_the_slow_units_of_a_gpu():
    """Lines 10 and 11: an H100 multiplies float32 at 67 TFLOP/s, bfloat16 at 989.5 (NVIDIA's datasheet)."""
    model = ModelSettings(num_layers=12, num_heads=12, hidden_size=768, vocab_size=50257, max_length=1024, attention="xla")
    for target, executed, slower in (("v5e:2x4", 6, 6), ("h100:8", 1, 989.5 / 67)):
        plans = [estimated_plan(replace(SETTINGS, model=model, train=TrainSettings(precision=precision)), find_target(target))
                 for precision in ("bfloat16", "float32")]
        assert plans[1].executed_flops / plans[0].executed_flops == pytest.approx(executed)
        assert plans[1].roofline.compute / plans[0].roofline.compute == pytest.approx(slower)
