"""Floating-point operations that a device executes in one step, counted in the compiled program.

What a compiler makes of a product counts, not what was asked for: a product over groups of rows that became a dense
one over all groups, float32 in several passes of bfloat16. Only Pallas kernels are closed to the reader of a
compiled program: theirs are counted in the traced one.
"""

import base64
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxlm.planning.dataflow import FUSIONS
from jaxlm.planning.hlo import STARTERS, TYPE_BYTES, Module, Operation, arrays
from jaxlm.runtime.chips import FLOAT32_PASSES, peak_flops

TARGET = re.compile(r'custom_call_target="([^"]*)"')
PRECISION = re.compile(r'operand_precision(?:=\{|":\[)"?(\w+)"?,"?(\w+)')
ALGORITHM = re.compile(r'algorithm(?:=|":"ALG_)dot_(\w+?)_\w+?(?:_x(\d))?\b', re.IGNORECASE)
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
WINDOW = re.compile(r"window=\{([^}]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
GROUPS = re.compile(r"batch_group_count=(\d+)")
SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]')
CAUSAL = re.compile(r'"mask_type":\s*"\w*CAUSAL')
ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')
BODY = re.compile(r'"body":"([^"]*)"')
APPENDED = re.compile(r"(?:\.(?:\d+|clone|remat\d*))*$")  # by compilers to a name

PARTS = {"default": 1, "high": 2, "highest": 3}  # bfloat16 numbers that a TPU makes of a float32 one
WIDE = 4  # bytes: float32
PALLAS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
Array = tuple[str, tuple[int, ...]]  # element type, shape
Kernels = Mapping[str, "Arithmetic"]


class Arithmetic(NamedTuple):
    """FLOPs of one device in one step, by what executes them."""

    bfloat16: float = 0.0  # and other 16-bit types; of float32 every pass
    tfloat32: float = 0.0  # GPUs: float32 rounded to 19 bits
    float32: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: "Arithmetic", times: float = 1) -> "Arithmetic":
        """The sum, the other one so many times."""
        return Arithmetic(*(a + times * b for a, b in zip(self, other, strict=True)))

    def seconds(self, device_kind: str) -> float | None:
        """At the published speeds; None: not published. TF32 runs at half of bfloat16's (NVIDIA's datasheets since
        the A100)."""
        bfloat16, float32 = peak_flops(device_kind), peak_flops(device_kind, "float32")
        peaks = (bfloat16, bfloat16 and bfloat16 / 2, float32)
        if any(flops and not peak for flops, peak in zip(self, peaks, strict=True)):
            return None
        return sum(flops / peak for flops, peak in zip(self, peaks, strict=True) if flops)


def executed_flops(module: Module, platform: str, kernels: Kernels = {}) -> Arithmetic:  # noqa: B006
    """Of matrix products and convolutions, recomputation included, loops multiplied by their trip counts.

    Args:
      module: the compiled program.
      platform: its devices' (tpu, gpu, cpu): each has its own way with float32.
      kernels: by name, what one call of a Pallas kernel executes (`kernels_of`).

    Of a choice the longest branch counts, a loop that does not say how often it runs counts once, and of a kernel
    that is not in `kernels` its own estimate.
    """
    @functools.cache
    def of(name: str) -> Arithmetic:
        operations, total = module.computations[name], Arithmetic()
        types = {operation.name: operation.type for operation in operations}
        for operation in operations:
            total = total.plus(_own(operation, types, platform, kernels))
            inside = operation.called if operation.opcode in (*FUSIONS, *STARTERS) else module.run_by(operation)
            for called in inside:
                total = total.plus(of(called), max(1, module.trips(operation)))
        return total

    return of(module.entry)


def _own(operation: Operation, types: Mapping[str, str], platform: str, kernels: Kernels) -> Arithmetic:
    """Without what it calls."""
    target = TARGET.search(operation.rest)[1] if operation.opcode == "custom-call" else ""
    inputs = [array for name in operation.operands if name in types for array in arrays(types[name])]
    if target in PALLAS:
        return _of_kernel(operation, inputs, kernels)
    if target.startswith("__cudnn$fmha"):
        return Arithmetic(bfloat16=_attention(operation, inputs))
    if operation.opcode == "dot" or target.startswith("__cublas$"):
        flops = _product(operation, inputs)
    elif operation.opcode == "convolution":
        flops = _convolution(operation, inputs)
    else:
        return Arithmetic()
    unit, passes = _executed_by(operation.rest, [TYPE_BYTES[kind] >= WIDE for kind, _ in inputs[:2]], platform)
    return Arithmetic(**{unit: passes * flops})


def _executed_by(rest: str, wide: list[bool], platform: str) -> tuple[str, int]:
    """What multiplies numbers of such widths (whether float32), and how many times it goes over them."""
    if not any(wide):
        return "bfloat16", 1
    if (named := ALGORITHM.search(rest)) and named[1].lower() not in ("f32", "f64"):
        return {"tf32": "tfloat32"}.get(named[1].lower(), "bfloat16"), int(named[2] or 1)
    asked = [word.lower() for word in PRECISION.search(rest).groups()] if PRECISION.search(rest) else []
    precision = "highest" if named else max(asked or ["default"], key=PARTS.get)
    if platform == "tpu":  # products of the parts of both, without the smallest
        first, second = (PARTS[precision] if one else 1 for one in wide)
        return "bfloat16", sum(i + j < max(first, second) for i in range(first) for j in range(second))
    return "float32" if precision == "highest" or platform == "cpu" else "tfloat32", 1


