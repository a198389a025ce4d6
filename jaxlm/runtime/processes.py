"""Processes: joining the others of this run."""

import functools
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from operator import itemgetter
from typing import Any

import jax
from orbax.checkpoint import multihost

import jaxlm
from jaxlm.errors import UserError, reason, shown
from jaxlm.runtime.accelerators import collected, how_to_install, may_be_here
from jaxlm.runtime.compiler import prepare_compiler
from jaxlm.safety.launcher import COORDINATOR, LAUNCHER, NUM_PROCESSES, PROCESS_ID
from jaxlm.settings import DevicesSettings

SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
OF_A_HOST = ("devices.compiled", "data.prepare_processes")  # keys that may differ between the processes of a run
MEETING = 7 * 24 * 3600 * 1000  # milliseconds; who watches over the run ends it before


def initialize(settings: DevicesSettings) -> list[jax.Device]:
    """Chooses the backend, joins the other processes when launched as one of several, and returns the run's devices.

    Call once, before any other use of JAX.

    Raises:
      UserError: the platform is not there, or has fewer devices than devices.count; the environment's variables
      contradict
        each other.
    """
    several = is_one_of_several(settings)
    prepare_compiler(settings)
    if LAUNCHER in os.environ:
        threading.Thread(target=_end_with, args=[int(os.environ[LAUNCHER])], daemon=True).start()
    if settings.platform != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(settings.platform, settings.platform))
    elif "JAX_PLATFORMS" not in os.environ and not may_be_here():
        jax.config.update("jax_platforms", "cpu")
    if settings.platform in ("auto", "cpu"):
        # Only the CPU backend reads these; with platform=auto an accelerator, where there is one, still goes first.
        jax.config.update("jax_num_cpu_devices", settings.count or 1)
        if several:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if several and not jax.distributed.is_initialized():
        _join()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX would only note it; before there is something to save, it ends us
    try:
        with collected() as said:
            local = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX fails where the platform's plugin is not installed
        why = (said or str(error).splitlines() or ["JAX knows no plugin for it"])[0]
        asked = os.environ.get("JAX_PLATFORMS") if settings.platform == "auto" else None
        what = f"JAX_PLATFORMS={asked}" if asked else f"devices.platform={settings.platform}"
        raise UserError(f"{what}: no such backend here ({why}){how_to_install(asked or settings.platform)}") from None
    for line in said:
        print(f"jaxlm: {line}; going on with {local[0].platform}", file=sys.stderr)
    count = settings.count or len(local)
    if count > len(local):
        raise UserError(f"devices.count={count}: this process has {len(local)} {local[0].platform} device(s); "
                        f"use devices.count={len(local)} or devices.platform=cpu to emulate more")
    chosen: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        chosen.setdefault(device.process_index, []).append(device)
    return [device for devices in chosen.values() for device in devices[:count]]


def is_one_of_several(settings: DevicesSettings) -> bool:
    """Whether this process was launched as one of several that make a run together.

    That is, in this order: by JAX's own variables (`--processes N` sets them), as a task of a Slurm step of several,
    or with devices.platform=tpu (a pod's hosts find each other through JAX). Raises UserError where they make no
    sense.
    """
    if COORDINATOR in os.environ:
        host, _, port = os.environ[COORDINATOR].rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"{COORDINATOR}='{os.environ[COORDINATOR]}': expected HOST:PORT, where process 0 listens")
        missing = [name for name in (NUM_PROCESSES, PROCESS_ID) if not os.environ.get(name, "").isdecimal()]
        if missing:
            raise UserError(f"{COORDINATOR} is set, so {missing[0]} must be a number, found '{os.environ.get(missing[0], '')}'")
        if not int(os.environ[NUM_PROCESSES]):
            raise UserError(f"{NUM_PROCESSES}=0: expected 1 or more")
        if not int(os.environ[PROCESS_ID]) < int(os.environ[NUM_PROCESSES]):
            raise UserError(f"{PROCESS_ID}={os.environ[PROCESS_ID]}: expected less than {NUM_PROCESSES}="
                            f"{os.environ[NUM_PROCESSES]}; the first process has number 0")
        return True
    if os.environ.get(NUM_PROCESSES, "1") != "1":  # each would train alone, in the same folder
        raise UserError(f"{NUM_PROCESSES}={os.environ[NUM_PROCESSES]} is set, but {COORDINATOR} is not; set it to HOST:PORT of "
                        f"process 0, or unset {NUM_PROCESSES}; on one machine, --processes does all of it")
    tasks = os.environ.get(SLURM_TASKS, "1")
    if not tasks.isdecimal():
        raise UserError(f"{SLURM_TASKS}='{tasks}': expected a number, as srun sets it; unset it where this is no Slurm step")
    return int(tasks) > 1 or settings.platform == "tpu"


