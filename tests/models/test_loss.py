"""The chunked, sharded loss with hand-written gradients against full float32 logits and jax.grad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxlm.models.loss import Head, cross_entropy
from jaxlm.parallel.sharding import spec

ROWS, LENGTH, WIDTH, VOCAB, PADDED = 8, 12, 16, 100, 128
PLAIN = Head(VOCAB)
EVERYTHING = Head(VOCAB, logit_soft_cap=3.0, z_loss=0.05, chunk=4)


def arguments(seed=0):
    random = np.random.default_rng(seed)
    normal = [random.normal(size=shape).astype(np.float32) for shape in ((ROWS, LENGTH, WIDTH), (PADDED, WIDTH), (PADDED,))]
    normal[1][VOCAB:] = normal[2][VOCAB:] = 50.0  # padding that would win every contest, were it let in
    return *normal, random.integers(0, VOCAB, (ROWS, LENGTH)), random.random((ROWS, LENGTH)) < 0.7


def reference(x, table, bias, targets, mask, head):
    """Everything at once; z-loss as in Chowdhery et al. 2022 (PaLM), the cap as in Bello et al. 2016."""
    logits = (x @ table.T + bias)[..., :VOCAB]
    if head.logit_soft_cap:
        logits = head.logit_soft_cap * jnp.tanh(logits / head.logit_soft_cap)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    entropy = log_partition - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.where(mask, entropy + head.z_loss * log_partition**2, 0).sum()
    correct = (mask & (logits.argmax(-1) == targets)).sum()
    return loss, (jnp.where(mask, entropy, 0).sum(), correct, mask.sum())


def ours(x, table, bias, targets, mask, head):
    sums = cross_entropy(x, table, bias, targets, mask, head)
    return sums.loss, (sums.cross_entropy, sums.correct, sums.count)


@functools.cache
def compiled(function, head):
    """arrays -> the sums, and the gradients of 2.5 times the loss."""
    def scaled(*arrays):
        loss, rest = function(*arrays, head)
        return 2.5 * loss, (loss, *rest)

    gradients = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1, 2), has_aux=True))

    def run(*arrays):
        (_, sums), grads = gradients(*arrays)
        return sums, grads

    return run


def assert_same(got, want, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("head", [
    PLAIN, Head(VOCAB, z_loss=0.1, chunk=1), Head(VOCAB, logit_soft_cap=3.0, chunk=6), EVERYTHING], ids=str)
def test_sums_and_gradients(head):
    assert_same(compiled(ours, head)(*arguments()), compiled(reference, head)(*arguments()))


@pytest.mark.parametrize(("mesh", "head"), [("data8", EVERYTHING), ("fsdp8", EVERYTHING), ("tensor8", EVERYTHING),
                                            ("2x2x2", EVERYTHING), ("2x2x2", PLAIN)])
def test_on_a_mesh(mesh, head, meshes):
    arrays = arguments()
    with jax.set_mesh(meshes[mesh]):
        placed = [jax.device_put(array, NamedSharding(meshes[mesh], spec(*axes))) for array, axes in zip(
            arrays, (("batch",), ("vocab", "embed"), ("vocab",), ("batch",), ("batch",)), strict=True)]
        sums, gradients = compiled(ours, head)(*placed)
        without = jax.jit(ours, static_argnums=5)(*placed, head)
    assert_same((sums, gradients), compiled(reference, head)(*arrays))
    assert_same(without, (sums[0], sums[1:]))  # evaluation takes the same path without gradients
    assert gradients[1].sharding.is_equivalent_to(placed[1].sharding, 2)


@pytest.mark.parametrize("head", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_padding_has_no_gradient_and_is_never_predicted(head):
    x, table, bias, targets, mask = arguments()
    (*_, correct, _), (_, grad_table, grad_bias) = compiled(ours, head)(x, table, bias, targets, mask)
    assert not np.any(grad_table[VOCAB:]) and not np.any(grad_bias[VOCAB:])
    best = (x @ table[:VOCAB].T + bias[:VOCAB]).argmax(-1)
    (_, _, right, count), _ = compiled(ours, head)(x, table, bias, best, mask)
    assert right == count == mask.sum()
    assert correct == (mask & (best == targets)).sum()


def test_positions_that_do_not_count():
    x, table, bias, targets, mask = arguments()
    sums, (grad_x, *_) = compiled(ours, EVERYTHING)(x, table, bias, targets, mask)
    assert not np.any(np.asarray(grad_x)[~mask])
    wrong_targets = np.where(mask, targets, VOCAB + 7)  # out of the vocabulary, as padding may be
    assert_same(compiled(ours, EVERYTHING)(x, table, bias, wrong_targets, mask)[0], sums, tolerance=0)
    nothing = compiled(ours, EVERYTHING)(x, table, bias, targets, np.zeros_like(mask))
    assert all(not np.any(array) for array in jax.tree.leaves(nothing))


def test_bfloat16_states():
    x, *rest = arguments()
    x = jnp.asarray(x, jnp.bfloat16)
    sums, gradients = compiled(ours, EVERYTHING)(x, *rest)
    want_sums, want = compiled(reference, EVERYTHING)(x.astype(jnp.float32), *rest)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == gradients[2].dtype == jnp.float32
    assert_same((sums[:2], sums[3:]), (want_sums[:2], want_sums[3:]), tolerance=2**-8)
    assert_same(gradients, want, tolerance=2**-6)


@pytest.mark.parametrize(("chunk", "positions"), [(12, 12), (5, 4), (7, 6), (100, 12), (None, 12)])
def test_a_chunk_is_the_largest_that_divides_the_sequence(chunk, positions, array_shapes):
    arrays = arguments()
    shapes = array_shapes(jax.grad(lambda *arrays: ours(*arrays, Head(VOCAB, chunk=chunk))[0]), *arrays)
    assert {shape for shape in shapes if shape[0:1] == (ROWS,) and shape[2:] == (PADDED,)} == {(ROWS, positions, PADDED)}


def test_a_length_that_is_prime_is_padded(array_shapes):
    x, table, bias, targets, mask = arguments()
    arrays = x[:, :11], table, bias, targets[:, :11], mask[:, :11]
    assert_same(compiled(ours, EVERYTHING)(*arrays), compiled(reference, EVERYTHING)(*arrays))
    shapes = array_shapes(jax.grad(lambda *arrays: ours(*arrays, EVERYTHING)[0]), *arrays)
    assert (ROWS, 4, PADDED) in shapes and (ROWS, 1, PADDED) not in shapes


def test_chunks_are_near_64_MiB_unless_set(array_shapes):
    rows, length, vocabulary = 8, 1024, 50304
    shapes = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in (
        ((rows, length, 64), jnp.bfloat16), ((vocabulary, 64), jnp.float32), ((vocabulary,), jnp.float32),
        ((rows, length), jnp.int32), ((rows, length), jnp.bool))]
    logits = {shape for shape in array_shapes(lambda *arrays: ours(*arrays, Head(50257)), *shapes)
              if shape[:1] == (rows,) and shape[2:] == (vocabulary,)}
    assert logits == {(rows, 32, vocabulary)}  # 49 MiB; 64 positions would take 98
