import pytest

from jaxlm.reporting.hardware import MEMORY, PEAKS, peak_flops, products_peak


@pytest.mark.parametrize(("kind", "teraflops"), [
    ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU7x", 1153.5),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H200", 989.5), ("NVIDIA B200", 2250),
    ("NVIDIA L4", 121)])
def test_published_dense_bfloat16_peaks(kind, teraflops):
    assert peak_flops(kind) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "", "Quantum 9000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v9", "NVIDIA H100"])
def test_no_guess_for_what_is_not_published(kind):
    assert peak_flops(kind) is None
    assert peak_flops(kind, "float32") is None


def test_precisions_are_kept_apart():
    assert peak_flops("NVIDIA A100-SXM4-40GB", "float32") == pytest.approx(19.5e12)
    assert peak_flops("TPU v4", "float32") is None  # Google publishes none
    assert peak_flops("Tesla V100-SXM2-32GB") is None  # Volta has no bfloat16
    both = [peak for peak in PEAKS.values() if peak.bfloat16 and peak.float32]
    assert both and all(peak.bfloat16 > peak.float32 for peak in both)


def test_float32_products_have_a_peak_of_their_own():
    """Published for GPUs' CUDA cores; on TPUs six bfloat16 products make one of float32. What is not known stays so."""
    assert products_peak("NVIDIA H100 80GB HBM3", "float32") == pytest.approx(67e12)
    assert products_peak("NVIDIA A100-SXM4-80GB", "float32") == pytest.approx(19.5e12)
    assert products_peak("TPU v5 lite", "float32") == pytest.approx(197e12 / 6)
    assert products_peak("TPU7x", "float32") == pytest.approx(2307e12 / 12)
    assert products_peak("TPU v5", "bfloat16") == pytest.approx(459e12)
    assert products_peak("cpu", "float32") is None and products_peak("TPU v9", "float32") is None


def test_memory_is_known_of_devices_whose_speed_is():
    assert set(MEMORY) <= set(PEAKS)
    assert MEMORY["TPU v5 lite"] == 15.75 * 2**30 and 84e9 < MEMORY["NVIDIA H100 80GB HBM3"] < 85.9e9
