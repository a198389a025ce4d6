"""Attention over a sequence that is cut over devices: keys and values go round, and no device ever holds them all.

Ring attention (Liu et al. 2023) with a running softmax (Milakov & Gimelshein 2018; Dao et al. 2022): each device
keeps its queries, and blocks of keys and values go from device to device, the next one under way while the present
one is computed. The backward pass goes round again; the gradients of keys and values travel with them, and home at
last.

A causal sequence cut into N contiguous pieces would leave the first device idle and the last with all the work. So
device i holds pieces i and 2N-1-i of 2N (zigzag; as Llama 3 does, Dubey et al. 2024): of every block that comes by
it then computes exactly half, and that half needs no causal mask.

Shapes: B sequences, T tokens, N query heads, K key/value heads of width H, G = N / K.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.parallel.dropout import attention_dropout
from jaxlm.parallel.sharding import per_device
from jaxlm.parallel.visible import Visible

SCORE_BYTES = 64 * 2**20  # of a chunk of queries against a block; more queries wait
NEGATIVE = -2.0**30  # a masked score; finite, so that a row with nothing to see stays a number

TOKENS = ("batch", "sequence")
HEADS = ("batch", "sequence", "heads", None)
KV_HEADS = ("batch", "sequence", "kv_heads", None)


def zigzag(length: int, devices: int) -> np.ndarray:
    """int32 [length]: which position stands in each slot, so that contiguous pieces for `devices` have equal causal
    work."""
    if devices == 1:
        return np.arange(length, dtype=np.int32)
    pieces = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([pieces[[i, 2 * devices - 1 - i]].ravel() for i in range(devices)])


class Tokens(NamedTuple):
    """Which tokens a block holds."""

    places: jax.Array  # int32 [1, T]: places in the sequence, the same in every row
    segment_ids: jax.Array | None  # int32 [B, T]: tokens see only their own segment
    dropout_keys: jax.Array | None  # uint32 [B, T, 2]
    is_local: jax.Array | None  # bool [1, T]: whether the layer is a local one, where there are both kinds


class Ring(NamedTuple):
    """Facts that every part of the way needs."""

    axis: str
    causal: bool
    window: int | None  # see `jaxlm.parallel.visible.Visible`
    dropout_rate: float
    heads: jax.Array | None = None  # int32 [N]: numbers of this device's heads; known once on the device

    def pass_on(self, tree: Any) -> Any:
        """Sends arrays to the next device and receives the previous one's."""
        size = jax.lax.axis_size(self.axis)
        return jax.lax.ppermute(tree, self.axis, [(i, (i + 1) % size) for i in range(size)])


def ring_attention(query: jax.Array, key: jax.Array, value: jax.Array, visible: Visible, dropout_keys: jax.Array | None,
                   axis: str, dropout_rate: float) -> jax.Array:
    """softmax(Q K^T / sqrt(H)) V, with the sequence cut over the mesh axis `axis`.

    Args:
      query: [B, T, N, H], laid out in `zigzag` order if causal.
      key, value: [B, T, K, H], likewise.
      visible: with the places of all slots.
      dropout_keys: uint32 [B, T, 2], of the queries; None: no dropout.
      axis: of the mesh.
      dropout_rate: of the probabilities.

    Returns:
      [B, T, N, H] in query's type; scores and softmax are float32.
    """
    is_local = None if visible.is_local is None else jnp.broadcast_to(visible.is_local, visible.places.shape)
    tokens = Tokens(visible.places, visible.segment_ids, dropout_keys, is_local)
    return _ring(query, key, value, tokens, Ring(axis, visible.causal, visible.window, dropout_rate))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(query, key, value, tokens, ring):
    return _forward(query, key, value, tokens, ring)[0]


def _token_axes(tokens: Tokens) -> Tokens:
    same = (None, "sequence")
    return Tokens(same, None if tokens.segment_ids is None else TOKENS,
                  None if tokens.dropout_keys is None else (*TOKENS, None), None if tokens.is_local is None else same)


def _forward(query, key, value, tokens, ring):
    run = per_device(functools.partial(_forward_round, ring=ring),
                     (HEADS, KV_HEADS, KV_HEADS, _token_axes(tokens), ("heads",)), (HEADS, HEADS[:3]))
    out, log_sum = checkpoint_name(run(query, key, value, tokens, jnp.arange(query.shape[2])), "attention")
    return out, (query, key, value, tokens, out, log_sum)


def _backward(ring, saved, grad):
    run = per_device(functools.partial(_backward_round, ring=ring),
                     (HEADS, KV_HEADS, KV_HEADS, _token_axes(saved[3]), HEADS, HEADS[:3], ("heads",), HEADS),
                     (HEADS, KV_HEADS, KV_HEADS))
    return *run(*saved, jnp.arange(grad.shape[2]), grad), None


