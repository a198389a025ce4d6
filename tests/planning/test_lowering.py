"""The shipped configs' training steps, compiled at their real widths for eight emulated devices."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import config
from jaxlm.checks import check_layout
from jaxlm.errors import UserError
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import mesh_shape
from jaxlm.planning.lowering import compile_step
from jaxlm.reporting.memory import memory_of
from jaxlm.safety.guards import WINDOW
from jaxlm.settings import MeshSettings, ModelSettings, Settings

# One of each kind; all of them: benchmarks/plans.py
CONFIGS = ["moe_8x7b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert_large", "gpt2_124m", "llama_8b"))]
# What the compiler says when it can cut an array no better than by copying the whole of it to every device
COMPLAINT = "Involuntary full rematerialization"


@pytest.fixture
def really_compiled():
    """A program found in the cache of compiled ones says nothing."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("really_compiled")
def test_the_complaint_is_seen_where_there_is_cause(meshes, capfd):
    mesh = meshes["2x2x2"]
    cut = functools.partial(lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes))))

    def bad(x, indices):
        return cut(jnp.take_along_axis(cut(x, "data", "fsdp"), indices, axis=1), "tensor", ("data", "fsdp"))

    jax.jit(bad).lower(*(jax.ShapeDtypeStruct((64, 64), kind, sharding=NamedSharding(mesh, PartitionSpec("data")))
                         for kind in (jnp.float32, jnp.int32))).compile()
    assert COMPLAINT in capfd.readouterr().err


@pytest.mark.usefixtures("really_compiled")
@pytest.mark.parametrize("name", CONFIGS)
def test_no_kind_of_config_makes_the_compiler_complain(name, capfd):
    """On its own mesh, and on one that also cuts heads and sequences where they can be cut. Two layers: they are all
    alike."""
    settings = config.load(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    model = replace(settings.model, num_layers=2, vocab_size=settings.model.vocab_size or 256)
    settings = replace(settings, model=model, train=replace(settings.train, gradient_accumulation=1),
                       data=replace(settings.data, global_batch_size=8))
    for mesh in (settings.mesh, MeshSettings(fsdp=2, tensor=2, context=2)):
        if mesh_shape(mesh, 8)["tensor"] > 1 and model.num_heads % 2:
            continue  # GPT-2 XL has 25 heads
        on_mesh = replace(settings, mesh=mesh)
        check_layout(on_mesh, mesh_shape(mesh, 8))
        compile_step(on_mesh, make_mesh(mesh, jax.devices()))
        assert COMPLAINT not in capfd.readouterr().err


def test_memory_is_that_of_the_arrays():
    """Parameters and Adam's two moments, each cut in eight, what the guards remember, and the batch."""
    settings = Settings(model=ModelSettings(num_layers=2, num_heads=8, hidden_size=64, vocab_size=256, max_length=32, bias=False))
    settings = replace(settings, data=replace(settings.data, sequence_length=32))
    mesh = make_mesh(MeshSettings(fsdp=8), jax.devices())
    memory = memory_of(compile_step(settings, mesh))
    block = 12 * 64 * 64 / 8 + 2 * 64  # norms are whole everywhere
    parameters = 2 * block + (256 + 32) * 64 / 8 + 64
    batch = 32 * (4 + 4 + 1)
    remembered = 2 * 4 * WINDOW  # a loss and a gradient norm of each step
    assert memory.arguments == pytest.approx(3 * 4 * parameters + batch + remembered, abs=64)
    assert memory.total >= memory.arguments + memory.temporaries and memory.host == 0


def test_without_a_vocabulary_there_is_nothing_to_compile():
    with pytest.raises(UserError, match=r"model\.vocab_size: missing"):
        compile_step(Settings(), make_mesh(MeshSettings(), jax.devices()[:1]))
