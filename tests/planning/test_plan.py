"""`jaxlm plan`, part by part against what can be counted by hand, and as a user calls it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm import cli, config
from jaxlm.planning.buffers import largest_live
from jaxlm.planning.estimated_plan import estimated_plan
from jaxlm.planning.flops import executed_flops
from jaxlm.planning.hlo import parse
from jaxlm.planning.lowering import compile_step
from jaxlm.planning.names import Names, names_of
from jaxlm.planning.plan import Collective, masked_flops, model_flops
from jaxlm.planning.roofline import network_of_mesh, network_of_sizes, roofline
from jaxlm.planning.targets import find_target
from jaxlm.planning.traffic import memory_traffic
from jaxlm.runtime.chips import CHIPS
from jaxlm.settings import DataSettings, ModelSettings, Settings, TrainSettings

SETTINGS = Settings(
    model=ModelSettings(num_layers=4, num_heads=8, hidden_size=64, vocab_size=384, max_length=32),
    data=DataSettings(sequence_length=32, global_batch_size=16))
ROOT = Path(__file__).parents[2]
SMALL = ["model.num_layers=2", "model.num_heads=2", "model.hidden_size=32", "model.vocab_size=128", "model.max_length=32",
         "data.sequence_length=32", "data.global_batch_size=8"]


# ---- arithmetic ------------------------------------------------------------------------------------------------------

def executed(settings, mesh):
    """Of one device, in the program compiled for the CPU."""
    return executed_flops(parse(compile_step(settings, mesh).as_text()), "cpu").total


@pytest.mark.parametrize("mesh", ["one", "2x2x2", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "fsdp8", "tensor8", "fsdp2context2tensor2"))])
def test_what_all_devices_execute_is_what_the_model_asks_for(mesh, meshes):
    """Line 11: counted in the compiled program, against PaLM's formula."""
    counted = executed(SETTINGS, meshes[mesh]) * meshes[mesh].size
    # a ring computes the half of the scores that a causal token sees, and the blocks on the diagonal
    least = 0.9 if "context" in mesh else 1.0
    assert least <= counted / model_flops(SETTINGS) <= 1.0001


def test_what_is_computed_again_is_counted_again(meshes):
    counts = {remat: executed(replace(SETTINGS, train=TrainSettings(remat=remat)), meshes["one"]) for remat in ("none", "full")}
    assert counts["none"] < counts["full"] < 1.34 * counts["none"]  # one of three passes, without the head


# ---- memory traffic and buffers --------------------------------------------------------------------------------------

LOOP = """
%read (p0: f32[10,256,256], p1: s32[]) -> f32[256,256] {
  %p0 = f32[10,256,256] parameter(0)
  %p1 = s32[] parameter(1)
  %ds = f32[1,256,256] dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,256,256}
  ROOT %out = f32[256,256] bitcast(%ds)
}
%body (t: (s32[], f32[10,256,256])) -> (s32[], f32[10,256,256]) {
  %t = (s32[], f32[10,256,256]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %all = f32[10,256,256] get-tuple-element(%t), index=1
  %one = f32[256,256] fusion(%all, %i), kind=kLoop, calls=%read, metadata={op_name="jit(f)/transpose(jvp())/mlp/sin"}
  %dot.1 = f32[256,256] dot(%one, %one)
  ROOT %r = (s32[], f32[10,256,256]) tuple(%i, %all)
}
ENTRY %main (p: f32[10,256,256]) -> f32[10,256,256] {
  %p = f32[10,256,256] parameter(0)
  %c = s32[] constant(0)
  %start = (s32[], f32[10,256,256]) tuple(%c, %p)
  %w = (s32[], f32[10,256,256]) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %out = f32[10,256,256] get-tuple-element(%w), index=1
}
"""
ARRAY = 256 * 256 * 4
NAMES = Names(rows=2, length=16, width=256, mlp=256, heads=1, kv_heads=1, head_dim=128, vocabulary=384, layers=10, cut=1,
              compute="f32")


def test_a_slice_of_a_large_array_is_all_that_a_fusion_reads():
    per_turn = (ARRAY + 4) + ARRAY + 3 * ARRAY  # the slice and its place read, one written; a product's two operands and result
    assert memory_traffic(parse(LOOP)) == 10 * per_turn


