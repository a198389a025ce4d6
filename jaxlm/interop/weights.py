"""One statement of how a parameter and the tensor of a file are the same numbers, read in both directions.

A tensor is seen as a matrix of rows (a vector is one column). PyTorch's linear layers are (out, in), ours (in, out):
transposed. GPT-2's Conv1D layers are (in, out). Heads are dimensions of their own here, and parts of a row there;
some tensors hold several parameters one behind the other.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.interop.safetensors import Range

Index = tuple[slice, ...]  # of an array, steps of 1


class Weight(NamedTuple):
    """Where a parameter is in the files. `{}` in the name stands for the layer: those parameters are stacked."""

    name: str
    inputs: int  # how many of the parameter's dimensions (without the layers) are its rows; 0: a vector
    transposed: bool = False
    part: tuple[int, int] = (0, 1)  # which of how many parameters of the same size that the tensor holds
    skipped: int = 0  # rows of the tensor before the first of the parameter's
    first_layer: int = 0  # layers before it have no such tensor

    def file_shape(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, for a parameter (one layer of it) of these sizes, without rows that only pad it."""
        if not self.inputs:
            return (math.prod(sizes) * self.part[1],)
        rows, columns = math.prod(sizes[: self.inputs]), math.prod(sizes[self.inputs :]) * self.part[1]
        return (columns, rows) if self.transposed else (rows + self.skipped, columns)

    def place(self, index: Index, sizes: Sequence[int]) -> tuple[Range, Range]:
        """Rows and columns of the tensor that hold `index` of a parameter (one layer of it) of these sizes."""
        cut = self.inputs or len(sizes)
        rows, columns = _span(index[:cut], sizes[:cut]), _span(index[cut:], sizes[cut:])
        number, _ = self.part
        if not self.inputs:
            return _moved(rows, number * math.prod(sizes)), (0, 1)
        columns = _moved(columns, number * math.prod(sizes[cut:]))
        return (columns, rows) if self.transposed else (_moved(rows, self.skipped), columns)

    def view(self, array: np.ndarray) -> np.ndarray:
        """A contiguous piece of the parameter (one layer of it) as the tensor has it: the same memory, two
        dimensions."""
        matrix = array.reshape(math.prod(array.shape[: self.inputs or array.ndim]), -1)
        return matrix.T if self.transposed else matrix


def _span(index: Index, sizes: Sequence[int]) -> Range:
    """The run of numbers that an index of several dimensions takes of them in one; only the first may be cut."""
    if not sizes:
        return 0, 1
    first, last, _ = index[0].indices(sizes[0])
    inner = math.prod(sizes[1:])
    if any(each.indices(size)[:2] != (0, size) for each, size in zip(index[1:], sizes[1:], strict=True)):
        raise ValueError(f"{index} of {tuple(sizes)}: only the first dimension may be cut")
    return first * inner, last * inner


def _moved(span: Range, by: int) -> Range:
    return span[0] + by, span[1] + by
