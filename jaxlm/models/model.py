"""An NNX model as what the hot path wants: pure functions over a nested dict of arrays.

`nnx.split` runs once, here; a step merges at trace time only, so that dispatch sees plain pytrees.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.bert import BERT
from jaxlm.models.gpt import GPT
from jaxlm.models.layers import REMAT, Execution, padded_vocab_size, remat_policy
from jaxlm.parallel.sharding import Axes
from jaxlm.settings import ModelSettings, TrainSettings

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
        choices = REMAT[train.remat] if isinstance(train.remat, str) else train.remat
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

    def num_parameters(self) -> int:
        """Parameters, without the padding of the vocabulary."""
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))
        padding = padded_vocab_size(self.settings.vocab_size) - self.settings.vocab_size
        for leaf, axes in zip(jax.tree.leaves(self.shapes), jax.tree.leaves(self.axes), strict=True):
            if "vocab" in axes.names:
                total -= padding * math.prod(leaf.shape) // padded_vocab_size(self.settings.vocab_size)
        return total

    def training_flops(self, sequence_length: int, predictions: int) -> float:
        """FLOPs of one sequence's forward and backward pass, as PaLM counts them (Chowdhery et al. 2022, appendix B).

        Matrix products only, a backward pass is two forward passes, attention counts every pair of positions, and
        recomputation does not count. `predictions`: positions that reach the output head.
        """
        model, length = self.settings, sequence_length
        width, kv_heads = model.hidden_size, model.num_kv_heads or model.num_heads
        head_dim = model.head_dim or width // model.num_heads
        projections = width * head_dim * (2 * model.num_heads + 2 * kv_heads)
        mlp = width * (model.intermediate_size or 4 * width) * (3 if model.activation in ("swiglu", "geglu") else 2)
        if model.num_experts is not None:
            mlp = mlp * model.experts_per_token + width * model.num_experts
        attention = 2 * length * model.num_heads * head_dim
        head = predictions * width * (model.vocab_size + (width if model.family == "bert" else 0))
        return 3 * 2 * (length * model.num_layers * (projections + mlp + attention) + head)
