"""Floating-point operations that a device executes in one step, counted in the traced program before any compiler sees it."""

import math
from typing import Any

import jax
from jax.extend import core


def executed_flops(jaxpr: core.ClosedJaxpr, num_devices: int, visible: float = 1.0) -> float:
    """Of matrix products, on one device, recomputation included, loops multiplied by their lengths.

    Inside a `shard_map` shapes are a device's own; outside, the work is taken to be spread evenly. Of a choice the larger branch
    counts. Pallas kernels count by their own estimate, or else grid times body; of splash attention `visible` is the share of
    its blocks that the mask leaves (`jaxlm.models.sizes.visible_blocks`), since it skips the others.
    """
    return _count(jaxpr.jaxpr, num_devices, visible)


def _count(jaxpr: Any, share: int, visible: float) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        parameters, name = equation.params, equation.primitive.name
        if name == "dot_general":
            total += _product(equation) / share
        elif name.startswith("ragged_dot"):
            rows, kernel = (variable.aval.shape for variable in equation.invars[:2])
            total += 2 * math.prod(rows) * kernel[-1] / share
        elif name == "scan":
            total += parameters["length"] * _count(parameters["jaxpr"].jaxpr, share, visible)
        elif name == "cond":
            total += max(_count(branch.jaxpr, share, visible) for branch in parameters["branches"])
        elif name == "shard_map":
            here = math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"])
            total += _count(getattr(parameters["jaxpr"], "jaxpr", parameters["jaxpr"]), share // here, visible)
        elif name.startswith("dot_product_attention"):  # cuDNN's
            total += _attention(equation, backward="bwd" in name) / share
        elif name == "pallas_call":
            total += _kernel(parameters) / share * (visible if "splash" in str(parameters.get("name", "")) else 1.0)
        else:
            total += sum(_count(inner, share, visible) for inner in _inner(parameters))
    return total


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _attention(equation: Any, backward: bool) -> float:
    """Two products forward, five backward (Dao et al. 2022); half of each where the mask is causal."""
    (rows, length, heads, head_dim), (_, slots, *_) = (variable.aval.shape for variable in equation.invars[:2])
    causal = "CAUSAL" in str(equation.params.get("mask_type", ""))
    return (5 if backward else 2) * 2 * rows * heads * length * slots * head_dim / (2 if causal else 1)


def _kernel(parameters: dict[str, Any]) -> float:
    estimate = parameters.get("cost_estimate")
    if estimate is not None and estimate.flops:
        return float(estimate.flops)
    grid = parameters["grid_mapping"].grid
    return math.prod(size for size in grid if isinstance(size, int)) * _count(parameters["jaxpr"], 1, 1.0)


def _inner(parameters: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(list(parameters.values()), is_leaf=lambda node: hasattr(node, "eqns") or hasattr(node, "jaxpr"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]
