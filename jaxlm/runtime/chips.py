"""Everything that is published of an accelerator: one record a chip, and nothing made up.

Its peak speed, which MFU divides by; its memory; its networks; and what XLA has to know to compile for it where it is
not. A device without a record has no peak, and no MFU. Names are compared whole, so that a MIG slice or a custom part
never inherits the figures of the full chip. No JAX here: plans and help are read without it.

Sources, beside those named in the records.
- Memory that a program can use: TPUs: what libtpu 0.0.52 says; GPUs: NVIDIA's datasheets.
- TPUs' bandwidth: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; links, one way, and the share of a host's
  data-centre network: "How to Scale Your Model" (Austin et al. 2025), part 2, and for TPU7x the page of its bandwidth.
- GPUs' networks: NVIDIA's A100, H100, H200 and Blackwell datasheets (NVLink's figure counts both ways), with one
  network card for each GPU, as in DGX systems: 200 Gbit/s beside an A100, 400 Gbit/s beside the others.
- What XLA has to know of GPUs: openxla/xla, xla/backends/gpu/target_config/specs.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

GIB = 2**30
FLOAT32_PASSES = 6  # bfloat16 products that a TPU makes of one of float32


class Slices(NamedTuple):
    """How slices of a TPU generation are asked for."""

    name: str  # in targets, and libtpu's
    counted_as: int  # what the number in the cloud's names counts of a chip: v4's, v5p's and tpu7x's are TensorCores
    devices: int = 1  # JAX's, of one chip
    cloud_names: tuple[str, ...] = ()  # beside its own


class Card(NamedTuple):
    """What XLA has to know of a GPU to compile for it."""

    name: str  # in targets
    compute_capability: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    bandwidth: int  # bytes/s of its memory, to the last digit of XLA's specification
    l2_cache: int  # bytes
    shared_memory_per_core: int  # bytes
    shared_memory_per_block: int  # bytes, at most


class Chip(NamedTuple):
    """One JAX device of a kind; None: not published, not known here, or the chip lacks the format."""

    kind: str  # JAX's `device.device_kind`
    bfloat16: float | None = None  # dense teraFLOP/s (10^12, without sparsity)
    float32: float | None = None  # dense teraFLOP/s of IEEE float32; not TF32, nor bfloat16 passes
    memory: float | None = None  # bytes that a program can use
    bandwidth: float | None = None  # bytes/s of its memory; where it is known, so are the networks
    link: float | None = None  # bytes/s one way: TPU: of one link of the torus; GPU: of the whole connection to its node
    slow: float | None = None  # bytes/s one way to other slices or nodes
    host: float | None = None  # bytes/s one way to the host's memory
    torus: int = 0  # dimensions of the network inside an island; 0: every device reaches every other at full speed
    wraps: int = 1  # sides of a slice that are multiples of this can close to rings (`rings`)
    slices: Slices | None = None  # TPUs that can be planned for
    card: Card | None = None  # GPUs that can be planned for
    other_kinds: tuple[str, ...] = ()  # what JAX may call it, too


# Google publishes bfloat16 per chip and no float32.
TPUS = (
    # docs.cloud.google.com/tpu/docs/v2 and /v3: 46 and 123 TFLOPs a chip; JAX shows its two cores as two devices.
    Chip("TPU v2", 46 / 2),
    Chip("TPU v3", 123 / 2),
    # docs.cloud.google.com/tpu/docs/v4: 275 TFLOPs a chip, whose two cores are one device ("megacore")
    Chip("TPU v4", 275, memory=30.75 * GIB, bandwidth=1.2e12, link=4.5e10, slow=6.25e9, host=1.6e10, torus=3, wraps=4,
         slices=Slices("v4", 2)),
    # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs
    Chip("TPU v5 lite", 197, memory=15.75 * GIB, bandwidth=8.1e11, link=4.5e10, slow=3.125e9, host=1.6e10, torus=2, wraps=16,
         slices=Slices("v5e", 1, cloud_names=("v5litepod",)), other_kinds=("TPU v5e",)),
    # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs
    Chip("TPU v5", 459, memory=95.73 * GIB, bandwidth=2.765e12, link=9e10, slow=6.25e9, host=1.6e10, torus=3, wraps=4,
         slices=Slices("v5p", 2), other_kinds=("TPU v5p",)),
    # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs
    Chip("TPU v6 lite", 918, memory=31.24 * GIB, bandwidth=1.64e12, link=9e10, slow=1.25e10, host=3.2e10, torus=2, wraps=16,
         slices=Slices("v6e", 1), other_kinds=("TPU v6e",)),
    # docs.cloud.google.com/tpu/docs/tpu7x: 2307 TFLOPs a chip, whose two chiplets are two devices: half of everything
    Chip("TPU7x", 2307 / 2, memory=94.74 * GIB, bandwidth=7.38e12 / 2, link=1e11 / 2, slow=1.25e10 / 2, host=3.2e10, torus=3,
         wraps=4, slices=Slices("tpu7x", 2, devices=2)),
)

V100_SXM2 = (None, 15.7)  # NVIDIA V100 datasheet (2020). Volta has no bfloat16 arithmetic
V100_PCIE = (None, 14)
A100 = (312, 19.5)  # NVIDIA A100 datasheet (2021), all four cards
H100_SXM = (1979 / 2, 67)  # NVIDIA H100 datasheet (2024), whose tensor figures are with sparsity: half of them
H100_PCIE = (1513 / 2, 51)  # NVIDIA H100 datasheet (2022)
H100_NVL = (1671 / 2, 60)  # NVIDIA H100 datasheet (2024)

GPUS = (
    Chip("Tesla V100-SXM2-16GB", *V100_SXM2),
    Chip("Tesla V100-SXM2-32GB", *V100_SXM2),
    Chip("Tesla V100-PCIE-16GB", *V100_PCIE),
    Chip("Tesla V100-PCIE-32GB", *V100_PCIE),
    Chip("Tesla T4", None, 8.1),  # NVIDIA T4 datasheet. Turing has no bfloat16 arithmetic
    Chip("NVIDIA A100-SXM4-40GB", *A100),
    Chip("NVIDIA A100-SXM4-80GB", *A100, 85100068864, bandwidth=2.039e12, link=3e11, slow=2.5e10, host=3.2e10,
         card=Card("a100", 8, 108, 64, 1.41, 2039040000000, 41943040, 167936, 166912)),
    Chip("NVIDIA A100-PCIE-40GB", *A100),
    Chip("NVIDIA A100 80GB PCIe", *A100),
    Chip("NVIDIA A10", 125, 31.2),  # NVIDIA A10 datasheet
    Chip("NVIDIA A30", 165, 10.3),  # NVIDIA A30 datasheet
    Chip("NVIDIA A40", 149.7, 37.4),  # NVIDIA A40 datasheet
    Chip("NVIDIA L4", 242 / 2, 30.3),  # NVIDIA L4 datasheet, with sparsity: half
    Chip("NVIDIA L40", 181.05, 90.5),  # NVIDIA L40 datasheet
    Chip("NVIDIA L40S", 362.05, 91.6),  # NVIDIA L40S datasheet
    Chip("NVIDIA H100 80GB HBM3", *H100_SXM, 84942979072, bandwidth=3.35e12, link=4.5e11, slow=5e10, host=6.4e10,
         card=Card("h100", 9, 132, 128, 1.98, 3352320000000, 52428800, 233472, 232448)),
    Chip("NVIDIA H100 PCIe", *H100_PCIE),
    Chip("NVIDIA H100 NVL", *H100_NVL),
    # NVIDIA H200 datasheet (2024), with sparsity: half
    Chip("NVIDIA H200", 1979 / 2, 67, 151397597184, bandwidth=4.8e12, link=4.5e11, slow=5e10, host=6.4e10,
         card=Card("h200", 9, 132, 128, 1.98, 4800000000000, 52428800, 233472, 232448)),
    Chip("NVIDIA H200 NVL", 1671 / 2, 60),
    Chip("NVIDIA GH200 480GB", 1979 / 2, 67),  # NVIDIA GH200 datasheet, with sparsity: half
    # NVIDIA Blackwell architecture brief, HGX B200, with sparsity: half
    Chip("NVIDIA B200", 4500 / 2, 80, 191514411008, bandwidth=7.7e12, link=9e11, slow=5e10, host=6.4e10,
         card=Card("b200", 10, 148, 128, 1.965, 7672320000000, 132644864, 233472, 232448)),
    Chip("NVIDIA GB200", 5000 / 2, 90),  # the same, GB200 (of one GPU), with sparsity: half
    # NVIDIA GA102, Ada and RTX Blackwell architecture white papers: bfloat16 products with float32 sums, dense
    Chip("NVIDIA GeForce RTX 3090", 71, 35.6),
    Chip("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    Chip("NVIDIA GeForce RTX 5090", 209.5, 104.8),
)

CHIPS = {kind: chip for chip in (*TPUS, *GPUS) for kind in (chip.kind, *chip.other_kinds)}


def find_chip(device_kind: str) -> Chip:
    """The record of a device by JAX's `device.device_kind`; one in which nothing is known where there is none."""
    return CHIPS.get(device_kind) or Chip(device_kind)


