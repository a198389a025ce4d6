"""Attention kernels behind one function: XLA everywhere, cuDNN's fused kernel on GPUs, splash attention on TPUs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.parallel.sharding import spec

NEGATIVE = -2.0**30  # a masked score; finite, so that a row with nothing to see stays a number


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, segment_ids: jax.Array | None = None,
              mask: jax.Array | None = None, dropout: Callable[[jax.Array], jax.Array] | None = None,
              implementation: str = "auto") -> jax.Array:
    """softmax(Q K^T / sqrt(H)) V.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H]; N is a multiple of K, and query head n reads key head n // (N / K).
      causal: a token sees itself and what is before it (needs S = T).
      segment_ids: int32 [B, T]; a token sees only tokens of its own segment (needs S = T).
      mask: bool, broadcastable to [B, 1, T, S]; what a token may see, beside the above (KV cache).
      dropout: applied to the probabilities, [B, N, T, S].
      implementation: auto, xla, cudnn or splash. The fused kernels have no dropout and no `mask`; `auto` then takes xla.

    Returns:
      [B, T, N, H] in query's type; scores and softmax are float32.
    """
    if implementation == "auto":
        implementation = _choose(query, key, fused=mask is None and dropout is None)
    elif mask is not None:
        implementation = "xla"  # decoding one token at a time
    if implementation == "cudnn":
        return _cudnn(query, key, value, causal, segment_ids)
    if implementation == "splash":
        return _splash(query, key, value, causal, segment_ids)
    return _xla(query, key, value, _combined_mask(query, causal, segment_ids, mask), dropout)


def _choose(query: jax.Array, key: jax.Array, fused: bool) -> str:
    """The fastest kernel of the backend that serves these shapes and types."""
    length, head_dim = query.shape[1], query.shape[3]
    if fused and jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16 and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    if fused and jax.default_backend() == "tpu" and length % 128 == 0 and key.shape[1] == length:
        return "splash"
    return "xla"


def _combined_mask(query: jax.Array, causal: bool, segment_ids: jax.Array | None, mask: jax.Array | None) -> jax.Array | None:
    length = query.shape[1]
    parts = [] if mask is None else [mask]
    if causal:
        parts.append(jnp.tril(jnp.ones((length, length), bool))[None, None])
    if segment_ids is not None:
        parts.append((segment_ids[:, :, None] == segment_ids[:, None, :])[:, None])
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None,
         dropout: Callable[[jax.Array], jax.Array] | None) -> jax.Array:
    batch, length, num_heads, head_dim = query.shape
    slots, kv_heads = key.shape[1:3]
    group = num_heads // kv_heads
    query = (query * head_dim**-0.5).reshape(batch, length, kv_heads, group, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights.reshape(batch, num_heads, length, slots)).reshape(weights.shape)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value, preferred_element_type=jnp.float32)
    return out.astype(query.dtype).reshape(batch, length, num_heads, head_dim)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, segment_ids: jax.Array | None) -> jax.Array:
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, segment_ids: jax.Array | None) -> jax.Array:
    """Splash attention, a Pallas kernel that ships with JAX; each device runs it on its own sequences and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, head_dim = query.shape[1], query.shape[3]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    block_sizes = kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
                                    block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)

    def on_device(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        group = query.shape[2] // key.shape[2]
        mask = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
        run = kernel.make_splash_mha(masks.MultiHeadMask([mask] * query.shape[2]), block_sizes=block_sizes,
                                     head_shards=1, q_seq_shards=1)
        heads_first = [jnp.moveaxis(array, 2, 1) for array in (query * head_dim**-0.5, key, value)]
        heads_first[1:] = [jnp.repeat(array, group, axis=1) for array in heads_first[1:]]
        if segment_ids is None:
            out = jax.vmap(run)(*heads_first)
        else:
            out = jax.vmap(run)(*heads_first, kernel.SegmentIds(q=segment_ids, kv=segment_ids))
        return jnp.moveaxis(out, 1, 2).astype(query.dtype)

    rows, heads, kv_heads = spec("batch", None), spec("batch", None, "heads", None), spec("batch", None, "kv_heads", None)
    return jax.shard_map(on_device, in_specs=(heads, kv_heads, kv_heads, rows), out_specs=heads, check_vma=False)(
        query, key, value, segment_ids)
