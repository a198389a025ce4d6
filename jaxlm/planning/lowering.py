"""The training step that `jaxlm train` runs, compiled for arrays and devices that need not be there."""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from jaxlm.checks import check_kernel, check_layout, require_vocabulary
from jaxlm.errors import RunError, UserError
from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning.devices import devices_of
from jaxlm.planning.targets import Target
from jaxlm.planning.versions import told_in_a_line
from jaxlm.runtime import executables
from jaxlm.runtime.compiler import programs_folder
from jaxlm.settings import Settings
from jaxlm.stages import stages_of
from jaxlm.tasks.find import find_task
from jaxlm.training.corpora import open_corpora, usable
from jaxlm.training.feed import abstract_batch
from jaxlm.training.length import with_any_steps
from jaxlm.training.setup import join, lay_mesh
from jaxlm.training.stages import lay_stages, open_stages
from jaxlm.training.step import Trainer, start

NEEDED = re.compile(r"(temporaries )?\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")  # libtpu's words
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(UserError):
    """The compiler finds that no device can hold the step. `needed`: bytes of a device, None where it does not say; of
    `temporaries` alone, or with the state."""

    def __init__(self, words: str):
        found = NEEDED.search(words)
        need = f"{found[2]} {found[3]}iB of {found[4]} {found[5]}iB" if found else "more memory than there is"
        self.needed = float(found[2]) * UNITS[found[3]] if found else None
        self.temporaries = bool(found and found[1])
        beside = ", beside the state" if self.temporaries else ""
        super().__init__(f"does not fit: the step needs {need} on each device{beside}, says the compiler; "
                         "what helps: more devices, more of mesh.fsdp or mesh.tensor, train.remat=full, more micro-batches")


def lay(settings: Settings, target: Target) -> tuple[Mesh, Callable[[jax.Device], int]]:
    """The mesh of a run over a target's devices, and which island each stands in. Raises UserError."""
    devices = devices_of(target)
    mesh = make_mesh(settings.mesh, devices.all, devices.island)
    check_layout(settings, mesh.shape)
    check_kernel(settings, target.platform)
    return mesh, devices.island


def trace_step(settings: Settings, mesh: Mesh, schedule: optax.Schedule | None = None) -> tuple[jax.stages.Traced, Trainer]:
    """The step of `settings` on `mesh`, whose devices may be a target's (`jaxlm.planning.targets`), before any
    compiler sees it.

    Raises:
      UserError: model.vocab_size is not known.
    """
    require_vocabulary(settings)
    settings = settings if settings.train.hours is not None else with_any_steps(settings)
    with jax.set_mesh(mesh):
        trainer = start(settings, mesh, schedule)
        return trainer.step.trace(trainer.layout.abstract, abstract_batch(settings, mesh)), trainer


def compile_step(settings: Settings, mesh: Mesh) -> jax.stages.Compiled:
    """The same, compiled. Raises UserError."""
    return compiled(lower(trace_step(settings, mesh)[0], mesh), mesh)


def compile_ahead(settings: Settings, target: Target | None) -> list[Path]:
    """Compiles the step, of each stage, for a target's devices, or for those that are here, and writes it where `jaxlm
    train` looks for it.

    Raises:
      UserError: devices.compiled is no folder here, or the step cannot be compiled.
    """
    folder = programs_folder(settings.devices)
    if folder is None:
        raise UserError(f"devices.compiled={settings.devices.compiled}: --compile-only needs a folder on this machine")
    if settings.stages:
        laid = [(each, lay(each, target)[0]) for each in stages_of(settings)] if target else lay_stages(settings, join(settings))
        return [_save(trace_step(stage.settings, stage.mesh, stage.schedule())[0], stage.mesh, folder)
                for stage in open_stages(settings, laid)]
    settings, mesh = (settings, lay(settings, target)[0]) if target else lay_mesh(settings)
    unknown = settings.train.steps is None and settings.train.hours is None
    if settings.model.vocab_size is None or find_task(settings).needs_corpus or unknown:
        settings = open_corpora(settings, functools.partial(usable, settings)).settings
    return [_save(trace_step(settings, mesh)[0], mesh, folder)]


def _save(traced: jax.stages.Traced, mesh: Mesh, folder: Path) -> Path:
    lowered = lower(traced, mesh)
    return executables.save(compiled(lowered, mesh), lowered, mesh, folder)


def lower(traced: jax.stages.Traced, mesh: Mesh) -> jax.stages.Lowered:
    """The program as the compiler of the devices of `mesh` takes it."""
    with jax.set_mesh(mesh):
        return traced.lower()


def compiled(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """The program for its devices. Raises as `compiler_failures`."""
    with compiler_failures(mesh):
        return lowered.compile()


@contextmanager
def compiler_failures(mesh: Mesh) -> Iterator[None]:
    """Around what asks the compiler of a mesh's devices, or reads what it made.

    Raises:
      DoesNotFit: it finds that no device can hold the program.
      RunError: it fails itself.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise RunError(told_in_a_line(error, mesh.devices.flat[0].platform)) from None
        raise DoesNotFit(str(error)) from None
