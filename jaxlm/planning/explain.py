"""`jaxlm plan --explain`: how every parameter and every main activation is cut, and what each matrix product sends
and why."""

import math
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table

from jaxlm.checks import check_layout, require_vocabulary
from jaxlm.console.units import format_size
from jaxlm.models.sizes import head_dim, intermediate_size, is_recurrent, kv_heads
from jaxlm.parallel.rules import cutting, mesh_shape, parts
from jaxlm.planning.describe import new_table
from jaxlm.planning.targets import Target
from jaxlm.settings import Settings
from jaxlm.training.footprint import parameters_of

Shape = tuple[tuple[int, ...], tuple[str | None, ...]]  # sizes and axes


def explain(settings: Settings, target: Target) -> RenderableType:
    """Three tables.

    Raises:
      UserError: model.vocab_size is not known, or the run cannot be laid out on the devices.
    """
    require_vocabulary(settings)
    sizes = mesh_shape(settings.mesh, target.num_devices)
    check_layout(settings, sizes)
    return Group(
        "parameters (float32)", _arrays({name: one[:2] for name, one in parameters_of(settings).items()}, 4, sizes), "",
        f"activations ({settings.train.precision}, of one micro-batch)", _activations(settings, sizes), "",
        "what each product sends", _products(settings, sizes))


def _arrays(arrays: Mapping[str, Shape], element: int, sizes: Mapping[str, int]) -> Table:
    """A row for each array of `element` bytes a number: its shape, its axes, what cuts them, and its bytes on a
    device."""
    table = new_table("name", "shape", "axes", "cut over", "bytes")
    for name, (shape, axes) in arrays.items():
        cuts = ", ".join("+".join(cut for cut in cutting(axis) if sizes[cut] > 1) or "-" for axis in axes)
        table.add_row(name, " x ".join(f"{size:,}" for size in shape), ", ".join(axis or "-" for axis in axes), cuts,
                      format_size(element * math.prod(shape) / parts(axes, sizes)))
    return table


def _activations(settings: Settings, sizes: Mapping[str, int]) -> Table:
    model, data = settings.model, settings.data
    rows = data.global_batch_size // settings.train.gradient_accumulation * sizes["stage"]
    tokens, width = (rows, data.sequence_length), 2 if settings.train.precision == "bfloat16" else 4
    residual = {"residual (between the parts)": ((*tokens, model.hidden_size), ("batch", "residual_sequence", "residual"))}
    if is_recurrent(model):
        return _arrays(residual | {"gates": ((*tokens, 4, model.hidden_size), ("batch", "sequence", None, "mlp"))}, width, sizes)
    return _arrays(residual | {
        "query": ((*tokens, model.num_heads, head_dim(model)), ("batch", "sequence", "heads", None)),
        "key, value": ((*tokens, kv_heads(model), head_dim(model)), ("batch", "sequence", "kv_heads", None)),
        "mlp_hidden": ((*tokens, intermediate_size(model)), ("batch", "sequence", "mlp")),
    }, width, sizes)


def _products(settings: Settings, sizes: Mapping[str, int]) -> Table:
    table = new_table("product", "axis", "exchange, forward / backward", "why")
    for row in _product_rows(settings, sizes):
        table.add_row(*row)
    return table


def _product_rows(settings: Settings, shape: Mapping[str, int]) -> Iterator[tuple[str, str, str, str]]:
    if shape["fsdp"] > 1:
        yield ("every kernel", "fsdp", "all-gather / all-gather, reduce-scatter",
               "a kernel is kept in pieces: fetched for its product and again for its gradients, whose sum goes to the owners")
    if shape["tensor"] > 1 and is_recurrent(settings.model):
        yield ("gates", "tensor", "all-gather, and one for each token / reduce-scatter, and one for each token",
               "units are cut: each of them reads all tokens, and of the token before all units")
        yield "states", "tensor", "all-to-all / all-to-all", "units are exchanged for tokens, which are cut between the layers"
    elif shape["tensor"] > 1:
        yield ("query, key, value; up, gate", "tensor", "all-gather / reduce-scatter",
               "tokens are cut between the parts and whole inside: a device's columns need all of them")
        yield ("attention output; down", "tensor", "reduce-scatter / all-gather",
               "each device has the products of its columns: they are added, and every device keeps its tokens")
    if shape["tensor"] > 1:
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
