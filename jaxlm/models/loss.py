"""Cross-entropy over a vocabulary whose logits never exist all at once.

The head is a third of a small GPT's arithmetic and its logits are the largest array of the step. So the loss takes the
hidden states and the head's matrix, forms the logits of a few positions at a time, and computes the gradient while they
are there: three matrix products, as with full logits, none repeated. (The idea of gradients inside the forward pass:
Liger Kernel, Hsu et al. 2024; the vocabulary split over devices: Megatron-LM, Shoeybi et al. 2019.)

Shapes: `jaxlm.parallel.shapes`; T is whatever positions are predicted: all tokens, or P of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.models.sizes import loss_chunk
from jaxlm.parallel.products import TOKENS, MeshAxes, gather, residual_axes, scatter_sum, sum_over
from jaxlm.parallel.shapes import Array, Bool, Float, Float32, Int32, Shaped
from jaxlm.parallel.sharding import mesh_axes, per_device, platform


class Sums(NamedTuple):
    """Sums over positions; divided by global counts only at the end, so that no mean of means appears."""

    loss: Float32[Array, ""]  # what is minimized: cross-entropy and z-loss
    cross_entropy: Float32[Array, ""]  # nats
    correct: Float32[Array, ""]  # positions whose most likely token is the target
    count: Float32[Array, ""]


class RouterLoss(NamedTuple):
    """Sums over sequences from the routers of experts."""

    loss: Float32[Array, ""]  # balance and z losses, weighted, mean over layers
    count: Float32[Array, ""]  # sequences
    load: Float32[Array, "L E"]  # tokens that chose each expert
    dropped: Float32[Array, ""]  # choices that found their expert full


class Head(NamedTuple):
    """Static facts of the output head."""

    vocab_size: int  # without padding
    logit_soft_cap: float | None = None
    z_loss: float = 0.0
    chunk: int | None = None  # positions per chunk, at most; None: by `jaxlm.models.sizes.loss_chunk`
    logits_memory: float = 0.0  # bytes of each device that it may fill with float32 logits


Gradients = tuple[Float[Array, "B T D"], Float[Array, "V D"], Float32[Array, " V"]]  # of x, table, bias
OwnGradients = tuple[Float[Array, "B T_own D"], Float[Array, "V_own D_own"], Float32[Array, " V_own"]]  # of them, a device's part


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def cross_entropy(x: Float[Array, "B T D"], table: Float[Array, "V D"], bias: Float32[Array, " V"],
                  targets: Int32[Array, "B T"], mask: Bool[Array, "B T"], head: Head) -> Sums:
    """Loss sums of predicting `targets` from hidden states x.

    Args:
      table: float32 or x's type; axes ("vocab", "embed").
      mask: positions that count.
    """
    return _sharded(x, table, bias, targets, mask, head, with_gradients=False)[0]


def _backward(head: Head, gradients: Gradients, cotangents: Sums) -> tuple[Any, ...]:
    scale = cotangents.loss  # the other sums are metrics: nothing flows through them
    return (*(gradient * scale.astype(gradient.dtype) for gradient in gradients), None, None)





class LossCuts(NamedTuple):
    """Mesh axes that cut what the loss works on."""

    vocab: MeshAxes
    embed: MeshAxes
    tokens: MeshAxes
    scattered: bool  # whether the gradient of the states is cut over `vocab` along the sequence, too


@jax.named_scope("head")
def _sharded(x: Float[Array, "B T D"], table: Float[Array, "V D"], bias: Float32[Array, " V"], targets: Int32[Array, "B T"],
             mask: Bool[Array, "B T"], head: Head, with_gradients: bool) -> tuple[Sums, Gradients | None]:
    """Runs `_local` on each device's tokens and its part of the vocabulary."""
    states, weights, biases, grad_states = (*TOKENS, None), ("vocab", "embed"), ("vocab",), residual_axes(x.shape[1])
    cuts = LossCuts(mesh_axes("vocab"), mesh_axes("embed"), mesh_axes("batch") + mesh_axes("sequence"),
                    scattered=grad_states[1] == "residual_sequence")
    results = (Sums((), (), (), ()), (grad_states, weights, biases) if with_gradients else None)
    run = functools.partial(_local, head=head, with_gradients=with_gradients, cuts=cuts)
    return per_device(run, (states, weights, biases, TOKENS, TOKENS), results)(x, table, bias, targets, mask)


cross_entropy.defvjp(functools.partial(_sharded, with_gradients=True), _backward)


