"""The transformer trunk (Vaswani et al. 2017): from tokens to one state for each of them.

GPT-2, Llama, BERT, ModernBERT and their like are settings of it (`jaxlm.presets`); what is learned from the states, and
the heads for it, are objectives (`jaxlm.models.objectives`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.attention import sequence_order
from jaxlm.models.layers import (
    MLP,
    Attention,
    Auxiliary,
    Context,
    Embedding,
    Execution,
    Experts,
    Norm,
    embed_and_run,
    run_stack,
    stack,
)
from jaxlm.models.sizes import head_dim, kv_heads, norm_bias, padded_vocab_size
from jaxlm.models.states import States
from jaxlm.parallel.dropout import dropout, fold_in, token_keys
from jaxlm.parallel.experts import RouterSums
from jaxlm.parallel.products import residual_axes
from jaxlm.parallel.shapes import Array, Batch, Cache, Float, Int32, RowKeys
from jaxlm.parallel.sharding import constrain
from jaxlm.settings import ModelSettings


class Block(nnx.Module):
    """Attention and MLP, each with a residual connection. pre: x + f(norm(x)); post: norm(x + f(x))."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        self.attention_norm = residual_norm(settings)
        self.attention = Attention(settings, rngs)
        self.mlp_norm = residual_norm(settings)
        self.mlp = (MLP if settings.num_experts is None else Experts)(settings, rngs)
        self.pre, self.first_norm, self.dropout_rate = settings.norm_position == "pre", settings.first_norm, settings.dropout

    def __call__(self, x: Float[Array, "B T D"], context: Context, cache: Cache | None = None
                 ) -> tuple[Float[Array, "B T D"], Auxiliary]:
        normed = self.attention_norm(x) if self.pre else x
        if not self.first_norm:
            normed = jnp.where(context.layer == 0, x, normed)
        attended, cache = self.attention(normed, context, cache)
        x = x + dropout(attended, self.dropout_rate, context.dropout_keys, site=1)
        x = x if self.pre else self.attention_norm(x)
        y, router = self.mlp(self.mlp_norm(x) if self.pre else x), None
        if isinstance(self.mlp, Experts):
            y, router = y
        x = x + dropout(y, self.dropout_rate, context.dropout_keys, site=2)
        return (x if self.pre else self.mlp_norm(x)), Auxiliary(cache, router)


class Transformer(nnx.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, settings: ModelSettings, *, dtype: jnp.dtype, execution: Execution, rngs: nnx.Rngs):
        rows, width, stddev = padded_vocab_size(settings.vocab_size), settings.hidden_size, settings.initializer_range
        self.token_embedding = Embedding(rows, width, "vocab", stddev=stddev, rngs=rngs)
        learned, types = settings.positions == "learned", settings.type_vocab_size
        self.position_embedding = (
            Embedding(settings.max_length, width, "positions", stddev=stddev, rngs=rngs) if learned else None)
        self.type_embedding = Embedding(types, width, "types", stddev=stddev, rngs=rngs) if types else None
        self.embedding_norm = residual_norm(settings) if settings.embedding_norm else None
        self.blocks = stack(lambda rngs: Block(settings, rngs), settings.num_layers, rngs)
        self.final_norm = residual_norm(settings) if settings.final_norm else None
        self.settings, self.dtype, self.execution = settings, dtype, execution

    @jax.named_scope("embedding")
    def embed(self, tokens: Int32[Array, "B T"], token_types: Int32[Array, "B T"] | None, context: Context
              ) -> Float[Array, "B T D"]:
        """What the first block reads. Missing token types are type 0, which is added, not skipped."""
        x = self.token_embedding(tokens, self.dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding(context.positions, self.dtype)
        if self.type_embedding is not None:
            x = x + self.type_embedding(jnp.zeros_like(tokens) if token_types is None else token_types, self.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = constrain(x.astype(self.dtype), *residual_axes(x.shape[1]))
        return dropout(x, self.settings.dropout, fold_in(context.dropout_keys, 2**31), site=0)

    def states(self, batch: Batch, dropout_keys: RowKeys | None = None) -> States:
        """States of a batch {tokens int32 [B, T], optionally segment_ids, positions, token_types, likewise}.

        `dropout_keys`: None: no dropout. Where a causal sequence is cut over devices the states come
        in the order that gives each as much work: `States` knows it.
        """
        length = batch["tokens"].shape[1]
        order = sequence_order(length, self.settings.causal, self.settings.attention)
        token_indices = jnp.arange(length) if order is None else order
        arrays = {name: array if order is None else array[:, order] for name, array in batch.items()
                  if name in ("tokens", "segment_ids", "positions", "token_types")}
        token_indices = jnp.asarray(token_indices)[None]
        positions = arrays.get("positions", jnp.broadcast_to(token_indices, batch["tokens"].shape))
        context = Context(positions, token_indices, arrays.get("segment_ids"), token_keys(dropout_keys, token_indices[0]))
        x, router = self.hidden(arrays["tokens"], context, arrays.get("token_types"))
        return States(x, order, router, dropout_keys)

    def hidden(self, tokens: Int32[Array, "B T"], context: Context, token_types: Int32[Array, "B T"] | None = None
               ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        """States of tokens, and the sums of the routers of experts, where there are some."""
        x, router = embed_and_run(self, (tokens, token_types), context, self.execution)
        return (x if self.final_norm is None else self.final_norm(x)), router

    def hidden_with_cache(self, tokens: Int32[Array, "B T"], context: Context, cache: Cache
                          ) -> tuple[Float[Array, "B T D"], Cache]:
        """The same for tokens that go to the slots from context.cache_index on; and the updated KV cache."""
        x, aux = run_stack(self.blocks, self.embed(tokens, None, context), context, cache=cache)
        return (x if self.final_norm is None else self.final_norm(x)), aux.cache

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A KV cache of all layers, for `rows` sequences of at most `slots` tokens."""
        shape = (self.settings.num_layers, rows, slots, kv_heads(self.settings), head_dim(self.settings))
        empty = constrain(jnp.zeros(shape, self.dtype), "layers", "batch", None, "kv_heads", None)
        return {"key": empty, "value": empty}


Trunk = Transformer


def residual_norm(settings: ModelSettings) -> Norm:
    """A norm over the residual stream."""
    return Norm(settings.hidden_size, "residual", kind=settings.normalization, epsilon=settings.norm_epsilon,
                bias=norm_bias(settings))
