"""Where devices stand in the mesh: inside slices and nodes, and across them."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.parallel.mesh import crossings, islands_of, make_mesh
from jaxlm.parallel.rules import across, shrunk
from jaxlm.settings import AXES, MeshSettings


@dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "fake"
    process_index: int = 0


def nodes(*sizes):
    """Devices of GPU nodes or TPU slices of these sizes, numbered in a row."""
    return [Device(i, node) for i, node in enumerate(np.repeat(np.arange(len(sizes)), sizes))]


def line(mesh, axis):
    """The devices along an axis, from the mesh's first."""
    return mesh.devices[tuple(slice(None) if axis == other else 0 for other in AXES)]


@pytest.mark.parametrize(("mesh", "crossed"), [
    (MeshSettings(data=2, fsdp=4), {"data": 2}),
    (MeshSettings(stage=2, tensor=4), {"stage": 2}),
    (MeshSettings(fsdp=8), {"fsdp": 2}),
    (MeshSettings(tensor=8), {"tensor": 2}),
    (MeshSettings(data=2, fsdp=2, tensor=2, across={"fsdp": 2}), {"fsdp": 2}),
])
def test_only_the_axes_that_may_cross_nodes_do(mesh, crossed):
    laid = make_mesh(mesh, nodes(4, 4))
    assert crossings(laid) == crossed
    assert sorted(device.id for device in laid.devices.flat) == list(range(8))


def test_an_axis_partly_inside_a_node_keeps_neighbours_there():
    laid = make_mesh(MeshSettings(fsdp=8), nodes(4, 4))
    assert [device.slice_index for device in line(laid, "fsdp")] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_order_of_the_given_devices_does_not_matter_to_which_node_they_are_in():
    devices = nodes(2, 2, 2, 2)
    laid = make_mesh(MeshSettings(data=4, tensor=2), devices[::2] + devices[1::2])
    assert all(len({device.slice_index for device in row}) == 1 for row in laid.devices.reshape(4, 2))


def test_any_mesh_can_be_laid_over_any_number_of_equal_nodes():
    """Brute force over all ways to write 24 devices as a mesh of three axes, in 1 to 24 nodes."""
    for sizes in itertools.product([1, 2, 3, 4, 6, 8, 12, 24], repeat=3):
        if np.prod(sizes) == 24:
            shape = dict.fromkeys(AXES, 1) | dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
            for islands in (1, 2, 3, 4, 6, 8, 12, 24):
                outer = across(MeshSettings(), shape, islands)
                assert np.prod(list(outer.values())) == islands
                assert all(shape[axis] % parts == 0 for axis, parts in outer.items())


@pytest.mark.parametrize(("settings", "sizes", "message"), [
    (MeshSettings(data=8), (5, 3), "2 nodes of different sizes"),
    (MeshSettings(data=8, across={"data": 4}), (4, 4), "data=4 does not make the 2 nodes"),
    (MeshSettings(fsdp=8, across={"data": 2}), (4, 4), "data=2 does not divide mesh.data=1"),
])
def test_what_does_not_fit_the_nodes_is_refused(settings, sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(settings, nodes(*sizes))


def test_local_processes_are_called_processes():
    """Emulated devices of different processes stand neither in slices nor in nodes (line 18)."""
    devices = [Device(number, 0, "cpu", process_index=number // 5) for number in range(8)]
    with pytest.raises(UserError, match="8 devices in 2 processes of different sizes"):
        make_mesh(MeshSettings(data=8), devices)
    assert [islands_of(platform) for platform in ("cpu", "tpu", "gpu")] == ["processes", "slices", "nodes"]


# ---- fewer devices than the mesh says --------------------------------------------------------------------------------

@pytest.mark.parametrize(("devices", "sizes"), [
    (8, (4, 2, 1, 1)), (16, (4, 2, 1, 1)), (4, (2, 2, 1, 2)), (2, (1, 2, 1, 4)), (1, (1, 1, 1, 8))])
def test_an_elastic_mesh_shrinks_data_first_and_cuts_the_batch_finer(devices, sizes):
    smaller, times = shrunk(MeshSettings(data=4, fsdp=2, elastic=True), devices)
    assert (smaller.data, smaller.fsdp, smaller.tensor, times) == sizes


def test_axes_that_cannot_shrink_are_named():
    assert shrunk(MeshSettings(data=2, tensor=4), 4)[0] == MeshSettings(data=1, tensor=4)
    with pytest.raises(UserError, match=r"mesh\.elastic: .*cannot shrink to 2 devices, with 4 along the other axes"):
        shrunk(MeshSettings(data=2, tensor=4), 2)


def test_a_free_axis_adapts_by_itself():
    for mesh in (MeshSettings(), MeshSettings(fsdp=-1), MeshSettings(tensor=2)):
        assert shrunk(mesh, 1) == (mesh, 1)
