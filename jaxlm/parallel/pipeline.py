"""Layers cut into stages, through which micro-batches flow (GPipe, Huang et al. 2019; interleaved, Narayanan et al.
2021).

Every device runs the same program: at each tick it works on the micro-batch that has arrived and passes the result
to the next stage. With S stages, M micro-batches and R groups of layers per stage a micro-batch passes the ring of
stages R times, and of the M R + S - 1 ticks S - 1 find a stage idle: a bubble of (S - 1) / (M R) of the work. The
order is such that what comes back from the last stage is just what the first stage needs next, so nothing waits
anywhere:

    S = 2, R = 2, M = 4       stage 0:  0a 1a 0c 1c 2a 3a 2c 3c  .
    (0..3 micro-batches,      stage 1:   . 0b 1b 0d 1d 2b 3b 2d 3d
     a..d groups of layers)

What comes out of the last stage is dealt out to all of them, so that the output head's work is cut by their number too.

Shapes: `jaxlm.parallel.shapes`; and here b rows of one micro-batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm.parallel.products import residual_axes
from jaxlm.parallel.shapes import Array, Float, Int, Int32, Shaped
from jaxlm.parallel.sharding import axis_size, constrain, per_device

AXIS = "stage"
Layers = Any  # tree of the parameters of one or more layers, stacked: [L, ...]
First = Callable[[Any, Any], Float[Array, "B T D"]]  # (shared, inputs) -> x
Stage = Callable[[Layers, Int32[Array, " L"], Float[Array, "b T D"], Any], tuple[Float[Array, "b T D"], Any]]


def layer_order(num_layers: int, stages: int, repeats: int) -> Int[np.ndarray, " L"]:
    """Which layer stands in each slot of the stacked parameters: every stage's layers make up one
    contiguous piece."""
    return np.arange(num_layers).reshape(repeats, stages, -1).swapaxes(0, 1).ravel()


def num_stages() -> int:
    """Stages of the current mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def run_pipeline(first: First, stage: Stage, shared: Any, layers: Layers, inputs: Any, *, micro_batches: int, repeats: int
                 ) -> tuple[Float[Array, "B T D"], Any]:
    """What comes out of the last layer, rows cut over the stages too; and auxiliary outputs [L, ...], sums over rows.

    Args:
      first: the first layer's input from `shared` and inputs; each stage computes it.
      stage: a group of layers, with their numbers, over one micro-batch: x, and a tree of auxiliary outputs [L, ...].
      shared: parameters that `first` takes.
      layers: tree of parameters with a leading dimension L, in `layer_order`.
      inputs: tree of arrays [B, ...], rows cut over the stages too; a micro-batch gets its rows.
      micro_batches: M, or fewer where the rows do not make so many.
      repeats: R.
    """
    stages = num_stages()
    rows = len(jax.tree.leaves(inputs)[0])
    micro_batches = max(count for count in range(stages, max(stages, micro_batches) + 1, stages)
                        if rows % (count // stages * axis_size("batch")) == 0)
    run = functools.partial(_on_stage, first, stage, stages=stages, micro_batches=micro_batches, repeats=repeats)
    whole, cut = PartitionSpec(), PartitionSpec(AXIS)
    inputs = jax.tree.map(lambda array: _to_micro_batches(array, stages, micro_batches), inputs)
    on_stages = jax.shard_map(run, in_specs=(whole, cut, whole), out_specs=cut, axis_names={AXIS}, check_vma=False)
    out, aux = on_stages(shared, layers, inputs)
    return _from_micro_batches(out, stages), aux


# All stages run one program in lockstep, so it is the clock that says what each of them is to do. With S stages and
# R repeats, at time t stage s does its job number i = t - s: it is s ticks behind the first one, for what the first
# one does at time 0 gets there at time s. Jobs go through S micro-batches before the next repeat:
#
#     repeat = i // S mod R            S = 2, R = 2:  i            0  1  2  3  4  5  6  7
#     micro-batch = i // (S R) S                      repeat       0  0  1  1  0  0  1  1
#                   + i mod S                         micro-batch  0  1  0  1  2  3  2  3
#
# Why S at a time: what stage S - 1 sends off at the end of its job i reaches stage 0 at time i + S, whose job then
# is i + S: the same micro-batch, one repeat later. So the ring itself is the only buffer (Narayanan et al. 2021,
# section 2.2). Before its first job and after its last a stage computes on what lies there; the index is clipped to
# be a valid one, and `busy` keeps the outcome out of `aux` and `done`. That matters for gradients too: through a
# `where` that is not taken flow zeros, as long as what was computed is finite. Layers lie in `layer_order`, so a
# stage's own are [R, layers of a group]: `numbers` are what they are called in the whole model, which dropout keys
# and local layers go by; taken from the place in memory they would change with S.
def _on_stage(first: First, stage: Stage, shared: Any, layers: Layers, inputs: Any, *, stages: int, micro_batches: int,
              repeats: int) -> tuple[Float[Array, "M_own b T D"], Any]:
    here = jax.lax.axis_index(AXIS)
    layers = jax.tree.map(lambda leaf: leaf.reshape(repeats, -1, *leaf.shape[1:]), layers)
    per_group = jax.tree.leaves(layers)[0].shape[1]
    together = jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(-1, *array.shape[2:]), inputs)
    entering = first(shared, together)
    length = entering.shape[1]
    entering = jnp.moveaxis(entering.reshape(-1, micro_batches, *entering.shape[1:]), 1, 0)

    def tick(carry: tuple[Array, Array, Any], time: Int32[Array, ""]) -> tuple[tuple[Array, Array, Any], None]:
        x, done, aux = carry
        index = jnp.clip(time - here, 0, micro_batches * repeats - 1)
        repeat = index // stages % repeats
        micro_batch = index // (stages * repeats) * stages + index % stages
        x = jnp.where((here == 0) & (repeat == 0), entering[micro_batch], x)
        group = jax.tree.map(lambda leaf: leaf[repeat], layers)
        numbers = (repeat * stages + here) * per_group + jnp.arange(per_group)
        x, new = stage(group, numbers, x, jax.tree.map(lambda array: array[micro_batch], inputs))
        busy = (time >= here) & (time - here < micro_batches * repeats)
        aux = jax.tree.map(lambda total, part: total.at[repeat].add(jnp.where(busy, part, 0)), aux, new)
        leaving = (here == stages - 1) & (repeat == repeats - 1) & busy
        done = done.at[micro_batch].set(jnp.where(leaving, x, done[micro_batch]))
        return (jax.lax.ppermute(x, AXIS, [(i, (i + 1) % stages) for i in range(stages)]), done, aux), None

    ticks = jnp.arange(micro_batches * repeats + stages - 1)
    piece = jax.tree.map(lambda array: array[0], (layers, entering, inputs))
    shapes = jax.eval_shape(stage, piece[0], jnp.arange(per_group), *piece[1:])[1]
    aux = jax.tree.map(lambda leaf: jnp.zeros((repeats, *leaf.shape), leaf.dtype), shapes)
    (_, done, aux), _ = jax.lax.scan(tick, (jnp.zeros_like(entering[0]), jnp.zeros_like(entering), aux), ticks)
    # by hand on all axes: the partitioner would first gather what the others cut
    deal = functools.partial(jax.lax.psum_scatter, axis_name=AXIS, scatter_dimension=0, tiled=True)
    states = (None, *residual_axes(length))
    done = per_device(deal, (states,), states)(jnp.where(here == stages - 1, done, 0))
    return done, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)


def _to_micro_batches(array: Shaped[Array, "B ..."], stages: int, micro_batches: int) -> Shaped[Array, "M b ..."]:
    """The rows that one device holds are spread over the micro-batches of its stage."""
    pieces = micro_batches // stages
    array = array.reshape(stages, -1, pieces, *array.shape[1:])
    array = jnp.moveaxis(array, 2, 1)
    return constrain(array.reshape(micro_batches, *array.shape[2:]), None, "batch")


def _from_micro_batches(array: Shaped[Array, "M b ..."], stages: int) -> Shaped[Array, "B ..."]:
    """The inverse, for rows that are cut over the stages."""
    array = array.reshape(stages, -1, *array.shape[1:])
    return jnp.moveaxis(array, 1, 2).reshape(-1, *array.shape[3:])
