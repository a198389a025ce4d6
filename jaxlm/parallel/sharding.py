"""Arrays laid out on the mesh by the names of their axes (the table: `jaxlm.parallel.rules.RULES`).

Axes of size 1 cost nothing, so the same program serves one device and a pod.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel.rules import RULES, cutting
from jaxlm.parallel.shapes import Array, Shaped


@dataclasses.dataclass(frozen=True)
class Axes:
    """What the dimensions of one array are called, and what it is. A leaf in a pytree, so that a tree of them mirrors a
    tree of arrays."""

    names: tuple[str | None, ...]
    role: str | None = None  # of a parameter: kernel, table, bias, scale, router


def spec(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions carry these names; None is a dimension that is never cut."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def platform() -> str:
    """What the current mesh's devices are: cpu, gpu or tpu. They need not be there (`jaxlm.planning`)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The axes of the current mesh that cut `axis` here.

    Without those of size 1, over which a collective is still a copy, and without those that are cut by hand already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in cutting(axis) if mesh.shape.get(name, 1) > 1 and name not in mesh.manual_axes)


def axis_size(axis: str) -> int:
    """Into how many parts `axis` is cut here."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in mesh_axes(axis))


def divides(size: int, axis: str) -> bool:
    """Whether a dimension of this size can be cut along `axis`."""
    return size % axis_size(axis) == 0


def per_device(function: Callable, in_axes: Any, out_axes: Any, *, check_vma: bool = False) -> Callable:
    """`function` as what each device does with its part (`jax.shard_map` over all axes that are not cut by hand
    already).

    `in_axes` and `out_axes`: trees like the arguments and results, with a tuple of axis names for each array; None
    for none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    in_specs, out_specs = (jax.tree.map(lambda names: _cut(*names), tree, is_leaf=_is_names) for tree in (in_axes, out_axes))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma,
                         axis_names=set(mesh.axis_names) - set(mesh.manual_axes))


# Data parallelism by hand, over that one axis; the partitioner goes on cutting the others. With gradient
# accumulation the sum over the data axis is the same whether it is taken once a micro-batch or once a step, for
# sums commute:
#
#     sum_m sum_d g[m, d]   (M all-reduces)    =    sum_d sum_m g[m, d]   (one)
#
# but the partitioner, which sees a loop whose carry must be whole, does the former. Inside, the data axis is manual
# (`mesh_axes` leaves it out), so each copy's loop adds up its own rows only and one psum follows. It holds only for
# what adds up over rows: a mean, or anything divided by a local count, would become a mean of means. That is why
# objectives give sums, and why the step passes in `counts` of the whole batch (jaxlm/training/step.py).
def for_each_copy(function: Callable, *by_rows: int, has_rows: bool = False) -> Callable:
    """Runs `function`, whose results are sums over rows, once for each copy of the model, and sums over the copies
    at the end. `has_rows`: the results are such sums, and arrays by rows, which stay as they are.

    For loops: summed by the partitioner, gradients would cross the data axis in every turn. `by_rows`: which
    arguments are trees of arrays whose first dimension is the batch; the others are the same everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh

    def run(*arguments: Any) -> Any:
        if mesh().shape.get("data", 1) == 1:
            return function(*arguments)
        specs = tuple(PartitionSpec("data") if i in by_rows else PartitionSpec() for i in range(len(arguments)))
        results = (PartitionSpec(), PartitionSpec("data")) if has_rows else PartitionSpec()
        return jax.shard_map(of_one_copy, in_specs=specs, out_specs=results, axis_names={"data"}, check_vma=False)(*arguments)

    def of_one_copy(*arguments: Any) -> Any:
        sums, rows = function(*arguments) if has_rows else (function(*arguments), None)
        sums = jax.lax.psum(sums, "data")
        return (sums, rows) if has_rows else sums

    return run


def _cut(*axes: str | None) -> PartitionSpec:
    return PartitionSpec(*(mesh_axes(axis) if axis else None for axis in axes))


def _is_names(tree: Any) -> bool:
    return type(tree) is tuple and all(name is None or isinstance(name, str) for name in tree)


def constrain(array: Shaped[Array, "*shape"], *axes: str | None) -> Shaped[Array, "*shape"]:
    """Asks the partitioner to lay `array` out by its axes' names. Without a mesh (`jax.set_mesh`) it does nothing.

    A dimension that its axes do not divide, such as one decoded token, stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    divided = (axis if axis and divides(size, axis) else None for axis, size in zip(axes, array.shape, strict=False))
    return jax.lax.with_sharding_constraint(array, _cut(*divided))


def shardings(mesh: Mesh, axes: Any) -> Any:
    """A tree of `Axes` to the same tree of NamedShardings."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(*leaf.names)), axes)


def abstract(shapes: Any, shardings: Any) -> Any:
    """Arrays that are not there: a tree of shapes and types, laid out by a tree of NamedShardings."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)
