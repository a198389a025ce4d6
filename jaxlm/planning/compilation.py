"""The training step that `jaxlm train` runs, compiled for arrays and devices that need not be there."""

import jax
from jax.sharding import Mesh

from jaxlm.errors import UserError
from jaxlm.parallel.sharding import abstract
from jaxlm.settings import Settings
from jaxlm.training.setup import batch_shapes, start
from jaxlm.training.step import batch_sharding


def compile_step(settings: Settings, mesh: Mesh) -> jax.stages.Compiled:
    """The step of `settings` on `mesh`, whose devices may be a target's (`jaxlm.planning.targets`).

    Raises:
      UserError: model.vocab_size is not known.
    """
    if settings.model.vocab_size is None:
        raise UserError("model.vocab_size: missing; without a corpus the size of the vocabulary has to be said")
    with jax.set_mesh(mesh):
        trainer = start(settings, mesh).trainer
        batch = batch_shapes(settings)
        state = abstract(trainer.state_shapes, trainer.state_shardings)
        return trainer.step.lower(state, abstract(batch, dict.fromkeys(batch, batch_sharding(mesh)))).compile()
