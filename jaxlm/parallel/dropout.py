"""Dropout whose masks no mesh can change.

Every token has its own key, from (seed, step, row, layer) and its index in the sequence, and every element's bits
are one hash of that key and the element's own number (Threefry, Salmon et al. 2011). So a mask does not depend on
which device holds the element, nor on the order in which tokens are laid out.
"""

import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from jaxlm.parallel.shapes import Array, Bool, Float, Float32, Int32, RowKeys, Shaped, TokenKeys, UInt32

FOLD = 2**32 - 1  # second counter of keys made from keys; elements have smaller ones


def token_keys(keys: RowKeys | None, token_indices: Int32[Array, " T"]) -> TokenKeys | None:
    """A key for each token from one for each sequence. `token_indices`: which of the sequence they are."""
    return None if keys is None else fold_in(jax.random.key_data(keys)[:, None], token_indices)


def fold_in(keys: UInt32[Array, "*keys 2"] | None, numbers: Shaped[Array, "..."] | int) -> UInt32[Array, "*new 2"] | None:
    """New keys from keys and numbers (broadcast against each other); None stays None."""
    return None if keys is None else jnp.stack(_hash(keys, numbers, FOLD), axis=-1)


def dropout(x: Float[Array, "B T *rest"], rate: float, keys: TokenKeys | None, site: int) -> Float[Array, "B T *rest"]:
    """Zeroes elements with probability `rate`, scaling up the rest. `keys`: None: no dropout."""
    if keys is None or rate == 0.0:
        return x
    elements = jnp.arange(math.prod(x.shape[2:])).reshape(x.shape[2:])
    keys = keys.reshape(*keys.shape[:2], *[1] * elements.ndim, 2)
    return jnp.where(_keep(keys, site, elements, rate), x / (1 - rate), 0).astype(x.dtype)


def attention_dropout(keys: TokenKeys, token_indices: Int32[Array, " S"], heads: Int32[Array, " N"], rate: float
                      ) -> Float32[Array, "B N T S"]:
    """Factors for attention probabilities, each 0 with probability `rate` and otherwise 1 / (1 - rate).

    Args:
      keys: of the queries; no other site uses them.
      token_indices: which tokens of the sequence the attention keys are of.
      heads: numbers of the heads.
    """
    return _keep(keys[:, None, :, None], token_indices, heads[:, None, None], rate) / jnp.float32(1 - rate)


def _keep(keys: UInt32[Array, "*keys 2"], first: Array | int, second: Array | int, rate: float) -> Bool[Array, "..."]:
    return _hash(keys, first, second)[0] < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))


def _hash(keys: UInt32[Array, "*keys 2"], first: Array | int, second: Array | int
          ) -> tuple[UInt32[Array, "*words"], UInt32[Array, "*words"]]:
    """Two words for each key and pair of counters."""
    words = (keys[..., 0], keys[..., 1], jnp.asarray(first, jnp.uint32), jnp.asarray(second, jnp.uint32))
    return tuple(threefry2x32_p.bind(*jnp.broadcast_arrays(*words)))
