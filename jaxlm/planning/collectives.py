"""What a compiled program sends between devices, read from the program itself, loops multiplied by their trip counts.

An exchange is hidden where the compiler has put a matrix product between its start and its end, or, as libtpu does,
has fused it into one: `async-collective-start`, then products that carry the exchange along
(`async_collective_fusion`), then `async-collective-done`. The exchange stands in the text of all of them; counted is
the start.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm.planning.dataflow import Dataflow, ProgramValue
from jaxlm.planning.hlo import Module, Operation, array_sizes
from jaxlm.planning.plan import Collective

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
TILED = re.compile(r":T\(")  # layouts of TPUs
ALMOST = 1.01  # pieces are equal but for what fills up a tile
COUNTERS = re.compile(r"\b[us]32\[\]")  # what libtpu hands from a start to its end beside operands and results
KERNEL = re.compile(r'custom_call_target="(?:__cublas|__cudnn|tpu_custom_call)')


class Exchange(NamedTuple):
    """One operation that sends."""

    kind: str
    axes: tuple[str, ...]
    size: float
    pieces: int  # devices that exchange with each other
    hidden: bool = False


def collectives(module: Module, mesh: Mesh) -> list[Collective]:
    """The exchanges of a compiled program on `mesh`, the largest first.

    Raises:
      ValueError: a loop around an exchange does not say how often it runs, or its devices are written in an unknown
      form.
    """
    sent, exposed, counts = Counter(), Counter(), Counter()
    exchanges, products = {}, set()  # of the computations so far, which are written before what calls them
    flow = Dataflow(module)
    for name in module.computations:
        exchanges[name], has_product = _read(name, flow, exchanges, products, mesh)
        if has_product:
            products.add(name)
    for name, times in module.runs().items():
        if times < 0 and exchanges[name]:
            raise ValueError(f"the loop {name} does not say how often it runs")
        for kind, axes, size, _, hidden in exchanges[name]:
            sent[kind, axes] += times * size
            exposed[kind, axes] += 0 if hidden else times * size
            counts[kind, axes] += times
    found = (Collective(*key, size, counts[key], exposed[key]) for key, size in sent.items())
    return sorted(found, key=lambda one: -one.bytes_per_device)


def _read(computation: str, flow: Dataflow, before: dict[str, list[Exchange]], products: set[str], mesh: Mesh
          ) -> tuple[list[Exchange], bool]:
    """A computation's own exchanges, and whether there is a matrix product in it or in what it calls."""
    found: list[Exchange] = []
    pending: dict[str, list[int]] = {}  # exchanges under way: name of the operation, places in `found`
    has_product = False
    for operation in flow.module.computations[computation]:
        first = operation.called[0] if operation.called else ""
        called_product = not products.isdisjoint(operation.called)
        if called_product or operation.opcode in ("dot", "convolution") or KERNEL.search(operation.rest):
            has_product = True
            for place in itertools.chain(*pending.values()):
                found[place] = found[place]._replace(hidden=True)
        inside = list(_exchange(operation, mesh))
        if operation.name.startswith("async-collective-start"):
            inside = [one._replace(hidden=True) for one in before[first]]
        elif operation.name.startswith("async-collective-done") or first.startswith("async_collective_fusion"):
            inside = []
        elif first.startswith("all-reduce-scatter"):  # a sum of which each device keeps its part: half of what a whole sum sends
            inside = [one._replace(kind="reduce-scatter", size=one.size / 2) for one in before[first]]
        elif operation.opcode in ("async-start", "custom-call-start"):  # the latter: on a TPU7x's SparseCore
            inside = before.get(first, [])
        elif operation.opcode == "all-reduce" and TILED.search(operation.type):
            inside = list(_as_asked(inside[0], operation, computation, flow)) if inside else []
        if operation.opcode.endswith("-start"):
            pending[operation.name] = list(range(len(found), len(found) + len(inside)))
        elif operation.opcode.endswith("-update"):
            pending[operation.name] = [place for name in operation.operands for place in pending.pop(name, ())]
        found += inside
        if operation.opcode.endswith("-done"):
            for name in operation.operands:
                pending.pop(name, None)
    return found, has_product


