"""What XLA is told before its backend starts: flags that let communication run beside computation, and where
programs are kept.

A flag that XLA does not know ends the process, so only those stand here that the compilers of jax 0.10 and 0.12
know, and only the backends that are installed get theirs. Flags that the user has set come last and win. What each
one does, measured on compiled programs: docs/memory-and-overlap.md.
"""

import functools
import os
import stat
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax

from jaxlm.console.progress import optional
from jaxlm.errors import UserError
from jaxlm.settings import DevicesSettings, expand_home


class Backend(NamedTuple):
    """Where a backend reads its flags, the packages of which one brings it, and the flags."""

    variable: str
    packages: tuple[str, ...]
    flags: dict[str, str]


BACKENDS = {
    "gpu": Backend("XLA_FLAGS", ("jax_cuda13_plugin", "jax_cuda12_plugin"), {
        "xla_gpu_enable_latency_hiding_scheduler": "true",  # starts exchanges early and waits for them late
        "xla_gpu_enable_pipelined_all_gather": "true",  # a layer's weights are fetched while the layer before is computed
        "xla_gpu_enable_pipelined_reduce_scatter": "true",  # a layer's gradients leave while the next one's are computed
        "xla_gpu_enable_pipelined_all_reduce": "true",
    }),
    # libtpu chooses by itself, differently for each generation: v5e's choices said aloud change nothing there, and
    # v5p's compiler refuses them (docs/memory-and-overlap.md).
    "tpu": Backend("LIBTPU_INIT_ARGS", ("libtpu",), {}),
    "cpu": Backend("XLA_FLAGS", ("jaxlib",), {}),  # none of those that were tried helped (docs/lab-notes.md)
}


def prepare_compiler(settings: DevicesSettings) -> None:
    """Sets the flags of the backends that may start and the folder of compiled programs. Call before JAX starts a
    backend."""
    if settings.overlap:
        for platform in BACKENDS if settings.platform == "auto" else [settings.platform]:
            set_flags(platform)
    folder = settings.compiled and _usable(settings.compiled)
    if folder and not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR goes first
        jax.config.update("jax_compilation_cache_dir", folder)


def programs_folder(settings: DevicesSettings) -> Path | None:
    """Where `jaxlm.runtime.executables` keeps programs; None: nowhere, or not on this machine. Raises UserError."""
    return Path(_folder(settings.compiled)) if settings.compiled and "://" not in settings.compiled else None


def find_programs(settings: DevicesSettings) -> Path | None:
    """The same for a run, which can do without."""
    return programs_folder(settings) if settings.compiled and _usable(settings.compiled) else None


@functools.cache  # it is said once
def _usable(name: str) -> str | None:
    with optional("compiled programs are not kept"):
        return _folder(name)


def _folder(name: str) -> str:
    """A folder that is there, and that others can put nothing into; remote ones (gs://...) as they are. Raises
    UserError."""
    if "://" in name:
        return name
    path = Path(expand_home(name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"devices.compiled={name}: cannot be made a folder ({error.strerror}); choose another, or null") from None
    problem = find_strangers(path)
    if problem:
        raise UserError(f"devices.compiled={name}: {problem}, and what is in it runs as code; choose another, or null")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"devices.compiled={name}: no permission to write in {path}; choose another, or null")
    return str(path)


def find_strangers(path: Path) -> str | None:
    """How other users, root apart, could have written to a file or folder, or could put another in its place; None:
    in no way."""
    path = path.resolve()
    state = path.stat()
    if state.st_uid != os.geteuid():
        return f"{path} belongs to another user (id {state.st_uid})"
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write in {path} (if none has: chmod go-w {path})"
    for parent in path.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"anyone can replace what is in {parent}"
    return None


def set_flags(platform: str) -> None:
    """Puts a backend's flags before those that the user has set, if the backend is installed. A file of flags is
    left alone.

    Raises UserError: what the user has set is neither.
    """
    backend = BACKENDS[platform]
    given = os.environ.get(backend.variable, "").strip()
    if given and not given.startswith("--"):
        if not os.path.isfile(given):  # XLA would end the process
            raise UserError(f"{backend.variable}='{given}': expected flags, --name=value, or a file of them")
        return
    new = [flag for name, value in backend.flags.items() if (flag := f"--{name}={value}") not in given.split()]
    if new and any(map(find_spec, backend.packages)):
        os.environ[backend.variable] = " ".join([*new, given]).strip()
