"""An NNX model as what the hot path wants: pure functions over a nested dict of arrays.

`nnx.split` runs once, here; a step merges at trace time only, so that dispatch sees plain pytrees.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.layers import Execution, remat_policy
from jaxlm.models.objectives import Objectives, PerRow, pretraining_objectives
from jaxlm.parallel.shapes import Array, Batch, Int, Key, RowKeys, Shaped
from jaxlm.parallel.sharding import Axes
from jaxlm.presets import TRUNKS
from jaxlm.settings import ModelSettings, TrainSettings, remat_choices

Params = dict[str, Any]


class Model:
    """The structure of one model, a trunk and the heads of its objectives; holds no arrays.

    Attributes:
      settings: its architecture, vocab_size filled in.
      objectives: what it learns, in the order in which they are summed.
      dtype: the compute type.
      axes: the parameters' tree with each leaf's `Axes`: names of dimensions, and role.
      shapes: the parameters' tree with each leaf's `jax.ShapeDtypeStruct` (float32).
    """

    def __init__(self, settings: ModelSettings, train: TrainSettings, objectives: Objectives | None = None,
                 logits_memory: float = 0.0):
        """`objectives`: None: `pretraining_objectives`. `logits_memory`: bytes of a device for the loss's logits
        (`jaxlm.models.loss.Head`), where train.loss_chunk is null."""
        self.settings, self.dtype, self.logits_memory = settings, jnp.dtype(train.precision), logits_memory
        self.objectives = pretraining_objectives(settings) if objectives is None else objectives
        choices = remat_choices(train.remat)
        remat = None if choices is None else remat_policy(choices)
        self._execution = Execution(remat, train.gradient_accumulation, train.stage_repeats, train.loss_chunk, logits_memory)
        self._graph, state = nnx.split(nnx.eval_shape(lambda: self._network(jax.random.key(0))))
        self._structure = jax.tree.structure(state)
        self.shapes = nnx.to_pure_dict(state)
        # A stacked parameter has one dimension more than the block it was written in named.
        self.axes = nnx.to_pure_dict(jax.tree.map(
            lambda variable: Axes(("layers",) * (len(variable.shape) - len(variable.axes)) + variable.axes, variable.role),
            state, is_leaf=lambda node: isinstance(node, nnx.Variable)))

    def _network(self, key: Key[Array, ""]) -> nnx.Module:
        """The trunk of the family, with the heads as its `heads`."""
        rngs = nnx.Rngs(params=key)
        trunk = importlib.import_module(f"jaxlm.models.{TRUNKS.get(self.settings.family, 'transformer')}").Trunk
        network = trunk(self.settings, dtype=self.dtype, execution=self._execution, rngs=rngs)
        heads = {objective.name: objective.head(self.settings, rngs) for objective in self.objectives}
        heads = {name: head for name, head in heads.items() if head is not None}
        network.heads = nnx.Dict(heads) if heads else None
        return network

    def init(self, key: Key[Array, ""]) -> Params:
        """Initial parameters; the same for every mesh."""
        return nnx.to_pure_dict(nnx.state(self._network(key)))

    def bind(self, params: Params) -> Any:
        """The module with these parameters in it. Inside a jitted function this costs nothing at run time."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, jax.tree.leaves(params)))

    def terms(self, params: Params, batch: Batch, dropout_keys: RowKeys | None = None) -> dict[str, Any]:
        """Each objective's sums over a batch (`Objective.terms`), by name. `dropout_keys`: None: no dropout."""
        network = self.bind(params)
        states = network.states(batch, dropout_keys)
        return {objective.name: objective.terms(network, states, batch) for objective in self.objectives}

    def evaluated(self, params: Params, batch: Batch) -> tuple[dict[str, Any], PerRow]:
        """What an evaluation adds up, by objective, and what it keeps of each row (`Objective.verdicts`)."""
        network = self.bind(params)
        states = network.states(batch)
        terms, verdicts = {}, {}
        for objective in self.objectives:
            if objective.is_evaluated:
                terms[objective.name] = objective.terms(network, states, batch)
                verdicts |= objective.verdicts(network, states, batch)
        return terms, verdicts

    def answers(self, params: Params, batch: Batch) -> PerRow:
        """What is said of each row of a batch (`Objective.answers`)."""
        network = self.bind(params)
        states = network.states(batch)
        return {name: answer for objective in self.objectives
                for name, answer in objective.answers(network, states, batch).items()}

    def counts(self, batch: Batch) -> dict[str, Int[Array, ""]]:
        """What each objective's loss is to be divided by."""
        return {objective.name: objective.count(batch) for objective in self.objectives}

    def traced(self, function: Callable) -> Callable:
        """`function` as it has to be traced, so that its products are as exact as the compute type says.

        JAX multiplies float32 arrays in bfloat16 on TPUs and in TF32 on GPUs, unless it is told otherwise. Where the
        model computes in float32 it is told here, once for all that is traced below: forward and backward, kernels,
        the optimizer.
        """
        @functools.wraps(function)
        def exact(*arguments: Any) -> Any:
            with jax.default_matmul_precision("highest"):
                return function(*arguments)

        return exact if self.dtype == jnp.float32 else function

    def pad_vocabulary(self, params: Params) -> Params:
        """Parameters with a row for each token, as other programs keep them, given zeros up to the rows that this
        one keeps."""
        def pad(leaf: Shaped[Array, "..."], shape: jax.ShapeDtypeStruct, axes: Axes) -> Shaped[Array, "..."]:
            missing = [(0, want - size if axis == "vocab" else 0)
                       for size, want, axis in zip(leaf.shape, shape.shape, axes.names, strict=True)]
            return jnp.pad(leaf, missing)

        return jax.tree.map(pad, params, self.shapes, self.axes)