def peak_flops(device_kind: str, precision: Literal["bfloat16", "float32"] = "bfloat16") -> float | None:
    """Published peak FLOP/s of one device by JAX's `device.device_kind`; None when there is none (every CPU, too).

    `float32` is for matrix products in full float32, not for TF32 or bfloat16 passes.
    """
    teraflops = getattr(find_chip(device_kind), precision)
    return None if teraflops is None else teraflops * 1e12


def products_peak(device_kind: str, precision: Literal["bfloat16", "float32"]) -> float | None:
    """FLOP/s of matrix products in `train.precision` that no program passes: what MFU and the roofline divide by.

    A float32 product is a full one (`jaxlm.models.model.Model.traced`). GPUs make it on their CUDA cores; that peak
    is published. TPUs have no such unit: XLA makes it of six bfloat16 products (`jax.lax.Precision.HIGHEST`), so its
    peak is a sixth of theirs. (For two matrices of 4,096 x 4,096 libtpu 0.0.52 expects 5.6 to 6.2 times the cycles,
    on v4 to TPU7x.)
    """
    if precision == "float32" and find_chip(device_kind) in TPUS:
        return peak_flops(device_kind) / FLOAT32_PASSES
    return peak_flops(device_kind, precision)


def rings(chip: Chip, shape: Sequence[int]) -> tuple[bool, ...]:
    """Which sides of a TPU slice, `shape` chips long, close to rings.

    Three-dimensional slices are put together of cubes of 4 x 4 x 4 chips by optical switches, which close every
    side; a slice smaller than a cube closes none. The sides of a two-dimensional one close one by one, where they
    span the pod's 16 chips (docs.cloud.google.com/tpu/docs/{v4,v5p,tpu7x,v5e,v6e}).
    """
    spanning = tuple(side % chip.wraps == 0 for side in shape)
    return spanning if chip.torus < 3 else (all(spanning),) * len(shape)
