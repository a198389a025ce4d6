"""How fast a step can be: the time of its arithmetic, of its memory traffic, and of what it sends over each network.

The roofline model (Williams et al. 2009), with networks as further roofs. What the compiler runs beside matrix
products overlaps with them; what it does not is added.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.planning.plan import Collective, Roofline
from jaxlm.planning.targets import Target
from jaxlm.runtime.chips import Chip, rings


class Speeds(NamedTuple):
    """Bytes/s one way of a device in an exchange, inside its island and between islands; infinite where it sends
    nothing."""

    fast: float
    slow: float


Network = Callable[[Sequence[str]], Speeds]  # of the exchanges along some mesh axes


def roofline(compute: float, traffic: float, found: Sequence[Collective], chip: Chip, network: Network) -> Roofline:
    """Of a step with `compute` seconds of arithmetic on a device that moves `traffic` bytes in its memory and sends
    `found`."""
    fast = slow = hidden = exposed = 0.0
    for one in found:
        speeds = network(one.axes)
        fast += one.bytes_per_device / speeds.fast
        slow += one.bytes_per_device / speeds.slow
        exposed += one.exposed_bytes / min(speeds)  # both networks at once
        hidden += (one.bytes_per_device - one.exposed_bytes) / min(speeds)
    memory = traffic / chip.bandwidth
    return Roofline(compute, memory, fast, slow, exposed, max(compute, memory, hidden) + exposed)


def network_of_mesh(mesh: Any, chip: Chip, island: Callable[[Any], int]) -> Network:
    """By the places of a mesh's (`jax.sharding.Mesh`) devices.

    Between islands a group uses the cards of all its devices of an island. On a torus it uses the links of every
    dimension that it spans, both ways where the dimension closes to a ring.
    """
    def network(axes: Sequence[str]) -> Speeds:
        group = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].ravel()
        islands = len({island(device) for device in group})
        fast = chip.link if not chip.torus else chip.link * _links(group, mesh, chip, island)
        return _speeds(fast, islands, len(group) // islands, chip)

    return network


def _links(group: np.ndarray, mesh: Any, chip: Chip, island: Callable[[Any], int]) -> int:
    here = island(group[0])
    spanned = np.array([device.coords for device in group if island(device) == here])
    whole = np.array([device.coords for device in mesh.devices.flat if island(device) == here])
    sizes, shape = ([len(set(places)) for places in coordinates.T] for coordinates in (spanned, whole))
    links = (2 if size == side and closed else 1
             for size, side, closed in zip(sizes, shape, rings(chip, shape), strict=True) if size > 1)
    return max(1, sum(links))


def network_of_sizes(target: Target, sizes: Mapping[str, int], outer: Mapping[str, int], chip: Chip) -> Network:
    """The same without devices: an axis is taken to lie along whole dimensions of the torus where its size allows.

    `sizes` of the mesh's axes; `outer`: into how many parts each is cut between islands.
    """
    def network(axes: Sequence[str]) -> Speeds:
        inside = math.prod(sizes[axis] // outer[axis] for axis in axes)
        fast = chip.link
        if chip.torus:
            fast *= _links_of_size(-(-inside // target.devices_per_chip), target.shape, chip)
        return _speeds(fast, math.prod(outer[axis] for axis in axes), inside, chip)

    return network


def _links_of_size(size: int, shape: Sequence[int], chip: Chip) -> int:
    sides = list(zip(shape, rings(chip, shape), strict=True))
    some = [[one for i, one in enumerate(sides) if number >> i & 1] for number in range(1 << len(sides))]
    whole = [chosen for chosen in some if math.prod(side for side, _ in chosen) == size]
    if whole and size > 1:
        return sum(2 if closed else 1 for side, closed in whole[0] if side > 1)
    spanned, left = 0, size
    for side in sorted(shape, reverse=True):
        spanned += left > 1 and side > 1
        left = -(-left // side)
    return max(1, spanned)


def _speeds(fast: float, islands: int, inside: int, chip: Chip) -> Speeds:
    return Speeds(fast if inside > 1 else math.inf, inside * chip.slow if islands > 1 else math.inf)
