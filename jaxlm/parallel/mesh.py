"""The mesh: which devices stand along which axis."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxlm.errors import UserError
from jaxlm.settings import MeshSettings

# Slowest to fastest varying: neighbours along `tensor` are neighbours in the machine, where its many small collectives are cheap.
# Nested `shard_map`s (copies, then stages, then the rest) must follow this order: XLA of jax 0.12 aborts otherwise.
AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")


def mesh_shape(settings: MeshSettings, num_devices: int) -> dict[str, int]:
    """Size of every axis, -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(settings, axis) for axis in AXES}
    if sizes["data"] is None:
        sizes["data"] = 1 if -1 in sizes.values() else -1
    fixed = math.prod(size for size in sizes.values() if size != -1)
    described = " * ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "mesh.data=1"
    if num_devices % fixed or (-1 not in sizes.values() and fixed != num_devices):
        raise UserError(f"{described} does not make {num_devices} device(s); change the mesh, or devices.count "
                        f"(or leave one axis at -1 and make the others divide {num_devices})")
    return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of all axes over `devices`, ordered along the hardware's own topology."""
    shape = mesh_shape(settings, len(devices))
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def rows_needed(sharding: jax.sharding.Sharding, num_rows: int) -> np.ndarray:
    """The rows of a batch whose leading dimension is cut by `sharding` that this process's devices hold, ascending."""
    ranges = {index[0].indices(num_rows)[:2] for index in sharding.addressable_devices_indices_map((num_rows,)).values()}
    return np.unique(np.concatenate([np.arange(start, stop) for start, stop in ranges]))
