"""Which arrays stand in a device's memory when the compiled step needs most of it, by names that a user knows."""

import math
import re
from collections import Counter

from jaxlm.planning.dataflow import UPDATES, Dataflow
from jaxlm.planning.hlo import Module, Operation, arrays
from jaxlm.planning.names import Names
from jaxlm.planning.plan import Buffer
from jaxlm.planning.traffic import results_in_memory, written_shares

IN_SCOPE = re.compile(r"(?:\w+\()*(embedding|attention|mlp|experts|norm|head|optimizer)\)*")  # jvp(head), transpose(jvp(head))
OTHER = "other arrays"
OP_NAME = re.compile(r'op_name="([^"]*)"')
ALIASES = ("bitcast", "get-tuple-element", "tuple", "while", "optimization-barrier", "opt-barrier", "conditional", "call")


def largest_live(module: Module, names: Names, count: int = 5) -> list[Buffer]:
    """The largest at the peak, those of one name together; arguments are left out (they are the state and the batch).

    Follows the schedule that the text is in. What is made in place (loops, updates of a slice) takes no new memory. The
    compiler's own assignment packs tighter; the names are what this is for.
    """
    peak: tuple[float, dict[str, Buffer]] = (0.0, {})
    flow = Dataflow(module)

    def walk(name: str, outside: dict[str, Buffer]) -> None:
        nonlocal peak
        operations = module.computations[name]
        sources, last = _follow(operations)
        live = dict(outside)
        for place, operation in enumerate(operations):
            size = _new_memory(operation, name, flow)
            if size:
                live[f"{name}/{operation.name}"] = Buffer(label(operation, module, names), size)
            total = sum(buffer.size for buffer in live.values())
            if total > peak[0]:
                peak = (total, dict(live))
            if operation.opcode in ("while", "call"):
                for called in operation.called:
                    walk(called, live)
            for source in {one for operand in operation.operands for one in sources.get(operand, ())} | {operation.name}:
                if last.get(source, place) <= place and not operation.is_root:
                    live.pop(f"{name}/{source}", None)

    walk(module.entry, {})
    together: Counter[str] = Counter()
    for buffer in peak[1].values():
        together[buffer.label] += buffer.size
    return [Buffer(name, size) for name, size in together.most_common(count)]


def _follow(operations: list[Operation]) -> tuple[dict[str, set[str]], dict[str, int]]:
    """For each operation the ones whose memory its result is, and for those the place of the last one that reads
    them."""
    sources: dict[str, set[str]] = {}
    parts: dict[str, list[set[str]]] = {}  # of tuples
    last: dict[str, int] = {}
    for place, operation in enumerate(operations):
        first = next(iter(operation.operands), "")
        behind = {one for operand in operation.operands for one in sources.get(operand, ())}
        if operation.opcode == "tuple":
            parts[operation.name] = [sources.get(operand, set()) for operand in operation.operands]
        elif operation.opcode == "get-tuple-element" and first in parts:
            behind = parts[first][operation.number]
        elif operation.opcode in ALIASES and first in parts:
            parts[operation.name] = parts[first]
        sources[operation.name] = behind if operation.opcode in ALIASES else {operation.name}
        for one in behind:
            last[one] = place
    return sources, last


def _new_memory(operation: Operation, computation: str, flow: Dataflow) -> float:
    if operation.opcode in (*ALIASES, "parameter", "constant", *UPDATES) or operation.opcode.endswith(("-done", "-update")):
        return 0.0
    results = results_in_memory(operation, computation, flow)
    return sum(size for size, share in zip(results, written_shares(operation, computation, flow), strict=False) if share == 1)


def label(operation: Operation, module: Module, names: Names) -> str:
    """`gradient of mlp kernels`: by its shape, and by the path that JAX gives an operation, or one that it calls."""
    inside = [one for name in operation.called for one in module.computations[name]]
    paths = [found[1].split("/") for one in (operation, *reversed(inside)) if (found := OP_NAME.search(one.rest))]
    path = next((path for path in paths if len(path) > 1), [])
    scope = next((found[1] for part in reversed(path) if (found := IN_SCOPE.fullmatch(part))), None)
    phase = "recomputed" if "rematted_computation" in path else "backward" if any("transpose(" in part for part in path) else ""
    kind, shape = max(arrays(operation.type), key=lambda array: math.prod(array[1]))
    return names.of(kind, shape, scope, phase) or ", ".join([scope or OTHER, *([phase] if phase else [])])