def _join() -> None:
    if COORDINATOR not in os.environ:
        try:
            jax.distributed.initialize()  # Slurm or TPU: JAX asks the cluster
        except (ValueError, KeyError) as error:  # there is none to ask, or a variable that it should have set is missing
            if int(os.environ.get(SLURM_TASKS, "1")) > 1:
                raise UserError(f"{SLURM_TASKS}={os.environ[SLURM_TASKS]}: JAX finds no Slurm step of several tasks here "
                                f"({reason(error)}); start jaxlm with srun, or unset {SLURM_TASKS}") from None
            raise UserError(f"devices.platform=tpu: no TPU here; start jaxlm on a TPU host, or set {COORDINATOR}, "
                            f"{NUM_PROCESSES} and {PROCESS_ID}{how_to_install('tpu')}") from None
        return
    address = os.environ[COORDINATOR]
    only_here = address if address.startswith(("127.0.0.1:", "localhost:", "[::1]:")) else None  # else JAX takes all interfaces
    if only_here:
        _keep_gloo_here()
    jax.distributed.initialize(address, int(os.environ[NUM_PROCESSES]), int(os.environ[PROCESS_ID]),
                               coordinator_bind_address=only_here)


def _keep_gloo_here() -> None:
    """Lets Gloo, the CPU's collectives, listen on localhost. By itself it takes the address that this host's name
    stands for, and its sockets ask nobody who they are; JAX has no setting for it."""
    from jax._src.lib import _jax

    _jax.make_gloo_tcp_collectives = functools.partial(_jax.make_gloo_tcp_collectives, hostname="127.0.0.1")


def place() -> tuple[int, int]:
    """This process's number and how many there are, as far as that is known before they have joined."""
    for number, count in ((PROCESS_ID, NUM_PROCESSES), ("SLURM_PROCID", SLURM_TASKS)):
        if os.environ.get(number, "").isdecimal() and os.environ.get(count, "").isdecimal():
            return int(os.environ[number]), int(os.environ[count])
    return 0, 1


_meetings = itertools.count()  # the same number in every process: all of them meet as often


def refuse_differences(settings: dict[str, Any]) -> None:
    """Compares the settings (by dotted key) and versions of all processes, which wait for each other here.

    A job's hosts may read another copy of the run file, or run another checkout: they would train one model by two
    rules, and none would know. Raises UserError, in every process.
    """
    if not has_joined():
        return
    own = {key: value for key, value in settings.items() if key not in OF_A_HOST}
    own |= {"jaxlm": jaxlm.__version__, "jax": jax.__version__}
    folder, text = f"jaxlm/settings/{next(_meetings)}", json.dumps(own, sort_keys=True)
    coordinator = multihost.get_jax_distributed_client()
    with suppress(jax.errors.JaxRuntimeError):  # said by another process already, in the same words
        coordinator.key_value_set(f"{folder}/{hashlib.sha256(text.encode()).hexdigest()}", f"{jax.process_index()} {text}")
    coordinator.wait_at_barrier(folder, MEETING)
    said = [found.partition(" ") for _, found in coordinator.key_value_dir_get(folder)]
    kinds = sorted(((int(number), json.loads(words)) for number, _, words in said), key=itemgetter(0))
    (first, one), (second, other) = kinds[0], kinds[-1]
    if len(kinds) > 1:
        coordinator.wait_at_barrier(f"{folder}/read", MEETING)  # nobody leaves before all have read it
    for key in own:
        if one.get(key) != other.get(key):
            raise UserError(f"{key}: process {first} has {shown(one.get(key))}, process {second} {shown(other.get(key))}; all "
                            "processes of a run take the same run file, keys and versions")


def meet() -> None:
    """Waits until every process of this run is here, however long one of them works alone before."""
    if has_joined():
        multihost.get_jax_distributed_client().wait_at_barrier(f"jaxlm/meeting/{next(_meetings)}", MEETING)


def has_joined() -> bool:
    """Whether this is one of several processes that wait for each other."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this process prints and writes for all."""
    return jax.process_index() == 0


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)
