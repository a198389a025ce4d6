"""What a token may see: the one statement of it, for plain attention, the ring, fused kernels and the KV cache."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.parallel.shapes import Array, Bool, Int32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["token_indices", "segment_ids", "is_local", "cache_index"],
                   meta_fields=["causal", "window"])
@dataclass(frozen=True)
class Visible:
    """What each token of a batch may see of the same sequence.

    Attributes:
      causal: itself and what is before it; else all.
      window: in a local layer: causal, the last so many tokens, its own included; else those at most half as many away.
      token_indices: which token of the sequence each slot holds, the same in every row; None: slot i holds token i.
      segment_ids: a token sees only its own segment (0 is padding); None: one segment.
      is_local: whether this is a local layer, once or for each query; None: every layer is, where there is a window.
      cache_index: keys are the slots of a KV cache, and the first query stands in this one.
    """

    causal: bool
    window: int | None = None
    token_indices: Int32[Array, "1 T"] | None = None
    segment_ids: Int32[Array, "B T"] | None = None
    is_local: Bool[Array, "..."] | None = None
    cache_index: Int32[Array, ""] | None = None

    @property
    def is_plain(self) -> bool:
        """Nothing but causality and segments, which fused kernels know."""
        return self.window is None and self.cache_index is None

    def mask(self, length: int, slots: int) -> Bool[Array, "#B 1 T S"] | None:
        """Which of `slots` keys each of `length` queries sees, of sequences in their natural order; None: all."""
        queries, keys = jnp.arange(length), jnp.arange(slots)
        if self.cache_index is not None:
            queries = self.cache_index + queries
        parts = []
        if self.cache_index is not None:
            parts.append((keys[None, :] <= queries[:, None])[None, None])
        elif self.causal:
            parts.append(jnp.tril(jnp.ones((length, length), bool))[None, None])
        if self.window is not None:
            parts.append(self.near(queries[None, :], keys[None, :])[:, None])
        if self.segment_ids is not None:
            parts.append((self.segment_ids[:, :, None] == self.segment_ids[:, None, :])[:, None])
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def near(self, queries: Int32[Array, "1 T"], keys: Int32[Array, "1 S"]) -> Bool[Array, "1 T S"]:
        """Whether the keys of these tokens lie in the window of the queries of those."""
        distance = queries[:, :, None] - keys[:, None, :]
        inside = distance < self.window if self.causal else jnp.abs(distance) <= self.window // 2
        return inside if self.is_local is None else inside | ~self.is_local
