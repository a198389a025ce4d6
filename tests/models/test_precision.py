"""`train.precision=float32` means float32: on TPUs and GPUs, too, where JAX's default is a coarser product."""

import base64
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.models.model import Model
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.lowering import trace_step
from jaxlm.serving import sampling
from jaxlm.settings import GenerateSettings, MeshSettings, ModelSettings, Settings
from jaxlm.training.step import start

PRODUCTS = ("dot_general", "ragged_dot_general", "ragged_dot", "conv_general_dilated")
LENGTH = 128  # what splash attention takes
SMALL = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "vocab_size": 128, "max_length": LENGTH}
EXPERTS = {"num_experts": 4, "activation": "swiglu"}
RUNS = {
    "gpt": {},
    "gpt, everything computed again": {"train": {"remat": "full"}},
    "splash attention": {"model": {"attention": "splash"}},
    "bert": {"model": {"family": "bert", "next_sentence": True}},
    "experts": {"model": EXPERTS},
    "experts with a capacity": {"model": EXPERTS | {"capacity_factor": 1.5}, "mesh": {"expert": 2}},
    "ring": {"mesh": {"context": 2}},
    "ring, everything computed again": {"mesh": {"context": 2}, "train": {"remat": "full"}},
    "pipeline": {"mesh": {"stage": 2}, "train": {"gradient_accumulation": 2}},
    "muon": {"optimizer": {"name": "muon"}},
}


def settings_of(run: dict[str, dict[str, Any]], precision: str = "float32") -> Settings:
    base = Settings(model=ModelSettings(**SMALL | run.get("model", {})), mesh=MeshSettings(**run.get("mesh", {})))
    return replace(base, data=replace(base.data, sequence_length=LENGTH, global_batch_size=8, packing="documents"),
                   train=replace(base.train, precision=precision, **run.get("train", {})),
                   optimizer=replace(base.optimizer, **run.get("optimizer", {})))


def mesh_of(settings: Settings) -> jax.sharding.Mesh:
    mesh = settings.mesh
    return make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.context * mesh.stage * mesh.expert])


