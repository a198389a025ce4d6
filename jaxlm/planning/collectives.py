"""What a compiled program sends between devices, read from the program itself, loops multiplied by their trip counts.

An exchange is hidden where the compiler has put a matrix product between its start and its end, or, as libtpu does, has fused
it into one: `async-collective-start`, then products that carry the exchange along (`async_collective_fusion`), then
`async-collective-done`. The exchange stands in the text of all of them; counted is the start.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
TYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
              "s64": 8, "u64": 8, "f64": 8}

COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
OPERATION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)(?= \w)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
PRODUCT = re.compile(r'custom_call_target="(?:__cublas|__cudnn|tpu_custom_call)')
CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
CONTEXT = re.compile(r"\b[us]32\[\]")  # counters that libtpu hands from a start to its end
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One kind of exchange along some mesh axes."""

    kind: str
    axes: tuple[str, ...]
    bytes_per_device: float  # in one step: what a device sends, in the ring forms of the exchanges (Chan et al. 2007)
    count: int  # in one step
    exposed_bytes: float  # those of bytes_per_device that no matrix product hides


class Exchange(NamedTuple):
    """One operation that sends."""

    kind: str
    axes: tuple[str, ...]
    size: float
    hidden: bool = False


class Program(NamedTuple):
    """A computation: its own exchanges, and what it calls how many times."""

    exchanges: list[Exchange]
    calls: list[tuple[str, int]]
    pending: dict[str, int]  # exchanges that have started: name of the operation, place in `exchanges`


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The exchanges of the compiled program `text` (`compiled.as_text()`) on `mesh`, the largest first.

    Raises:
      ValueError: a loop around an exchange does not say how often it runs, or its devices are written in an unknown form.
    """
    programs, entry = _programs(text, mesh)
    sent, exposed, counts = Counter(), Counter(), Counter()

    def add(name: str, times: int) -> None:
        program = programs[name]
        for kind, axes, size, hidden in program.exchanges:
            sent[kind, axes] += times * size
            exposed[kind, axes] += 0 if hidden else times * size
            counts[kind, axes] += times
        for called, trips in program.calls:
            if _has_collectives(called, programs):
                if trips < 0:
                    raise ValueError(f"the loop {called} does not say how often it runs")
                add(called, times * trips)

    add(entry, 1)
    found = (Collective(*key, size, counts[key], exposed[key]) for key, size in sent.items())
    return sorted(found, key=lambda one: -one.bytes_per_device)


def _has_collectives(name: str, programs: dict[str, Program]) -> bool:
    return bool(programs[name].exchanges) or any(_has_collectives(called, programs) for called, _ in programs[name].calls)


def _programs(text: str, mesh: Mesh) -> tuple[dict[str, Program], str]:
    programs: dict[str, Program] = {}
    products: set[str] = set()  # computations in which there is a matrix product
    bounds: dict[str, int] = {}  # of computations that compare a counter with a constant
    entry, current = "", ""
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            current = found["name"]
            programs[current] = Program([], [], {})
            entry = current if found["entry"] else entry
        elif current and (found := OPERATION.match(line)):
            if constant := CONSTANT.search(line):
                bounds[current] = int(constant[1])
            called = list(_called(found, bounds))
            if found["opcode"] in ("dot", "convolution") or PRODUCT.search(line) or any(name in products for name, _ in called):
                products.add(current)
                _hide_pending(programs[current])
            _add_operation(programs, current, found, called, mesh)
    return programs, entry


def _add_operation(programs: dict[str, Program], current: str, operation: re.Match, called: list[tuple[str, int]], mesh: Mesh
                   ) -> None:
    """Enters what an operation sends and calls. Computations are written before what calls them."""
    program, name, opcode = programs[current], operation["name"], operation["opcode"]
    first, inside = next(iter(called), ("", 1))[0], []
    if name.startswith("async-collective-start"):
        program.exchanges.extend(one._replace(hidden=True) for one in programs[first].exchanges)
    elif name.startswith("async-collective-done") or first.startswith("async_collective_fusion"):
        return
    elif first.startswith("all-reduce-scatter"):  # a sum of which each device keeps its part: half of what a whole sum sends
        inside = [one._replace(kind="reduce-scatter", size=one.size / 2) for one in programs[first].exchanges]
    elif opcode == "async-start":
        inside = programs[first].exchanges
    else:
        program.calls.extend(called)
        inside = list(_exchange(operation, mesh))
    if inside and opcode.endswith("-start"):
        program.pending[name] = len(program.exchanges)
    program.exchanges.extend(inside)
    if opcode.endswith("-done"):
        for started in re.findall(r"%?([\w.\-]+)", operation["rest"].split(")")[0]):
            program.pending.pop(started, None)


def _hide_pending(program: Program) -> None:
    for place in program.pending.values():
        program.exchanges[place] = program.exchanges[place]._replace(hidden=True)


def _called(operation: re.Match, bounds: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Computations that an operation calls, and how often; -1: unknown."""
    rest = operation["rest"]
    if operation["opcode"].removesuffix("-start") in KINDS:
        return  # to_apply is the sum's arithmetic
    trips = 1
    if operation["opcode"] == "while":
        known, condition = TRIPS.search(rest), CONDITION.search(rest)
        # libtpu leaves the count out: a scan's counter runs from 0 to the constant in its condition
        trips = int(known[1]) if known else bounds.get(condition[1], -1)
    for name in CALLED.findall(rest):
        yield name, trips
    if branches := BRANCHES.search(rest):  # one of them runs; counted is the first, since ours send alike
        yield branches[1].split(",")[0].strip().lstrip("%"), 1


def _exchange(operation: re.Match, mesh: Mesh) -> Iterator[Exchange]:
    """The operation, if it is an exchange between different devices."""
    kind = operation["opcode"].removesuffix("-start")
    if kind not in KINDS:
        return
    group = _group(operation["rest"])
    if len(group) < 2:
        return
    arrays = ARRAY.findall(CONTEXT.sub("", operation["type"]))
    if operation["opcode"].endswith("-start"):
        arrays = arrays[len(arrays) // 2 :]  # operands stand before results
    size = sum(TYPE_BYTES[name] * math.prod(int(n) for n in shape.split(",") if n) for name, shape in arrays)
    share = (len(group) - 1) / len(group)
    factor = {"all-reduce": 2 * share, "reduce-scatter": len(group) - 1, "collective-permute": 1}.get(kind, share)
    yield Exchange(kind, _axes(group, mesh), factor * size)


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
