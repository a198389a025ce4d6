"""Silent corruption: copies of a parameter on different devices are compared by digest, and the device that differs
is named.

Devices that hold the same piece of an array hold the same bits: they compute the same sums in the same order. A
digest is the sum of a bijective mix of every element's bits with its place, modulo 2^32, so that any one changed
element changes it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec


def make_digests(mesh: Mesh, layout: Any) -> Callable[[Any], jax.Array]:
    """A function from a tree of arrays of 32-bit numbers, laid out as `layout`, to uint32 [devices, arrays] on every
    device: the digests of what each device of the mesh holds."""
    specs = jax.tree.map(lambda sharding: sharding.spec, layout)

    def of_one_device(tree: Any) -> jax.Array:
        digests = jnp.stack([_digest(leaf) for leaf in jax.tree.leaves(tree)])
        return jax.lax.all_gather(digests, mesh.axis_names)

    return jax.jit(jax.shard_map(of_one_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False))


def _digest(array: jax.Array) -> jax.Array:
    """uint32 []. The mix is MurmurHash3's finalizer (Appleby 2011), a bijection for every place."""
    bits = jax.lax.bitcast_convert_type(array.reshape(-1), jnp.uint32)
    mixed = bits ^ (jax.lax.iota(jnp.uint32, bits.size) * np.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def find_differences(digests: np.ndarray, mesh: Mesh, layout: Any, shapes: Any) -> list[str]:
    """One line for each device whose copy of an array is not what most of its copies are; [] when all agree."""
    devices = list(mesh.devices.flat)
    found: dict[jax.Device, list[str]] = defaultdict(list)
    leaves = zip(jax.tree_util.tree_flatten_with_path(shapes)[0], jax.tree.leaves(layout), strict=True)
    for column, ((path, leaf), sharding) in enumerate(leaves):
        pieces = sharding.devices_indices_map(leaf.shape)
        holders: dict[str, list[int]] = defaultdict(list)
        for row, device in enumerate(devices):
            holders[str(pieces[device])].append(row)
        for rows in holders.values():
            counts = Counter(digests[rows, column].tolist())
            usual, times = counts.most_common(1)[0]
            alone = [row for row in rows if digests[row, column] != usual] if 2 * times > len(rows) else rows
            for row in alone if len(counts) > 1 else ():
                found[devices[row]].append(".".join(entry.key for entry in path))
    return [f"device {device.id} ({device.device_kind}, process {device.process_index}): {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" if len(names) > 3 else "") for device, names in found.items()]


def has_copies(layout: Any, shapes: Any) -> bool:
    """Whether any array is on more than one device: else there is nothing to compare."""
    pairs = zip(jax.tree.leaves(layout), jax.tree.leaves(shapes), strict=True)
    return any(math.prod(leaf.shape) < math.prod(sharding.shard_shape(leaf.shape)) * sharding.mesh.size
               for sharding, leaf in pairs)
