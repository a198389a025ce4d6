"""How fast a compiled step can be: the time of its arithmetic, of its memory traffic, and of what it sends over each network.

The roofline model (Williams et al. 2009), with networks as further roofs. What the compiler runs beside matrix products overlaps
with them; what it does not is added.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.planning.chips import CHIPS, Chip
from jaxlm.planning.collectives import Collective


class Roofline(NamedTuple):
    """Seconds of one step."""

    compute: float
    memory: float
    fast_network: float  # inside a slice or node
    slow_network: float  # between them
    exposed: float  # of both networks: what nothing hides
    total: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"compute": self.compute, "memory": self.memory, "the network inside": self.fast_network,
                 "the network between slices or nodes": self.slow_network}
        return max(parts, key=parts.get)


def roofline(flops: float, peak: float, traffic: float, found: Sequence[Collective], mesh: Mesh,
             island: Callable[[jax.Device], int]) -> Roofline:
    """Of a step with `flops` on a device of `peak` FLOP/s that moves `traffic` bytes in its memory and sends `found`."""
    chip = CHIPS[mesh.devices.flat[0].device_kind]
    seconds, exposed = {"fast": 0.0, "slow": 0.0}, 0.0
    for one in found:
        level, speed = network(one.axes, mesh, chip, island)
        seconds[level] += one.bytes_per_device / speed
        exposed += one.exposed_bytes / speed
    compute, memory = flops / peak, traffic / chip.bandwidth
    hidden = seconds["fast"] + seconds["slow"] - exposed
    return Roofline(compute, memory, seconds["fast"], seconds["slow"], exposed, max(compute, memory, hidden) + exposed)


def network(axes: Sequence[str], mesh: Mesh, chip: Chip, island: Callable[[jax.Device], int]) -> tuple[str, float]:
    """Which network exchanges along these axes take, "fast" or "slow", and the bytes/s one way of a device on it.

    Between islands a group uses the cards of all its devices of an island. On a torus it uses the links of every dimension that
    it spans, both ways where the dimension closes to a ring.
    """
    group = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].ravel()
    islands = len({island(device) for device in group})
    fast = chip.link if not chip.torus else chip.link * _links(group, mesh, chip, island)
    inside = len(group) // islands
    if islands == 1:
        return "fast", fast
    return "slow", min(fast, inside * chip.slow) if inside > 1 else chip.slow


def _links(group: np.ndarray, mesh: Mesh, chip: Chip, island: Callable[[jax.Device], int]) -> int:
    here = island(group[0])
    spanned = np.array([device.coords for device in group if island(device) == here])
    whole = np.array([device.coords for device in mesh.devices.flat if island(device) == here])
    links = 0
    for places, all_places in zip(spanned.T, whole.T, strict=True):
        size, full = len(set(places)), len(set(all_places))
        if size > 1:
            links += 2 if size == full and full % chip.wraps == 0 else 1
    return max(1, links)
