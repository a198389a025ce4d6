"""Line 21: the config that `plan --search` writes keeps the comments of the one that it was given."""

import copy
from pathlib import Path

import pytest
import yaml

from jaxlm.planning.run_file import with_keys

VALUES = {"model.attention": "auto", "mesh.data": 1, "mesh.fsdp": 64, "train.gradient_accumulation": 4,
          "train.remat": {"mlp_hidden": "keep"}, "mesh.expert": None}
CONFIGS = Path(__file__).parents[2] / "configs"
TEXTS = [
    "", "{}", "# only this\n", "mesh:\n", "model: {attention: xla}  # flow\nmesh: {}\n", "{mesh: {fsdp: 2}, seed: 3}\n",
    "train:\n  # of it\n  steps: 5   # five\n  remat:\n    attention: keep\n    residual: keep\n  # its end\nseed: 1",
    "train:\n    notes: |\n      a: 1\n      b\n\nmesh:\n    fsdp: -1  # all\n    # last\n",
]


@pytest.mark.parametrize("text", [*TEXTS, *(path.read_text() for path in CONFIGS.glob("*.yaml"))])
def test_keys_change_and_comments_stay(text):
    wanted = copy.deepcopy(yaml.safe_load(text)) or {}
    for name, value in VALUES.items():
        section, key = name.split(".")
        wanted[section] = (wanted.get(section) or {}) | {key: value}
    changed = with_keys(text, VALUES)
    assert yaml.safe_load(changed) == wanted
    for line in text.splitlines():
        if "#" in line:
            assert line[line.index("#"):] in changed
