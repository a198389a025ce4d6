"""Bytes that a compiled program reads from and writes to a device's main memory in one run."""

import itertools
import re
from collections.abc import Iterator

from jaxlm.planning.dataflow import FUSIONS, UPDATES, Dataflow
from jaxlm.planning.hlo import CALLERS, STARTERS, Module, Operation, array_sizes

# Nothing moves, or what moves is counted where it is done (loops, and exchanges at their start).
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
        "optimization-barrier", "opt-barrier", *CALLERS}
NO_WORK = re.compile(r'custom_call_target="(?:AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"')  # libtpu's
ARRAY = re.compile(r"(\w+\[[\d,]*\])(\{[^}]*\})?")
ELSEWHERE = re.compile(r"S\([1-9]\d*\)")  # a layout's word for on-chip memory, or the host's


def memory_traffic(module: Module) -> float:
    """The sum over all operations of what they read and write, loops multiplied by their trip counts.

    A fusion reads of an operand that it only slices the slice, and writes of a result that it only updates the
    update; so do the fusions inside it. Caches are not modelled.
    """
    flow, total = Dataflow(module), 0.0
    for name, times in module.runs().items():
        total += max(times, 1) * sum(_moved(operation, name, flow) for operation in module.computations[name])
    return total


def in_memory(text: str) -> list[float]:
    """Bytes of each array in a type; 0 of what is not in the device's main memory."""
    return [0.0 if ELSEWHERE.search(layout) else sum(array_sizes(array)) for array, layout in ARRAY.findall(text)]


def results_in_memory(operation: Operation, computation: str, flow: Dataflow) -> list[float]:
    """Bytes of each result; operands stand in the type of what is started, too, before the results or, of a copy,
    behind it."""
    arrays = in_memory(operation.type)
    if operation.opcode == "copy-start":
        return arrays[:1]
    if operation.opcode.endswith("-start"):
        operands = (flow.find(computation, name) for name in operation.operands)
        behind = arrays[sum(len(in_memory(one.type)) for one in operands if one) :]
        return behind or arrays  # an older XLA's sums name their results alone
    return arrays


def _moved(operation: Operation, computation: str, flow: Dataflow) -> float:
    if operation.opcode in FREE or operation.opcode.endswith(("-done", "-update")) or NO_WORK.search(operation.rest):
        return 0.0
    if operation.opcode in STARTERS:
        return sum(_moved(one, name, flow) for name in operation.called for one in flow.module.computations[name])
    operands = [flow.find(computation, name) for name in operation.operands]
    sizes = [sum(in_memory(one.type)) if one else 0.0 for one in operands]
    read = sum(size * share for size, share in zip(sizes, _read(operation, computation, operands, flow), strict=True))
    results = results_in_memory(operation, computation, flow)
    return read + sum(size * share for size, share in zip(results, written_shares(operation, computation, flow), strict=False))


def _read(operation: Operation, computation: str, operands: list[Operation | None], flow: Dataflow) -> Iterator[float]:
    """The share of each operand that is read."""
    for place, operand in enumerate(operands):
        if operation.opcode in FUSIONS:
            inside = flow.parameter(operation.called[0], place)
            yield min(1.0, sum(share for _, share in flow.taken(operation.called[0], inside))) if inside else 1.0
        else:
            yield flow.share(operation, computation, operand) if operand and place == 0 else 1.0


def written_shares(operation: Operation, computation: str, flow: Dataflow) -> Iterator[float]:
    """The share of each result that is written: less than all where it is an operand, updated in place."""
    if operation.opcode in FUSIONS:
        for value in flow.results(operation.called[0]):
            yield flow.written(operation.called[0], value)
    elif operation.opcode in UPDATES:
        yield flow.updated(operation, computation)
    else:
        yield from itertools.repeat(1.0)
