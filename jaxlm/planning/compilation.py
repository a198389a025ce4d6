"""The training step that `jaxlm train` runs, compiled for arrays and devices that need not be there."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.errors import UserError
from jaxlm.settings import Settings
from jaxlm.training.setup import batch_shapes, start
from jaxlm.training.step import TrainState, batch_sharding


def compile_step(settings: Settings, mesh: Mesh) -> jax.stages.Compiled:
    """The step of `settings` on `mesh`, whose devices may be a target's (`jaxlm.planning.targets`).

    Raises:
      UserError: model.vocab_size is not known.
    """
    if settings.model.vocab_size is None:
        raise UserError("model.vocab_size: missing; without a corpus the size of the vocabulary has to be said")
    with jax.set_mesh(mesh):
        trainer = start(settings, mesh).trainer
        state = _placed(trainer.state_shapes, trainer.state_shardings)
        sharding = batch_sharding(mesh)
        batch = {name: dataclasses.replace(leaf, sharding=sharding) for name, leaf in batch_shapes(settings).items()}
        return trainer.step.lower(state, batch).compile()


def _placed(shapes: TrainState, shardings: TrainState) -> Any:
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)
