"""Matrix products of activations and kernels that are both cut over the mesh, with every collective written out.

A block's part (attention, MLP) is a column-parallel product, work that each device does on its own heads or columns,
and a row-parallel product (Megatron-LM's words). With `t` devices on the tensor axis:

    x [B, T/t, D] -> all-gather -> [B, T, D] -> kernels [D, F/t] -> [B, T, F/t] ...
    ... [B, T, F/t] -> kernel [F/t, D] -> partial sums [B, T, D] -> reduce-scatter -> [B, T/t, D]

The devices of the tensor axis share the kernels' columns and, between the parts, the tokens (Megatron-LM, Shoeybi et
al. 2019; the tokens: Korthikanti et al. 2022). Devices of the fsdp axis share the kernels' other side: a kernel is
fetched for its product, forward and again backward, and its gradient goes straight to its owners (ZeRO-3,
Rajbhandari et al. 2020). Kernels are fetched in the compute type; each device sums their gradients in float32 and
sends them in the type of the kernels it was given.

Written out, because the partitioner sums the gradients that meet in a column-parallel product over devices one by one,
and on backends without that optimization turns a sum of which each device keeps a part (reduce-scatter) into a sum of
which everybody gets all (all-reduce).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.parallel.shapes import Array, Bool, Float, Float32, Int32, Shaped
from jaxlm.parallel.sharding import divides, mesh_axes, per_device, platform

TOKENS = ("batch", "sequence")
RESIDUAL = ("batch", "residual_sequence", "residual")  # the stream between the parts of the blocks
Names = tuple[str | None, ...]  # of the dimensions of an array (`jaxlm.parallel.rules.RULES`)
MeshAxes = tuple[str, ...]


def residual_axes(length: int) -> Names:
    """RESIDUAL, or with whole sequences where `length` (one decoded token, say) cannot be cut."""
    return RESIDUAL if divides(length, "residual_sequence") else (*TOKENS, "residual")


class ProductCuts(NamedTuple):
    """Mesh axes that cut what a product works on."""

    columns: MeshAxes  # the kernel's side away from the states, or the table's rows
    embed: MeshAxes  # its other side
    tokens: MeshAxes  # rows and sequence of the activations inside a part
    scattered: MeshAxes  # what cuts the sequence of the states beyond that (sequence parallelism)


class Product(NamedTuple):
    """How arrays are multiplied on the mesh: what each device does with its parts, forth and back, and their axes."""

    forward: Callable[..., Any]  # (*arrays) -> out
    backward: Callable[..., Any]  # (*arrays, gradient of out) -> their gradients
    cuts: ProductCuts
    inputs: tuple[Any, ...]
    output: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: Product, *arrays: Any) -> Any:
    return per_device(functools.partial(product.forward, cuts=product.cuts), product.inputs, product.output)(*arrays)


def _multiply_forward(product: Product, *arrays: Any) -> tuple[Any, tuple[Any, ...]]:
    return _multiply(product, *arrays), arrays


def _multiply_backward(product: Product, arrays: tuple[Any, ...], grad: Any) -> tuple[Any, ...]:
    run = functools.partial(product.backward, cuts=product.cuts)
    return per_device(run, (*product.inputs, product.output), product.inputs)(*arrays, grad)


_multiply.defvjp(_multiply_forward, _multiply_backward)


def column_parallel(x: Float[Array, "B T D"], kernels: tuple[Float[Array, "D ..."], ...], axes: tuple[Names, ...], states: Names
                    ) -> tuple[Float[Array, "B T ..."], ...]:
    """x times each of several kernels, in x's type.

    Args:
      x: its axes are `states`: those of the residual stream, or others whose tokens are not cut further than inside
        a part.
      kernels: float32 or x's type; their axes are `axes`, the first of all of them the same.
    """
    outputs = tuple((*_inside(states), *names[1:]) for names in axes)
    cuts = _cuts(axes[0][1:], axes[0][0], states)
    return _multiply(Product(_column_parallel, _column_parallel_gradients, cuts, (states, axes), outputs), x, kernels)


def row_parallel(y: Float[Array, "B T *inner"], kernel: Float[Array, "*inner D"], axes: Names, states: Names
                 ) -> Float[Array, "B T D"]:
    """y times a kernel, in y's type; the axes of what comes out are `states`.

    Args:
      y: axes TOKENS, then the kernel's but for the last.
      kernel: float32 or y's type; its axes are `axes`.
    """
    inputs = ((*_inside(states), *axes[:-1]), axes)
    cuts = _cuts(axes[:-1], axes[-1], states)
    return _multiply(Product(_row_parallel, _row_parallel_gradients, cuts, inputs, states), y, kernel)


def look_up(table: Float[Array, "V D"], indices: Int32[Array, "B T"], axis: str, dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """Rows of a table, whose axes are (`axis`, "embed"), in the residual stream and in `dtype`.

    Where the rows are cut each device fetches those that it has, and the others add zeros (Megatron-LM's vocabulary-
    parallel embedding); where they are not, each looks up what it keeps and no more. The table travels in `dtype`, too.
    """
    states = residual_axes(indices.shape[1])
    inputs = ((axis, "embed"), _inside(states) if mesh_axes(axis) else states[:2])
    cuts = _cuts((axis,), "embed", states)
    return _multiply(Product(functools.partial(_look_up, dtype=dtype), _look_up_gradient, cuts, inputs, states), table, indices)


def _cuts(columns: Names, embed: str | None, states: Names) -> ProductCuts:
    columns, embed, tokens, sequence = (
        tuple(axis for name in names if name for axis in mesh_axes(name))
        for names in (columns, (embed,), _inside(states), states[1:2]))
    return ProductCuts(columns, embed, tokens, tuple(axis for axis in sequence if axis not in tokens))


def _inside(states: Names) -> Names:
    """Axes of rows and tokens inside a part, from those of the states that it reads or writes."""
    return TOKENS if states[1] == RESIDUAL[1] else states[:2]


# ---- one device ------------------------------------------------------------------------------------------------------

def _column_parallel(x: Float[Array, "B T_own D"], kernels: tuple[Float[Array, "D_own ..."], ...], *, cuts: ProductCuts
                     ) -> tuple[Float[Array, "B T ..."], ...]:
    x = gather(x, cuts.scattered, axis=1)
    return tuple(_product(x, gather(kernel.astype(x.dtype), cuts.embed, axis=0), 1).astype(x.dtype) for kernel in kernels)


# For y_i = x W_i:  dx = sum_i dy_i W_i^T,  dW_i = x^T dy_i. What is summed over which devices follows from what
# each of them holds. Of W_i's columns a device of the tensor axis has its own, so its dx is a partial sum: summed
# over `columns`, but only after the sum over i has been formed here (q, k and v in one exchange, not three; this is
# what the partitioner does not see). Where the residual stream is cut along the tensor axis, too, every device
# needs only its tokens of that sum: a reduce-scatter, half an all-reduce's traffic (Korthikanti et al. 2022,
# section 4.2). dW_i sums over the tokens of this device; other devices have other tokens, so it is still a partial
# sum over `tokens` (`_sum_kernel`). x and W_i are gathered a second time rather than kept: kept, each layer's whole
# kernels would stay in memory from the forward to the backward pass, which is all that ZeRO-3 saves.
#
#     example: fsdp 2, tensor 2, q k v      x [B, T/2, D] -> gather(tensor) -> [B, T, D]
#     dx    partial over tensor     reduce-scatter(tensor) along T       -> [B, T/2, D]
#     dW_i  partial over fsdp       reduce-scatter(fsdp) along D         -> [D/2, N/2, H]
#
# If dx is rounded before the sum over i, or summed over `tokens`, it is wrong by little or by a factor: compared in
# tests/parallel/test_products.py with plain products.
def _column_parallel_gradients(x: Float[Array, "B T_own D"], kernels: tuple[Float[Array, "D_own ..."], ...],
                               grads: tuple[Float[Array, "B T ..."], ...], *, cuts: ProductCuts
                               ) -> tuple[Float[Array, "B T_own D"], tuple[Float[Array, "D_own ..."], ...]]:
    x = gather(x, cuts.scattered, axis=1)
    fetched = [gather(kernel.astype(x.dtype), cuts.embed, axis=0) for kernel in kernels]
    if platform() == "tpu":  # as one product: libtpu keeps each float32 term of a sum (XLA's GPU backend adds them up in place)
        grads_as_one = jnp.concatenate([grad.reshape(*grad.shape[:2], -1) for grad in grads], axis=-1)
        kernels_as_one = jnp.concatenate([kernel.reshape(len(kernel), -1) for kernel in fetched], axis=-1)
        grad_x = _product_transposed(grads_as_one, kernels_as_one, 1)
    else:
        grad_x = sum(_product_transposed(grad, kernel, grad.ndim - 2) for kernel, grad in zip(fetched, grads, strict=True))
    if cuts.scattered:
        grad_x = scatter_sum(grad_x.astype(x.dtype), cuts.scattered, axis=1)
    else:
        grad_x = sum_over(grad_x.astype(x.dtype), cuts.columns)
    return grad_x, tuple(_sum_kernel(_kernel_gradient(x, grad).astype(kernel.dtype), cuts, axis=0)
                         for kernel, grad in zip(kernels, grads, strict=True))


def _row_parallel(y: Float[Array, "B T *inner"], kernel: Float[Array, "*inner D_own"], *, cuts: ProductCuts
                  ) -> Float[Array, "B T_own D"]:
    out = _product(y, gather(kernel.astype(y.dtype), cuts.embed, axis=-1), kernel.ndim - 1).astype(y.dtype)
    return scatter_sum(out, cuts.scattered, axis=1) if cuts.scattered else sum_over(out, cuts.columns)


def _row_parallel_gradients(y: Float[Array, "B T *inner"], kernel: Float[Array, "*inner D_own"],
                            grad: Float[Array, "B T_own D"], *, cuts: ProductCuts
                            ) -> tuple[Float[Array, "B T *inner"], Float[Array, "*inner D_own"]]:
    # The mirror image: forward's reduce-scatter over the tensor axis becomes the gather of `grad`, after which nothing
    # is partial over that axis, and dW is summed over tokens as above.
    grad = gather(grad, cuts.scattered, axis=1)
    grad_y = _product_transposed(grad, gather(kernel.astype(y.dtype), cuts.embed, axis=-1), 1)
    return grad_y.astype(y.dtype), _sum_kernel(_kernel_gradient(y, grad).astype(kernel.dtype), cuts, axis=-1)


def _look_up(table: Float[Array, "V_own D_own"], indices: Int32[Array, "B T"], *, cuts: ProductCuts, dtype: jnp.dtype
             ) -> Float[Array, "B T_own D"]:
    table = gather(table.astype(dtype), cuts.embed, axis=1)
    if not cuts.columns:
        return table[indices]
    indices, here = _own(indices, table, cuts)
    found = jnp.where(here[..., None], table[indices], 0)
    return scatter_sum(found, cuts.scattered, axis=1) if cuts.scattered else sum_over(found, cuts.columns)


def _look_up_gradient(table: Float[Array, "V_own D_own"], indices: Int32[Array, "B T"], grad: Float[Array, "B T_own D"], *,
                      cuts: ProductCuts) -> tuple[Float[Array, "V_own D_own"], None]:
    if cuts.columns:
        grad = gather(grad, cuts.scattered, axis=1)
        indices, here = _own(indices, table, cuts)
        grad = jnp.where(here[..., None], grad, 0)
        tokens = cuts.tokens
    else:
        tokens = cuts.tokens + cuts.scattered
    grad_table = jnp.zeros((table.shape[0], grad.shape[2]), jnp.float32).at[indices].add(grad.astype(jnp.float32))
    return _sum_kernel(grad_table.astype(table.dtype), cuts._replace(tokens=tokens), axis=1), None


def _own(indices: Int32[Array, "B T"], table: Float[Array, "V_own ..."], cuts: ProductCuts
         ) -> tuple[Int32[Array, "B T"], Bool[Array, "B T"]]:
    """Indices into this device's rows, and which of them it has; the others point at row 0."""
    indices = indices - jax.lax.axis_index(cuts.columns) * table.shape[0]
    here = (indices >= 0) & (indices < table.shape[0])
    return jnp.where(here, indices, 0), here


