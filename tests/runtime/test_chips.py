"""One record a chip: published figures, none changed since they stood in tables of their own, and no guesses."""

import json
from pathlib import Path

import pytest

from jaxlm.planning.targets import GPUS, TPUS
from jaxlm.runtime import chips
from jaxlm.runtime.chips import CHIPS, find_chip, peak_flops, products_peak

TABLES = json.loads((Path(__file__).parents[1] / "golden" / "chips.json").read_text(encoding="utf-8"))
RECORDS = (*chips.TPUS, *chips.GPUS)


@pytest.mark.parametrize("kind", TABLES["peaks"])
def test_figures_are_those_of_the_old_tables(kind):
    """`golden/chips.json`: the tables of peaks, memory and networks, as they were before they became one."""
    chip = find_chip(kind)
    assert (chip.bfloat16, chip.float32) == tuple(TABLES["peaks"][kind].values())
    if kind in TABLES["memory"]:
        assert chip.memory == TABLES["memory"][kind]
        assert {name: getattr(chip, name) for name in TABLES["networks"][kind]} == TABLES["networks"][kind]


@pytest.mark.parametrize("name", [*TABLES["tpus"], *TABLES["gpus"]])
def test_what_compilers_are_told_is_that_of_the_old_tables(name):
    if old := TABLES["tpus"].get(name):
        chip = TPUS[name]
        new = chip.slices._asdict() | {"kind": chip.kind, "dimensions": chip.torus, "cloud_names": list(chip.slices.cloud_names)}
    else:
        chip, old = GPUS[name], TABLES["gpus"][name]
        new = chip.card._asdict() | {"kind": chip.kind, "memory": chip.memory}
    assert {key: new[key] for key in old} == old


def test_records_are_whole_and_no_chip_has_two():
    """Whatever can be planned for has all that a roofline reads; the rest only its speed."""
    for chip in RECORDS:
        figures = (chip.memory, chip.bandwidth, chip.link, chip.slow, chip.host, chip.slices or chip.card)
        assert all(figures) or not any(figures)
        assert bool(chip.torus) == bool(chip.slices)
    assert len(CHIPS) == sum(1 + len(chip.other_kinds) for chip in RECORDS) == len(TABLES["peaks"])


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
    assert find_chip(kind)[1:] == chips.Chip("")[1:]


def test_precisions_are_kept_apart():
    assert peak_flops("NVIDIA A100-SXM4-40GB", "float32") == pytest.approx(19.5e12)
    assert peak_flops("TPU v4", "float32") is None  # Google publishes none
    assert peak_flops("Tesla V100-SXM2-32GB") is None  # Volta has no bfloat16
    both = [chip for chip in RECORDS if chip.bfloat16 and chip.float32]
    assert both and all(chip.bfloat16 > chip.float32 for chip in both)


def test_float32_products_have_a_peak_of_their_own():
    """Published for GPUs' CUDA cores; on TPUs six bfloat16 products make one of float32. What is not known stays so."""
    assert products_peak("NVIDIA H100 80GB HBM3", "float32") == pytest.approx(67e12)
    assert products_peak("NVIDIA A100-SXM4-80GB", "float32") == pytest.approx(19.5e12)
    assert products_peak("TPU v5 lite", "float32") == pytest.approx(197e12 / 6)
    assert products_peak("TPU7x", "float32") == pytest.approx(2307e12 / 12)
    assert products_peak("TPU v5", "bfloat16") == pytest.approx(459e12)
    assert products_peak("cpu", "float32") is None and products_peak("TPU v9", "float32") is None
