"""Copies of parameters that differ are found, and the device that holds the odd one is named."""

import jax
import numpy as np
import pytest

from jaxlm.models.model import Model
from jaxlm.parallel.sharding import shardings
from jaxlm.safety.copies import find_differences, has_copies, make_digests
from jaxlm.settings import TrainSettings


@pytest.fixture(scope="module")
def params(models, random_params):
    model = Model(models["gpt"], TrainSettings())
    return model, random_params(model)


def turned(array, device, bit):
    """The same with one bit of an element turned on one device."""
    pieces = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            data.view(np.uint32).reshape(-1)[-1] ^= np.uint32(1 << bit)
        pieces.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


@pytest.mark.parametrize("mesh", ["data8", "2x2x2", "expert4data2"])
def test_a_turned_bit_names_the_device(mesh, params, meshes):
    model, values = params
    mesh = meshes[mesh]
    layout = shardings(mesh, model.axes)
    assert has_copies(layout, model.shapes)
    digests = make_digests(mesh, layout)
    values = jax.device_put(values, layout)
    assert find_differences(np.asarray(digests(values)), mesh, layout, model.shapes) == []
    for device, bit in ((5, 0), (0, 31), (7, 12)):
        wrong = values | {"token_embedding": {"embedding": turned(values["token_embedding"]["embedding"], device, bit)}}
        found = find_differences(np.asarray(digests(wrong)), mesh, layout, model.shapes)
        names = [line for line in found if f"device {device} (cpu, process 0): token_embedding.embedding" in line]
        copies = sum(mesh.shape[axis] for axis in ("data", "expert")) - 1
        assert len(names) == 1 and (len(found) == 1 or copies == 2), found  # of two copies, either may be the wrong one


def test_what_is_nowhere_twice_cannot_be_compared(params, meshes):
    model, _ = params
    kernels = {"kernel": model.axes["blocks"]["mlp"]["up"]["kernel"]}
    shapes = {"kernel": model.shapes["blocks"]["mlp"]["up"]["kernel"]}
    assert not has_copies(shardings(meshes["one"], kernels), shapes)
    assert not has_copies(shardings(meshes["fsdp8"], kernels), shapes)
    assert has_copies(shardings(meshes["data8"], kernels), shapes)