def _sum_kernel(grad: Float[Array, "..."], cuts: ProductCuts, axis: int) -> Float[Array, "..."]:
    """Tokens are cut over `embed`'s axes too: that sum comes back already cut. The other axes of the tokens are
    summed whole."""
    grad = scatter_sum(grad, cuts.embed, axis=axis % grad.ndim)
    return sum_over(grad, tuple(name for name in cuts.tokens if name not in cuts.embed))


def _product(x: Float[Array, "B T ..."], kernel: Float[Array, "..."], num_axes: int) -> Float32[Array, "B T ..."]:
    """The last `num_axes` dimensions of x with the first of `kernel`, summed in float32."""
    dimensions = (tuple(range(x.ndim - num_axes, x.ndim)), tuple(range(num_axes)))
    return jax.lax.dot_general(x, kernel, (dimensions, ((), ())), preferred_element_type=jnp.float32)


def _product_transposed(grad: Float[Array, "B T ..."], kernel: Float[Array, "..."], num_axes: int) -> Float32[Array, "B T ..."]:
    """The last `num_axes` dimensions of grad with the last of `kernel`, summed in float32."""
    dimensions = (tuple(range(grad.ndim - num_axes, grad.ndim)), tuple(range(kernel.ndim - num_axes, kernel.ndim)))
    return jax.lax.dot_general(grad, kernel, (dimensions, ((), ())), preferred_element_type=jnp.float32)