def products(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """(type of the operands, precision) of every matrix product, inside loops, kernels and what is differentiated,
    too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield "/".join(variable.aval.dtype.name for variable in equation.invars[:2]), equation.params["precision"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")):
            if hasattr(inner, "eqns"):
                yield from products(getattr(inner, "jaxpr", inner))


def coarse(found: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The products with a float32 operand that an accelerator need not compute in float32."""
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    return [one for one in found if "float32" in one[0] and one[1] != highest]


def traced(run: dict, precision: str = "float32") -> list[tuple[str, Any]]:
    settings = settings_of(run, precision)
    return list(products(trace_step(settings, mesh_of(settings))[0].jaxpr))


@pytest.mark.parametrize("name", RUNS)
def test_every_product_of_a_step_is_float32(name):
    found = traced(RUNS[name])
    assert len(found) > 20 and coarse(found) == []


def test_the_check_sees_what_is_coarser(monkeypatch):
    """The control: without the setting almost every product would be left to JAX's default."""
    monkeypatch.setattr(Model, "traced", lambda self, function: function)
    assert len(coarse(traced(RUNS["gpt"]))) > 20
    assert len(coarse(traced(RUNS["splash attention"]))) > 20


def test_in_bfloat16_the_router_alone_is_float32():
    """Products of bfloat16 arrays are exact in one pass; to ask them for more is refused inside the kernels of TPUs."""
    found = traced(RUNS["experts"], "bfloat16")
    exact = {kind for kind, precision in found if precision is not None}
    assert exact == {"float32/float32"} and coarse(one for one in found if one[0] == "float32/float32") == []


def test_evaluation_is_float32():
    settings = settings_of(RUNS["gpt"])
    mesh = mesh_of(settings)
    with jax.set_mesh(mesh):
        trainer = start(settings, mesh)
        rows = {"tokens": jnp.int32, "targets": jnp.int32, "loss_mask": bool, "segment_ids": jnp.int32, "positions": jnp.int32}
        batch = {name: jax.ShapeDtypeStruct((8, LENGTH), kind) for name, kind in rows.items()}
        found = list(products(trainer.evaluate.trace(trainer.layout.shapes.params, batch).jaxpr))
    assert len(found) > 5 and coarse(found) == []


@pytest.mark.parametrize(("precision", "expected"), [("float32", "highest"), ("bfloat16", None)])
def test_generation_is_as_exact_as_the_run(precision, expected, monkeypatch):
    seen = []

    def decode_batch(*arguments: Any) -> jax.Array:
        seen.append(jax.config.jax_default_matmul_precision)
        return arguments[-3]

    class Letters:
        special = type("Special", (), {"eos": None, "bos": None})
        encode, decode_after = staticmethod(lambda text: [1, 2]), staticmethod(lambda before, after, prompt: str(after))

    monkeypatch.setattr(sampling, "decode_batch", decode_batch)
    settings = replace(settings_of({}, precision), generate=GenerateSettings(max_new_tokens=2))
    mesh = mesh_of(settings)
    with jax.set_mesh(mesh):
        sampling.generate(start(settings, mesh), {}, Letters())
    assert seen == [expected]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_it_stands_in_what_their_compilers_are_given(platform):
    settings = settings_of(RUNS["gpt"])
    mesh = mesh_of(settings)
    with jax.set_mesh(mesh):
        text = trace_step(settings, mesh)[0].lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(lines) > 20 and all("precision = [HIGHEST, HIGHEST]" in line for line in lines)


# ---- what the compilers make of it -----------------------------------------------------------------------------------

PROGRAM = """
import sys
from jaxlm import config
from jaxlm.planning.lowering import compile_step, lay
from jaxlm.planning.targets import find_target
settings, target = config.load(sys.argv[2], sys.argv[3:]), find_target(sys.argv[1])
sys.stdout.write(compile_step(settings, lay(settings, target)[0]).as_text())
"""
OVERRIDES = {
    "gpt": ["train.remat=full"],
    "bert": ["model.family=bert"],
    "experts": ["model.num_experts=4", "model.activation=swiglu"],
    "ring": ["mesh.context=2"],
}
RUN_FILE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
COMPILERS = {"v5e:2x2": "libtpu", "h100:4": "jax_cuda13_plugin"}


@functools.cache
def compiled_for(target: str, *overrides: str) -> str:
    """The optimized program, from a process of its own: compilers of other devices are told so by the environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    common = ["model.num_layers=2", "model.num_heads=4", "model.hidden_size=128", "model.vocab_size=256",
              "train.precision=float32", "data.tokenizer=bytes", f"model.max_length={LENGTH}", f"data.sequence_length={LENGTH}",
              "data.global_batch_size=8"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, target, str(RUN_FILE), *common, *overrides], env=environment, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def precisions_in(text: str) -> list[str]:
    """Of each product of an optimized program: XLA's own, cuBLAS's, and those inside Mosaic's kernels."""
    own = [found[1] if (found := re.search(r"operand_precision=\{([^}]*)\}", line)) else "default"
           for line in text.splitlines() if re.search(r" (dot|convolution)\(", line)]
    cublas = [found[1].lower().replace('"', "") if (found := re.search(r'"operand_precision":\[([^\]]*)\]', line)) else "default"
              for line in text.splitlines() if 'custom_call_target="__cublas' in line]
    bodies = [base64.b64decode(body) for body in re.findall(r'"custom_call_config":\{"body":"([^"]*)"', text)]
    kernels = ["highest,highest" if b"contract_precision<fp32>" in body else "default" for body in bodies if b"matmul" in body]
    return own + cublas + kernels


@pytest.mark.slow
@pytest.mark.parametrize("target", COMPILERS)
@pytest.mark.parametrize("name", OVERRIDES)
def test_it_stands_in_the_compiled_program(target, name):
    if not find_spec(COMPILERS[target]):
        pytest.skip(f"needs {COMPILERS[target]}, the compiler of {target}")
    text = compiled_for(target, *OVERRIDES[name])
    found = precisions_in(text)
    assert len(found) > 15 and set(found) == {"highest,highest"}
    assert "bf16[" not in text  # nothing was rounded on the way


@pytest.mark.slow
@pytest.mark.parametrize("target", COMPILERS)
def test_the_compiled_check_sees_the_default(target):
    if not find_spec(COMPILERS[target]):
        pytest.skip(f"needs {COMPILERS[target]}, the compiler of {target}")
    assert "default" in precisions_in(compiled_for(target, "train.precision=bfloat16"))
