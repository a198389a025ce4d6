"""What a trunk gives to the objectives."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.models.layers import take_positions
from jaxlm.parallel.experts import RouterSums
from jaxlm.parallel.shapes import Array, Float, Int32, RowKeys, Shaped
from jaxlm.parallel.sharding import axis_size


class States(NamedTuple):
    """One state for each token of a batch."""

    x: Float[Array, "B T D"]
    order: Int32[np.ndarray, " T"] | None  # which token of the sequence each slot of x belongs to; None: slot i to token i
    router: RouterSums | None  # of mixtures of experts
    dropout_keys: RowKeys | None = None  # for heads; None: no dropout

    def in_order(self, array: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
        """An array of the batch, in the order of x."""
        return array if self.order is None else array[:, self.order]

    def at(self, positions: Int32[Array, "B P"]) -> Float[Array, "B P_padded D"]:
        """States of the tokens at these positions of the sequence, as many as can be cut (`cuttable`)."""
        if self.order is not None:
            positions = jnp.asarray(np.argsort(self.order))[positions]
        return take_positions(self.x, cuttable(positions))


def cuttable(array: Shaped[Array, "B P ..."]) -> Shaped[Array, "B P_padded ..."]:
    """With zeros behind the predictions, so that they, too, can be cut as the sequence is."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % axis_size("sequence"))))
