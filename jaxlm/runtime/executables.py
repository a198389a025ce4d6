"""Compiled programs on disk: `jaxlm train --compile-only` writes one, for these devices or for others; the run loads
it.

They stand in `devices.compiled` beside JAX's own cache, and are trusted like it: both hold machine code, this one in
a pickle. So the folder must be this user's own (`jaxlm.runtime.compiler`). A program is found by what it was made
of (its text before compilation, the devices, the number of processes, versions and flags), so a changed setting
never finds an old one.
"""

import hashlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxlm.errors import UserError
from jaxlm.runtime.compiler import BACKENDS, find_strangers
from jaxlm.storage.files import write_atomically

COMPILERS = ("jaxlib", "libtpu", "jax-cuda13-plugin")
DIGEST = 32  # bytes of SHA-256 in front of a program


def save(compiled: jax.stages.Compiled, lowered: jax.stages.Lowered, mesh: Mesh, folder: Path) -> Path:
    """Writes a program that was compiled for the devices of `mesh` from `lowered`; returns the file."""
    payload, _, _ = serialize_executable.serialize(compiled)
    path = _path(lowered, mesh, folder)

    def write(temporary: Path) -> None:
        temporary.touch(mode=0o600)  # whatever the umask: nobody else may write it
        temporary.write_bytes(hashlib.sha256(payload).digest() + payload)

    write_atomically(path, write)
    return path


def load(lowered: jax.stages.Lowered, mesh: Mesh, folder: Path) -> jax.stages.Compiled | None:
    """The program that was saved for `lowered` on devices like those of `mesh`; None: there is none, or it is damaged.

    Raises UserError: another user may have written it.
    """
    path = _path(lowered, mesh, folder)
    if not path.exists():
        return None
    problem = find_strangers(path)
    if problem:
        raise UserError(f"{problem}, and it runs as code; remove it")
    content = path.read_bytes()
    if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
        return None
    return serialize_executable.deserialize_and_load(
        content[DIGEST:], lowered.in_tree, lowered.out_tree, execution_devices=list(mesh.devices.flat))


def _path(lowered: jax.stages.Lowered, mesh: Mesh, folder: Path) -> Path:
    device = mesh.devices.flat[0]
    processes = len({each.process_index for each in mesh.devices.flat})  # that have a part of the program
    made_of = [lowered.as_text(), device.device_kind, str(mesh.devices.shape), str(processes), *map(_version, COMPILERS),
               os.environ.get(BACKENDS[device.platform].variable, "") if device.platform in BACKENDS else ""]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()
    return folder / f"step-{digest[:32]}.executable"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
