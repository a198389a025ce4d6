"""Which axes of the mesh cut what, and how long they are. No JAX: checks and estimates need no devices.

Models name their axes (`"embed"`, `"heads"`, ...) and know nothing else of parallelism; RULES is the one table from
those names to the axes of the mesh.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxlm.errors import UserError
from jaxlm.settings import AXES, MeshSettings

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "stage", "fsdp", "expert"),
    "sequence": "context",
    "residual_sequence": ("context", "tensor"),  # between the blocks' parts, where every token is on its own
    "residual": None,
    # parameters (and the activations that run through them)
    "layers": "stage",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "heads_of_whole_sequences": ("tensor", "context"),
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "positions": None,
    "types": None,
}


def cutting(axis: str | None) -> tuple[str, ...]:
    """The mesh axes that cut a named axis; none for None."""
    rule = RULES[axis] if axis else None
    return (rule,) if isinstance(rule, str) else rule or ()


def parts(axes: Sequence[str | None], sizes: Mapping[str, int]) -> int:
    """Into how many pieces an array with these named axes is cut on a mesh of these sizes."""
    return math.prod(sizes[name] for axis in axes for name in cutting(axis))


def mesh_shape(settings: MeshSettings, num_devices: int) -> dict[str, int]:
    """Size of every axis, -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(settings, axis) for axis in AXES}
    if sizes["data"] is None:
        sizes["data"] = 1 if -1 in sizes.values() else -1
    fixed = math.prod(size for size in sizes.values() if size != -1)
    described = " * ".join(f"mesh.{axis}={size}" for axis, size in sizes.items()
                           if size != 1 and getattr(settings, axis) is not None) or "mesh.data=1"
    if num_devices % fixed or (-1 not in sizes.values() and fixed != num_devices):
        raise UserError(f"{described} does not make {num_devices} device(s); change the mesh, or devices.count or the target "
                        f"(or leave one axis at -1 and make the others divide {num_devices})")
    return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def shrunk(settings: MeshSettings, num_devices: int) -> tuple[MeshSettings, int]:
    """The mesh on fewer devices than its sizes make, and in how many times as many micro-batches the batch must then
    be cut for a device to have no more of it at a time: fsdp as large as it was if it can be, data as what is left.
    The mesh itself and 1 when it has a free axis, or the devices suffice.

    Raises:
      UserError: the other axes take more devices than there are, or do not divide them.
    """
    sizes = {axis: getattr(settings, axis) or 1 for axis in AXES}
    wanted = math.prod(sizes.values())
    if settings.data is None or -1 in sizes.values() or num_devices >= wanted:
        return settings, 1
    others = wanted // (sizes["data"] * sizes["fsdp"])
    fitting = [fsdp for fsdp in range(1, sizes["fsdp"] + 1) if sizes["fsdp"] % fsdp == 0
               and num_devices % (others * fsdp) == 0 and sizes["data"] % (num_devices // (others * fsdp)) == 0]
    if not fitting:
        raise UserError(f"mesh.elastic: mesh.data={sizes['data']} and mesh.fsdp={sizes['fsdp']} cannot shrink to {num_devices} "
                        f"devices, with {others} along the other axes; use a divisor of {wanted} that is a multiple of {others}")
    fsdp = max(fitting)
    return replace(settings, data=num_devices // (others * fsdp), fsdp=fsdp), wanted // num_devices


def across(settings: MeshSettings, shape: dict[str, int], islands: int, kind: str = "slices or nodes") -> dict[str, int]:
    """Into how many parts, of which each lies inside one island, every axis is cut; they multiply to the number of
    islands.

    Args:
      kind: what messages call the islands.

    Raises:
      UserError: `settings.across` is not such a cut.
    """
    if settings.across is None:
        outer = {}
        for axis, size in shape.items():  # the axis that moves least and waits least for it goes first
            outer[axis] = math.gcd(size, islands)
            islands //= outer[axis]
        return outer
    outer = dict.fromkeys(AXES, 1) | settings.across
    for axis, parts in outer.items():
        if shape[axis] % parts:
            raise UserError(f"mesh.across: {axis}={parts} does not divide mesh.{axis}={shape[axis]}")
    if math.prod(outer.values()) != islands:
        described = " * ".join(f"{axis}={parts}" for axis, parts in settings.across.items()) or "no axis"
        raise UserError(f"mesh.across: {described} does not make the {islands} {kind} that these devices stand in; "
                        "leave it null to have it worked out")
    return outer