_ring.defvjp(_forward, _backward)


# ---- one device's way round the ring ---------------------------------------------------------------------------------

def _forward_round(query, key, value, tokens, heads, *, ring):
    ring = ring._replace(heads=heads)
    queries, block = (query, tokens), (key, value, tokens._replace(dropout_keys=None))

    def see(total, block, distance):
        return _joined(total, _what_it_sees(ring, distance, queries, block, _attend, _pad_forward))

    def step(carry, distance):
        total, block = carry
        coming = ring.pass_on(block)
        return (see(total, block, distance), coming), None

    last = jax.lax.axis_size(ring.axis) - 1
    coming = ring.pass_on(block)
    total = _attend(ring, queries, block, causal=ring.causal)
    (total, coming), _ = jax.lax.scan(step, (total, coming), jnp.arange(1, last))
    out, log_sum = see(total, coming, last)
    return out.astype(query.dtype), log_sum


def _backward_round(query, key, value, tokens, out, log_sum, heads, grad, *, ring):
    ring = ring._replace(heads=heads)
    delta = jnp.einsum("btnh,btnh->btn", grad, out, preferred_element_type=jnp.float32)
    queries, block = (query, tokens, grad, log_sum, delta), (key, value, tokens._replace(dropout_keys=None))

    def see(grad_query, block, grad_block, distance):
        new_query, *new_block = _what_it_sees(ring, distance, queries, block, _attend_backward, _pad_backward)
        return grad_query + new_query, [(old + new).astype(old.dtype) for old, new in zip(grad_block, new_block, strict=True)]

    def step(carry, distance):
        grad_query, block, grad_block = carry
        coming = ring.pass_on(block)
        grad_query, grad_block = see(grad_query, block, grad_block, distance)
        return (grad_query, coming, ring.pass_on(grad_block)), None

    last = jax.lax.axis_size(ring.axis) - 1
    coming = ring.pass_on(block)
    grad_query, *at_home = _attend_backward(ring, queries, block, causal=ring.causal)
    grad_block = [jnp.zeros_like(array) for array in (key, value)]
    (grad_query, coming, grad_block), _ = jax.lax.scan(step, (grad_query, coming, grad_block), jnp.arange(1, last))
    grad_query, grad_block = see(grad_query, coming, grad_block, last)
    come_home = ring.pass_on(grad_block)
    return tuple(array.astype(query.dtype) for array in (grad_query, *(a + b for a, b in zip(at_home, come_home, strict=True))))


