"""What a row of a batch holds: its arrays, and what stands in them."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

Values = Literal["token", "position", "segment", "class", "number", "mask"]


class Field(NamedTuple):
    """One array of a row."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Values  # what its numbers are
    fill: int = 0  # what stands where there is nothing
    bound: int | None = None  # classes: how many there are; positions: below this


Spec = Mapping[str, Field]
Rows = dict[str, np.ndarray]  # {name: [n, *shape]}
Spans = list[tuple[int, int]]  # of a stream of tokens: first and end


class Sequences(Protocol):
    """One way to cut a split into sequences, and sequences into rows.

    Attributes:
      count: sequences in an epoch.
      padding_share: of all places for tokens, those that are empty.
      spec: the arrays of a row.
    """

    count: int
    padding_share: float
    spec: Spec

    def rows(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> Rows:
        """The arrays of several sequences: indices int64 [n]; epoch_keys and sample_keys uint64 [n] are all the
        randomness there is (see jaxlm.data.randomness). The only one that reads text: DamagedData."""
        ...

    def spans(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> list[Spans]:
        """Of which stretches of the stream each of them is made."""
        ...


# The arrays that tasks share: what they hold, and whether a row has one for each token.
SHARED: dict[str, tuple[Values, bool]] = {
    "tokens": ("token", True), "targets": ("token", True), "loss_mask": ("mask", True), "segment_ids": ("segment", True),
    "positions": ("position", True), "token_types": ("class", True), "next_sentence": ("class", False),
    "next_sentence_mask": ("mask", False), "masked_positions": ("position", True), "masked_targets": ("token", True),
    "masked_mask": ("mask", True),
}


def row_spec(length: int, names: Sequence[str], pad: int = 0, positions: int | None = None) -> dict[str, Field]:
    """Fields of these arrays of SHARED: `length` numbers, or one for the row. `pad` fills up tokens; `positions` lie
    below that, or below `length`."""
    spec = {}
    for name in names:
        values, each = SHARED[name]
        bound = {"class": 2, "position": positions or length}.get(values)
        spec[name] = Field((length,) if each else (), np.dtype(bool if values == "mask" else np.int32), values,
                           pad if name == "tokens" else 0, bound)
    return spec


def empty_rows(spec: Spec, num_rows: int) -> Rows:
    """Rows in which there is nothing."""
    return {name: np.full((num_rows, *field.shape), field.fill, field.dtype) for name, field in spec.items()}
