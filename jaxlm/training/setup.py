"""What every verb needs before it can start: the processes of this run, and a mesh over the devices of all."""

import dataclasses

import jax
from jax.sharding import Mesh

from jaxlm.checks import check_kernel, check_layout
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.rules import shrunk
from jaxlm.runtime import processes, runtime_log
from jaxlm.settings import Settings, flatten, to_dict


def lay_mesh(settings: Settings) -> tuple[Settings, Mesh]:
    """Joins the other processes of this run and lays the mesh over the devices of all: `join`, then `lay`."""
    return lay(settings, join(settings))


def join(settings: Settings) -> list[jax.Device]:
    """The devices of all processes of this run, once they have found each other. Raises UserError."""
    runtime_log.divert(settings)
    devices = processes.initialize(settings.devices)
    processes.refuse_differences(flatten(to_dict(settings)))
    return devices


def lay(settings: Settings, devices: list[jax.Device]) -> tuple[Settings, Mesh]:
    """The mesh over devices, and the settings: with mesh.elastic they follow the devices that are there. Raises
    UserError for what does not fit."""
    if settings.mesh.elastic:
        smaller, times = shrunk(settings.mesh, len(devices))
        train = dataclasses.replace(settings.train, gradient_accumulation=times * settings.train.gradient_accumulation)
        settings = dataclasses.replace(settings, mesh=smaller, train=train)
    mesh = make_mesh(settings.mesh, devices)
    check_layout(settings, mesh.shape)
    check_kernel(settings, mesh.devices.flat[0].platform)
    return settings, mesh
