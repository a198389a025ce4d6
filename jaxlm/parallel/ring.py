"""Attention over a sequence that is cut over devices: keys and values go round, and no device ever holds them all.

Ring attention (Liu et al. 2023) with a running softmax (Milakov & Gimelshein 2018; Dao et al. 2022): each device
keeps its queries, and blocks of keys and values go from device to device, the next one under way while the present
one is computed. The backward pass goes round again; the gradients of keys and values travel with them, and home at
last.

A causal sequence cut into R contiguous pieces would leave the first device idle and the last with all the work. So
device i holds pieces i and 2R-1-i of 2R (zigzag; as Llama 3 does, Dubey et al. 2024): of every block that comes by
it then computes exactly half, and that half needs no causal mask.

Shapes: `jaxlm.parallel.shapes`; on a device T is its queries and S the keys of the block that has come by.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.parallel.dropout import attention_dropout
from jaxlm.parallel.products import TOKENS
from jaxlm.parallel.shapes import Array, Bool, Float, Float32, Int32, TokenKeys
from jaxlm.parallel.sharding import per_device
from jaxlm.parallel.visible import Visible

SCORE_BYTES = 64 * 2**20  # of a chunk of queries against a block; more queries wait
NEGATIVE = -2.0**30  # a masked score; finite, so that a row with nothing to see stays a number

HEADS = ("batch", "sequence", "heads", None)
KV_HEADS = ("batch", "sequence", "kv_heads", None)


def zigzag(length: int, devices: int) -> Int32[np.ndarray, " T"]:
    """Which token of the sequence stands in each slot, so that contiguous pieces for `devices` have equal causal
    work."""
    if devices == 1:
        return np.arange(length, dtype=np.int32)
    pieces = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([pieces[[i, 2 * devices - 1 - i]].ravel() for i in range(devices)])


class Tokens(NamedTuple):
    """Which tokens a block holds."""

    token_indices: Int32[Array, "1 T"]  # which of the sequence, the same in every row
    segment_ids: Int32[Array, "B T"] | None  # tokens see only their own segment
    dropout_keys: TokenKeys | None
    is_local: Bool[Array, "1 T"] | None  # whether the layer is a local one, where there are both kinds


class Ring(NamedTuple):
    """Facts that every part of the way needs."""

    axis: str
    causal: bool
    window: int | None  # see `jaxlm.parallel.visible.Visible`
    dropout_rate: float
    heads: Int32[Array, " N"] | None = None  # numbers of this device's heads; known once on the device

    def pass_on(self, tree: Any) -> Any:
        """Sends arrays to the next device and receives the previous one's."""
        size = jax.lax.axis_size(self.axis)
        return jax.lax.ppermute(tree, self.axis, [(i, (i + 1) % size) for i in range(size)])


# What travels: keys, values and which tokens they are of. What stays: queries and their tokens; backward also the
# output's gradient, log sums and delta. The token dimension is the second of all, so that they are cut and scanned as
# one.
Block = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"], Tokens]
Queries = tuple[Any, ...]
Result = tuple[Float32[Array, "B T N H"], Float32[Array, "B T N"]]  # attention over some keys; log of sum of exp(scores)


def ring_attention(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"],
                   visible: Visible, dropout_keys: TokenKeys | None, axis: str, dropout_rate: float
                   ) -> Float[Array, "B T N H"]:
    """softmax(Q K^T / sqrt(H)) V, with the sequence cut over the mesh axis `axis`; scores and softmax are float32.

    Args:
      query, key, value: with their tokens in `zigzag` order if causal.
      visible: with the token_indices of all slots.
      dropout_keys: of the queries; None: no dropout.
      dropout_rate: of the probabilities.
    """
    is_local = None if visible.is_local is None else jnp.broadcast_to(visible.is_local, visible.token_indices.shape)
    tokens = Tokens(visible.token_indices, visible.segment_ids, dropout_keys, is_local)
    return _ring(query, key, value, tokens, Ring(axis, visible.causal, visible.window, dropout_rate))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], tokens: Tokens,
          ring: Ring) -> Float[Array, "B T N H"]:
    return _forward(query, key, value, tokens, ring)[0]


