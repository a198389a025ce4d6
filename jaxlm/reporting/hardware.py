"""Published peak speed of accelerators, what MFU divides by, and their memory. A device that is not in the table has
no peak, and no MFU.

Names are compared whole, so that a MIG slice or a custom part never inherits the figure of the full chip.
"""

from typing import Literal, NamedTuple


class Peak(NamedTuple):
    """Dense teraFLOP/s (10^12, without sparsity) of ONE JAX device; None: not published, or the chip lacks the
    format."""

    bfloat16: float | None
    float32: float | None  # IEEE float32; not TF32, nor bfloat16 passes


# Google publishes bfloat16 per chip and no float32.
TPU = {
    # docs.cloud.google.com/tpu/docs/v2 and /v3: 46 and 123 TFLOPs a chip; JAX shows its two cores as two devices.
    "TPU v2": Peak(46 / 2, None),
    "TPU v3": Peak(123 / 2, None),
    # docs.cloud.google.com/tpu/docs/v4: 275 TFLOPs a chip, whose two cores are one device ("megacore")
    "TPU v4": Peak(275, None),
    # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs
    "TPU v5 lite": Peak(197, None),
    "TPU v5e": Peak(197, None),
    # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs
    "TPU v5": Peak(459, None),
    "TPU v5p": Peak(459, None),
    # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs
    "TPU v6 lite": Peak(918, None),
    "TPU v6e": Peak(918, None),
    # docs.cloud.google.com/tpu/docs/tpu7x: 2307 TFLOPs a chip, whose two chiplets are two devices
    "TPU7x": Peak(2307 / 2, None),
}

V100_SXM2 = Peak(None, 15.7)  # NVIDIA V100 datasheet (2020). Volta has no bfloat16 arithmetic
V100_PCIE = Peak(None, 14)
A100 = Peak(312, 19.5)  # NVIDIA A100 datasheet (2021), all four cards
H100_SXM = Peak(1979 / 2, 67)  # NVIDIA H100 datasheet (2024), whose tensor figures are with sparsity: half of them
H100_PCIE = Peak(1513 / 2, 51)  # NVIDIA H100 datasheet (2022)
H100_NVL = Peak(1671 / 2, 60)  # NVIDIA H100 datasheet (2024)

NVIDIA = {
    "Tesla V100-SXM2-16GB": V100_SXM2,
    "Tesla V100-SXM2-32GB": V100_SXM2,
    "Tesla V100-PCIE-16GB": V100_PCIE,
    "Tesla V100-PCIE-32GB": V100_PCIE,
    "Tesla T4": Peak(None, 8.1),  # NVIDIA T4 datasheet. Turing has no bfloat16 arithmetic
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA A10": Peak(125, 31.2),  # NVIDIA A10 datasheet
    "NVIDIA A30": Peak(165, 10.3),  # NVIDIA A30 datasheet
    "NVIDIA A40": Peak(149.7, 37.4),  # NVIDIA A40 datasheet
    "NVIDIA L4": Peak(242 / 2, 30.3),  # NVIDIA L4 datasheet, with sparsity: half
    "NVIDIA L40": Peak(181.05, 90.5),  # NVIDIA L40 datasheet
    "NVIDIA L40S": Peak(362.05, 91.6),  # NVIDIA L40S datasheet
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 PCIe": H100_PCIE,
    "NVIDIA H100 NVL": H100_NVL,
    "NVIDIA H200": Peak(1979 / 2, 67),  # NVIDIA H200 datasheet (2024), with sparsity: half
    "NVIDIA H200 NVL": Peak(1671 / 2, 60),
    "NVIDIA GH200 480GB": Peak(1979 / 2, 67),  # NVIDIA GH200 datasheet, with sparsity: half
    "NVIDIA B200": Peak(4500 / 2, 80),  # NVIDIA Blackwell architecture brief, HGX B200, with sparsity: half
    "NVIDIA GB200": Peak(5000 / 2, 90),  # the same, GB200 (of one GPU), with sparsity: half
    # NVIDIA GA102, Ada and RTX Blackwell architecture white papers: bfloat16 products with float32 sums, dense
    "NVIDIA GeForce RTX 3090": Peak(71, 35.6),
    "NVIDIA GeForce RTX 4090": Peak(165.2, 82.6),
    "NVIDIA GeForce RTX 5090": Peak(209.5, 104.8),
}

PEAKS = TPU | NVIDIA


# Bytes that a program can use of one JAX device. TPUs: what libtpu 0.0.52 says; GPUs: NVIDIA's datasheets.
GIB = 2**30
MEMORY = {
    "TPU v4": 30.75 * GIB,
    "TPU v5 lite": 15.75 * GIB,
    "TPU v5": 95.73 * GIB,
    "TPU v6 lite": 31.24 * GIB,
    "TPU7x": 94.74 * GIB,  # half a chip
    "NVIDIA A100-SXM4-80GB": 85100068864,
    "NVIDIA H100 80GB HBM3": 84942979072,
    "NVIDIA H200": 151397597184,
    "NVIDIA B200": 191514411008,
}

FLOAT32_PASSES = 6  # bfloat16 products that a TPU makes of one of float32


def peak_flops(device_kind: str, precision: Literal["bfloat16", "float32"] = "bfloat16") -> float | None:
    """Published peak FLOP/s of one device by JAX's `device.device_kind`; None when there is none (every CPU, too).

    `float32` is for matrix products in full float32, not for TF32 or bfloat16 passes.
    """
    peak = PEAKS.get(device_kind)
    teraflops = getattr(peak, precision) if peak else None
    return None if teraflops is None else teraflops * 1e12


def products_peak(device_kind: str, precision: Literal["bfloat16", "float32"]) -> float | None:
    """FLOP/s of matrix products in `train.precision` that no program passes: what MFU and the roofline divide by.

    A float32 product is a full one (`jaxlm.models.model.Model.traced`). GPUs make it on their CUDA cores; that peak
    is published. TPUs have no such unit: XLA makes it of six bfloat16 products (`jax.lax.Precision.HIGHEST`), so its
    peak is a sixth of theirs. (For two matrices of 4,096 x 4,096 libtpu 0.0.52 expects 5.6 to 6.2 times the cycles,
    on v4 to TPU7x.)
    """
    if precision == "float32" and device_kind in TPU:
        return peak_flops(device_kind) / FLOAT32_PASSES
    return peak_flops(device_kind, precision)
