"""The shapes and types in signatures are true: tiny models traced with every one of them checked."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("beartype", reason="checks types at run time; in the extra `test`")

# In a process of its own: the hook works on what is imported after it. Nothing is compiled: tracing goes through every
# function, forward and backward, with the shapes that it will have.
TRACED = """
import sys
from dataclasses import replace
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook(["jaxlm.models", "jaxlm.parallel", "jaxlm.training.step"], "beartype.beartype"):
    from jaxlm.models.layers import Context
    from jaxlm.models.model import Model
    from jaxlm.parallel.products import column_parallel
    from jaxlm.training.step import make_trainer

import jax
import jax.numpy as jnp

sys.path.insert(0, {tests!r})
from conftest import MESHES, MODELS, _batch
from jaxlm.parallel.mesh import make_mesh
from jaxlm.settings import ModelSettings, Settings, TrainSettings

SETTINGS = {{
    "gpt": replace(MODELS["gpt"], dropout=0.1),
    "llama": replace(MODELS["gpt"], positions="rope", normalization="rmsnorm", activation="swiglu", bias=False, num_kv_heads=2,
                     tied_embeddings=False, attention_window=4, global_every=2, qk_norm=True, logit_soft_cap=5.0),
    "bert": MODELS["bert"], "moe": MODELS["moe"],
    "lstm": ModelSettings(family="lstm", num_layers=2, hidden_size=32, vocab_size=300, max_length=16),
    "capacity": replace(MODELS["moe"], capacity_factor=1.25),
}}

for case in sys.argv[1:]:
    name, mesh_name = case.split("/")
    batch = _batch("bert" if name == "bert" else "gpt", 0)
    settings = Settings(model=SETTINGS[name], mesh=MESHES[mesh_name],
                        train=TrainSettings(gradient_accumulation=2, precision="bfloat16"))
    with jax.set_mesh(make_mesh(settings.mesh, jax.devices()[: 1 if mesh_name == "one" else 8])):
        model = Model(settings.model, settings.train)
        trainer = make_trainer(model, settings, jax.sharding.get_mesh())
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)
        trainer.step.trace(trainer.layout.shapes, shapes)
        trainer.evaluate.trace(trainer.params.shapes, shapes)
        if mesh_name == "one":  # one token, with a KV cache
            slot = Context(jnp.full((2, 1), 5), cache_index=jnp.int32(5))
            jax.eval_shape(lambda params: model.bind(params).hidden_with_cache(
                jnp.zeros((2, 1), jnp.int32), slot, model.bind(params).empty_cache(2, 12)), model.shapes)
    print("traced", case)

try:
    column_parallel(jnp.zeros((2, 3, 4)), (jnp.zeros((5, 6)),), (("embed", "mlp"),), ("batch", None, None))
except TypeCheckError:
    print("a wrong shape is refused")
"""


def assert_traced(*cases: str) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", TRACED.format(tests=os.path.dirname(__file__)), *cases], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [*(f"traced {case}" for case in cases), "a wrong shape is refused"]


def test_traced_models_have_the_shapes_that_their_signatures_say():
    assert_traced("llama/fsdp2context2tensor2", "moe/expert4data2")


@pytest.mark.slow
def test_on_every_kind_of_mesh():
    assert_traced("gpt/one", "llama/one", "gpt/2x2x2", "gpt/context8", "gpt/stage2fsdp2tensor2", "bert/2x2x2",
                  "capacity/expert4data2", "lstm/one", "lstm/2x2x2")