def _token_axes(tokens: Tokens) -> Tokens:
    """Its arrays' axes in place of them."""
    same = (None, "sequence")
    return Tokens(same, None if tokens.segment_ids is None else TOKENS,
                  None if tokens.dropout_keys is None else (*TOKENS, None), None if tokens.is_local is None else same)


def _forward(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], tokens: Tokens,
             ring: Ring) -> tuple[Float[Array, "B T N H"], tuple[Any, ...]]:
    run = per_device(functools.partial(_forward_round, ring=ring),
                     (HEADS, KV_HEADS, KV_HEADS, _token_axes(tokens), ("heads",)), (HEADS, HEADS[:3]))
    out, log_sum = checkpoint_name(run(query, key, value, tokens, jnp.arange(query.shape[2])), "attention")
    return out, (query, key, value, tokens, out, log_sum)


def _backward(ring: Ring, saved: tuple[Any, ...], grad: Float[Array, "B T N H"]) -> tuple[Any, ...]:
    run = per_device(functools.partial(_backward_round, ring=ring),
                     (HEADS, KV_HEADS, KV_HEADS, _token_axes(saved[3]), HEADS, HEADS[:3], ("heads",), HEADS),
                     (HEADS, KV_HEADS, KV_HEADS))
    return *run(*saved, jnp.arange(grad.shape[2]), grad), None


_ring.defvjp(_forward, _backward)


# ---- one device's way round the ring ---------------------------------------------------------------------------------

# Queries stay, blocks go round. After `distance` turns a device holds the block of the device that many before it:
#
#     distance            0       1       2       3         the block that each of 4 devices holds
#     device 0            0       3       2       1
#     device 1            1       0       3       2         0 is its own, the only one that still needs
#     device 2            2       1       0       3         a causal mask; of each other one half is seen
#     device 3            3       2       1       0         (`_what_it_sees`)
#
# Invariant of `step`: `total` is attention over the blocks of all smaller distances, `block` the one of `distance`,
# and the next is asked for before this one is computed, so that the network works while the devices do. Hence the
# first block is taken out of the loop (it is masked, and its successor must be under way by then) and the last one,
# too (nothing comes after it): R - 1 exchanges for R blocks. No softmax over all keys is ever formed: each part
# comes with the logarithm of its denominator, and `_joined` weighs two parts by these (Milakov & Gimelshein 2018;
# Liu et al. 2023, algorithm 1).
def _forward_round(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"],
                   tokens: Tokens, heads: Int32[Array, " N"], *, ring: Ring
                   ) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    ring = ring._replace(heads=heads)
    queries, block = (query, tokens), (key, value, tokens._replace(dropout_keys=None))

    def see(total: Result, block: Block, distance: Any) -> Result:
        return _joined(total, _what_it_sees(ring, distance, queries, block, _attend, _pad_forward))

    def step(carry: tuple[Result, Block], distance: Array) -> tuple[tuple[Result, Block], None]:
        total, block = carry
        coming = ring.pass_on(block)
        return (see(total, block, distance), coming), None

    last = jax.lax.axis_size(ring.axis) - 1
    coming = ring.pass_on(block)
    total = _attend(ring, queries, block, causal=ring.causal)
    (total, coming), _ = jax.lax.scan(step, (total, coming), jnp.arange(1, last))
    out, log_sum = see(total, coming, last)
    return out.astype(query.dtype), log_sum


