"""A target's devices as JAX knows them: what the compilers of TPUs and GPUs take for a pod or a cluster.

The compilers are wheels, of the versions that JAX asks for: libtpu (the extra `tpu`); jax-cuda13-plugin with
jax-cuda13-pjrt (`cuda`). They need no driver and no accelerator.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxlm.errors import RunError, UserError
from jaxlm.parallel.mesh import island
from jaxlm.planning.targets import Target
from jaxlm.planning.versions import how_to_install, told_in_a_line, warn_of_mismatch
from jaxlm.runtime.chips import Chip, rings
from jaxlm.runtime.compiler import set_flags

# What libtpu asks its host, and complains of where there is no TPU.
NO_HOST = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
DIMENSIONS = 3  # of every topology to libtpu, whatever the network's


class Devices(NamedTuple):
    """All of a target's; `island` says which of them have a fast network among themselves, as for
    `jaxlm.parallel.mesh`."""

    all: list[jax.Device]
    island: Callable[[jax.Device], int]


def devices_of(target: Target) -> Devices:
    """The target's devices. Call before any other use of JAX.

    Raises:
      UserError: its compiler is not installed, or knows no such topology.
      RunError: the compiler does not start.
    """
    jax.config.update("jax_platforms", "cpu")  # what compiles; the target's devices are never started
    if target.platform == "tpu":
        return Devices(_tpus(target), island)
    if target.platform == "gpu":
        return Devices(_gpus(target), lambda device: device.process_index)
    jax.config.update("jax_num_cpu_devices", target.num_devices)
    return Devices(jax.devices(), island)


def _tpus(target: Target) -> list[jax.Device]:
    if not find_spec("libtpu"):
        raise UserError(f"target '{target.name}' needs the compiler of TPUs: {how_to_install('tpu')}")
    warn_of_mismatch("tpu")
    set_flags("tpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # outside the cloud there is no metadata server to ask
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compilers do not contend for a device as runs do
    for name, value in NO_HOST.items():
        os.environ.setdefault(name, value)
    cores = {"chip_config_name": "megacore"} if target.kind == "v4" else {}  # a v4 chip's two are one device, as in a run
    closed = rings(target.chip, target.shape)  # or libtpu sends everything as along a line
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.kind}:{'x'.join(map(str, target.shape))}", num_slices=target.islands,
            wrap=closed + (False,) * (DIMENSIONS - len(closed)), **cores)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"target '{target.name}': libtpu knows no such topology; {told_in_a_line(error, 'tpu')}") from None
    return list(topology.devices)


def _gpus(target: Target) -> list[jax.Device]:
    if not find_spec("jax_cuda13_plugin"):
        version = jax.__version__
        raise UserError(f"target '{target.name}' needs the compiler of GPUs: {how_to_install('gpu')}; without CUDA's libraries: "
                        f"pip install jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cudnn-cu13 nvidia-cublas "
                        "nvidia-cuda-nvrtc")
    warn_of_mismatch("gpu")
    set_flags("gpu")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=target.kind, target_config=_described(target.chip),
            topology=f"1x{target.islands}x{target.island_size}")
    except (RuntimeError, ValueError) as error:
        raise RunError(f"target '{target.name}': {told_in_a_line(error, 'gpu')}") from None
    return list(topology.devices)


def _described(chip: Chip) -> str:
    """The GpuTargetConfigProto, as text."""
    gpu = chip.card
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared_memory_per_block}
          shared_memory_per_core: {gpu.shared_memory_per_core}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {gpu.cores} fpus_per_core: {gpu.fpus_per_core} clock_rate_ghz: {gpu.clock_ghz}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2_cache} device_memory_size: {chip.memory}
          cuda_compute_capability {{
            major: {gpu.compute_capability}
            feature_extension: {"ACCELERATED_FEATURES" if gpu.compute_capability >= 9 else "NONE"}
          }}
          device_vendor: "NVIDIA Corporation" name: "{chip.kind}" device_address_bits: 64 ecc_enabled: true
          driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{chip.kind}"
        """
