import pytest

from jaxlm.reporting.hardware import PEAKS, peak_flops


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
