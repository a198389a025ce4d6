"""How a tree of arrays lies on a mesh: what parameters, the training state and a checkpoint of either need to know of
each other, and all that they need to know."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm.parallel.pipeline import layer_order
from jaxlm.parallel.shapes import Int
from jaxlm.parallel.sharding import abstract, shardings


class Layout(NamedTuple):
    """Three trees of one structure, and what is common to their arrays."""

    mesh: Mesh
    axes: Any  # of `Axes`: the names of each array's dimensions
    shapes: Any  # of jax.ShapeDtypeStruct
    shardings: Any  # of NamedSharding
    layer_order: Int[np.ndarray, " L"]  # which layer stands in each slot of a stacked array

    @property
    def abstract(self) -> Any:
        """The arrays, as ShapeDtypeStructs that know where they lie."""
        return abstract(self.shapes, self.shardings)

    def part(self, take: Any) -> "Layout":
        """Of a part of the tree, or of the same arrays in another tree: `take` maps each of the three."""
        return self._replace(axes=take(self.axes), shapes=take(self.shapes), shardings=take(self.shardings))

    def reordered(self, tree: Any, order: Int[np.ndarray, " L"]) -> Any:
        """Slot i of every stacked array gets what was in slot `order[i]`. A function of arrays, for `jax.jit`."""
        return reorder_layers(tree, self.axes, order)

    def from_order(self, tree: Any, saved: Int[np.ndarray, " L"]) -> Any:
        """`tree`, which lies here with its layers in the order `saved`, with them in the order of this layout."""
        order = np.argsort(saved)[self.layer_order]
        if (order == np.arange(len(order))).all():
            return tree
        # nothing is computed on the host
        on_device = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), self.shardings)
        return jax.jit(lambda tree: self.reordered(jax.device_put(tree, on_device), order), out_shardings=self.shardings,
                       donate_argnums=0)(tree)


def make_layout(mesh: Mesh, axes: Any, shapes: Any, num_layers: int, stage_repeats: int) -> Layout:
    """The layout of these arrays on the mesh, by the names of their axes and the stages of its pipeline."""
    return Layout(mesh, axes, shapes, shardings(mesh, axes), layer_order(num_layers, mesh.shape["stage"], stage_repeats))


def reorder_layers(tree: Any, axes: Any, order: Int[np.ndarray, " L"]) -> Any:
    """Slot i of every stacked array gets what was in slot `order[i]`. `axes` mirrors `tree`."""
    if (order == np.arange(len(order))).all():
        return tree
    return jax.tree.map(lambda leaf, axes: leaf[order] if axes.names[:1] == ("layers",) else leaf, tree, axes)


def on_host(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """The same in the host's memory; counters stay where they are."""
    return sharding.with_memory_kind("pinned_host") if leaf.ndim else sharding
