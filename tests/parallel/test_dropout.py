"""Dropout: its rate, what its masks depend on, and what they do not."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.parallel.dropout import attention_dropout, dropout, fold_in, token_keys
from jaxlm.parallel.sharding import spec


def keys_of(rows, length, seed=0):
    return token_keys(jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows)), jnp.arange(length))


def same(one, other):
    return (np.asarray(one) == np.asarray(other)).mean()


def test_it_keeps_the_mean():
    x, keys = jnp.ones((8, 100, 100)), keys_of(8, 100)
    dropped = np.asarray(dropout(x, 0.25, keys, site=0))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / dropped.size)
    assert dropout(x, 0.0, keys, site=0) is x and dropout(x, 0.25, None, site=0) is x
    factors = np.asarray(attention_dropout(keys, jnp.arange(100), jnp.arange(4), 0.25))
    assert factors.shape == (8, 4, 100, 100) and set(np.unique(factors)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((factors == 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / factors.size)


def test_masks_differ_by_row_token_site_layer_and_seed():
    x, keys = jnp.ones((2, 3, 4, 500)), keys_of(2, 3)
    mask = dropout(x, 0.5, keys, site=1)
    masks = [*(mask[index] for index in np.ndindex(2, 3, 4)), *(dropout(x, 0.5, *other)[0, 0, 0] for other in (
        (keys, 2), (fold_in(keys, 7), 1), (keys_of(2, 3, seed=1), 1)))]
    factors = attention_dropout(keys, jnp.arange(500), jnp.arange(4), 0.5)
    masks += [2 * (factors[index] > 0) for index in np.ndindex(2, 4, 3)]
    for index, one in enumerate(masks):
        assert all(0.35 < same(one, other) < 0.65 for other in masks[:index])


def test_masks_do_not_depend_on_micro_batches_layout_and_mesh(meshes):
    x, keys = jnp.ones((8, 6, 16)), keys_of(8, 6)
    mask = np.asarray(dropout(x, 0.5, keys, site=1))
    assert same(dropout(x[5:6], 0.5, keys[5:6], site=1), mask[5:6]) == 1
    order = np.array([3, 0, 5, 1, 4, 2])
    assert same(dropout(x, 0.5, keys[:, order], site=1), mask[:, order]) == 1
    factors = attention_dropout(keys, jnp.arange(6), jnp.arange(4), 0.5)
    assert same(attention_dropout(keys[:, order], order, jnp.arange(2, 4), 0.5), factors[:, 2:, order][..., order]) == 1
    for name, axes in (("data8", ("batch",)), ("2x2x2", ("batch", None, "heads"))):
        with jax.set_mesh(meshes[name]):
            placed = jax.device_put(x, NamedSharding(meshes[name], spec(*axes)))
            assert same(jax.jit(lambda x: dropout(x, 0.5, keys, site=1))(placed), mask) == 1
