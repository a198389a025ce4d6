"""Products over the mesh against einsum, forward and backward, and the sums' types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.parallel.products import TOKENS, column_parallel, look_up, residual_axes, row_parallel

ROWS, LENGTH, WIDTH, HEADS, HEAD_DIM = 8, 16, 32, 8, 4
COLUMNS = (("embed", "heads", None), ("embed", "kv_heads", None))
MLP = (("embed", "mlp"),)
MESHES = ["one", "data8", "fsdp8", "tensor8", "2x2x2", "context8", "fsdp2context2tensor2"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def with_gradients(function, grads):
    return jax.jit(lambda *arrays: (lambda out, pull: (out, pull(grads)))(*jax.vjp(function, *arrays)))


@pytest.mark.parametrize("mesh", MESHES)
def test_column_parallel_and_its_gradients(mesh, meshes):
    x, kernels = normal(ROWS, LENGTH, WIDTH), (normal(WIDTH, HEADS, HEAD_DIM, seed=1), normal(WIDTH, HEADS, 2, seed=2))
    grads = (normal(ROWS, LENGTH, HEADS, HEAD_DIM, seed=3), normal(ROWS, LENGTH, HEADS, 2, seed=4))
    plain = with_gradients(lambda x, kernels: tuple(jnp.einsum("btd,dnh->btnh", x, kernel) for kernel in kernels), grads)
    with jax.set_mesh(meshes[mesh]):
        for states in {residual_axes(LENGTH), (*TOKENS, None)}:
            ours = with_gradients(lambda x, kernels, states=states: column_parallel(x, kernels, COLUMNS, states), grads)
            assert_close(ours(x, kernels), plain(x, kernels))


@pytest.mark.parametrize(("mesh", "length"), [  # one decoded token: on meshes that do not cut sequences
    *((mesh, LENGTH) for mesh in MESHES), *((mesh, 1) for mesh in MESHES if "context" not in mesh)])
def test_row_parallel_and_its_gradients(mesh, length, meshes):
    y, kernel, grad = (normal(*shape, seed=seed) for seed, shape in enumerate(
        ((ROWS, length, HEADS, HEAD_DIM), (HEADS, HEAD_DIM, WIDTH), (ROWS, length, WIDTH))))
    plain = with_gradients(functools.partial(jnp.einsum, "btnh,nhd->btd"), grad)
    with jax.set_mesh(meshes[mesh]):
        ours = with_gradients(lambda y, kernel: row_parallel(y, kernel, ("heads", None, "embed"), residual_axes(length)), grad)
        assert_close(ours(y, kernel), plain(y, kernel))


@pytest.mark.parametrize("axis", ["vocab", "positions"])  # rows that tensor cuts, and rows that nothing does
@pytest.mark.parametrize("mesh", MESHES)
def test_look_up_and_its_gradient(mesh, axis, meshes):
    table, grad = normal(256, WIDTH), normal(ROWS, LENGTH, WIDTH, seed=1)
    indices = np.random.default_rng(2).integers(0, 256, (ROWS, LENGTH)).astype(np.int32)
    plain = with_gradients(lambda table: table[indices], grad)
    with jax.set_mesh(meshes[mesh]):
        ours = with_gradients(lambda table: look_up(table, indices, axis, jnp.float32), grad)
        assert_close(ours(table), plain(table))


def test_bfloat16_rounds_only_operands_and_results(meshes):
    """On a mesh too a kernel's gradient is summed in float32, though kernels travel in bfloat16."""
    x, grad = (jnp.asarray(normal(ROWS, LENGTH, width, seed=width), jnp.bfloat16) for width in (WIDTH, HEADS))
    kernel = normal(WIDTH, HEADS, seed=1)
    wide_x, wide_grad, rounded = (np.asarray(array, np.float64) for array in (x, grad, jnp.asarray(kernel, jnp.bfloat16)))
    for mesh in ("one", "fsdp8"):
        with jax.set_mesh(meshes[mesh]):
            run = with_gradients(lambda x, kernel: column_parallel(x, (kernel,), MLP, residual_axes(LENGTH)), (grad,))
            [y], (grad_x, grad_kernel) = run(x, kernel)
            text = run.lower(x, kernel).as_text()
        assert (y.dtype, grad_x.dtype, grad_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
        np.testing.assert_allclose(np.asarray(y, np.float64), wide_x @ rounded, rtol=2**-8, atol=1e-4)
        np.testing.assert_allclose(np.asarray(grad_x, np.float64), wide_grad @ rounded.T, rtol=2**-8, atol=1e-4)
        np.testing.assert_allclose(grad_kernel, np.einsum("btd,btf->df", wide_x, wide_grad), rtol=1e-4, atol=1e-4)
    gathers = [line for line in text.splitlines() if "all_gather" in line]
    assert gathers and all("bf16" in line for line in gathers)


@pytest.mark.parametrize("mesh", ["one", "2x2x2"])
def test_as_libtpu_gets_it_the_gradient_is_the_same(mesh, meshes, monkeypatch):
    """There the gradients of several kernels' input are one product."""
    test_column_parallel_and_its_gradients(mesh, meshes)
    monkeypatch.setattr("jaxlm.parallel.products.platform", lambda: "tpu")
    jax.clear_caches()
    test_column_parallel_and_its_gradients(mesh, meshes)
    jax.clear_caches()


def test_gradients_travel_in_the_type_of_their_kernels(meshes):
    x, kernel = normal(ROWS, LENGTH, WIDTH).astype(jnp.bfloat16), normal(WIDTH, HEADS, HEAD_DIM, seed=1)
    grad = (normal(ROWS, LENGTH, HEADS, HEAD_DIM, seed=2).astype(jnp.bfloat16),)
    with jax.set_mesh(meshes["fsdp8"]):
        ours = with_gradients(lambda x, kernel: column_parallel(x, (kernel,), COLUMNS[:1], residual_axes(LENGTH)), grad)
        for kind in (jnp.float32, jnp.bfloat16):
            text = ours.lower(x, kernel.astype(kind)).as_text()
            sent = next(line for line in text[text.index("reduce_scatter") :].splitlines() if "->" in line)
            assert ("bf16" in sent) == (kind == jnp.bfloat16)
        assert ours(x, kernel.astype(jnp.bfloat16))[1][1].dtype == jnp.bfloat16