def _what_it_sees(ring, distance, queries, block, attend, pad):
    """`attend` for a block from `distance` devices back: of a causal sequence the half that these queries may see.

    A block of earlier pieces (its owner stands before this device): all queries see its first half. A later one: the
    second half of the queries sees all of it. `pad` brings both results to whole blocks.
    """
    if not ring.causal:
        return attend(ring, queries, block, causal=False)
    first, second = (functools.partial(jax.tree.map, half) for half in (
        lambda array: array[:, : array.shape[1] // 2], lambda array: array[:, array.shape[1] // 2 :]))
    return jax.lax.cond(
        jax.lax.axis_index(ring.axis) >= distance,
        lambda: pad(attend(ring, queries, first(block), causal=False), earlier=True),
        lambda: pad(attend(ring, second(queries), block, causal=False), earlier=False))


def _pad_forward(result, earlier):
    out, log_sum = result
    return result if earlier else (_double(out, after=False), _double(log_sum, after=False, fill=NEGATIVE))


def _pad_backward(result, earlier):
    grad_query, *grad_block = result
    if earlier:
        return grad_query, *(_double(array, after=True) for array in grad_block)
    return _double(grad_query, after=False), *grad_block


def _double(array, *, after, fill=0.0):
    """Twice as many tokens, `fill` after or before those that are there."""
    width = array.shape[1]
    return jnp.pad(array, [(0, 0), (0, width) if after else (width, 0), *[(0, 0)] * (array.ndim - 2)], constant_values=fill)


def _joined(total, part):
    """Attention over two sets of keys from attention over each of them."""
    (out, log_sum), (other, other_log_sum) = total, part
    joint = jnp.logaddexp(log_sum, other_log_sum)
    return out * jnp.exp(log_sum - joint)[..., None] + other * jnp.exp(other_log_sum - joint)[..., None], joint


# ---- queries against one block ---------------------------------------------------------------------------------------

def _attend(ring, queries, block, *, causal):
    """Queries (query, tokens) of a block of keys: float32 outputs [B, T, N, H] and log sums of exponentials [B, T,
    N]."""
    def some_queries(_, chunk):
        query, tokens = chunk
        scores = _scores(ring, query, tokens, block, causal)
        largest = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - largest)
        total = exponentials.sum(-1, keepdims=True)
        weights = exponentials / total
        if tokens.dropout_keys is not None:
            weights = weights * _dropout_factors(ring, tokens, block, weights.shape)
        out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(query.dtype), block[1], preferred_element_type=jnp.float32)
        return None, (out.reshape(query.shape), _per_head((largest + jnp.log(total))[..., 0]))

    return _scan_chunks(some_queries, None, queries, block)[1]


def _attend_backward(ring, queries, block, *, causal):
    """Gradients of query, key and value from (query, tokens, gradient, log sums, delta), float32.

    `log_sum` is over all blocks; delta is the gradient times the output, summed over H (Dao et al. 2022, appendix B).
    """
    key, value, _ = block

    def some_queries(carry, chunk):
        query, tokens, grad, log_sum, delta = chunk
        rows, length, _, head_dim = query.shape
        grouped = (rows, length, key.shape[2], -1, head_dim)
        weights = jnp.exp(_scores(ring, query, tokens, block, causal) - _grouped(log_sum, key)[..., None])
        grad = grad.reshape(grouped)
        grad_weights = jnp.einsum("btkgh,bskh->bkgts", grad, value, preferred_element_type=jnp.float32)
        dropped = weights
        if tokens.dropout_keys is not None:
            factors = _dropout_factors(ring, tokens, block, weights.shape)
            dropped, grad_weights = weights * factors, grad_weights * factors
        grad_scores = (weights * (grad_weights - _grouped(delta, key)[..., None]) * head_dim**-0.5).astype(query.dtype)
        add = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        grad_key, grad_value = carry
        grad_key += add("bkgts,btkgh->bskh", grad_scores, query.reshape(grouped))
        grad_value += add("bkgts,btkgh->bskh", dropped.astype(query.dtype), grad)
        return (grad_key, grad_value), add("bkgts,bskh->btkgh", grad_scores, key).reshape(query.shape)

    zeros = tuple(jnp.zeros(array.shape, jnp.float32) for array in (key, value))
    (grad_key, grad_value), grad_query = _scan_chunks(some_queries, zeros, queries, block)
    return grad_query, grad_key, grad_value


def _scores(ring, query, tokens, block, causal):
    """float32 [B, K, G, T, S]. `causal`: whether this block still has to be masked so."""
    key, _, key_tokens = block
    rows, length, _, head_dim = query.shape
    grouped = (query * head_dim**-0.5).reshape(rows, length, key.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    visible = tokens.places[:, :, None] >= key_tokens.places[:, None, :] if causal else True
    if ring.window is not None:
        is_local = None if tokens.is_local is None else tokens.is_local[:, :, None]
        visible &= Visible(ring.causal, ring.window, is_local=is_local).near(tokens.places, key_tokens.places)
    if tokens.segment_ids is not None:
        visible &= tokens.segment_ids[:, :, None] == key_tokens.segment_ids[:, None, :]
    return scores if visible is True else jnp.where(visible[:, None, None], scores, NEGATIVE)


def _dropout_factors(ring, tokens, block, shape):
    return attention_dropout(tokens.dropout_keys, block[2].places[0], ring.heads, ring.dropout_rate).reshape(shape)


def _grouped(array, key):
    """[B, T, N] to [B, K, G, T]."""
    return jnp.moveaxis(array.reshape(*array.shape[:2], key.shape[2], -1), 1, 3)


def _per_head(array):
    """[B, K, G, T] to [B, T, N]."""
    rows, kv_heads, group, length = array.shape
    return jnp.moveaxis(array, 3, 1).reshape(rows, length, kv_heads * group)


def _scan_chunks(function, carry, queries, block):
    """Scans `function(carry, chunk)` over the queries, cut so that a chunk's scores stay near SCORE_BYTES."""
    rows, length, num_heads, _ = queries[0].shape
    pieces = 1
    while length % (2 * pieces) == 0 and 4 * rows * num_heads * (length // pieces) * block[0].shape[1] > SCORE_BYTES:
        pieces *= 2
    if pieces == 1:
        return function(carry, queries)
    chunks = jax.tree.map(lambda array: jnp.moveaxis(array.reshape(array.shape[0], pieces, -1, *array.shape[2:]), 1, 0), queries)
    carry, outs = jax.lax.scan(function, carry, chunks)
    return carry, jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(array.shape[1], -1, *array.shape[3:]), outs)
