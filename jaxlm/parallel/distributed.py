"""Processes: joining the others of this run, and starting several on this machine."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import jax

from jaxlm.errors import UserError
from jaxlm.parallel.compiler import prepare_compiler
from jaxlm.settings import DevicesSettings

# JAX's own names, so that any launcher that sets them for JAX serves jaxlm.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LAUNCHER = "JAXLM_LAUNCHER"  # id of the process that --processes belongs to; none of its processes outlives it


def initialize(settings: DevicesSettings) -> list[jax.Device]:
    """Chooses the backend, joins the other processes when launched as one of several, and returns the run's devices.

    Launched as one of several means, in this order: the JAX_* variables above (`--processes N` sets them), a Slurm step of
    several tasks, or devices.platform=tpu (a pod's hosts find each other through JAX). Call once, before any other use of JAX.

    Raises:
      UserError: the platform is not there, or has fewer devices than devices.count.
    """
    prepare_compiler(settings)
    several = COORDINATOR in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or settings.platform == "tpu"
    if settings.platform != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(settings.platform, settings.platform))
    if settings.platform in ("auto", "cpu"):
        # Only the CPU backend reads these; with platform=auto an accelerator, where there is one, still goes first.
        jax.config.update("jax_num_cpu_devices", settings.count or 1)
        if several:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if several and not jax.distributed.is_initialized():
        if LAUNCHER in os.environ:
            threading.Thread(target=_end_with, args=[int(os.environ[LAUNCHER])], daemon=True).start()
        _join()
    try:
        local = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX fails where the platform's plugin is not installed
        reason = str(error).splitlines()[0] if str(error) else "JAX knows no plugin for it"
        raise UserError(f"devices.platform={settings.platform}: no such backend here ({reason})") from None
    count = settings.count or len(local)
    if count > len(local):
        raise UserError(f"devices.count={count}: this process has {len(local)} {local[0].platform} device(s); "
                        f"use devices.count={len(local)} or devices.platform=cpu to emulate more")
    chosen: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        chosen.setdefault(device.process_index, []).append(device)
    return [device for devices in chosen.values() for device in devices[:count]]


def _join() -> None:
    # Gloo writes its greetings to file descriptor 1; standard output is for what was asked for.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if COORDINATOR not in os.environ:
        try:
            jax.distributed.initialize()  # Slurm or TPU: JAX asks the cluster
        except ValueError:  # there is none to ask
            raise UserError(f"devices.platform=tpu: no TPU here; start jaxlm on a TPU host, or set {COORDINATOR}, "
                            f"{NUM_PROCESSES} and {PROCESS_ID}") from None
        return
    missing = [name for name in (NUM_PROCESSES, PROCESS_ID) if not os.environ.get(name, "").isdigit()]
    if missing:
        raise UserError(f"{COORDINATOR} is set, so {missing[0]} must be a number, found '{os.environ.get(missing[0], '')}'")
    jax.distributed.initialize(os.environ[COORDINATOR], int(os.environ[NUM_PROCESSES]), int(os.environ[PROCESS_ID]))


def is_main() -> bool:
    """Whether this process prints and writes for all."""
    return jax.process_index() == 0


def run_local_processes(arguments: Sequence[str], num_processes: int) -> int:
    """Runs `jaxlm ARGUMENTS` in `num_processes` processes on this machine, joined over localhost.

    Returns the exit code: 0 when all ended well, else that of the first that failed; the others are then ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for process_id in range(num_processes):
        environment = os.environ | {COORDINATOR: f"127.0.0.1:{port}", NUM_PROCESSES: str(num_processes),
                                    PROCESS_ID: str(process_id), LAUNCHER: str(os.getpid())}
        processes.append(subprocess.Popen([sys.executable, "-m", "jaxlm", *arguments], env=environment))
    try:
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.1)
        return _first_failure(processes)
    finally:
        for process in processes:
            process.kill()  # after jax.distributed.initialize SIGTERM ends nothing; what is being written is whole or not there
            process.wait()


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)


def _first_failure(processes: Sequence[subprocess.Popen]) -> int:
    """The exit code to report; processes that hit the same bad input get a moment to say so with code 2."""
    deadline = time.monotonic() + 2
    while any(process.poll() is None for process in processes) and any(process.poll() for process in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes if process.poll()]
    return 0 if not codes else min(codes) if min(codes) > 0 else 1
