"""The training state and the step: what runs a million times, as pure functions of plain pytrees."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.models.model import Model, Params
from jaxlm.models.objectives import Objectives, PerRow
from jaxlm.models.sizes import attention_dropout_rate
from jaxlm.parallel.layout import Layout, on_host, reorder_layers
from jaxlm.parallel.pipeline import layer_order
from jaxlm.parallel.shapes import Array, Batch, Float32, Int32, RowKeys, Shaped, UInt32
from jaxlm.parallel.sharding import Axes, constrain, for_each_copy, shardings, spec
from jaxlm.safety.guards import Recent, is_good, nothing_yet, remembered
from jaxlm.settings import Settings
from jaxlm.tasks.find import find_task
from jaxlm.training.footprint import logits_memory
from jaxlm.training.length import schedule_of
from jaxlm.training.optimizers import make_optimizer, state_axes

PLACE = "place"  # beside the rows of a batch where the schedule goes by time: float32 [], see `jaxlm.training.length.Hours`
Terms = dict[str, Any]  # of each objective, by name: sums that add up (`jaxlm.models.objectives`)
Metrics = dict[str, Shaped[Array, ""]]


class TrainState(NamedTuple):
    """Everything that a run's future depends on, beside its settings and its corpus."""

    step: Int32[Array, ""]  # steps done; the only clock: data, dropout and schedule go by it
    key: UInt32[Array, " 2"]  # key data of the run's random key; every use folds in the step
    params: Params
    optimizer: Any
    recent: Recent  # what the guards remember


class Trainer(NamedTuple):
    """A run ready to go: its settings, everything derived filled in, and its functions on the mesh."""

    settings: Settings
    model: Model
    layout: Layout  # of the whole state, a TrainState
    init: Callable[[int], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # jitted; donates the state
    evaluate: Callable[[Params, Batch], tuple[Terms, PerRow]]  # `Model.evaluated`, jitted; experts drop nothing

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    @property
    def params(self) -> Layout:
        """The layout of the parameters alone."""
        return self.layout.part(lambda state: state.params)

    @property
    def saved(self) -> Layout:
        """The layout of the state as checkpoints have it."""
        return self.layout.part(as_saved)


def start(settings: Settings, mesh: Mesh, schedule: optax.Schedule | None = None) -> Trainer:
    """Builds the model's functions on the mesh; `model.vocab_size` is known by now (see `resolve`). `schedule`: of the
    learning rate; None: by the settings alone."""
    device = mesh.devices.flat[0]
    memory = logits_memory(settings, mesh.shape, device.platform, device.device_kind)
    model = Model(settings.model, settings.train, find_task(settings).objectives(), memory)
    return make_trainer(model, settings, mesh, schedule)


def dropless(settings: Settings) -> Settings:
    """The same without `model.capacity_factor`, which is for training: what is generated or measured must not depend on
    the batch that it is in."""
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, capacity_factor=None))


def make_trainer(model: Model, settings: Settings, mesh: Mesh, schedule: optax.Schedule | None = None) -> Trainer:
    """Builds the state's layout, its initializer and the two steps for `settings` on `mesh`.

    Call the results under `jax.set_mesh(mesh)`.
    """
    schedule = schedule or schedule_of(settings)
    optimizer = make_optimizer(settings.optimizer, model.axes)
    order = layer_order(settings.model.num_layers, mesh.shape["stage"], settings.train.stage_repeats)
    axes = TrainState(Axes(()), Axes((None,)), model.axes, state_axes(optimizer, model.shapes, model.axes),
                      jax.tree.map(lambda leaf: Axes((None,) * leaf.ndim), jax.eval_shape(nothing_yet)))

    def init(seed: int | Int32[Array, ""]) -> TrainState:
        key = jax.random.key(seed)
        params = reorder_layers(model.init(jax.random.fold_in(key, 2**31)), model.axes, order)
        return TrainState(jnp.zeros((), jnp.int32), jax.random.key_data(key), params, optimizer.init(params), nothing_yet())

    dropless = model
    if settings.model.capacity_factor is not None:  # a token's loss must not depend on the batch that it is measured in
        dropless = Model(dataclasses.replace(settings.model, capacity_factor=None), settings.train, model.objectives,
                         model.logits_memory)
    layout = Layout(mesh, axes, jax.eval_shape(init, 0), shardings(mesh, axes), order)
    step = _train_step(model, optimizer, schedule, settings, mesh.shape["stage"] > 1, layout.shardings.optimizer)
    if settings.optimizer.offload:
        moved = jax.tree.map(on_host, layout.shardings.optimizer, layout.shapes.optimizer)
        layout = layout._replace(shardings=layout.shardings._replace(optimizer=moved))
    return Trainer(
        settings, model, layout,
        init=jax.jit(init, out_shardings=layout.shardings),
        step=jax.jit(model.traced(step), donate_argnums=0, out_shardings=(layout.shardings, None)),
        evaluate=jax.jit(model.traced(for_each_copy(dropless.evaluated, 1, has_rows=True)),
                         out_shardings=(None, NamedSharding(mesh, PartitionSpec()))))  # every process reads all verdicts


def as_saved(state: TrainState) -> dict[str, Any]:
    """A state, or a tree that mirrors one, as checkpoints have it."""
    return {"params": state.params, "optimizer": state.optimizer,
            "clock": {"step": state.step, "key": state.key, "recent": state.recent._asdict()}}