NESTED = LOOP.replace("""%body (t""", """%outer (q0: f32[10,256,256], q1: s32[]) -> f32[256,256] {
  %q0 = f32[10,256,256] parameter(0)
  %q1 = s32[] parameter(1)
  %slice = f32[256,256] fusion(%q0, %q1), kind=kLoop, calls=%read
  ROOT %dot.2 = f32[256,256] dot(%slice, %slice), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (t""").replace("calls=%read, metadata", "calls=%outer, metadata")


def test_a_fusion_inside_a_fusion_reads_the_slice_too():
    """Line 11: products of which a fusion inside takes a layer's kernel out of the stack of all layers."""
    assert memory_traffic(parse(NESTED)) == memory_traffic(parse(LOOP))


def test_an_argument_that_a_fusion_inside_a_fusion_updates_is_not_written_whole():
    text = """
%put (stack: f32[10,256], piece: f32[1,256]) -> f32[10,256] {
  %stack = f32[10,256] parameter(0)
  %piece = f32[1,256] parameter(1)
  ROOT %dus = f32[10,256] dynamic-update-slice(%stack, %piece, %i, %i)
}
%around (a: f32[10,256], b: f32[1,256]) -> f32[10,256] {
  %a = f32[10,256] parameter(0)
  %b = f32[1,256] parameter(1)
  %inner = f32[10,256] fusion(%a, %b), kind=kLoop, calls=%put
  ROOT %same = f32[10,256] bitcast(%inner)
}
%pad (c: f32[1,256]) -> f32[10,256] {
  %c = f32[1,256] parameter(0)
  %zero = f32[] constant(0)
  %zeros = f32[10,256] broadcast(%zero), dimensions={}
  ROOT %padded = f32[10,256] dynamic-update-slice(%zeros, %c, %i, %i)
}
ENTRY %main (p: f32[10,256], q: f32[1,256]) -> f32[10,256] {
  %p = f32[10,256] parameter(0)
  %q = f32[1,256] parameter(1)
  %updated = f32[10,256] fusion(%p, %q), kind=kLoop, calls=%around
  ROOT %whole = f32[10,256] fusion(%q), kind=kLoop, calls=%pad
}
"""
    piece = 256 * 4
    assert memory_traffic(parse(text)) == (piece + piece) + (piece + 10 * piece)  # what is put among zeros is written whole


def test_arrays_in_on_chip_memory_are_no_traffic():
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %a = f32[1024]{0:T(1024)S(1)} add(%x, %x)\n  %b = f32[1024]{0} negate(%a)\n}\n"
    assert memory_traffic(parse(text)) == 4096


def test_the_largest_arrays_at_the_peak_have_names():
    found = {buffer.label: buffer.size for buffer in largest_live(parse(LOOP), NAMES)}
    assert found == {"gradient of mlp kernels": ARRAY, "mlp kernels": ARRAY}


# ---- time ------------------------------------------------------------------------------------------------------------

