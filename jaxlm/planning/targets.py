"""Devices that are not here: what the compilers of TPUs and GPUs take for a pod or a cluster.

`cpu:8` (emulated, and so really there), `v5p:4x4x4` or `2xv5e:16x16` (TPU slices), `h100:8x4` (GPUs of a node x nodes).
The compilers are wheels: libtpu; jax-cuda13-plugin with jax-cuda13-pjrt. They need no driver and no accelerator.
"""

import math
import os
import re
from importlib.util import find_spec
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxlm.errors import UserError, nearest
from jaxlm.parallel.compiler import set_flags
from jaxlm.parallel.mesh import island

TPUS = ("v4", "v5e", "v5p", "v6e")


class GPU(NamedTuple):
    """What XLA has to know of a GPU to compile for it (openxla/xla, xla/backends/gpu/target_config/specs)."""

    kind: str  # JAX's device_kind
    compute_capability: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory: int  # bytes
    bandwidth: int  # bytes/s
    l2_cache: int  # bytes
    shared_memory_per_core: int  # bytes
    shared_memory_per_block: int  # bytes, at most

    def proto(self) -> str:
        """The GpuTargetConfigProto, as text."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_memory_per_block}
              shared_memory_per_core: {self.shared_memory_per_core}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              core_count: {self.cores} fpus_per_core: {self.fpus_per_core} clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache} device_memory_size: {self.memory}
              cuda_compute_capability {{
                major: {self.compute_capability}
                feature_extension: {"ACCELERATED_FEATURES" if self.compute_capability >= 9 else "NONE"}
              }}
              device_vendor: "NVIDIA Corporation" name: "{self.kind}" device_address_bits: 64 ecc_enabled: true
              driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.kind}"
            """


GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85100068864, 2039040000000, 41943040, 167936, 166912),
    "h100": GPU("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84942979072, 3352320000000, 52428800, 233472, 232448),
    "h200": GPU("NVIDIA H200", 9, 132, 128, 1.98, 151397597184, 4800000000000, 52428800, 233472, 232448),
    "b200": GPU("NVIDIA B200", 10, 148, 128, 1.965, 191514411008, 7672320000000, 132644864, 233472, 232448),
}
FORM = re.compile(r"(?:(?P<slices>\d+)x)?(?P<kind>[a-z]\w*):(?P<shape>\d+(?:x\d+)*)")


class Target(NamedTuple):
    """A target's devices; `island` says which of them have a fast network among themselves, as for `jaxlm.parallel.mesh`."""

    name: str
    kind: str
    devices: list[jax.Device]

    def island(self, device: jax.Device) -> int:
        """Number of the TPU slice or GPU node that a device stands in."""
        return device.process_index if self.kind in GPUS else island(device)


def find_target(name: str) -> Target:
    """The devices of a target. Call before any other use of JAX.

    Raises:
      UserError: there is no such target, or its compiler is not installed.
    """
    found = FORM.fullmatch(name)
    kinds = ("cpu", *TPUS, *GPUS)
    if not found:
        raise UserError(f"target '{name}': expected KIND:SHAPE, for example cpu:8, v5p:4x4x4, 2xv5e:16x16 or h100:8x4")
    kind, shape, slices = found["kind"], found["shape"], int(found["slices"] or 1)
    if kind not in kinds:
        raise UserError(f"target '{name}': unknown kind '{kind}', expected one of {', '.join(kinds)}{nearest(kind, kinds)}")
    if not all(map(int, re.findall(r"\d+", shape))) or not slices:
        raise UserError(f"target '{name}': sizes are positive numbers")
    jax.config.update("jax_platforms", "cpu")  # what compiles; the target's devices are never started
    if kind in TPUS:
        return Target(name, kind, _tpu_devices(name, kind, shape, slices))
    sizes = [int(size) for size in shape.split("x")]
    if slices > 1 or len(sizes) > 2 or (kind == "cpu" and len(sizes) > 1):
        form = "cpu:N" if kind == "cpu" else f"{kind}:GPUs of a node x nodes, for example {kind}:8x4"
        raise UserError(f"target '{name}': expected {form}")
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", math.prod(sizes))
        return Target(name, kind, jax.devices())
    return Target(name, kind, _gpu_devices(name, kind, *sizes))


def _tpu_devices(name: str, kind: str, shape: str, slices: int) -> list[jax.Device]:
    if not find_spec("libtpu"):
        raise UserError(f"target '{name}' needs the compiler of TPUs: pip install libtpu")
    set_flags("tpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # outside the cloud there is no metadata server to ask
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compilers do not contend for a device as runs do
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", num_slices=slices,
            **{"chip_config_name": "megacore"} if kind == "v4" else {})  # a v4 chip's two cores are one device, as in a run
    except (RuntimeError, ValueError) as error:
        raise UserError(f"target '{name}': libtpu knows no such topology ({str(error).splitlines()[0]})") from None
    return list(topology.devices)


def _gpu_devices(name: str, kind: str, per_node: int, nodes: int = 1) -> list[jax.Device]:
    if not find_spec("jax_cuda13_plugin"):
        version = jax.__version__
        raise UserError(f"target '{name}' needs the compiler of GPUs: pip install jax-cuda13-plugin=={version} "
                        f"jax-cuda13-pjrt=={version} nvidia-cudnn-cu13 nvidia-cublas nvidia-cuda-nvrtc")
    set_flags("gpu")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=GPUS[kind].proto(), topology=f"1x{nodes}x{per_node}")
    return list(topology.devices)