def _kernel_gradient(x: Float[Array, "B T *inputs"], grad: Float[Array, "B T *outputs"]) -> Float32[Array, "..."]:
    """x and grad multiplied and summed over their tokens, in float32."""
    tokens = (((0, 1), (0, 1)), ((), ()))
    if platform() == "cpu" and math.prod(x.shape[2:]) > math.prod(grad.shape[2:]):
        # XLA's CPU backend first transposes the left operand in memory: let it be the narrow one
        transposed = jax.lax.optimization_barrier(jax.lax.dot_general(grad, x, tokens, preferred_element_type=jnp.float32))
        return jnp.moveaxis(transposed, tuple(range(grad.ndim - 2)), tuple(range(2 - grad.ndim, 0)))
    return jax.lax.dot_general(x, grad, tokens, preferred_element_type=jnp.float32)


def gather(array: Shaped[Array, "..."], axes: MeshAxes, axis: int) -> Shaped[Array, "..."]:
    """The pieces of all devices along `axes`, put together along the dimension `axis` (all-gather)."""
    return jax.lax.all_gather(array, axes, axis=axis % array.ndim, tiled=True) if axes else array


def sum_over(array: Shaped[Array, "*shape"], axes: MeshAxes) -> Shaped[Array, "*shape"]:
    """The sum over the devices along `axes`, for all of them (all-reduce)."""
    return jax.lax.psum(array, axes) if axes else array


def scatter_sum(array: Shaped[Array, "..."], axes: MeshAxes, axis: int) -> Shaped[Array, "..."]:
    """That sum, of which each device gets its piece along the dimension `axis` (reduce-scatter)."""
    return jax.lax.psum_scatter(array, axes, scatter_dimension=axis, tiled=True) if axes else array
