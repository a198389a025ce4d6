"""Dropout whose masks no mesh can change.

Every token has its own key, from (seed, step, row, layer) and its place in the sequence, and every element's bits
are one hash of that key and the element's own number (Threefry, Salmon et al. 2011). So a mask does not depend on
which device holds the element, nor on the order in which tokens are laid out.
"""

import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

FOLD = 2**32 - 1  # second counter of keys made from keys; elements have smaller ones


def token_keys(keys: jax.Array | None, places: jax.Array) -> jax.Array | None:
    """Keys [B], one for each sequence, to uint32 [B, T, 2], one for each token. `places`: int32 [T], places in the
    sequence."""
    return None if keys is None else fold_in(jax.random.key_data(keys)[:, None], places)


def fold_in(keys: jax.Array | None, numbers: jax.Array | int) -> jax.Array | None:
    """New keys, uint32 [..., 2], from keys and numbers (broadcast against each other); None stays None."""
    return None if keys is None else jnp.stack(_hash(keys, numbers, FOLD), axis=-1)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, site: int) -> jax.Array:
    """Zeroes elements of x [B, T, ...] with probability `rate`, scaling up the rest. `keys` [B, T, 2]; None: no
    dropout."""
    if keys is None or rate == 0.0:
        return x
    elements = jnp.arange(math.prod(x.shape[2:])).reshape(x.shape[2:])
    keys = keys.reshape(*keys.shape[:2], *[1] * elements.ndim, 2)
    return jnp.where(_keep(keys, site, elements, rate), x / (1 - rate), 0).astype(x.dtype)


def attention_dropout(keys: jax.Array, places: jax.Array, heads: jax.Array, rate: float) -> jax.Array:
    """Factors for attention probabilities: float32 [B, N, T, S], each 0 with probability `rate` and otherwise 1 / (1
    - rate).

    Args:
      keys: uint32 [B, T, 2], of the queries; no other site uses them.
      places: int32 [S], places of the keys in the sequence.
      heads: int32 [N], numbers of the heads.
    """
    return _keep(keys[:, None, :, None], places, heads[:, None, None], rate) / jnp.float32(1 - rate)


def _keep(keys: jax.Array, first: jax.Array | int, second: jax.Array | int, rate: float) -> jax.Array:
    return _hash(keys, first, second)[0] < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))


def _hash(keys: jax.Array, first: jax.Array | int, second: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Two words for each key and pair of counters."""
    words = (keys[..., 0], keys[..., 1], jnp.asarray(first, jnp.uint32), jnp.asarray(second, jnp.uint32))
    return tuple(threefry2x32_p.bind(*jnp.broadcast_arrays(*words)))