# Softmax over a vocabulary of which each device has a part needs two numbers of the others: the largest logit and
# the sum of exponentials, [B, T] each, never the logits (Shoeybi et al. 2019, section 3). `ids` are the words that
# this device's rows are of; the target is one of them on just one device, and the others add 0 to its logit.
#
#     V = 6 on 2 devices, target 4      largest   pmax    sum of exp(logit - 5)    psum    target's logit   psum
#     ids 0 1 2    logits 1 5 2            5        5            1.07             1.58           0           3
#     ids 3 4 5    logits 0 3 4            4        5            0.51             1.58           3           3
#
# The gradient does not wait for the backward pass, because there the logits would be computed again (V D products)
# or would have been kept (4 B T V bytes). The loss is a scalar sum, so its gradient for a chunk is known, up to a
# factor, as soon as the chunk's logits are: grad = p - onehot, then grad . table for x, grad^T x for the table.
# `_backward` only multiplies by that factor, the one number that comes down; so of the sums only `loss` may be
# differentiated. with_gradients=False, for evaluation, forms none of this.
#
# What is summed where: x's gradient is partial over `vocab` (each device's words), the table's over `tokens` (each
# device's positions), the three sums of the result over `tokens` alone, for they are the same along `vocab`. z-loss
# adds z (log Z)^2, so 2 z log Z p to the gradient (Chowdhery et al. 2022, section 5): `factor` holds p's
# coefficient, divided by the total, since exponentials / total = p. Rows beyond the vocabulary (padding) have
# logits of -inf: no probability, and no gradient.
def _local(x: Float[Array, "B T D"], table: Float[Array, "V_own D_own"], bias: Float32[Array, " V_own"],
           targets: Int32[Array, "B T"], mask: Bool[Array, "B T"], *, head: Head, with_gradients: bool, cuts: LossCuts
           ) -> tuple[Sums, OwnGradients | None]:
    vocab, embed = cuts.vocab, cuts.embed
    sent_type = table.dtype
    table = gather(table.astype(x.dtype), embed, axis=1)
    ids = (jax.lax.axis_index(vocab) * table.shape[0] if vocab else 0) + jnp.arange(table.shape[0])

    def one_chunk(carry: tuple[Any, ...], chunk: Any) -> tuple[tuple[Any, ...], Float32[Array, "B t D"] | None]:
        sums, grad_table, grad_bias = carry
        x, targets, mask = chunk
        logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32) + bias
        slope = 1.0
        if head.logit_soft_cap:
            tanh = jnp.tanh(logits / head.logit_soft_cap)
            logits, slope = head.logit_soft_cap * tanh, 1 - tanh**2
        logits = jnp.where(ids < head.vocab_size, logits, -jnp.inf)
        largest = jax.lax.pmax(logits.max(-1), vocab) if vocab else logits.max(-1)
        exponentials = jnp.exp(logits - largest[..., None])
        total = sum_over(exponentials.sum(-1), vocab)
        log_partition = largest + jnp.log(total)
        is_target = ids == targets[..., None]
        target_logit = sum_over(jnp.where(is_target, logits, 0).sum(-1), vocab)
        cross_entropy = log_partition - target_logit
        sums = Sums(*(total + jnp.where(mask, term, 0).sum() for total, term in zip(sums, (
            cross_entropy + head.z_loss * log_partition**2, cross_entropy, target_logit >= largest, mask), strict=True)))
        if not with_gradients:
            return (sums, None, None), None
        # d loss / d logits = p (1 + 2 z log Z) - onehot
        factor = jnp.where(mask, (1 + 2 * head.z_loss * log_partition) / total, 0)
        grad = (exponentials * factor[..., None] - (is_target & mask[..., None])) * slope
        if head.logit_soft_cap:
            grad = jnp.where(ids < head.vocab_size, grad, 0)
        grad_bias = grad_bias + grad.sum((0, 1))
        grad = grad.astype(x.dtype)
        grad_table = grad_table + jnp.einsum("btv,btd->vd", grad, x, preferred_element_type=jnp.float32)
        return (sums, grad_table, grad_bias), jnp.einsum("btv,vd->btd", grad, table, preferred_element_type=jnp.float32)

    size = loss_chunk(x.shape[1], x.shape[0], *table.shape, most=head.chunk, memory=head.logits_memory)
    chunks = [_chunks(array, size) for array in (x, targets, mask)]
    zeros = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
    empty = (jnp.zeros(table.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32)) if with_gradients else (None, None)
    carry = (zeros, *empty)
    if len(chunks[0]) == 1:
        carry, grad_x = one_chunk(carry, [array[0] for array in chunks])
        grad_x = grad_x[None] if with_gradients else None
    else:
        carry, grad_x = jax.lax.scan(one_chunk, carry, chunks)
    sums, grad_table, grad_bias = carry
    sums = Sums(*(sum_over(total, cuts.tokens) for total in sums))
    if not with_gradients:
        return sums, None
    grad_x = jnp.moveaxis(grad_x, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]  # without the chunks' padding
    grad_x = (scatter_sum(grad_x, vocab, axis=1) if cuts.scattered else sum_over(grad_x, vocab)).astype(x.dtype)
    # Tokens are cut over `embed`'s axes too, so their sum comes back already cut; the remaining token axes are summed
    # whole.
    rest = tuple(axis for axis in cuts.tokens if axis not in embed)
    grad_table = sum_over(scatter_sum(grad_table.astype(sent_type), embed, axis=1), rest)
    if platform() == "tpu":  # libtpu puts this sum off to the end, and the whole table's gradient stays through the backward pass
        grad_x, grad_table = jax.lax.optimization_barrier((grad_x, grad_table))
    return sums, (grad_x, grad_table, sum_over(grad_bias, cuts.tokens))


def _chunks(array: Shaped[Array, "B T ..."], size: int) -> Shaped[Array, "chunks B {size} ..."]:
    """So many tokens at a time; zeros fill up the last."""
    rows, length, *rest = array.shape
    padding = -length % size
    padded = jnp.pad(array, [(0, 0), (0, padding), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(padded.reshape(rows, -1, size, *rest), 1, 0)