def devices(kind, coords, islands=1):
    per_island = len(coords) // islands
    return [SimpleNamespace(device_kind=kind, coords=place, island=i // per_island) for i, place in enumerate(coords)]


def laid(kind, shape, coords, islands=1):
    """A mesh of (data, fsdp) over such devices, in their order."""
    placed = np.empty(len(coords), object)
    placed[:] = devices(kind, coords, islands)
    return SimpleNamespace(devices=placed.reshape(shape), axis_names=("data", "fsdp"))


def test_an_axis_gets_the_links_of_the_dimensions_that_it_spans():
    v5e, ring = CHIPS["TPU v5 lite"], [(x, y, 0) for x in range(16) for y in range(16)]
    island = lambda device: device.island  # noqa: E731
    whole = laid("TPU v5 lite", (16, 16), ring)
    assert network_of_mesh(whole, v5e, island)(["fsdp"]) == (2 * v5e.link, math.inf)  # 16 close to a ring
    assert network_of_mesh(whole, v5e, island)(["data", "fsdp"]) == (4 * v5e.link, math.inf)
    open_line = laid("TPU v5 lite", (2, 4), [(x, y, 0) for x in range(2) for y in range(4)])
    assert network_of_mesh(open_line, v5e, island)(["fsdp"]) == (v5e.link, math.inf)


def test_between_nodes_a_group_uses_the_cards_of_all_its_devices():
    h100, places = CHIPS["NVIDIA H100 80GB HBM3"], [(i, 0, 0) for i in range(16)]
    island = lambda device: device.island  # noqa: E731
    across = laid("NVIDIA H100 80GB HBM3", (2, 8), places, islands=2)
    for network in (network_of_mesh(across, h100, island),
                    network_of_sizes(find_target("h100:8x2"), {"data": 2, "fsdp": 8}, {"data": 2, "fsdp": 1}, h100)):
        assert network(["data"]) == (math.inf, h100.slow)
        assert network(["fsdp"]) == (h100.link, math.inf)
        assert network(["data", "fsdp"]) == (h100.link, 8 * h100.slow)


@pytest.mark.parametrize(("axes", "links"), [
    (["fsdp"], 6),  # the whole torus, each of its three dimensions a ring
    (["tensor"], 2),  # 4: one dimension
    (["data"], 1),  # 2: a part of one
])
def test_without_devices_an_axis_lies_along_whole_dimensions(axes, links):
    v5p, sizes = CHIPS["TPU v5"], {"data": 2, "tensor": 4, "fsdp": 64}
    network = network_of_sizes(find_target("v5p:4x4x4"), sizes, dict.fromkeys(sizes, 1), v5p)
    assert network(axes) == (links * v5p.link, math.inf)


def test_a_slice_smaller_than_a_cube_closes_no_side():
    """v5p:2x4x4 is no 4x4x4: its sides of 4 are lines, one link each."""
    v5p, sizes = CHIPS["TPU v5"], {"data": 2, "fsdp": 16}
    network = network_of_sizes(find_target("v5p:2x4x4"), sizes, dict.fromkeys(sizes, 1), v5p)
    assert network(["fsdp"]) == (2 * v5p.link, math.inf)
    mesh = laid("TPU v5", (2, 16), [(x, y, z) for x in range(2) for y in range(4) for z in range(4)])
    assert network_of_mesh(mesh, v5p, lambda device: device.island)(["fsdp"]) == (2 * v5p.link, math.inf)


def test_what_is_hidden_overlaps_and_what_is_not_is_added():
    mesh = laid("NVIDIA H100 80GB HBM3", (1, 8), [(i, 0, 0) for i in range(8)])
    sent = [Collective("all-gather", ("fsdp",), 4.5e11, 10, 0.9e11)]
    h100 = CHIPS["NVIDIA H100 80GB HBM3"]
    step = roofline(2.0, 3.35e12, sent, h100, network_of_mesh(mesh, h100, lambda device: device.island))
    assert (step.compute, step.memory, step.fast_network, step.slow_network) == (2.0, 1.0, 1.0, 0.0)
    assert step.exposed == pytest.approx(0.2) and step.total == pytest.approx(2.2) and step.bound == "compute"


@pytest.mark.parametrize(("shape", "kind", "scope", "phase", "name"), [
    ((8, 2048, 50304), "f32", "head", "", "logits"),
    ((50304, 1024), "f32", "head", "", "gradient of token table"),
    ((24, 8, 2048, 4096), "bf16", "mlp", "", "mlp hidden, kept for the backward pass"),
    ((8, 16, 2048, 2048), "f32", "attention", "backward", "gradient of attention scores"),
    ((16384, 1024), "bf16", "norm", "recomputed", "residual states, computed again"),
    ((8, 2048, 16, 64), "bf16", "attention", "", "queries, keys and values"),
    ((1024, 4096), "bf16", "mlp", "", "mlp kernels"),
    ((4096, 1024), "f32", None, "", "gradient of mlp kernels"),
    ((24, 1024, 512), "bf16", None, "", "mlp kernels, all layers"),
    ((3, 5, 7), "f32", None, "", None),
])
def test_arrays_have_names_that_a_user_knows(shape, kind, scope, phase, name):
    """Line 21, for GPT-2 medium's shape on 8 devices, 8 sequences of 2,048 on each."""
    model = ModelSettings(num_layers=24, num_heads=16, hidden_size=1024, vocab_size=50257, max_length=2048)
    settings = Settings(model=model, data=DataSettings(sequence_length=2048, global_batch_size=64),
                        train=TrainSettings(precision="bfloat16"))
    sizes = dict.fromkeys(("data", "stage", "expert", "context", "tensor"), 1) | {"fsdp": 8}
    assert names_of(settings, sizes).of(kind, shape, scope, phase) == name


def test_no_utilization_passes_its_peak():
    """Line 21: at 131,072 tokens PaLM's count, of which the mask hides half of the attention, comes to 118 %; beside
    it stands what is left without that half: 12 B L T^2 N H / 2 for forward and backward."""
    plan = estimated_plan(config.load(ROOT / "configs" / "llama_8b_128k.yaml"), find_target("v5p:4x4x4"))
    hidden = 12 * plan.settings.data.global_batch_size * 32 * 131072**2 * 32 * 128 / 2
    assert masked_flops(plan.settings) == hidden
    assert plan.mfu_palm > 1 > plan.mfu > 0.5
    assert plan.mfu / plan.mfu_palm == pytest.approx(1 - hidden / (64 * plan.model_flops))
    assert plan.to_json()["mfu"] == plan.mfu


# ---- the verb --------------------------------------------------------------------------------------------------------

@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    return str(path)


@pytest.fixture
def eight_devices(monkeypatch):
    """This process has its devices already."""
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)


@pytest.mark.usefixtures("eight_devices")
def test_the_json_is_the_contracts(config_file, capsys):
    assert cli.main(["plan", config_file, "--target", "cpu:8", "--json", "mesh.fsdp=4", "mesh.data=2", *SMALL]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["devices"] == 8 and plan["mesh"]["fsdp"] == 4
    memory = plan["memory_per_device"]
    assert {"parameters", "optimizer", "gradients", "activations", "total"} <= memory.keys()
    assert sum(memory[name] for name in ("parameters", "optimizer", "gradients", "activations")) == memory["total"]
    assert {(one["kind"], one["axis"]) for one in plan["collectives"]} >= {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")}
    assert all({"kind", "axis", "bytes_per_device", "count"} <= one.keys() for one in plan["collectives"])
    assert plan["flops_per_device"] > 0 and plan["compile_seconds"] > 0
    assert plan["step_seconds"] is None and plan["mfu"] is None  # nobody publishes the speed of an emulated device


@pytest.mark.usefixtures("eight_devices")
def test_people_get_a_table_and_a_picture(config_file, capsys, tmp_path):
    picture = tmp_path / "plan.png"
    assert cli.main(["plan", config_file, "--target", "cpu:8", "--picture", str(picture), "mesh.tensor=2", *SMALL]) == 0
    text = capsys.readouterr().out
    for words in ("8 cpu devices", "tensor 2", "total (by the compiler)", "all-gather", "not published", "at best: at published"):
        assert words in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("eight_devices")
def test_explain_says_what_is_cut_and_what_travels(config_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a row in a line
    overrides = ["mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2", *SMALL]
    assert cli.main(["plan", config_file, "--target", "cpu:8", "--explain", *overrides]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    kernel = 4 * 2 * 32 * 128 // 4 // 1024  # two layers, float32, a quarter on each device
    assert f"blocks.mlp.up.kernel 2 x 32 x 128 layers, embed, mlp -, fsdp, tensor {kernel} KiB" in lines
    assert any(line.startswith("every kernel data - / all-reduce") for line in lines)
    assert not any("all-to-all" in line for line in lines)


def test_what_the_mesh_does_not_fit_is_said_in_one_line(config_file, capsys, eight_devices):
    overrides = ["mesh.fsdp=3", *SMALL, "model.hidden_size=96", "data.global_batch_size=9"]
    assert cli.main(["plan", config_file, "--target", "cpu:8", *overrides]) == 2
    assert capsys.readouterr().err == (
        "jaxlm: mesh.fsdp=3 does not make 8 device(s); change the mesh, or devices.count or the target (or leave one axis at "
        "-1 and make the others divide 8)\n")
