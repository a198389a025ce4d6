"""A compiled program as its text says it: computations of operations, who calls whom, and how often each one runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

TYPE_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f4e2m1fn": 0.5, "s8": 1, "u8": 1, "f8e4m3": 1, "f8e4m3fn": 1, "f8e5m2": 1,
              "f8e8m0fnu": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
              "c64": 8, "c128": 16}
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
OPERATION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)(?= [\w\-]+\()|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:body|calls|called_computations|to_apply|true_computation|false_computation)=\{?%?([\w.\-]+)")
CALLERS = ("while", "call", "conditional")  # what runs what it calls
STARTERS = ("async-start", "call-start", "custom-call-start")  # what begins it, beside what follows
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONSTANT = re.compile(r"^(\d+)\)")
INDEX = re.compile(r"index=(\d+)")


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    type: str
    operands: list[str]
    called: list[str]  # computations; of a loop its body, of a choice all branches
    rest: str  # what stands behind the opcode
    is_root: bool

    @property
    def size(self) -> float:
        """Bytes of the result."""
        return sum(array_sizes(self.type))

    @property
    def elements(self) -> int:
        """Numbers in the result."""
        return sum(math.prod(shape) for _, shape in arrays(self.type))

    @property
    def number(self) -> int:
        """Of a parameter: which one; of a part of a tuple: which part."""
        return int((INDEX.search(self.rest) if self.opcode == "get-tuple-element" else CONSTANT.match(self.rest))[1])


class Module(NamedTuple):
    """A program."""

    computations: dict[str, list[Operation]]
    entry: str

    def runs(self) -> dict[str, int]:
        """How often each computation that is called otherwise than by a fusion or a reduction runs in one step; -1:
        unknown.

        Of a choice the longest branch runs.
        """
        times: dict[str, int] = {}

        def visit(name: str, count: int) -> None:
            times[name] = -1 if count < 0 or times.get(name, 0) < 0 else times.get(name, 0) + count
            for operation in self.computations[name]:
                trips = self.trips(operation)
                for called in self.run_by(operation):
                    visit(called, -1 if trips < 0 else count * trips)

        visit(self.entry, 1)
        return times

    def run_by(self, operation: Operation) -> list[str]:
        """The computations that an operation runs, other than a fusion's and a reduction's."""
        if operation.opcode not in CALLERS:
            return []
        return [max(operation.called, key=self._length)] if operation.opcode == "conditional" else operation.called

    def _length(self, name: str) -> int:
        return sum(1 + sum(map(self._length, operation.called)) for operation in self.computations[name])

    def trips(self, operation: Operation) -> int:
        """How often a loop runs; 1 for what is none; -1: unknown.

        libtpu leaves the count out; then it is the constant in the condition, to which a scan's counter runs from 0.
        """
        if operation.opcode != "while":
            return 1
        if known := TRIPS.search(operation.rest):
            return int(known[1])
        condition = self.computations.get(CONDITION.search(operation.rest)[1], [])
        condition = condition + [inner for one in condition for name in one.called for inner in self.computations.get(name, [])]
        bounds = [int(found[1]) for one in condition
                  if one.opcode == "constant" and one.type[0] in "su" and (found := CONSTANT.match(one.rest))]
        compares = any(one.opcode == "compare" and "direction=LT" in one.rest for one in condition)
        return bounds[-1] if bounds and compares else -1


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if found := COMPUTATION.match(line):
            current = computations.setdefault(found["name"], [])
            entry = found["name"] if found["entry"] else entry
        elif current is not None and (found := OPERATION.match(line)):
            rest = found["rest"]
            current.append(Operation(found["name"], found["opcode"], found["type"], NAME.findall(rest.partition(")")[0]),
                                     list(_called(rest)), rest, bool(found["root"])))
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, and as one what an operation says in several: a Pallas kernel's metadata."""
    whole = ""
    for line in text.splitlines():
        if COMPUTATION.match(line) or OPERATION.match(line) or line.strip() in ("", "}"):
            yield whole
            whole = line
        else:
            whole += line
    yield whole


def arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Element type and shape of each array in a type; tokens and the like are none."""
    for kind, shape in ARRAY.findall(text):
        if kind in TYPE_BYTES:
            yield kind, tuple(int(n) for n in shape.split(",") if n)


def array_sizes(text: str) -> Iterator[float]:
    """Bytes of each array in a type."""
    for kind, shape in arrays(text):
        yield TYPE_BYTES[kind] * math.prod(shape)


def _called(rest: str) -> Iterator[str]:
    yield from CALLED.findall(rest)
    if branches := BRANCHES.search(rest):
        yield from NAME.findall(branches[1])
