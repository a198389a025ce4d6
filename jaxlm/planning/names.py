"""What a user calls an array of a compiled step: its shape on a device says what it is, the place where it is made
the rest."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxlm.models.sizes import head_dim, intermediate_size, kv_heads, padded_vocab_size, query_heads
from jaxlm.settings import Settings

STATISTICS = "sums of the softmax"


class Names(NamedTuple):
    """Sizes on one device, by which arrays are told. Shapes of a compiled program are a device's own."""

    rows: int  # sequences of a micro-batch
    length: int  # tokens of each
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # rows of the table
    layers: int
    cut: int  # over so many devices what is kept of a kernel is cut
    compute: str  # HLO's name of the compute type

    def of(self, kind: str, shape: Sequence[int], scope: str | None, phase: str) -> str | None:
        """`gradient of mlp kernels`; None: the shape says nothing.

        Args:
          kind: HLO's element type.
          shape: of the array, or of a stack of one for each layer.
          scope: the part of the model that makes it: attention, mlp, experts, head, ...
          phase: backward, recomputed or nothing.
        """
        sizes = [size for size in shape if size > 1]
        layers = [sizes[1:]] if len(sizes) > 1 and sizes[0] == self.layers else []
        for layer in (sizes, *layers):
            stacked = layer is not sizes
            if found := self._of_tokens(layer, scope):
                after = {"backward": "", "recomputed": ", computed again"}.get(phase, "")
                before = "gradient of " if phase == "backward" and not stacked else ""
                return f"{found}, kept for the backward pass" if stacked else f"{before}{found}{after}"
            if found := self._kernel(layer, scope):
                # what is computed with is in the compute type; float32 beside it and whole are sums that go to the
                # optimizer
                summed = kind == "f32" and self.compute != "f32" and math.prod(layer) >= self.width * self.cut
                before = "gradient of " if phase == "backward" or (summed and not stacked) else ""
                return f"{before}{found}" + (", all layers" if stacked else "")
        return None

    def _of_tokens(self, sizes: Sequence[int], scope: str | None) -> str | None:
        """What there is of each token: `rows` and `length`, or both in one, beside what remains."""
        rest, tokens = list(sizes), self.rows * self.length
        if sizes and sizes[-1] == self.vocabulary:
            return "logits"
        if tokens in rest:
            rest.remove(tokens)
        elif self.length in rest and (self.rows == 1 or self.rows in rest):
            for size in (self.length, *([self.rows] if self.rows > 1 else [])):
                rest.remove(size)
        else:
            in_pieces = self.width in rest and math.prod(rest) == tokens * self.width  # as the head takes them
            return "residual states" if in_pieces else None
        number = math.prod(rest)
        if self.length in rest and number // self.length in (1, self.heads):
            return "attention scores" if number != self.width else "residual states"
        if number == self.mlp or (number == 2 * self.mlp and scope in ("mlp", None)):
            return "mlp hidden"
        heads, part = divmod(number, self.head_dim)
        attended = self.kv_heads <= heads <= self.heads + 2 * self.kv_heads and not part
        if attended and (self.head_dim in rest[1:] or (scope == "attention" and number != self.width)):
            return "queries, keys and values"
        if number == self.width:
            return "residual states"
        return STATISTICS if number in (1, self.heads) and scope in ("attention", "head", None) else None

    def _kernel(self, sizes: Sequence[int], scope: str | None) -> str | None:
        number, attended = math.prod(sizes), self.heads * self.head_dim
        if self.vocabulary in sizes and number in (self.vocabulary * self.width, self.vocabulary * self.width // self.cut):
            return "token table"
        for cut in {1, self.cut}:
            if number * cut == self.width * self.mlp:
                return "experts' kernels" if scope == "experts" else "mlp kernels"
            if number * cut in (self.width * attended, self.width * self.kv_heads * self.head_dim, 2 * self.width * attended,
                                self.width * (attended + 2 * self.kv_heads * self.head_dim)):
                return "attention kernels"
        if scope == "experts" and self.mlp in sizes and self.width in sizes:
            return "experts' kernels"
        return None


def names_of(settings: Settings, sizes: Mapping[str, int]) -> Names:
    """Of a run on a mesh of `sizes`."""
    model, train, tensor = settings.model, settings.train, sizes["tensor"]
    rows = settings.data.global_batch_size // (train.gradient_accumulation * sizes["data"] * sizes["fsdp"] * sizes["expert"])
    return Names(
        max(1, rows), settings.data.sequence_length // sizes["context"], model.hidden_size, intermediate_size(model) // tensor,
        max(1, query_heads(model) // tensor), max(1, kv_heads(model) // tensor), head_dim(model),
        padded_vocab_size(model.vocab_size) // tensor, model.num_layers // (sizes["stage"] * train.stage_repeats), sizes["fsdp"],
        "bf16" if train.precision == "bfloat16" else "f32")
