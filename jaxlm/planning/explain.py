"""`jaxlm plan --explain`: how every parameter and every main activation is cut, and what each matrix product sends and why."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Group, RenderableType
from rich.table import Table

from jaxlm.models.model import Model
from jaxlm.parallel.sharding import RULES
from jaxlm.planning.describe import new_table
from jaxlm.reporting.units import format_size
from jaxlm.settings import Settings


def explain(settings: Settings, mesh: Mesh) -> RenderableType:
    """Three tables."""
    model = Model(settings.model, settings.train)
    return Group(
        "parameters (float32)", _parameters(model, mesh), "",
        f"activations ({settings.train.precision}, of one micro-batch)", _activations(settings, mesh), "",
        "what each product sends", _products(settings, mesh))


def _cut(axis: str | None, mesh: Mesh) -> list[str]:
    """Mesh axes that cut a named axis here."""
    rule = RULES[axis] if axis else None
    return [name for name in ((rule,) if isinstance(rule, str) else rule or ()) if mesh.shape[name] > 1]


def _arrays(arrays: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]], element: int, mesh: Mesh) -> Table:
    """A row for each array of `element` bytes a number: its shape, its axes, what cuts them, and its bytes on a device."""
    table = new_table("name", "shape", "axes", "cut over", "bytes")
    for name, (shape, axes) in arrays.items():
        parts = math.prod(mesh.shape[cut] for axis in axes for cut in _cut(axis, mesh))
        cuts = ", ".join("+".join(_cut(axis, mesh)) or "-" for axis in axes)
        table.add_row(name, " x ".join(f"{size:,}" for size in shape), ", ".join(axis or "-" for axis in axes), cuts,
                      format_size(element * math.prod(shape) / parts))
    return table


def _parameters(model: Model, mesh: Mesh) -> Table:
    leaves = jax.tree_util.tree_flatten_with_path(model.shapes)[0]
    return _arrays({".".join(entry.key for entry in path): (leaf.shape, axes.names)
                    for (path, leaf), axes in zip(leaves, jax.tree.leaves(model.axes), strict=True)}, 4, mesh)


def _activations(settings: Settings, mesh: Mesh) -> Table:
    model, data = settings.model, settings.data
    rows = data.global_batch_size // settings.train.gradient_accumulation * mesh.shape["stage"]
    tokens, width = (rows, data.sequence_length), 2 if settings.train.precision == "bfloat16" else 4
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    return _arrays({
        "residual (between the parts)": ((*tokens, model.hidden_size), ("batch", "residual_sequence", "residual")),
        "query": ((*tokens, model.num_heads, head_dim), ("batch", "sequence", "heads", None)),
        "key, value": ((*tokens, model.num_kv_heads or model.num_heads, head_dim), ("batch", "sequence", "kv_heads", None)),
        "mlp_hidden": ((*tokens, model.intermediate_size or 4 * model.hidden_size), ("batch", "sequence", "mlp")),
    }, width, mesh)


def _products(settings: Settings, mesh: Mesh) -> Table:
    table = new_table("product", "axis", "exchange, forward / backward", "why")
    for row in _product_rows(settings, mesh.shape):
        table.add_row(*row)
    return table


def _product_rows(settings: Settings, shape: Any) -> Iterator[tuple[str, str, str, str]]:
    if shape["fsdp"] > 1:
        yield ("every kernel", "fsdp", "all-gather / all-gather, reduce-scatter",
               "a kernel is kept in pieces: fetched for its product and again for its gradients, whose sum goes to the owners")
    if shape["tensor"] > 1:
        yield ("query, key, value; up, gate", "tensor", "all-gather / reduce-scatter",
               "tokens are cut between the parts and whole inside: a device's columns need all of them")
        yield ("attention output; down", "tensor", "reduce-scatter / all-gather",
               "each device has the products of its columns: they are added, and every device keeps its tokens")
        yield ("embedding; head", "tensor", "reduce-scatter; sums of the softmax / all-gather",
               "rows of the table are cut: a token's row is on one device, its logits on all")
    for axis, kernels in {"data": "every kernel", "context": "every kernel", "expert": "all but the experts"}.items():
        if shape[axis] > 1:
            yield kernels, axis, "- / all-reduce", f"each device of {axis} has other tokens: the kernels' gradients are summed"
    if shape["context"] > 1 and settings.model.attention == "auto":
        yield ("scores", "context", "collective-permute / collective-permute",
               "keys and values go round the ring, and their gradients home")
    elif shape["context"] > 1:
        yield "scores", "context", "all-to-all / all-to-all", "heads are exchanged for whole sequences, and back"
    if shape["stage"] > 1:
        yield ("none (between layers)", "stage", "collective-permute / collective-permute",
               "a micro-batch's states go to the next stage")
    if shape["expert"] > 1:
        yield ("experts", "expert", "2 all-to-all / 2 all-to-all",
               "tokens go to the devices of their experts, and the results home")
    if all(size == 1 for size in shape.values()):
        yield "all", "-", "-", "one device"