def _as_asked(sum_of_all: Exchange, operation: Operation, computation: str, flow: Dataflow) -> Iterator[Exchange]:
    """What was asked for where libtpu writes a sum, perhaps of several arrays at once.

    On a 3D torus it writes gathers as sums of arrays that are zero but for a device's own piece, and scatters as
    sums of which each device then takes its piece. So it is the flow of the data around each array that tells.
    """
    pieces = sum_of_all.pieces
    sizes = Counter()
    for place, (operand, size) in enumerate(zip(operation.operands, array_sizes(operation.type), strict=True)):
        if _is_padded(flow.origin(computation, operand), flow, pieces):
            sizes["all-gather"] += size
        elif _is_cut(operation, place, computation, flow, pieces):
            sizes["reduce-scatter"] += size
        else:
            sizes["all-reduce"] += size
    for kind, size in sizes.items():
        part = sum_of_all.size * size / max(1, sum(sizes.values()))
        yield sum_of_all._replace(kind=kind, size=part if kind == "all-reduce" else part / 2)


def _is_padded(operand: ProgramValue, flow: Dataflow, pieces: int) -> bool:
    """Whether an array is one of so many pieces, in its place among zeros."""
    padded = operand.operation
    if padded is None or padded.opcode != "dynamic-update-slice":
        return False
    piece, around = flow.find(operand.computation, padded.operands[1]), flow.operand(operand, 0)
    if piece is None or around.operation is None or around.operation.opcode != "broadcast":
        return False
    value = flow.operand(around, 0).operation
    is_zero = value is not None and value.opcode == "constant" and value.rest.startswith("0)")
    return is_zero and piece.elements * pieces <= ALMOST * padded.elements


def _is_cut(operation: Operation, place: int, computation: str, flow: Dataflow, pieces: int) -> bool:
    """Whether of a sum each device takes its piece, one of so many, and nothing else is done with it."""
    sums = [operation]
    if len(operation.operands) > 1:
        sums = [use for use in flow.users(computation, operation.name)
                if use.opcode == "get-tuple-element" and use.number == place]
    taken = [one for value in sums for one in flow.taken(computation, value)]
    return bool(taken) and all(use.opcode == "dynamic-slice" and share * pieces <= ALMOST for use, share in taken)


def _exchange(operation: Operation, mesh: Mesh) -> Iterator[Exchange]:
    """The operation, if it is an exchange between different devices."""
    kind = operation.opcode.removesuffix("-start")
    if kind not in KINDS:
        return
    group = _group(operation.rest)
    if len(group) < 2:
        return
    arrays = list(array_sizes(COUNTERS.sub("", operation.type)))
    if operation.opcode.endswith("-start") and len(arrays) > len(operation.operands):
        arrays = arrays[len(operation.operands) :]  # operands stand before results; of a sum only in newer XLA's text
    size = sum(arrays)
    share = (len(group) - 1) / len(group)
    factor = {"all-reduce": 2 * share, "reduce-scatter": len(group) - 1, "collective-permute": 1}.get(kind, share)
    yield Exchange(kind, _axes(group, mesh), factor * size, len(group))


def _axes(group: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    return tuple(name for name, place in zip(mesh.axis_names, places, strict=True) if len(set(place)) > 1)


def _group(rest: str) -> np.ndarray:
    """Numbers of the devices that exchange with the first one; of a permutation, a pair."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        numbers = np.array([int(n) for n in re.findall(r"\d+", pairs[1])]).reshape(-1, 2)
        moved = numbers[numbers[:, 0] != numbers[:, 1]]
        return moved[0] if len(moved) else numbers[0, :1]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return np.array([int(n) for n in listed[1].split(",")])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0]
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        numbers = (_iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))).reshape(*sizes.values())
        chosen = re.findall(r"'(\w+)'", named[3])
        return numbers[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel()
    raise ValueError(f"devices in an unknown form: {rest[:200]}")


def _iota(form: str) -> np.ndarray:
    """`[2,4]T(1,0)`: numbers from 0 on in that shape, transposed."""
    shape, _, order = form.partition("T")
    shape = [int(n) for n in re.findall(r"\d+", shape)]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else numbers).ravel()
