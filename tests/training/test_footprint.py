"""How much of a device is left for the logits of the loss, and that a run and its plan take the same."""

from dataclasses import replace

import jax
import jax.extend
import pytest

from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.estimated_plan import head_of, share_of
from jaxlm.planning.lowering import trace_step
from jaxlm.planning.targets import find_target
from jaxlm.runtime.chips import CHIPS, Chip
from jaxlm.settings import AXES, MeshSettings, ModelSettings, Settings
from jaxlm.training.footprint import FOR_LOGITS, logits_memory

MODEL = ModelSettings(num_layers=4, num_heads=4, hidden_size=64, vocab_size=50_000, max_length=512, bias=False)  # 50,048 rows
SIZES = dict.fromkeys(AXES, 1) | {"fsdp": 8}


@pytest.fixture
def settings() -> Settings:
    plain = Settings(model=MODEL, mesh=MeshSettings(fsdp=8))
    return replace(plain, data=replace(plain.data, sequence_length=512, global_batch_size=32),
                   train=replace(plain.train, precision="bfloat16", remat="full"))


def free(settings, kind="NVIDIA H100 80GB HBM3", platform="gpu"):
    return logits_memory(settings, SIZES, platform, kind) / FOR_LOGITS


def test_what_is_free_is_memory_without_state_and_activations(settings):
    """Parameters, two moments, gradients: of a layer 12 D^2 numbers, cut in eight, and two norms, which are whole."""
    cut, whole = (4 * 12 * 64**2 + (50_048 + 512) * 64) / 8, (4 * 2 + 1) * 64
    state = 4 * 4 * (cut + whole)
    kept = 4 * (4 * 512) * 64 * 2  # with remat=full what a block begins with: layers, tokens of 4 sequences, width, bfloat16
    assert free(settings) == pytest.approx(84942979072 - state - kept, abs=1)
    again = replace(settings, train=replace(settings.train, gradient_accumulation=2))  # half the tokens, and a sum of gradients
    assert free(again) == pytest.approx(84942979072 - 5 / 4 * state - kept / 2, abs=1)


def test_where_nothing_is_known_or_left_nothing_is_given(settings):
    assert free(settings, "cpu", "cpu") == 0 == free(settings, "NVIDIA GeForce RTX 5090")
    full = replace(settings, data=replace(settings.data, global_batch_size=2**22))
    assert free(full, "TPU v5 lite", "tpu") == 0


@pytest.mark.parametrize(("memory", "chunk"), [(None, 64), (1.5e9, 256), (1e12, 512)])
def test_run_and_plan_take_the_same_chunk(settings, array_shapes, monkeypatch, memory, chunk):
    """4 sequences a device: 64 positions of each fit into 64 MiB, 312 into a sixth of 1.5 GB, all 512 of them into
    more."""
    if memory is not None:
        monkeypatch.setitem(CHIPS, "cpu", Chip("cpu", memory=memory))
    traced, _ = trace_step(settings, make_mesh(settings.mesh, jax.devices()))
    logits = {shape for shape in array_shapes(jax.extend.core.jaxpr_as_fun(traced.jaxpr), *traced.jaxpr.in_avals)
              if len(shape) == 3 and shape[-1] == 50_048}
    assert {shape[1] for shape in logits if shape[0] == 4} == {chunk}
    estimated = head_of(settings, SIZES, find_target("cpu:8"), share_of(settings, SIZES, "cpu").tokens)
    assert (estimated.chunk, estimated.chunks) == (4 * chunk, 512 // chunk)
