"""What a validation loss must not depend on."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.models.model import Model
from jaxlm.settings import Settings, TrainSettings
from jaxlm.training.step import batch_sharding, make_trainer


@pytest.mark.parametrize("mesh", ["one", pytest.param("expert4data2", marks=pytest.mark.slow)])
def test_a_capacity_leaves_the_validation_loss_alone(mesh, models, make_batch, meshes, random_params):
    """Line 15. A capacity of a quarter of the even share drops most of what a batch wants: in training only."""
    data = make_batch("moe", 0)
    train = TrainSettings(steps=10)

    def sums(capacity, rows):
        settings = Settings(model=replace(models["moe"], capacity_factor=capacity), train=train)
        with jax.set_mesh(meshes[mesh]):
            model = Model(settings.model, train)
            params = random_params(model)
            trainer = make_trainer(model, settings, meshes[mesh])
            parts = [jax.device_put({name: array[at : at + rows] for name, array in data.items()}, batch_sharding(meshes[mesh]))
                     for at in range(0, len(data["tokens"]), rows)]
            found = [jax.device_get(trainer.evaluate(params, part)[0])["next_token"] for part in parts]
            dropped = float(jax.jit(lambda params, batch: model.terms(params, batch)["router"].dropped)(params, parts[0]))
        return sum(float(one.cross_entropy) for one in found) / sum(float(one.count) for one in found), dropped

    (want, none), (whole, some), (parts, _) = sums(None, 16), sums(0.25, 16), sums(0.25, 8)
    assert none == 0 < some  # what training drops
    np.testing.assert_allclose([whole, parts], want, rtol=1e-6)
