"""What JAX says of accelerators while it looks for them, in a line each, and the extra that brings what is missing."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

EXTRAS = {"gpu": "cuda", "tpu": "tpu"}
DEVICE_FILES = ("nvidia*", "dxg", "accel*", "vfio/[0-9]*")  # of NVIDIA's driver, of Windows' below Linux, of TPUs
VENDORS = ("0x10de", "0x1ae0")  # on the PCI bus: NVIDIA, Google


def may_be_here(root: Path = Path("/")) -> bool:
    """Whether a GPU or TPU can be in this machine. Where none can, JAX need not look for one.

    libtpu and CUDA's plug-in are installed for `jaxlm plan`, too; asked for devices that are not there, they answer
    with pages of C++. True wherever this cannot be told: other systems than Linux, other plug-ins than these.
    """
    if sys.platform != "linux" or any(not plugin.name.startswith("xla_cuda") for plugin in entry_points(group="jax_plugins")):
        return True
    vendors = (path.read_text().strip() for path in root.glob("sys/bus/pci/devices/*/vendor"))
    return any(any((root / "dev").glob(name)) for name in DEVICE_FILES) or any(vendor in VENDORS for vendor in vendors)


def how_to_install(platform: str) -> str:
    """`; ...` to stand behind what is missing on this platform (gpu or tpu); nothing for others."""
    if platform not in EXTRAS:
        return ""
    whose = "NVIDIA GPUs need their driver and" if platform == "gpu" else "TPUs need"
    return f"; {whose} pip install 'jaxlm[{EXTRAS[platform]}]'"


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collects the warnings of JAX's search for devices, which would be tracebacks, as lines."""
    logger, said = logging.getLogger("jax._src.xla_bridge"), []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        said.append(_in_a_line(record))
        return False

    logger.addFilter(collect)
    try:
        yield said
    finally:
        logger.removeFilter(collect)


def _in_a_line(record: logging.LogRecord) -> str:
    if record.exc_info and record.exc_info[1]:  # of a plug-in that is installed, and does not start
        error = record.exc_info[1]
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        return f"an accelerator's plug-in does not start: {reason}"
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # JAX has forgotten an argument in one of them
        text = str(record.msg)
    platform = "gpu" if "NVIDIA" in text or "CUDA" in text else "tpu" if "TPU" in text else ""
    return f"{text.strip().splitlines()[0]}{how_to_install(platform)}"
