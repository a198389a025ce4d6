"""What libtpu is told of a slice: which of its sides close to rings."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from jaxlm.planning import devices
from jaxlm.planning.targets import find_target
from jaxlm.runtime.chips import rings

# docs.cloud.google.com/tpu/docs and MaxText's table of topologies (0.2.5): (kind and sides, which of them close)
CLOSED = {
    "v4:4x4x4": "yyy", "v4:2x2x1": "nnn", "v4:2x4x4": "nnn", "v4:4x4x8": "yyy",
    "v5p:4x4x4": "yyy", "v5p:2x2x4": "nnn", "v5p:2x4x4": "nnn", "v5p:8x8x16": "yyy", "v5p:4x8x8": "yyy", "2xv5p:4x4x8": "yyy",
    "tpu7x:4x4x4": "yyy", "tpu7x:2x2x1": "nnn",
    "v5e:16x16": "yyn", "v5e:8x16": "nyn", "v5e:8x8": "nnn", "v5e:2x4": "nnn", "4xv5e:16x16": "yyn",
    "v6e:16x16": "yyn", "v6e:8x16": "nyn", "v6e:4x4": "nnn",
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_topology_says_which_sides_close(name, monkeypatch):
    asked = {}
    monkeypatch.setattr(devices, "find_spec", lambda name: True)
    monkeypatch.setattr(devices.topologies, "get_topology_desc", lambda **keys: asked.update(keys) or SimpleNamespace(devices=[]))
    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", *devices.NO_HOST):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))  # put back afterwards
    target = find_target(name)
    devices.devices_of(target)
    assert asked["wrap"] == tuple(letter == "y" for letter in CLOSED[name])  # libtpu takes three, whatever the dimensions
    assert rings(target.chip, target.shape) == asked["wrap"][: len(target.shape)]  # the roofline's links


PROGRAM = """
import sys
from jaxlm import config
from jaxlm.planning.lowering import compile_step, lay
from jaxlm.planning.targets import find_target
settings = config.load(sys.argv[1], sys.argv[2:])
sys.stdout.write(compile_step(settings, lay(settings, find_target("v5p:4x4x4"))[0]).as_text())
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="needs libtpu, the compiler of TPUs")
def test_on_a_closed_slice_gathers_stay_gathers(tmp_path):
    """Without rings libtpu writes them as sums of padded arrays, twice the bytes; there is then no all-gather at
    all."""
    (tmp_path / "run.yaml").write_text("""
        model: {num_layers: 2, num_heads: 8, hidden_size: 1024, vocab_size: 512, max_length: 256}
        data: {sequence_length: 256, global_batch_size: 64}
        train: {precision: bfloat16}
        mesh: {fsdp: -1}
        """)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "run.yaml")], env=environment, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" all-gather(") > 5
