"""How the parameters of every shipped config are cut, against what is written down."""

import importlib.util
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_partition_specs_are_those_written_down(path):
    """After a change that is meant: python tests/golden/make_specs.py"""
    loader = importlib.util.spec_from_file_location("make_specs", GOLDEN / "make_specs.py")
    make_specs = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(make_specs)
    assert make_specs.describe(path) == (GOLDEN / "specs" / f"{path.stem}.txt").read_text(encoding="utf-8")
