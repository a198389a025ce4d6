"""What objectives over whole rows share: the state of a row, and the head on it."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxlm.models.layers import ACTIVATIONS, Linear, column_parallel
from jaxlm.models.objectives import FIRST_TOKEN, Figures, Objective
from jaxlm.models.sizes import pooling
from jaxlm.models.states import States
from jaxlm.models.transformer import residual_norm
from jaxlm.parallel.dropout import dropout, fold_in, token_keys
from jaxlm.parallel.shapes import Array, Batch, Float, Float32, Int, RowKeys
from jaxlm.settings import DataSettings, ModelSettings

POOLERS = ACTIVATIONS | {"tanh": jnp.tanh}
DROPOUT_SITE = 2**31 + 1  # the trunk folds smaller numbers into its keys


class RowHead(nnx.Module):
    """The family's pooler, dropout, and a linear layer."""

    def __init__(self, settings: ModelSettings, outputs: int, rngs: nnx.Rngs):
        width, stddev, self.settings = settings.hidden_size, settings.initializer_range, settings
        self.pooler = None if settings.pooler is None else Linear(
            {"embed": width}, {"residual": width}, bias=settings.bias, stddev=stddev, rngs=rngs)
        self.norm = residual_norm(settings) if settings.pooler == "gelu" else None  # as in ModernBERT
        # Hugging Face's causal models have no bias here: one could not be exported.
        self.classifier = Linear({"residual": width}, {None: outputs}, bias=not settings.causal, stddev=stddev, rngs=rngs)

    def __call__(self, state: Float[Array, "B 1 D"], keys: RowKeys | None) -> Float32[Array, "B C"]:
        """`keys`: None: no dropout."""
        if self.pooler is not None:
            [state] = column_parallel(state, self.pooler, states=FIRST_TOKEN)
            state = POOLERS[self.settings.pooler](state)
        if self.norm is not None:
            state = self.norm(state)
        keys = fold_in(token_keys(keys, jnp.zeros(1, jnp.int32)), DROPOUT_SITE)
        state = dropout(state.astype(jnp.float32), self.settings.dropout, keys, site=0)
        return column_parallel(state, self.classifier, states=FIRST_TOKEN)[0][:, 0]


@dataclass(frozen=True)
class RowObjective(Objective):
    """An objective with `outputs` numbers for each row. Rows whose label_mask (bool [B]) is false count nothing."""

    outputs: int

    def head(self, settings: ModelSettings, rngs: nnx.Rngs) -> RowHead:
        return RowHead(settings, self.outputs, rngs)

    def logits(self, network: Any, states: States, batch: Batch) -> Float32[Array, "B C"]:
        return network.heads[self.name](pooled(pooling(network.settings), states, batch), states.dropout_keys)

    def every_logit(self, network: Any, states: States, batch: Batch) -> Float32[Array, "B C"]:
        return self.logits(network, states, batch)

    def count(self, batch: Batch) -> Int[Array, ""]:
        return batch["label_mask"].sum()

    def loss(self, terms: Any) -> float:
        return terms.loss / max(terms.count, 1)

    def predictions(self, data: DataSettings) -> int:
        return 0  # of a whole sequence; its products are not worth counting


def pooled(how: str, states: States, batch: Batch) -> Float[Array, "B 1 D"]:
    """The state that stands for a row: of its `first` token ([CLS]), of its `last` (last_position int32 [B]), or the
    `mean` of all that are no padding (segment_ids > 0), summed in float32."""
    if how == "first":
        return states.x[:, :1]
    if how == "last":
        return states.at(batch["last_position"][:, None])[:, :1]
    present = states.in_order(batch["segment_ids"] > 0)[..., None]
    total = jnp.where(present, states.x.astype(jnp.float32), 0).sum(1, keepdims=True)
    return (total / jnp.maximum(present.sum(1, keepdims=True), 1)).astype(states.x.dtype)


def validation(figures: dict[str, float]) -> Figures:
    """As columns of an evaluation row."""
    return {f"val_{name}": figure for name, figure in figures.items()}