def from_saved(tree: dict[str, Any]) -> TrainState:
    """The inverse of `as_saved`."""
    clock = tree["clock"]
    return TrainState(clock["step"], clock["key"], tree["params"], tree["optimizer"], Recent(**clock["recent"]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every array of a batch lies on the mesh: cut by rows."""
    return NamedSharding(mesh, spec("batch"))


def _train_step(model: Model, optimizer: optax.GradientTransformation, schedule: optax.Schedule, settings: Settings,
                pipelined: bool, on_device: Any) -> Callable:
    """The step. `on_device`: where the optimizer's state lies while it is used."""
    clip_norm = settings.optimizer.clip_norm
    has_dropout = bool(settings.model.dropout or attention_dropout_rate(settings.model))

    travels_as = jnp.dtype(settings.train.gradient_precision)

    def loss_and_terms(params: Params, batch: Batch, keys: RowKeys | None, counts: dict) -> tuple[Float32[Array, ""], Terms]:
        terms = model.terms(params, batch, keys)
        return sum(term.loss / counts[name] for name, term in terms.items()), terms

    def gradients(params: Params, batch: Batch, keys: RowKeys | None) -> tuple[Params, Terms]:
        # Divided by the whole batch's counts, so that micro-batches simply add up to the big batch's gradient.
        counts = {name: jnp.maximum(count, 1).astype(jnp.float32) for name, count in model.counts(batch).items()}
        gradient = jax.grad(loss_and_terms, has_aux=True)
        params = _as_type(params, model.axes, travels_as)
        if settings.train.gradient_accumulation == 1:
            return gradient(params, batch, keys, counts)
        one_by_one = gradient if pipelined else functools.partial(_accumulated, gradient, settings.train.gradient_accumulation)
        return for_each_copy(one_by_one, 1, 2)(params, batch, keys, counts)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch, keys = dict(batch), None
        place = batch.pop(PLACE, state.step)
        if has_dropout:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(batch["tokens"])))
        grads, terms = gradients(state.params, batch, keys)
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
            norm = optax.tree.norm(grads)
            if clip_norm is not None:
                scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
                grads = jax.tree.map(lambda grad: grad * scale, grads)
            before = jax.device_put(state.optimizer, on_device) if settings.optimizer.offload else state.optimizer
            direction, after = optimizer.update(grads, before, state.params)
            rate = jnp.asarray(schedule(place), jnp.float32)
            params = jax.tree.map(lambda param, update: param - rate * update, state.params, direction)
        metrics = training_metrics(model.objectives, terms) | {"learning_rate": rate, "grad_norm": norm}
        predicted = sum(terms[objective.name].count for objective in model.objectives if objective.is_evaluated)
        good = is_good(state.recent, metrics["loss"], norm, predicted, settings.guards.spike_sigma)
        params, after = jax.tree.map(lambda new, old: jnp.where(good, new, old), (params, after), (state.params, before))
        recent = remembered(state.recent, metrics["loss"], norm, good)
        metrics |= {"skipped_steps": recent.skipped, "skipped_in_a_row": recent.in_a_row}
        if "segment_ids" in batch:  # else every slot is a token
            metrics["tokens"] = (batch["segment_ids"] > 0).sum()
        return TrainState(state.step + 1, state.key, params, after, recent), metrics

    return train_step


def _as_type(params: Params, axes: Any, dtype: jnp.dtype) -> Params:
    """Kernels and tables in `dtype`, and so their gradients, which travel as what they belong to. Every product
    casts them to the compute type in any case; the router of experts, which computes in float32, stays as it is."""
    return jax.tree.map(lambda leaf, about: leaf.astype(dtype) if about.role in ("kernel", "table") else leaf, params, axes)


def _accumulated(gradient: Callable, pieces: int, params: Params, batch: Batch, keys: RowKeys | None, counts: dict) -> Any:
    """The sum of `gradient` over `pieces` micro-batches, one after the other."""
    def accumulate(total: Any, piece: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *piece, counts)), None

    cut = jax.tree.map(lambda array: _micro_batches(array, pieces), (batch, keys))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)),
                         jax.eval_shape(gradient, params, *jax.tree.map(lambda array: array[0], cut), counts))
    return jax.lax.scan(accumulate, zeros, cut)[0]


def _micro_batches(array: Shaped[Array, "B ..."], pieces: int) -> Shaped[Array, "M b ..."]:
    """Every device keeping its own rows: piece i takes rows i, i + pieces,
    ..."""
    cut = jnp.moveaxis(array.reshape(-1, pieces, *array.shape[1:]), 1, 0)
    return constrain(cut, None, "batch") if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else cut


def training_metrics(objectives: Objectives, terms: Terms) -> Metrics:
    """`loss` (what is minimized, per prediction) and, where there are several objectives, each one's part."""
    parts = {name: term.loss / jnp.maximum(term.count, 1) for name, term in terms.items()}
    metrics = {"loss": sum(parts.values())}
    if len(parts) > 1:
        metrics |= {f"{name}_loss": part for name, part in parts.items()}
    for objective in objectives:
        metrics |= objective.training_figures(terms[objective.name])
    return metrics
