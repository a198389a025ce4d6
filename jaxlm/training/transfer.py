"""Trained weights as the beginning of another run (`init`): what fits is taken, and what is not simply taken is said.

A trunk is taken whole, or the run is refused; heads are taken where they are there. The vocabulary may be another one,
and learned positions may be more or fewer.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.checkpoints.format1 import Place
from jaxlm.console.units import counted
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.data.vocabularies import same_tokens
from jaxlm.errors import UserError, clipped
from jaxlm.models.model import Params
from jaxlm.parallel.sharding import Axes
from jaxlm.reporting.runs import yaml_scalar
from jaxlm.settings import FREE_IN_MODEL, ModelSettings, Settings
from jaxlm.training.changes import saved_section
from jaxlm.training.step import Trainer

SIZE_KEYS = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "num_experts",
             "type_vocab_size")


class Weights(Protocol):
    """Trained weights that a run can begin with: a run directory's, or a Hugging Face folder's."""

    where: str  # for messages
    model: ModelSettings
    tokenizer: Tokenizer | None
    shapes: dict[Place, tuple[int, ...]]  # of all parameters
    notes: list[str]  # what was not simply read, a line each; known when something has been

    def read(self, wanted: dict[Place, jax.ShapeDtypeStruct]) -> tuple[dict[Place, jax.Array], np.ndarray]:
        """Some of them, laid out as they are wanted; and int [L], the order of the layers in stacked ones."""
        ...


class RunWeights:
    """The newest good checkpoint of another run. Raises UserError."""

    def __init__(self, run_dir: str):
        with Checkpoints(run_dir) as self._checkpoints:
            self._step = self._checkpoints.choose(None)
        saved = self._checkpoints.metadata(self._step)
        self.where = f"step {self._step} of {run_dir}"
        self.model = saved_section(ModelSettings, saved["settings"]["model"])
        self.tokenizer = Tokenizer.from_dict(saved["tokenizer"])
        self.shapes = self._checkpoints.shapes(self._step)
        self.notes: list[str] = []

    def read(self, wanted: dict[Place, jax.ShapeDtypeStruct]) -> tuple[dict[Place, jax.Array], np.ndarray]:
        return self._checkpoints.read(self._step, wanted), self._checkpoints.saved_order(self._step)


class Taken(NamedTuple):
    """How a parameter of this run is made of one of `init`."""

    source: Place
    rows: np.ndarray | None = None  # int [rows]: which row of the source each row is, -1: fresh; None: all as they are
    stretched: bool = False  # rows between those of the source


def begin_with(weights: Weights, trainer: Trainer, tokenizer: Tokenizer, fresh: Params) -> tuple[Params, list[str]]:
    """The parameters of a run that begins with trained weights; and lines: whence, and what is not simply taken.

    The trunk's are all taken; heads where they are there. Tables of the vocabulary are taken row by row, by the text of
    the tokens, where the tokenizers differ; learned positions as `init_positions` says.

    Args:
      weights: those to begin with.
      trainer: of this run.
      tokenizer: of this run.
      fresh: initial parameters, laid out for the run; they are given away.

    Raises:
      UserError: the trunk is another one.
    """
    settings = trainer.settings
    axes, shapes, shardings = (_by_place(tree) for tree in (trainer.params.axes, trainer.params.shapes, trainer.params.shardings))
    lines = [*_changed_model(weights, settings.model)]
    rows = _vocabulary_rows(weights, tokenizer, shapes, lines)
    taken: dict[Place, Taken] = {}
    for place, leaf in shapes.items():
        found = _find(place, leaf.shape, axes[place], weights, rows, settings)
        if found:
            taken[place] = found
    lines += _describe(taken, shapes, weights)
    wanted = {}
    for place, (source, *_) in taken.items():
        shape = weights.shapes[source]
        wanted[source] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=_fitting(shardings[place], shape))
    arrays, order = weights.read(wanted)
    slots = np.argsort(order)[trainer.params.layer_order]

    def adapted(fresh: dict[Place, jax.Array], arrays: dict[Place, jax.Array]) -> dict[Place, jax.Array]:
        return {place: _adapt(leaf, arrays[taken[place].source], taken[place], axes[place], slots) if place in taken else leaf
                for place, leaf in fresh.items()}

    result = jax.jit(adapted, out_shardings=shardings, donate_argnums=0)(_by_place(fresh), arrays)
    first = f"weights from {weights.where} ({counted(len(arrays), 'array')})"
    lines = [first, *(f"init: {note}" for note in weights.notes), *lines]
    return jax.tree.unflatten(jax.tree.structure(fresh), [result[place] for place in shapes]), lines


def _adapt(fresh: jax.Array, array: jax.Array, taken: Taken, axes: Axes, slots: np.ndarray) -> jax.Array:
    if axes.names[:1] == ("layers",):
        return array if (slots == np.arange(len(slots))).all() else array[slots]
    if taken.stretched:  # linear interpolation between the rows of the source
        at = np.linspace(0, array.shape[0] - 1, fresh.shape[0])
        below = np.minimum(at.astype(int), array.shape[0] - 2) if array.shape[0] > 1 else np.zeros(len(at), int)
        share = jnp.asarray(at - below, jnp.float32)[:, None]
        return (1 - share) * array[below] + share * array[np.minimum(below + 1, array.shape[0] - 1)]
    if taken.rows is None:
        return array
    is_taken = (taken.rows >= 0).reshape(-1, *[1] * (fresh.ndim - 1))
    return jnp.where(is_taken, array[np.maximum(taken.rows, 0)], fresh)


def _find(place: Place, shape: tuple[int, ...], axes: Axes, weights: Weights, rows: np.ndarray | None, settings: Settings
          ) -> Taken | None:
    """What of `weights` this parameter is made of; None: nothing, it is a head that is fresh. Raises UserError."""
    source = place if place in weights.shapes else _pooler_elsewhere(place, shape, weights)
    if source is None:
        if place[0] == "heads":
            return None
        raise UserError(f"init: {weights.where} has no {'.'.join(place)}, which this model has; leave model.* away, or set "
                        "it as that one was trained")
    there = weights.shapes[source]
    if axes.names[0] == "vocab" and there[1:] == shape[1:]:
        return Taken(source, rows if rows is not None or there == shape else _first_rows(there, shape))
    if axes.names[0] == "positions" and there[1:] == shape[1:] and there != shape:
        stretched = settings.init_positions == "interpolate" and shape[0] > there[0]
        return Taken(source, None if stretched else _first_rows(there, shape), stretched)
    if there == shape:
        return Taken(source)
    if place[0] == "heads":
        return None
    raise UserError(f"init: {'.'.join(place)} of {weights.where} is {_by(there)}, and this model's is {_by(shape)}"
                    + _other_size(weights.model, settings.model))


def _other_size(there: ModelSettings, here: ModelSettings) -> str:
    """The keys that differ in size, for a message."""
    keys = [key for key in SIZE_KEYS if getattr(there, key) != getattr(here, key)]
    return "".join(f"; model.{key} is {getattr(there, key)} there, and {getattr(here, key)} here" for key in keys)


def _first_rows(there: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.arange(shape[0])
    return np.where(numbers < there[0], numbers, -1)


def _pooler_elsewhere(place: Place, shape: tuple[int, ...], weights: Weights) -> Place | None:
    """A head's pooler may come from another head's: BERT's is pretrained with the next sentence."""
    if place[0] != "heads" or "pooler" not in place:
        return None
    last = place[place.index("pooler"):]
    return next((other for other, there in weights.shapes.items()
                 if other[0] == "heads" and other[-len(last):] == last and there == shape), None)