def _product(operation: Operation, inputs: Sequence[Array]) -> float:
    """2 m n k: of cuBLAS, too, which names the contracted axes in its own way and may return its workspace beside
    the result."""
    (_, result), (_, first) = next(arrays(operation.type)), inputs[0]
    contracted = CONTRACTED.search(operation.rest)
    return 2 * math.prod(result) * math.prod(first[int(axis)] for axis in re.findall(r"\d+", contracted[1]))


def _convolution(operation: Operation, inputs: Sequence[Array]) -> float:
    """libtpu writes every product as one, batches as axes of a window whose steps meet no number but their own."""
    (_, result), (_, first), (_, second) = next(arrays(operation.type)), *inputs[:2]
    first_axes, second_axes, result_axes = LABELS.search(operation.rest).groups()
    window = dict(part.split("=") for part in WINDOW.search(operation.rest)[1].split()) if WINDOW.search(operation.rest) else {}
    groups = GROUPS.search(operation.rest)
    pairs = second[second_axes.index("i")] * result[result_axes.index("f")] * first[first_axes.index("b")]
    for axis in range(len(first) - 2):
        steps, padding = ((window.get(name, "").split("x")[axis:] or [default])[0] or default for name, default in (
            ("size", "1"), ("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))), window.get("pad")
        before = int(padding.split("x")[axis].split("_")[0]) if padding else 0
        pairs *= _meetings(first[first_axes.index(str(axis))], result[result_axes.index(str(axis))], before, *map(int, steps))
    return 2 * pairs / int(groups[1] if groups else 1)


@functools.cache
def _meetings(inputs: int, results: int, before: int, size: int, stride: int, spread: int, holes: int) -> int:
    """How many pairs of a window's and an input's numbers meet along one axis, padding and holes left out."""
    places = np.arange(results)[:, None] * stride + np.arange(size) * holes - before
    return int(((places >= 0) & (places <= (inputs - 1) * spread) & (places % spread == 0)).sum())


def _attention(operation: Operation, inputs: Sequence[Array]) -> float:
    """Two products forward, five backward (Dao et al. 2022); half of each where the mask is causal."""
    scores = math.prod(int(size) for size in re.findall(r"\d+", SCORES.search(operation.rest)[1]))
    products = 5 if "Backward" in operation.rest.partition("custom_call_target")[2][:80] else 2
    return products * 2 * scores * inputs[0][1][-1] / (2 if CAUSAL.search(operation.rest) else 1)


# ---- Pallas kernels --------------------------------------------------------------------------------------------------

def _of_kernel(operation: Operation, inputs: Sequence[Array], kernels: Kernels) -> Arithmetic:
    """What was traced of it; of the compiler's own (libtpu's grouped products) what they say themselves."""
    if known := kernels.get(APPENDED.sub("", operation.name)):
        return known
    estimate, body = ESTIMATE.search(operation.rest), BODY.search(operation.rest)
    exact = body and b"contract_precision<fp32>" in base64.b64decode(body[1])
    wide = exact and all(TYPE_BYTES[kind] >= WIDE for kind, shape in inputs if len(shape) > 1)
    return Arithmetic(bfloat16=float(estimate[1]) * (FLOAT32_PASSES if wide else 1) if estimate else 0.0)


def kernels_of(jaxpr: core.ClosedJaxpr, visible: float = 1.0) -> dict[str, Arithmetic]:
    """By name, what one call of each Pallas kernel of a traced program executes on a device; of one name the largest.

    By its own estimate, or else grid times body. Of splash attention `visible` is the share of its blocks that the
    mask leaves (`jaxlm.models.sizes.visible_blocks`), since it skips the others.
    """
    found: dict[str, Arithmetic] = {}
    for parameters in _pallas_calls(jaxpr.jaxpr):
        name, estimate = str(parameters["name"]), parameters.get("cost_estimate")
        if estimate is not None and estimate.flops:
            one = Arithmetic(bfloat16=float(estimate.flops))
        else:
            turns = math.prod(size for size in parameters["grid_mapping"].grid if isinstance(size, int))
            one = Arithmetic(bfloat16=turns * _body(parameters["jaxpr"]) * (visible if "splash" in name else 1.0))
        found[name] = max(one, found.get(name, one))
    return found


def _pallas_calls(jaxpr: Any) -> Iterator[dict[str, Any]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params
        else:
            for inner in _inner(equation.params):
                yield from _pallas_calls(inner)


def _body(jaxpr: Any) -> float:
    """Of a kernel's body, once; of a choice the larger branch."""
    total = 0.0
    for equation in jaxpr.eqns:
        parameters, name = equation.params, equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            first, second = (variable.aval for variable in equation.invars[:2])
            exact = "HIGHEST" in str(parameters["precision"]) and min(first.dtype.itemsize, second.dtype.itemsize) >= WIDE
            pairs = math.prod(equation.outvars[0].aval.shape) * math.prod(first.shape[axis] for axis in contracted)
            total += 2 * pairs * (FLOAT32_PASSES if exact else 1)
        elif name == "cond":
            total += max(_body(branch.jaxpr) for branch in parameters["branches"])
        else:
            total += parameters.get("length", 1) * sum(map(_body, _inner(parameters)))
    return total


def _inner(parameters: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(list(parameters.values()), is_leaf=lambda node: hasattr(node, "eqns") or hasattr(node, "jaxpr"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]
