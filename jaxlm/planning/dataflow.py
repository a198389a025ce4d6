"""Where an array of a compiled program comes from and what is done with it: through fusions, fusions inside fusions,
and what only gives an array another form."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxlm.planning.hlo import Module, Operation, arrays

# The same numbers in another form; inside a fusion only those are computed that are asked for.
SAME = ("bitcast", "reshape", "transpose", "convert", "copy", "copy-start", "copy-done", "negate", "optimization-barrier",
        "opt-barrier")
SLICES = ("dynamic-slice", "slice", "slice-start")
UPDATES = ("dynamic-update-slice", "scatter")  # of their first operand, in place
FUSIONS = ("fusion", "fusion-start")


Around = tuple[str, Operation, Any] | None  # the computation that a fusion stands in, the fusion, and what is around that


class ProgramValue(NamedTuple):
    """An operation, None where it is not known; its computation, and the fusion in which that stands."""

    operation: Operation | None
    computation: str
    around: Around


class Dataflow:
    """Answers questions about the values of a program. A value is an operation and the computation in which it
    stands."""

    def __init__(self, module: Module):
        self.module = module
        self._by_name: dict[str, dict[str, Operation]] = {}
        self._users: dict[str, dict[str, list[Operation]]] = {}

    def find(self, computation: str, name: str) -> Operation | None:
        """The operation of that name."""
        if computation not in self._by_name:
            self._by_name[computation] = {one.name: one for one in self.module.computations.get(computation, [])}
        return self._by_name[computation].get(name)

    def users(self, computation: str, name: str) -> list[Operation]:
        """The operations of the computation that take a value."""
        if computation not in self._users:
            users = self._users[computation] = {}
            for one in self.module.computations[computation]:
                for operand in dict.fromkeys(one.operands):
                    users.setdefault(operand, []).append(one)
        return self._users[computation].get(name, [])

    def parameter(self, computation: str, number: int) -> Operation | None:
        operations = self.module.computations[computation]
        return next((one for one in operations if one.opcode == "parameter" and one.number == number), None)

    def root(self, computation: str) -> Operation:
        operations = self.module.computations[computation]
        return next((one for one in operations if one.is_root), operations[-1])

    def results(self, computation: str) -> list[Operation | None]:
        """What a computation returns, part by part."""
        root = self.root(computation)
        return [self.find(computation, name) for name in root.operands] if root.opcode == "tuple" else [root]

    def taken(self, computation: str, value: Operation, whole: int | None = None, around: Around = None
              ) -> Iterator[tuple[Operation, float]]:
        """The operations that do something with a value, and the share of its numbers that each of them takes.

        Of a slice its share, of a table the rows that are gathered, of what is updated in place nothing. `around`:
        the fusion in which the value stands, if it is followed further where that hands it on.
        """
        whole = whole or max(1, value.elements)
        for use in self.users(computation, value.name):
            first = use.operands[0] == value.name
            if use.opcode in SAME:
                yield from self.taken(computation, use, whole, around)
            elif use.opcode in FUSIONS:
                for inside in (self.parameter(use.called[0], n) for n, name in enumerate(use.operands) if name == value.name):
                    yield from self.taken(use.called[0], inside, whole, (computation, use, around)) if inside else ()
            else:
                yield use, self.share(use, computation, value, whole) if first else 1.0
        if value.is_root and around:
            yield from self.taken(around[0], around[1], whole, around[2])
        elif value.is_root:
            yield value, 1.0

    def share(self, use: Operation, computation: str, first: Operation, whole: int | None = None) -> float:
        """The share of its first operand's numbers that an operation reads."""
        if use.opcode in (*SLICES, "gather"):
            return min(1.0, _result(use) / (whole or max(1, first.elements)))
        if use.opcode == "scatter":  # adds to what is there
            return self.updated(use, computation)
        return 0.0 if use.opcode == "dynamic-update-slice" else 1.0

    def updated(self, operation: Operation, computation: str) -> float:
        """The share of its first operand that an update replaces."""
        update = self.find(computation, operation.operands[1 if operation.opcode == "dynamic-update-slice" else -1])
        return min(1.0, update.elements / max(1, operation.elements)) if update else 1.0

    def written(self, computation: str, value: Operation | None) -> float:
        """The share of what a fusion returns that it writes: of an argument that it updates in place, the updates."""
        share = 0.0
        while value is not None:
            if value.opcode in FUSIONS or value.opcode == "get-tuple-element":
                return min(1.0, share + self._written_inside(computation, value))
            if value.opcode in UPDATES:
                share += self.updated(value, computation)
            elif value.opcode != "bitcast":
                break
            value = self.find(computation, value.operands[0])
        return min(1.0, share) if value is not None and value.opcode == "parameter" and share else 1.0

    def _written_inside(self, computation: str, value: Operation) -> float:
        number, fusion = 0, value
        if value.opcode == "get-tuple-element":
            number, fusion = value.number, self.find(computation, value.operands[0])
        if fusion is None or fusion.opcode not in FUSIONS:
            return 1.0
        results = self.results(fusion.called[0])
        return self.written(fusion.called[0], results[number]) if number < len(results) else 1.0

    def origin(self, computation: str, name: str, around: Around = None) -> ProgramValue:
        """What makes a value, behind fusions and other forms of it."""
        value = self.find(computation, name)
        while value is not None:
            if value.opcode in SAME:
                value = self.find(computation, value.operands[0])
            elif value.opcode in FUSIONS and self.root(value.called[0]).opcode != "tuple":
                around = (computation, value, around)
                computation = value.called[0]
                value = self.root(computation)
            elif value.opcode == "parameter" and around:
                number = value.number
                computation, fusion, around = around
                value = self.find(computation, fusion.operands[number])
            else:
                break
        return ProgramValue(value, computation, around)

    def operand(self, origin: ProgramValue, number: int) -> ProgramValue:
        """The same of one of the operands of what was found."""
        return self.origin(origin.computation, origin.operation.operands[number], origin.around)


def _result(operation: Operation) -> int:
    """Numbers in a slice's result; of one that is started, operands and counters stand in its type, too."""
    if operation.opcode.endswith("-start"):
        return math.prod(list(arrays(operation.type))[1][1])
    return operation.elements