def _backward_round(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"],
                    tokens: Tokens, out: Float[Array, "B T N H"], log_sum: Float32[Array, "B T N"], heads: Int32[Array, " N"],
                    grad: Float[Array, "B T N H"], *, ring: Ring
                    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    # The same way round. Gradients of keys and values travel one turn behind the block that they belong to, and every
    # device adds its part; the owner's own part stays at home, in float32, until the rest has come all the way.
    ring = ring._replace(heads=heads)
    delta = jnp.einsum("btnh,btnh->btn", grad, out, preferred_element_type=jnp.float32)
    queries, block = (query, tokens, grad, log_sum, delta), (key, value, tokens._replace(dropout_keys=None))

    def see(grad_query: Array, block: Block, grad_block: list[Array], distance: Any) -> tuple[Array, list[Array]]:
        new_query, *new_block = _what_it_sees(ring, distance, queries, block, _attend_backward, _pad_backward)
        return grad_query + new_query, [(old + new).astype(old.dtype) for old, new in zip(grad_block, new_block, strict=True)]

    def step(carry: tuple[Any, ...], distance: Array) -> tuple[tuple[Any, ...], None]:
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


# Device i of R holds pieces i and 2R-1-i of 2R, in this order: an early and a late one. With R = 4, what queries
# of device 1 (pieces 1, 6) see of other devices' keys, x being seen whole and . not at all:
#
#     keys of device      0: pieces 0, 7        2: pieces 2, 5        3: pieces 3, 4
#     queries, piece 1          x  .                  .  .                  .  .
#              piece 6          x  .                  x  x                  x  x
#
# Keys from a device before this one, j < i: piece j is earlier than both of ours and 2R-1-j later than both, so all
# queries see the first half of the block. From one behind it, j > i: both pieces are later than i and earlier than
# 2R-1-i, so the second half of the queries sees all of it. Either way it is half the work, without a mask, and the
# same for every device: with contiguous pieces all would wait for the last one. "Before" is i >= distance: i -
# distance has then not wrapped round. The halves differ in shape, so the two branches pad their results to whole
# blocks: with a log sum of NEGATIVE, which has no weight in `_joined`, and backward with zeros.
def _what_it_sees(ring: Ring, distance: Int32[Array, ""] | int, queries: Queries, block: Block, attend: Callable[..., Any],
                  pad: Callable[..., Any]) -> Any:
    """`attend` for a block from `distance` devices back: of a causal sequence the half that these queries may see.
    `pad` brings the result to whole blocks."""
    if not ring.causal:
        return attend(ring, queries, block, causal=False)
    first, second = (functools.partial(jax.tree.map, half) for half in (
        lambda array: array[:, : array.shape[1] // 2], lambda array: array[:, array.shape[1] // 2 :]))
    return jax.lax.cond(
        jax.lax.axis_index(ring.axis) >= distance,
        lambda: pad(attend(ring, queries, first(block), causal=False), earlier=True),
        lambda: pad(attend(ring, second(queries), block, causal=False), earlier=False))


def _pad_forward(result: tuple[Float32[Array, "B T_seen N H"], Float32[Array, "B T_seen N"]], earlier: bool) -> Result:
    out, log_sum = result
    return result if earlier else (_double(out, after=False), _double(log_sum, after=False, fill=NEGATIVE))


def _pad_backward(result: tuple[Array, ...], earlier: bool) -> tuple[Array, ...]:
    grad_query, *grad_block = result
    if earlier:
        return grad_query, *(_double(array, after=True) for array in grad_block)
    return _double(grad_query, after=False), *grad_block


def _double(array: Float[Array, "B T ..."], *, after: bool, fill: float = 0.0) -> Float[Array, "B 2*T ..."]:
    """Twice as many tokens, `fill` after or before those that are there."""
    width = array.shape[1]
    return jnp.pad(array, [(0, 0), (0, width) if after else (width, 0), *[(0, 0)] * (array.ndim - 2)], constant_values=fill)


def _joined(total: Result, part: Result) -> Result:
    """Attention over two sets of keys from attention over each of them: their means, weighted by their denominators."""
    (out, log_sum), (other, other_log_sum) = total, part
    joint = jnp.logaddexp(log_sum, other_log_sum)
    return out * jnp.exp(log_sum - joint)[..., None] + other * jnp.exp(other_log_sum - joint)[..., None], joint


# ---- queries against one block ---------------------------------------------------------------------------------------

def _attend(ring: Ring, queries: Queries, block: Block, *, causal: bool) -> Result:
    """Attention of queries (query, tokens) over one block of keys."""
    def some_queries(_: None, chunk: Queries) -> tuple[None, Result]:
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


# Probabilities are not kept but computed again, block by block (Dao et al. 2022, section 3.1 and appendix B.2).
# That one block suffices is due to `log_sum`, the denominator over all blocks: P = exp(scores - log_sum) are parts
# of the whole softmax, not of this block's. And softmax's backward pass, dS = P (dP - sum_j P_j dP_j), needs a sum
# over all keys, but sum_j P_j dP_j = sum_j P_j (dO . V_j) = dO . O: `delta`, known before the first block comes.
# With the block's own denominator or its own sum, gradients would be off by what other blocks hold, and no shape
# would say so.
#
#     O = (P m) V,  m the dropout factors      dV = (P m)^T dO      dP = (dO V^T) m
#     dS = P (dP - delta)                      dQ = dS K            dK = dS^T Q        (dS, scaled by 1 / sqrt(H))
#
# Dropout changes nothing in delta: sum_j P_j m_j (dO . V_j) is still dO . O. The masks m are made again from the
# same keys (`jaxlm.parallel.dropout`), wherever the block is by now.
def _attend_backward(ring: Ring, queries: Queries, block: Block, *, causal: bool
                     ) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B S K H"], Float32[Array, "B S K H"]]:
    """Gradients of query, key and value from (query, tokens, gradient, log_sum, delta)."""
    key, value, _ = block

    def some_queries(carry: tuple[Array, Array], chunk: Queries) -> tuple[tuple[Array, Array], Array]:
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


def _scores(ring: Ring, query: Float[Array, "B T N H"], tokens: Tokens, block: Block, causal: bool
            ) -> Float32[Array, "B K G T S"]:
    """`causal`: whether this block still has to be masked so."""
    key, _, key_tokens = block
    rows, length, _, head_dim = query.shape
    grouped = (query * head_dim**-0.5).reshape(rows, length, key.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    visible = tokens.token_indices[:, :, None] >= key_tokens.token_indices[:, None, :] if causal else True
    if ring.window is not None:
        is_local = None if tokens.is_local is None else tokens.is_local[:, :, None]
        visible &= Visible(ring.causal, ring.window, is_local=is_local).near(tokens.token_indices, key_tokens.token_indices)
    if tokens.segment_ids is not None:
        visible &= tokens.segment_ids[:, :, None] == key_tokens.segment_ids[:, None, :]
    return scores if visible is True else jnp.where(visible[:, None, None], scores, NEGATIVE)


def _dropout_factors(ring: Ring, tokens: Tokens, block: Block, shape: tuple[int, ...]) -> Float32[Array, "B K G T S"]:
    return attention_dropout(tokens.dropout_keys, block[2].token_indices[0], ring.heads, ring.dropout_rate).reshape(shape)


def _grouped(array: Float[Array, "B T N"], key: Float[Array, "B S K H"]) -> Float[Array, "B K G T"]:
    """By the key/value heads that query heads read."""
    return jnp.moveaxis(array.reshape(*array.shape[:2], key.shape[2], -1), 1, 3)


def _per_head(array: Float[Array, "B K G T"]) -> Float[Array, "B T K*G"]:
    """The inverse of `_grouped`."""
    rows, kv_heads, group, length = array.shape
    return jnp.moveaxis(array, 3, 1).reshape(rows, length, kv_heads * group)


def _scan_chunks(function: Callable[..., Any], carry: Any, queries: Queries, block: Block) -> tuple[Any, Any]:
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
