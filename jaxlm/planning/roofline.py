"""How fast a step can be: the time of its arithmetic, of its memory traffic, and of what it sends over each network.

The roofline model (Williams et al. 2009), with networks as further roofs. What the compiler runs beside matrix products overlaps
with them; what it does not is added.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.planning.chips import Chip
from jaxlm.planning.plan import Collective, Roofline
from jaxlm.planning.targets import TPUS, Target

# For the axes of an exchange, which network it takes, "fast" or "slow", and a device's bytes/s one way on it.
Network = Callable[[Sequence[str]], tuple[str, float]]


def roofline(flops: float, peak: float, traffic: float, found: Sequence[Collective], chip: Chip, network: Network) -> Roofline:
    """Of a step with `flops` on a device of `peak` FLOP/s that moves `traffic` bytes in its memory and sends `found`."""
    seconds, exposed = {"fast": 0.0, "slow": 0.0}, 0.0
    for one in found:
        level, speed = network(one.axes)
        seconds[level] += one.bytes_per_device / speed
        exposed += one.exposed_bytes / speed
    compute, memory = flops / peak, traffic / chip.bandwidth
    hidden = seconds["fast"] + seconds["slow"] - exposed
    return Roofline(compute, memory, seconds["fast"], seconds["slow"], exposed, max(compute, memory, hidden) + exposed)


def network_of_mesh(mesh: Any, chip: Chip, island: Callable[[Any], int]) -> Network:
    """By the places of a mesh's (`jax.sharding.Mesh`) devices.

    Between islands a group uses the cards of all its devices of an island. On a torus it uses the links of every dimension that
    it spans, both ways where the dimension closes to a ring.
    """
    def network(axes: Sequence[str]) -> tuple[str, float]:
        group = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].ravel()
        islands = len({island(device) for device in group})
        fast = chip.link if not chip.torus else chip.link * _links(group, mesh, chip, island)
        return _slowest(fast, islands, len(group) // islands, chip)

    return network


def _links(group: np.ndarray, mesh: Any, chip: Chip, island: Callable[[Any], int]) -> int:
    here = island(group[0])
    spanned = np.array([device.coords for device in group if island(device) == here])
    whole = np.array([device.coords for device in mesh.devices.flat if island(device) == here])
    links = 0
    for places, all_places in zip(spanned.T, whole.T, strict=True):
        size, full = len(set(places)), len(set(all_places))
        if size > 1:
            links += 2 if size == full and full % chip.wraps == 0 else 1
    return max(1, links)


def network_of_sizes(target: Target, sizes: Mapping[str, int], outer: Mapping[str, int], chip: Chip) -> Network:
    """The same without devices: an axis is taken to lie along whole dimensions of the torus where its size allows.

    `sizes` of the mesh's axes; `outer`: into how many parts each is cut between islands.
    """
    def network(axes: Sequence[str]) -> tuple[str, float]:
        inside = math.prod(sizes[axis] // outer[axis] for axis in axes)
        fast = chip.link
        if target.kind in TPUS:
            fast *= _links_of_size(-(-inside // TPUS[target.kind].devices), target.shape, chip)
        return _slowest(fast, math.prod(outer[axis] for axis in axes), inside, chip)

    return network


def _links_of_size(size: int, shape: Sequence[int], chip: Chip) -> int:
    whole = [chosen for number in range(1 << len(shape))
             if math.prod(chosen := [side for place, side in enumerate(shape) if number >> place & 1]) == size]
    if whole and size > 1:
        return sum(2 if side % chip.wraps == 0 else 1 for side in whole[0] if side > 1)
    spanned, left = 0, size
    for side in sorted(shape, reverse=True):
        spanned += left > 1 and side > 1
        left = -(-left // side)
    return max(1, spanned)


def _slowest(fast: float, islands: int, inside: int, chip: Chip) -> tuple[str, float]:
    if islands == 1:
        return "fast", fast
    return "slow", min(fast, inside * chip.slow) if inside > 1 else chip.slow
