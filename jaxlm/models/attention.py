"""Attention kernels behind one function: XLA everywhere, cuDNN's fused kernel on GPUs, splash attention on TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models.sizes import attention_kernel, splash_block
from jaxlm.parallel.dropout import attention_dropout
from jaxlm.parallel.ring import NEGATIVE, ring_attention, zigzag
from jaxlm.parallel.shapes import Array, Bool, Float, Int32, TokenKeys
from jaxlm.parallel.sharding import axis_size, constrain, mesh_axes, per_device, platform
from jaxlm.parallel.visible import Visible


def attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], visible: Visible, *,
              dropout_keys: TokenKeys | None = None, dropout_rate: float = 0.0, implementation: str = "auto"
              ) -> Float[Array, "B T N H"]:
    """softmax(Q K^T / sqrt(H)) V, in query's type; scores and softmax are float32.

    Args:
      key, value: N is a multiple of K, and query head n reads key head n // (N / K). S = T without a cache.
      visible: what each query may see of the keys.
      dropout_keys: of the queries; None: no dropout.
      dropout_rate: of the probabilities.
      implementation: auto, xla, cudnn or splash. The fused kernels know neither dropout, nor windows, nor a cache; xla
        is taken then.
        Where the sequence is cut over devices `auto` is ring attention; with the others an all-to-all gives each device
        whole sequences of some of the heads, and back (Ulysses, Jacobs et al. 2023).
    """
    fused, cached = visible.is_plain and dropout_keys is None, visible.cache_index is not None
    if _is_ring(implementation) and not cached:
        [axis] = mesh_axes("sequence")
        return ring_attention(query, key, value, visible, dropout_keys, axis, dropout_rate)
    if implementation == "auto":
        implementation = attention_kernel(platform(), query.dtype.name, query.shape[1], query.shape[3], fused)
    heads, kv_heads = "heads", "kv_heads"
    if axis_size("sequence") > 1 and not cached:
        heads = kv_heads = "heads_of_whole_sequences"
        if key.shape[2] % axis_size(heads):  # too few to be cut so: every device takes whole sequences of all of them first
            key, value = (constrain(array, "batch", None, "kv_heads", None) for array in (key, value))
            key, value = (jnp.repeat(array, query.shape[2] // key.shape[2], axis=2) for array in (key, value))
        query, key, value = (constrain(array, "batch", None, heads, None) for array in (query, key, value))
    if implementation == "xla" or not fused:
        out = _xla(query, key, value, visible.mask(query.shape[1], key.shape[1]), dropout_keys, dropout_rate)
        return checkpoint_name(out, "attention")
    kernel = functools.partial({"cudnn": _cudnn, "splash": _splash}[implementation], causal=visible.causal)
    query_axes, key_axes = ("batch", None, heads, None), ("batch", None, kv_heads, None)
    run = per_device(kernel, (query_axes, key_axes, key_axes, ("batch", None)), query_axes)
    return run(query, key, value, visible.segment_ids)


def sequence_order(length: int, causal: bool, implementation: str) -> Int32[np.ndarray, " T"] | None:
    """The order in which the tokens of a sequence are to be laid out; None: as they are."""
    return zigzag(length, axis_size("sequence")) if causal and _is_ring(implementation) else None


def _is_ring(implementation: str) -> bool:
    return implementation == "auto" and axis_size("sequence") > 1


def _xla(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"],
         mask: Bool[Array, "#B 1 T S"] | None, dropout_keys: TokenKeys | None, dropout_rate: float) -> Float[Array, "B T N H"]:
    batch, length, num_heads, head_dim = query.shape
    slots, kv_heads = key.shape[1:3]
    group = num_heads // kv_heads
    query = (query * head_dim**-0.5).reshape(batch, length, kv_heads, group, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_keys is not None:
        factors = attention_dropout(dropout_keys, jnp.arange(slots), jnp.arange(num_heads), dropout_rate)
        weights = weights * factors.reshape(weights.shape)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(query.dtype), value, preferred_element_type=jnp.float32)
    return out.astype(query.dtype).reshape(batch, length, num_heads, head_dim)


# ---- one device's sequences and heads in a fused kernel --------------------------------------------------------------

def _cudnn(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"],
           segment_ids: Int32[Array, "B T"] | None, causal: bool) -> Float[Array, "B T N H"]:
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")
    return checkpoint_name(out, "attention")


def _splash(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"],
            segment_ids: Int32[Array, "B T"] | None, causal: bool) -> Float[Array, "B T N H"]:
    """Splash attention, a Pallas kernel that ships with JAX."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, num_heads, head_dim = query.shape[1:]
    block = splash_block(length)
    block_sizes = kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
                                    block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
    mask = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
    run = kernel.make_splash_mha(masks.MultiHeadMask([mask] * num_heads), block_sizes=block_sizes, head_shards=1, q_seq_shards=1,
                                 residual_checkpoint_name="attention")
    heads_first = [jnp.moveaxis(array, 2, 1) for array in (query * head_dim**-0.5, key, value)]
    heads_first[1:] = [jnp.repeat(array, num_heads // key.shape[2], axis=1) for array in heads_first[1:]]
    segments = () if segment_ids is None else (kernel.SegmentIds(q=segment_ids, kv=segment_ids),)
    return jnp.moveaxis(jax.vmap(run)(*heads_first, *segments), 1, 2).astype(query.dtype)
