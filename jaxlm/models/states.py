"""What a trunk gives to the objectives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models.layers import take_positions
from jaxlm.parallel.experts import RouterSums
from jaxlm.parallel.sharding import axis_size


class States(NamedTuple):
    """One state for each token of a batch."""

    x: jax.Array  # [B, T, D], in the compute type
    order: np.ndarray | None  # int32 [T]: which token of the sequence each slot of x belongs to; None: slot i to token i
    router: RouterSums | None  # of mixtures of experts
    dropout_keys: jax.Array | None = None  # of the rows, [B], for heads; None: no dropout

    def as_laid(self, array: jax.Array) -> jax.Array:
        """An array [B, T] of the batch, in the order of x."""
        return array if self.order is None else array[:, self.order]

    def at(self, positions: jax.Array) -> jax.Array:
        """States of the tokens at int32 positions [B, P]: [B, P', D], whose P' can be cut (`cuttable`)."""
        if self.order is not None:
            positions = jnp.asarray(np.argsort(self.order))[positions]
        return take_positions(self.x, cuttable(positions))


def cuttable(array: jax.Array) -> jax.Array:
    """[B, P, ...] with zeros behind the predictions, so that they, too, can be cut as the sequence is."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % axis_size("sequence"))))
