"""Line 19: what JAX says of accelerators that it does not find is a line, which names the extra that brings what is
missing."""

import logging
import sys

import pytest

from jaxlm.runtime import accelerators
from jaxlm.runtime.accelerators import collected, how_to_install

JAX = logging.getLogger("jax._src.xla_bridge")


@pytest.mark.parametrize(("platform", "extra"), [("gpu", "pip install 'jaxlm[cuda]'"), ("tpu", "pip install 'jaxlm[tpu]'")])
def test_what_is_missing_is_named(platform, extra):
    assert extra in how_to_install(platform) and how_to_install("cpu") == ""


def test_a_plug_in_that_does_not_start_is_a_line(caplog):
    with collected() as said:
        try:
            try:
                raise RuntimeError("cuDNN not found.")
            except RuntimeError as error:
                raise RuntimeError("Unable to load cuDNN. Is it installed?\nmore") from error
        except RuntimeError:
            JAX.exception("Jax plugin configuration error: Exception when calling %s.initialize()", "jax_plugins.xla_cuda13")
        JAX.warning("An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed.\nFalling back")
        JAX.warning("A Google TPU may be present on this machine, but no libtpu is installed.")
        JAX.exception("Jax plugin configuration error: Plugin module %s could not be loaded")  # JAX forgets the argument
    assert said[0] == "an accelerator's plug-in does not start: Unable to load cuDNN. Is it installed?"
    assert said[1].startswith("An NVIDIA GPU may be present") and said[1].endswith("pip install 'jaxlm[cuda]'")
    assert said[2].endswith("pip install 'jaxlm[tpu]'") and said[3].startswith("Jax plugin configuration error")
    assert not caplog.records and all("\n" not in line for line in said)
    JAX.warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]


@pytest.mark.parametrize(("files", "found"), [
    ({}, False), ({"dev/nvidia0": ""}, True), ({"dev/accel0": ""}, True), ({"dev/vfio/0": ""}, True), ({"dev/dxg": ""}, True),
    ({"dev/vfio/vfio": "", "dev/null": ""}, False), ({"sys/bus/pci/devices/0000:00:04.0/vendor": "0x10de\n"}, True),
    ({"sys/bus/pci/devices/0000:00:04.0/vendor": "0x8086\n"}, False)])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere JAX looks for itself")
def test_accelerators_are_looked_for_where_there_can_be_one(files, found, tmp_path, monkeypatch):
    """A compiler that is installed for `jaxlm plan` says nothing on a machine without a GPU or TPU."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(accelerators, "entry_points", lambda group: [])
    assert accelerators.may_be_here(tmp_path) is found
