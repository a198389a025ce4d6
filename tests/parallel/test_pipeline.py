"""Layers in stages against the same layers one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.pipeline import layer_order, run_pipeline
from jaxlm.settings import MeshSettings

ROWS, LENGTH, WIDTH, LAYERS = 16, 4, 8, 8


def test_every_stage_holds_its_groups_of_layers_together():
    assert layer_order(8, 2, 1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert layer_order(8, 2, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]  # groups a, c in stage 0 and b, d in stage 1
    assert layer_order(8, 4, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(("stages", "micro_batches", "repeats"),
                         [(2, 2, 1), (2, 8, 2), (4, 4, 2), (4, 16, 1), (8, 8, 1), (2, 4, 4)])
def test_what_comes_out_is_that_of_the_layers_one_by_one(stages, micro_batches, repeats):
    """Each layer multiplies, and adds its own number, so that no two orders give the same; gradients, too."""
    random = np.random.default_rng(0)
    kernels = (random.normal(size=(LAYERS, WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
    rows = random.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)

    def one_by_one(kernels):
        x, sums = rows + 1, []
        for number, kernel in enumerate(kernels):
            x = jnp.tanh(x @ kernel + number)
            sums.append(x.sum())
        return x, jnp.stack(sums)

    def stage(group, numbers, x, inputs):
        def layer(x, one):
            kernel, number = one
            x = jnp.tanh(x @ kernel + number)
            return x, x.sum()

        return jax.lax.scan(layer, x, (group, numbers))

    def pipelined(kernels):
        return run_pipeline(lambda shared, inputs: inputs + shared, stage, jnp.ones(()), kernels, rows,
                            micro_batches=micro_batches, repeats=repeats)

    order = layer_order(LAYERS, stages, repeats)
    mesh = make_mesh(MeshSettings(stage=stages, data=8 // stages), jax.devices())
    with jax.set_mesh(mesh):
        (got, got_sums), pull = jax.vjp(jax.jit(pipelined), kernels[order])
        [gradient] = pull((jnp.ones_like(got), jnp.zeros_like(got_sums)))
    (want, want_sums), pull = jax.vjp(one_by_one, kernels)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_sums, want_sums[order], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, pull((jnp.ones_like(want), jnp.zeros_like(want_sums)))[0][order], rtol=1e-4, atol=1e-4)
