"""The parameters of a model that is not built: read from its modules, which are the only statement of them."""

import functools
import math
from typing import NamedTuple

import jax

from jaxlm.models.model import Model
from jaxlm.models.objectives import Objectives, pretraining_objectives
from jaxlm.models.sizes import padded_vocab_size
from jaxlm.settings import ModelSettings, TrainSettings


class Parameter(NamedTuple):
    """One parameter."""

    sizes: tuple[int, ...]
    axes: tuple[str | None, ...]  # names of the dimensions (`jaxlm.parallel.rules.RULES`)
    role: str  # kernel, table, bias, scale, router

    @property
    def is_stacked(self) -> bool:
        """Whether every layer has one of its own."""
        return self.axes[:1] == ("layers",)

    @property
    def is_matrix(self) -> bool:
        """A factor of products, or a table: what is cast to the compute type, and decays."""
        return self.role in ("kernel", "router", "table")


@functools.lru_cache(64)
def parameters(model: ModelSettings, objectives: Objectives | None = None) -> dict[str, Parameter]:
    """Every parameter of a trunk and the heads of its objectives (None: those of pretraining) by its dotted path."""
    built = Model(model, TrainSettings(), objectives)
    shapes, axes = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (built.shapes, built.axes))
    return {".".join(entry.key for entry in path): Parameter(shape.shape, names.names, names.role)
            for (path, shape), (_, names) in zip(shapes, axes, strict=True)}


def num_parameters(model: ModelSettings, objectives: Objectives | None = None) -> int:
    """Numbers in them, without the padding of the vocabulary."""
    rows = padded_vocab_size(model.vocab_size)
    found = parameters(model, objectives or pretraining_objectives(model)).values()
    return sum(math.prod(one.sizes) // rows * model.vocab_size if "vocab" in one.axes else math.prod(one.sizes) for one in found)
