"""The training step that `jaxlm train` runs, compiled for arrays and devices that need not be there."""

import jax
from jax.sharding import Mesh

from jaxlm.errors import UserError
from jaxlm.parallel.sharding import abstract
from jaxlm.settings import Settings
from jaxlm.training.setup import batch_shapes, start
from jaxlm.training.step import Trainer, batch_sharding


def trace_step(settings: Settings, mesh: Mesh) -> tuple[jax.stages.Traced, Trainer]:
    """The step of `settings` on `mesh`, whose devices may be a target's (`jaxlm.planning.targets`), before any compiler sees it.

    Raises:
      UserError: model.vocab_size is not known.
    """
    if settings.model.vocab_size is None:
        raise UserError("model.vocab_size: missing; without a corpus the size of the vocabulary has to be said")
    with jax.set_mesh(mesh):
        trainer = start(settings, mesh).trainer
        batch = batch_shapes(settings)
        state = abstract(trainer.state_shapes, trainer.state_shardings)
        return trainer.step.trace(state, abstract(batch, dict.fromkeys(batch, batch_sharding(mesh)))), trainer


def compile_step(settings: Settings, mesh: Mesh) -> jax.stages.Compiled:
    """The same, compiled. Raises UserError."""
    return compiled(trace_step(settings, mesh)[0], mesh)


def compiled(traced: jax.stages.Traced, mesh: Mesh) -> jax.stages.Compiled:
    """The program for the devices of `mesh`."""
    with jax.set_mesh(mesh):
        return traced.lower().compile()
