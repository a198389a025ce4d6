"""The one table from the names of a model's axes to the axes of the mesh.

Models name their axes (`"embed"`, `"heads"`, ...) and know nothing else of parallelism. Axes of size 1 cost nothing,
so the same program serves one device and a pod.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "residual": None,
    # parameters (and the activations that run through them)
    "layers": "stage",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "positions": None,
    "types": None,
}


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axis names of one array. A leaf in a pytree, so that a tree of them mirrors a tree of arrays."""

    names: tuple[str | None, ...]


def spec(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions carry these names; None is a dimension that is never cut."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The axes of the current mesh that cut `axis`; without those of size 1, over which a collective is still a copy."""
    rule, sizes = RULES[axis], jax.sharding.get_abstract_mesh().shape
    names = () if rule is None else (rule,) if isinstance(rule, str) else rule
    return tuple(name for name in names if sizes.get(name, 1) > 1)


def cut(*axes: str | None) -> PartitionSpec:
    """`spec` for shard_map: only the mesh axes that `mesh_axes` knows."""
    return PartitionSpec(*(mesh_axes(axis) if axis else None for axis in axes))


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the partitioner to lay `array` out by its axes' names. Without a mesh (`jax.set_mesh`) it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, spec(*axes))


def shardings(mesh: Mesh, axes: Any) -> Any:
    """A tree of `Axes` to the same tree of NamedShardings."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(*leaf.names)), axes)
