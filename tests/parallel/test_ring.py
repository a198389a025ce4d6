"""Ring attention, and the all-to-all form, against attention of one device (which tests/models tests against loops)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.attention import attention, sequence_order
from jaxlm.parallel import ring
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.ring import zigzag
from jaxlm.parallel.visible import Visible
from jaxlm.settings import MeshSettings

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 32, 4, 2, 8
MESHES = {"8": MeshSettings(context=8), "2x2x2": MeshSettings(data=2, context=2, tensor=2), "4": MeshSettings(context=4, fsdp=2)}


def draw():
    """query, key, value, the gradient of the output, segments and dropout keys."""
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(ROWS, LENGTH, heads, WIDTH)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return arrays, np.sort(random.integers(0, 4, (ROWS, LENGTH))), random.integers(0, 2**32, (ROWS, LENGTH, 2), dtype=np.uint32)


def run(order, *, causal, segmented, rate, window=None, local=None, implementation="auto"):
    """Output and gradients with the tokens laid out in `order`, and put back in their own."""
    (*heads, grad), segment_ids, keys = draw()
    is_local = None if local is None else jnp.asarray(local)
    visible = Visible(causal, window, order[None], segment_ids[:, order] if segmented else None, is_local)

    @functools.partial(jax.jit)
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(query, key, value):
        out = attention(query, key, value, visible, dropout_keys=keys[:, order] if rate else None, dropout_rate=rate,
                        implementation=implementation)
        return (out * grad[:, order]).sum(), out

    (_, out), grads = loss(*(array[:, order] for array in heads))
    return [np.asarray(array)[:, np.argsort(order)] for array in (out, *grads)]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rest", [
    {"segmented": False, "rate": 0.0}, {"segmented": True, "rate": 0.3, "window": 7, "local": True}], ids=["plain", "all"])
def test_output_and_gradients_are_those_of_one_device(mesh, causal, rest, monkeypatch):
    want = run(np.arange(LENGTH), causal=causal, **rest)
    monkeypatch.setattr(ring, "SCORE_BYTES", 4 * HEADS * 4)  # as if the sequence were long: queries in several chunks
    with jax.set_mesh(make_mesh(MESHES[mesh], jax.devices())):
        for implementation in ("auto", "xla"):
            if mesh == "8" and implementation == "xla":
                continue  # 4 heads do not go round 8 devices
            order = sequence_order(LENGTH, causal, implementation)
            got = run(np.arange(LENGTH) if order is None else order, causal=causal, **rest, implementation=implementation)
            for one, other in zip(got, want, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_in_zigzag_order_every_device_has_the_same_work():
    for devices in (1, 2, 4, 8):
        order = zigzag(64, devices)
        assert sorted(order) == list(range(64))
        seen = (order + 1).reshape(devices, -1).sum(1)  # keys that each device's queries see
        assert len(set(seen)) == 1
    np.testing.assert_array_equal(zigzag(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])


def test_a_device_never_holds_another_than_its_part(array_shapes):
    """Neither all keys nor scores against all keys exist anywhere in the program, forward or backward."""
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    with jax.set_mesh(make_mesh(MeshSettings(context=8), jax.devices())):
        token_indices = zigzag(4096, 8)[None]
        loss = jax.grad(lambda *heads: attention(*heads, Visible(True, token_indices=token_indices)).sum(), argnums=(0, 1, 2))
        text = jax.jit(loss).lower(shape, shape, shape).compile().as_text()
    assert "f32[1,512,2,8]" in text and "4096" not in text.split("ENTRY")[0].split("entry_computation_layout")[0]
    assert "all-gather" not in text and "collective-permute" in text
