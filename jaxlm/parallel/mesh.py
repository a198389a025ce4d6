"""The mesh: which devices stand along which axis."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from jaxlm.errors import UserError
from jaxlm.parallel.rules import across, mesh_shape
from jaxlm.parallel.shapes import Int
from jaxlm.settings import AXES, MeshSettings


def island(device: jax.Device) -> int:
    """Number of the group of devices with a fast network among themselves: TPU slice, GPU node, process of emulated
    devices."""
    return device.process_index if device.platform == "cpu" else getattr(device, "slice_index", 0)


_of_machine = island


def islands_of(platform: str) -> str:
    """What `island` numbers, in a message."""
    return {"cpu": "processes", "tpu": "slices"}.get(platform, "nodes")


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device], island: Callable[[jax.Device], int] = island) -> Mesh:
    """The mesh of all axes over `devices`.

    Inside an island it follows the physical network: an axis lies along whole axes of the torus where it can. From
    island to island go the parts of the axes that `across` says.

    Raises:
      UserError: the sizes do not fit the devices or the islands.
    """
    shape = mesh_shape(settings, len(devices))
    islands: dict[int, list[jax.Device]] = {}
    for device in devices:
        islands.setdefault(island(device), []).append(device)
    kind = islands_of(devices[0].platform) if island is _of_machine else "slices or nodes"  # of a target: not told
    smallest, largest = (pick(map(len, islands.values())) for pick in (min, max))
    if smallest != largest:
        raise UserError(f"{len(devices)} devices in {len(islands)} {kind} of different sizes ({smallest} to {largest}); "
                        "a mesh needs as many in each, set devices.count")
    outer = across(settings, shape, len(islands), kind)
    inner = [shape[axis] // outer[axis] for axis in AXES]
    blocks = np.empty(list(outer.values()), object)
    for corner, number in zip(np.ndindex(blocks.shape), sorted(islands), strict=True):
        blocks[corner] = create_device_mesh(inner, islands[number], allow_split_physical_axes=True)
    return Mesh(np.block(blocks.tolist()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def crossings(mesh: Mesh, island: Callable[[jax.Device], int] = island) -> dict[str, int]:
    """How many islands the devices along each axis stand in; axes that stay inside one are left out."""
    numbers = np.vectorize(island)(mesh.devices)
    along = {axis: numbers[tuple(slice(None) if axis == other else 0 for other in AXES)] for axis in AXES}
    return {axis: len(set(line)) for axis, line in along.items() if len(set(line)) > 1}


def rows_needed(sharding: jax.sharding.Sharding, num_rows: int) -> Int[np.ndarray, " needed"]:
    """The rows of a batch whose leading dimension is cut by `sharding` that this process's devices hold, ascending."""
    ranges = {index[0].indices(num_rows)[:2] for index in sharding.addressable_devices_indices_map((num_rows,)).values()}
    return np.unique(np.concatenate([np.arange(start, stop) for start, stop in ranges]))


def first_holders(sharding: jax.sharding.Sharding, num_rows: int) -> Int[np.ndarray, " B"]:
    """The process of the first device, in the order of the mesh, that holds each row (see `rows_needed`)."""
    holders = np.empty(num_rows, int)
    for device, index in reversed(sharding.devices_indices_map((num_rows,)).items()):
        holders[index[0]] = device.process_index
    return holders


def rows_are_shared(sharding: jax.sharding.Sharding, num_rows: int) -> bool:
    """Whether several processes hold the same row."""
    first = first_holders(sharding, num_rows)
    return any((first[index[0]] != device.process_index).any()
               for device, index in sharding.devices_indices_map((num_rows,)).items())
