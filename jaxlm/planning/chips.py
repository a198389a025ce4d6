"""What vendors publish of a device's memory and networks; the peak speeds stand in `jaxlm.reporting.hardware`.

Sources. TPU memory: what libtpu 0.0.52 says a program can use; bandwidth: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x};
links, one way, and the share of a host's data-centre network: "How to Scale Your Model" (Austin et al. 2025), part 2, and for
TPU7x the page of its bandwidth. GPUs: NVIDIA's A100, H100, H200 and Blackwell datasheets (NVLink's figure counts both ways), with
one network card for each GPU, as in DGX systems: 200 Gbit/s beside an A100, 400 Gbit/s beside the others.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """Of one JAX device."""

    memory: float  # bytes that a program can use
    bandwidth: float  # bytes/s of that memory
    link: float  # bytes/s one way: TPU: of one link of the torus; GPU: of the whole connection to its node
    slow: float  # bytes/s one way to other slices or nodes
    host: float  # bytes/s one way to the host's memory
    torus: int = 0  # dimensions of the network inside an island; 0: every device reaches every other at full speed
    wraps: int = 1  # a dimension of a slice whose size is a multiple of this closes to a ring


CHIPS = {
    "TPU v4": Chip(30.75 * GIB, 1.2e12, 4.5e10, 6.25e9, 1.6e10, torus=3, wraps=4),
    "TPU v5 lite": Chip(15.75 * GIB, 8.1e11, 4.5e10, 3.125e9, 1.6e10, torus=2, wraps=16),
    "TPU v5": Chip(95.73 * GIB, 2.765e12, 9e10, 6.25e9, 1.6e10, torus=3, wraps=4),
    "TPU v6 lite": Chip(31.24 * GIB, 1.64e12, 9e10, 1.25e10, 3.2e10, torus=2, wraps=16),
    "TPU7x": Chip(94.74 * GIB, 7.38e12 / 2, 1e11 / 2, 1.25e10 / 2, 3.2e10, torus=3, wraps=4),  # half a chip
    "NVIDIA A100-SXM4-80GB": Chip(85100068864, 2.039e12, 3e11, 2.5e10, 3.2e10),
    "NVIDIA H100 80GB HBM3": Chip(84942979072, 3.35e12, 4.5e11, 5e10, 6.4e10),
    "NVIDIA H200": Chip(151397597184, 4.8e12, 4.5e11, 5e10, 6.4e10),
    "NVIDIA B200": Chip(191514411008, 7.7e12, 9e11, 5e10, 6.4e10),
}
