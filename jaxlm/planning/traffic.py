"""Bytes that a compiled program reads from and writes to a device's main memory in one run."""

import re
from collections.abc import Iterator

from jaxlm.planning.hlo import Module, Operation, array_sizes

# Nothing moves, or what moves is counted where it is done (loops, and exchanges at their start).
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "partition-id", "replica-id", "iota", "async-done", "async-update", "optimization-barrier", "opt-barrier"}
SLICES = ("dynamic-slice", "slice")
ELSEWHERE = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\([1-9]\)[^}]*\}")  # on-chip memory, or the host's


def memory_traffic(module: Module) -> float:
    """The sum over all operations of what they read and write, loops multiplied by their trip counts.

    A fusion reads of an operand that it only slices the slice, and writes of a result that it only updates the update.
    """
    total = 0.0
    for name, times in module.runs().items():
        operations = module.computations[name]
        sizes = {operation.name: _in_memory(operation.type) for operation in operations}
        total += max(times, 1) * sum(_moved(operation, sizes, module) for operation in operations)
    return total


def _moved(operation: Operation, sizes: dict[str, float], module: Module) -> float:
    if operation.opcode in FREE or operation.opcode.endswith("-done"):
        return 0.0
    operands = [sizes.get(name, 0.0) for name in operation.operands]
    result = _in_memory(operation.type)
    if operation.opcode == "dynamic-update-slice":
        return 2 * min(operands[1:2])
    if operation.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if operation.opcode.endswith("-start"):
        return 2 * sum(sliced(module, operation)) or result  # operands and results stand in its type
    if operation.opcode == "fusion":
        operands, result = _fusion(operation, operands, result, module.computations[operation.called[0]])
    return sum(operands) + result


def _fusion(operation: Operation, operands: list[float], result: float, inside: list[Operation]) -> tuple[list[float], float]:
    """What a fusion really reads of each operand, and writes."""
    by_name = {one.name: one for one in inside}
    users: dict[str, list[Operation]] = {}
    for one in inside:
        for name in one.operands:
            users.setdefault(name, []).append(one)
    for one in inside:
        if one.opcode == "parameter":
            number = int(one.rest.partition(")")[0])
            uses = list(_uses(one.name, users))
            if uses and number < len(operands) and all(_is_part(use, name) for name, use in uses):
                operands[number] = min(operands[number], sum(_part(use, by_name) for _, use in uses))
    for one in inside:
        if one.opcode == "dynamic-update-slice":
            whole, update = one.size, by_name[one.operands[1]].size if one.operands[1] in by_name else 0.0
            result = max(0.0, result - whole) + update if result >= whole else result
    return operands, result


def _uses(name: str, users: dict[str, list[Operation]]) -> Iterator[tuple[str, Operation]]:
    """What reads a value, and under which name: bitcasts give it another one."""
    for use in users.get(name, []):
        if use.opcode == "bitcast":
            yield from _uses(use.name, users)
        else:
            yield name, use


def _is_part(use: Operation, name: str) -> bool:
    return use.opcode in SLICES or (use.opcode == "dynamic-update-slice" and use.operands[0] == name)


def _part(use: Operation, by_name: dict[str, Operation]) -> float:
    if use.opcode in SLICES:
        return use.size
    return 0.0  # of what is updated in place nothing is read


def sliced(module: Module, operation: Operation) -> list[float]:
    """Bytes of the slices that are read or updated in what an operation calls."""
    inside = [one for name in operation.called for one in module.computations[name]]
    sizes = {one.name: one.size for one in inside}
    return ([one.size for one in inside if one.opcode == "dynamic-slice"]
            + [sizes.get(one.operands[1], 0.0) for one in inside if one.opcode == "dynamic-update-slice"])


def _in_memory(type: str) -> float:
    return sum(array_sizes(ELSEWHERE.sub("", type)))
