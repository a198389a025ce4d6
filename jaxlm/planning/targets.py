"""Devices that are not here, by name: what can be said of them without any compiler, or JAX.

`cpu:8` (emulated, and so really there); TPU slices by topology, `v5p:4x4x4` or `2xv5e:16x16`, or by the cloud's name,
`v5p-128` or `4xv6e-256`; `h100:8x4` (GPUs of a node x nodes).
"""

import itertools
import math
import re
from typing import NamedTuple

from jaxlm.errors import UserError, nearest
from jaxlm.runtime.chips import CHIPS, Chip

TPUS = {chip.slices.name: chip for chip in CHIPS.values() if chip.slices}
GPUS = {chip.card.name: chip for chip in CHIPS.values() if chip.card}
KINDS = ("cpu", *TPUS, *GPUS)
FORM = re.compile(r"(?:(?P<islands>\d+)x)?(?P<kind>[a-z]\w*):(?P<shape>\d+(?:x\d+)*)")
CLOUD = re.compile(r"(?:(?P<islands>\d+)x)?(?P<kind>[a-z]\w*)-(?P<count>\d+)")
LARGEST = {2: 16, 3: 28}  # chips along one dimension of a slice
PER_NODE = 8  # GPUs on one NVLink switch, as in HGX boards


class Target(NamedTuple):
    """Devices of one kind in islands of equal size: TPU slices, GPU nodes; CPUs are one."""

    name: str
    kind: str  # of KINDS
    shape: tuple[int, ...]  # of one island: chips along each dimension of a slice's torus, or devices
    islands: int = 1

    @property
    def chip(self) -> Chip:
        """What is published of one of its devices; of a CPU nothing."""
        return TPUS.get(self.kind) or GPUS.get(self.kind) or Chip("cpu")

    @property
    def device_kind(self) -> str:
        """JAX's name of such a device."""
        return self.chip.kind

    @property
    def platform(self) -> str:
        """JAX's name of what drives them."""
        return "tpu" if self.kind in TPUS else "gpu" if self.kind in GPUS else "cpu"

    @property
    def devices_per_chip(self) -> int:
        """JAX's devices of what `shape` counts."""
        return self.chip.slices.devices if self.chip.slices else 1

    @property
    def island_size(self) -> int:
        """Devices in an island."""
        return math.prod(self.shape) * self.devices_per_chip

    @property
    def num_devices(self) -> int:
        return self.island_size * self.islands


def find_target(name: str) -> Target:
    """What a target's name says.

    Raises:
      UserError: there is no such target.
    """
    name = name.strip().lower()
    if cloud := CLOUD.fullmatch(name):
        return _from_the_cloud(name, cloud)
    found = FORM.fullmatch(name)
    if not found:
        raise UserError(f"target '{name}': expected KIND:SHAPE, for example cpu:8, v5p:4x4x4, 2xv5e:16x16 or h100:8x4, or a "
                        "TPU's name in the cloud, for example v5p-128")
    kind, islands = found["kind"], int(found["islands"] or 1)
    _refuse_unknown(name, kind, KINDS)
    shape = tuple(int(size) for size in found["shape"].split("x"))
    if not all(shape) or not islands:
        raise UserError(f"target '{name}': sizes are positive numbers")
    if kind in TPUS:
        dimensions = TPUS[kind].torus
        if len(shape) != dimensions:
            example = suggestion(kind, math.prod(shape))
            raise UserError(f"target '{name}': a {kind} slice has {dimensions} dimensions, for example {kind}:{example}")
        if any(not _is_side(side, dimensions) for side in shape):
            raise UserError(f"target '{name}': the sides of a {kind} slice are 1, 2 or multiples of 4, at most "
                            f"{LARGEST[dimensions]}; several slices are written 2x{kind}:...")
        return Target(name, kind, shape, islands)
    if found["islands"] or len(shape) > 2 or (kind == "cpu" and len(shape) > 1):
        form = "cpu:N" if kind == "cpu" else f"{kind}:GPUs of a node x nodes, for example {kind}:8x4"
        raise UserError(f"target '{name}': expected {form}")
    if kind in GPUS and shape[0] > PER_NODE:
        nodes = -(-math.prod(shape) // PER_NODE)
        raise UserError(f"target '{name}': a node has at most {PER_NODE} GPUs; use {kind}:{PER_NODE}x{nodes}")
    return Target(name, kind, shape[:1], *shape[1:])


def _is_side(size: int, dimensions: int) -> bool:
    """Whether a slice can have so many chips along a dimension."""
    return size <= LARGEST[dimensions] and (size in (1, 2) or size % 4 == 0)


def _refuse_unknown(name: str, kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise UserError(f"target '{name}': unknown kind '{kind}', expected one of {', '.join(kinds)}{nearest(kind, kinds)}")


def _from_the_cloud(name: str, found: re.Match) -> Target:
    aliases = {alias: kind for kind, chip in TPUS.items() for alias in (kind, *chip.slices.cloud_names)}
    if found["kind"] in ("cpu", *GPUS):
        raise UserError(f"target '{name}': names with a dash are TPUs'; did you mean '{found['kind']}:{found['count']}'?")
    _refuse_unknown(name, found["kind"], tuple(aliases))
    kind, count, islands = aliases[found["kind"]], int(found["count"]), int(found["islands"] or 1)
    counted_as = TPUS[kind].slices.counted_as
    chips, rest = divmod(count, counted_as)
    shape = None if rest or not islands else topology(kind, chips)
    if shape is None:
        unit = "TensorCores, 2 of each chip" if counted_as == 2 else "chips"
        sizes = (size for size in (2**n for n in range(20)) if topology(kind, size))
        closest = min(sizes, key=lambda size: abs(math.log(size / max(1, chips)))) * counted_as
        raise UserError(f"target '{name}': no {kind} slice has {count} ({unit}); use {found['kind']}-{closest}")
    return Target(name, kind, shape, islands)


def topology(kind: str, chips: int) -> tuple[int, ...] | None:
    """The shape that the cloud gives a slice of so many chips: the most compact one; None: there is none.

    docs.cloud.google.com/tpu/docs lists them: sides of 1, 2 or multiples of 4.
    """
    dimensions = TPUS[kind].torus
    sides = [side for side in range(1, LARGEST[dimensions] + 1) if _is_side(side, dimensions) and chips % side == 0]
    shapes = [shape for shape in itertools.combinations_with_replacement(sides, dimensions) if math.prod(shape) == chips]
    if not shapes:
        return None
    best = min(shapes, key=sum)
    return best if best[0] > 1 else tuple(sorted(best, reverse=True))  # 2x2x1


def suggestion(kind: str, chips: int) -> str:
    """A topology of about so many chips, as a target's name has it."""
    shape = topology(kind, chips) or topology(kind, 4 ** round(math.log(chips, 4))) or topology(kind, 16)
    return "x".join(map(str, shape))
