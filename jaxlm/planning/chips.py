"""What vendors publish of a device's networks; its peak speed and the size of its memory stand in
`jaxlm.reporting.hardware`.

Sources. TPUs' bandwidth: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; links, one way, and the share of a
host's data-centre network: "How to Scale Your Model" (Austin et al. 2025), part 2, and for TPU7x the page of its
bandwidth. GPUs: NVIDIA's A100, H100, H200 and Blackwell datasheets (NVLink's figure counts both ways), with one
network card for each GPU, as in DGX systems: 200 Gbit/s beside an A100, 400 Gbit/s beside the others.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Chip(NamedTuple):
    """Of one JAX device."""

    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s one way: TPU: of one link of the torus; GPU: of the whole connection to its node
    slow: float  # bytes/s one way to other slices or nodes
    host: float  # bytes/s one way to the host's memory
    torus: int = 0  # dimensions of the network inside an island; 0: every device reaches every other at full speed
    wraps: int = 1  # sides of a slice that are multiples of this can close to rings (`rings`)


CHIPS = {
    "TPU v4": Chip(1.2e12, 4.5e10, 6.25e9, 1.6e10, torus=3, wraps=4),
    "TPU v5 lite": Chip(8.1e11, 4.5e10, 3.125e9, 1.6e10, torus=2, wraps=16),
    "TPU v5": Chip(2.765e12, 9e10, 6.25e9, 1.6e10, torus=3, wraps=4),
    "TPU v6 lite": Chip(1.64e12, 9e10, 1.25e10, 3.2e10, torus=2, wraps=16),
    "TPU7x": Chip(7.38e12 / 2, 1e11 / 2, 1.25e10 / 2, 3.2e10, torus=3, wraps=4),  # half a chip
    "NVIDIA A100-SXM4-80GB": Chip(2.039e12, 3e11, 2.5e10, 3.2e10),
    "NVIDIA H100 80GB HBM3": Chip(3.35e12, 4.5e11, 5e10, 6.4e10),
    "NVIDIA H200": Chip(4.8e12, 4.5e11, 5e10, 6.4e10),
    "NVIDIA B200": Chip(7.7e12, 9e11, 5e10, 6.4e10),
}


def rings(chip: Chip, shape: Sequence[int]) -> tuple[bool, ...]:
    """Which sides of a TPU slice, `shape` chips long, close to rings.

    Three-dimensional slices are put together of cubes of 4 x 4 x 4 chips by optical switches, which close every
    side; a slice smaller than a cube closes none. The sides of a two-dimensional one close one by one, where they
    span the pod's 16 chips (docs.cloud.google.com/tpu/docs/{v4,v5p,tpu7x,v5e,v6e}).
    """
    spanning = tuple(side % chip.wraps == 0 for side in shape)
    return spanning if chip.torus < 3 else (all(spanning),) * len(shape)
