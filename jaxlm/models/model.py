"""An NNX model as what the hot path wants: pure functions over a nested dict of arrays.

`nnx.split` runs once, here; a step merges at trace time only, so that dispatch sees plain pytrees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.bert import BERT
from jaxlm.models.gpt import GPT
from jaxlm.models.layers import Execution, remat_policy
from jaxlm.parallel.sharding import Axes
from jaxlm.settings import ModelSettings, TrainSettings, remat_choices

Params = dict[str, Any]
FAMILIES = {"gpt": GPT, "bert": BERT}


class Model:
    """The structure of one model; holds no arrays.

    Attributes:
      settings: its architecture, vocab_size filled in.
      axes: the parameters' tree with each leaf's `Axes`.
      shapes: the parameters' tree with each leaf's `jax.ShapeDtypeStruct` (float32).
    """

    def __init__(self, settings: ModelSettings, train: TrainSettings):
        self.settings = settings
        choices = remat_choices(train.remat)
        remat = None if choices is None else remat_policy(choices)
        execution = Execution(remat, train.gradient_accumulation, train.stage_repeats)
        self._make: Callable[[jax.Array], nnx.Module] = lambda key: FAMILIES[settings.family](
            settings, dtype=jnp.dtype(train.precision), execution=execution, loss_chunk=train.loss_chunk,
            rngs=nnx.Rngs(params=key))
        self._graph, state = nnx.split(nnx.eval_shape(lambda: self._make(jax.random.key(0))))
        self._structure = jax.tree.structure(state)
        self.shapes = nnx.to_pure_dict(state)
        # A stacked parameter has one dimension more than the block it was written in named.
        self.axes = nnx.to_pure_dict(jax.tree.map(
            lambda variable: Axes(("layers",) * (len(variable.shape) - len(variable.axes)) + variable.axes),
            state, is_leaf=lambda node: isinstance(node, nnx.Variable)))

    def init(self, key: jax.Array) -> Params:
        """Initial parameters; the same for every mesh."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def bind(self, params: Params) -> GPT | BERT:
        """The module with these parameters in it. Inside a jitted function this costs nothing at run time."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, jax.tree.leaves(params)))

    def pad_vocabulary(self, params: Params) -> Params:
        """Parameters with a row for each token, as other programs keep them, given zeros up to the rows that this one keeps."""
        def pad(leaf: jax.Array, shape: jax.ShapeDtypeStruct, axes: Axes) -> jax.Array:
            missing = [(0, want - size if axis == "vocab" else 0)
                       for size, want, axis in zip(leaf.shape, shape.shape, axes.names, strict=True)]
            return jnp.pad(leaf, missing)

        return jax.tree.map(pad, params, self.shapes, self.axes)