def _vocabulary_rows(weights: Weights, tokenizer: Tokenizer, shapes: dict[Place, Any], lines: list[str]) -> np.ndarray | None:
    """int [padded vocabulary]: which row of `weights` each token's is, by its text; None where the tokenizers are the
    same."""
    before = weights.tokenizer
    if before is None or before.digest == tokenizer.digest:
        return None
    rows = np.full(shapes["token_embedding", "embedding"].shape[0], -1)
    rows[: tokenizer.vocab_size] = same_tokens(tokenizer, before)
    found = int((rows >= 0).sum())
    lines.append(f"init: another tokenizer: {found:,} of {tokenizer.vocab_size:,} tokens have the weights of the same token "
                 f"there, {tokenizer.vocab_size - found:,} are fresh")
    return rows


# ---- lines -----------------------------------------------------------------------------------------------------------

def _changed_model(weights: Weights, own: ModelSettings) -> Iterator[str]:
    """A line for each key that says another computation with the same weights; sizes are seen at the arrays."""
    apart = (*FREE_IN_MODEL, "max_length", "vocab_size", "next_sentence", "pooler", *SIZE_KEYS)
    for field in dataclasses.fields(ModelSettings):
        before, now = getattr(weights.model, field.name), getattr(own, field.name)
        if before != now and field.name not in apart:
            yield f"init: model.{field.name} was {clipped(yaml_scalar(before))} there, and is {clipped(yaml_scalar(now))} here"


def _describe(taken: dict[Place, Taken], shapes: dict[Place, Any], weights: Weights) -> Iterator[str]:
    for place, (source, rows, stretched) in taken.items():
        before, now = weights.shapes[source][0], shapes[place].shape[0]
        if place[0] == "position_embedding" and (stretched or rows is not None):
            how = f"{before:,} rows stretched to {now:,}" if stretched else (
                f"{before:,} taken, {now - before:,} fresh" if now > before else f"the first {now:,} of {before:,} taken")
            yield f"init: learned positions: {how}"
        if place != source:
            yield f"init: {'.'.join(place)} from {'.'.join(source)}"
    fresh = _heads(place for place in shapes if place not in taken)
    left = _heads(place for place in weights.shapes if place not in {one.source for one in taken.values()})
    yield from (f"init: {head}: fresh" for head in fresh)
    yield from (f"init: {head} of {weights.where}: left out" for head in left)


def _heads(places: Iterator[Place]) -> list[str]:
    """The modules that these parameters belong to, each once."""
    return list(dict.fromkeys(".".join(place[:-1] or place) for place in places))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)


def _by_place(tree: Any) -> dict[Place, Any]:
    return {tuple(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding on the devices, or where it does not divide this shape, a whole copy."""
    sharding = sharding.with_memory_kind("device")
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


Opener = Callable[[str], Weights]
