"""What models are made of: matrix products, norms, embeddings, dropout, attention, MLP, the stack of blocks.

Shapes: `jaxlm.parallel.shapes`.
Parameters are float32; the compute type is the type of the activations, and every product casts its weights to it.
Each parameter names its axes (`axes=`; `jaxlm.parallel.sharding` says what that means on a mesh) and its role
(`role=`): kernel, table, bias, scale or router, by which optimizers, gradients and plans treat it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models.attention import attention
from jaxlm.models.sizes import (
    GATED,
    attention_dropout_rate,
    head_dim,
    intermediate_size,
    kv_heads,
    local_rope_theta,
    query_key_value_bias,
)
from jaxlm.parallel import products
from jaxlm.parallel.dropout import fold_in
from jaxlm.parallel.experts import MixtureOfExperts, RouterSums, mixture
from jaxlm.parallel.pipeline import num_stages, run_pipeline
from jaxlm.parallel.products import TOKENS, Names, residual_axes
from jaxlm.parallel.shapes import Array, Bool, Cache, Float, Float32, Int32, TokenKeys
from jaxlm.parallel.sharding import constrain, mesh_axes, per_device, platform
from jaxlm.parallel.visible import Visible
from jaxlm.settings import ModelSettings


class Context(NamedTuple):
    """What every block of a stack needs to know beside its input."""

    positions: Int32[Array, "B T"]  # what position embeddings take; may start anew with each document
    token_indices: Int32[Array, "1 T"] | None = None  # which token of the sequence stands in each slot
    segment_ids: Int32[Array, "B T"] | None = None  # tokens see only their own segment; 0 is padding
    dropout_keys: TokenKeys | None = None  # None: no dropout
    cache_index: Int32[Array, ""] | None = None  # slot of the KV cache that the first token goes to
    layer: Int32[Array, ""] | None = None  # number of the layer that reads this


# ---- matrix products -------------------------------------------------------------------------------------------------

class Linear(nnx.Module):
    """y = x W + b over one or more trailing dimensions; applied by `column_parallel` and `row_parallel`."""

    def __init__(self, inputs: Mapping[str, int], outputs: Mapping[str | None, int], *, bias: bool, stddev: float,
                 rngs: nnx.Rngs, role: str = "kernel"):
        """`inputs` and `outputs` map axis names to sizes, in order."""
        self.axes = (*inputs, *outputs)
        self.kernel = nnx.Param(
            stddev * jax.random.normal(rngs.params(), (*inputs.values(), *outputs.values())), axes=self.axes, role=role)
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), axes=tuple(outputs), role="bias") if bias else None

    def add_bias(self, y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def column_parallel(x: Float[Array, "B T D"], *linears: Linear, states: Names | None = None) -> list[Float[Array, "B T ..."]]:
    """States through several linear layers, each device making its own columns or heads of what comes out. `states`:
    x's axes, if not the residual stream's."""
    kernels, axes = tuple(linear.kernel[...] for linear in linears), tuple(linear.axes for linear in linears)
    ys = products.column_parallel(x, kernels, axes, states or residual_axes(x.shape[1]))
    return [linear.add_bias(y) for linear, y in zip(linears, ys, strict=True)]


def row_parallel(y: Float[Array, "B T ..."], linear: Linear) -> Float[Array, "B T D"]:
    """Through a linear layer back into the residual stream: the sum of what devices make of their columns or heads."""
    return linear.add_bias(products.row_parallel(y, linear.kernel[...], linear.axes, residual_axes(y.shape[1])))


# ---- norms, embeddings, dropout --------------------------------------------------------------------------------------

class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last dimension, in float32."""

    def __init__(self, size: int, axis: str | None, *, kind: str, epsilon: float, bias: bool):
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,), role="scale")
        self.bias = nnx.Param(jnp.zeros(size), axes=(axis,), role="bias") if bias and kind == "layernorm" else None
        self.centered = kind == "layernorm"
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors. Looked up by index; as a matrix it is the tied output head."""

    def __init__(self, size: int, hidden_size: int, axis: str, *, stddev: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            stddev * jax.random.normal(rngs.params(), (size, hidden_size)), axes=(axis, "embed"), role="table")
        self.axis = axis

    def __call__(self, indices: Int32[Array, "B T"], dtype: jnp.dtype) -> Float32[Array, "B T D"]:
        """Into the residual stream; vectors travel in `dtype`, to be added up in float32."""
        return products.look_up(self.embedding[...], indices, self.axis, dtype).astype(jnp.float32)


def take_positions(x: Float[Array, "B T D"], indices: Int32[Array, "B P"]) -> Float[Array, "B P D"]:
    """x at indices of each row; of what comes out P is cut as the "sequence" is."""
    states = residual_axes(x.shape[1])
    axes, cut = mesh_axes(states[1]), mesh_axes("sequence")

    def on_device(x: Float[Array, "B T_own D"], indices: Int32[Array, "B P"]) -> Float[Array, "B P_own D"]:
        if not axes:
            return jnp.take_along_axis(x, indices[..., None], axis=1)
        indices = indices - jax.lax.axis_index(axes) * x.shape[1]
        here = (indices >= 0) & (indices < x.shape[1])
        found = jnp.where(here[..., None], jnp.take_along_axis(x, jnp.where(here, indices, 0)[..., None], axis=1), 0)
        if others := tuple(axis for axis in axes if axis not in cut):
            found = jax.lax.psum(found, others)
        return jax.lax.psum_scatter(found, cut, scatter_dimension=1, tiled=True) if cut else found

    return per_device(on_device, (states, ("batch", None)), (*TOKENS, None), check_vma=True)(x, indices)


def rotate(x: Float[Array, "B T N H"], positions: Int32[Array, "B T"], frequencies: Float32[Array, " H//2"]
           ) -> Float[Array, "B T N H"]:
    """Rotary position embedding (Su et al. 2021) in the rotate-half form of Llama."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B, T, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_frequencies(width: int, theta: float, scaling: Mapping[str, Any] | None) -> Float32[Array, " {width}//2"]:
    """Radians that each pair of numbers turns by from one position to the next.

    scaling linear: positions divided by factor (Chen et al. 2023). llama3: only of pairs that turn slowly; those that
    turn less than low_freq_factor times in original_max_length wholly, those that turn more than high_freq_factor times
    not at all (Dubey et al. 2024, as in Llama 3.1's released code).
    """
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequencies
    scaled = frequencies / scaling["factor"]
    if scaling["type"] == "linear":
        return scaled
    turns = scaling["original_max_length"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * scaled


# ---- attention and MLP -----------------------------------------------------------------------------------------------

class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017), with grouped-query heads (Ainslie et al. 2023) where K < N."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        embed, stddev, bias = {"embed": settings.hidden_size}, settings.initializer_range, query_key_value_bias(settings)
        width = head_dim(settings)
        heads = {"heads": settings.num_heads, "head_dim": width}
        keys = {"kv_heads": kv_heads(settings), "head_dim": width}
        self.query = Linear(embed, heads, bias=bias, stddev=stddev, rngs=rngs)
        self.key = Linear(embed, keys, bias=bias, stddev=stddev, rngs=rngs)
        self.value = Linear(embed, keys, bias=bias, stddev=stddev, rngs=rngs)
        self.output = Linear(heads, embed, bias=settings.bias, stddev=output_stddev(settings), rngs=rngs)
        head_norm = functools.partial(Norm, width, None, kind="rmsnorm", epsilon=settings.norm_epsilon, bias=False)
        self.query_norm = head_norm() if settings.qk_norm else None
        self.key_norm = head_norm() if settings.qk_norm else None
        self.settings = settings
        self.dropout_rate = attention_dropout_rate(settings)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B T D"], context: Context, cache: Cache | None = None
                 ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """And the KV cache with this call's keys and values written into it."""
        query, key, value = column_parallel(x, self.query, self.key, self.value)  # [B, T, N or K, H]
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        is_local = self._is_local(context)
        if self.settings.positions == "rope":
            frequencies = self._frequencies(is_local)
            query, key = (rotate(heads, context.positions, frequencies) for heads in (query, key))
        query = constrain(query, "batch", "sequence", "heads", None)
        key, value = (constrain(heads, "batch", "sequence", "kv_heads", None) for heads in (key, value))
        query, key, value = (checkpoint_name(heads, "query_key_value") for heads in (query, key, value))
        if cache is not None:
            at = (0, context.cache_index, 0, 0)
            cache = {"key": jax.lax.dynamic_update_slice(cache["key"], key.astype(cache["key"].dtype), at),
                     "value": jax.lax.dynamic_update_slice(cache["value"], value.astype(cache["value"].dtype), at)}
            key, value = cache["key"], cache["value"]
        visible = Visible(self.settings.causal, self.settings.attention_window, context.token_indices, context.segment_ids,
                          is_local, None if cache is None else context.cache_index)
        out = attention(query, key, value, visible, dropout_rate=self.dropout_rate, implementation=self.settings.attention,
                        dropout_keys=fold_in(context.dropout_keys, 0) if self.dropout_rate else None)
        return checkpoint_name(row_parallel(out, self.output), "attention_output"), cache

    def _is_local(self, context: Context) -> Bool[Array, ""] | None:
        """Whether this layer is a local one; None where all layers are alike."""
        every = self.settings.global_every
        return None if every is None or self.settings.attention_window is None else context.layer % every != 0

    def _frequencies(self, is_local: Bool[Array, ""] | None) -> Float32[Array, " half"]:
        settings = self.settings
        frequencies = functools.partial(rope_frequencies, head_dim(settings), scaling=settings.rope_scaling)
        if local_rope_theta(settings) == settings.rope_theta or settings.attention_window is None:
            return frequencies(settings.rope_theta)
        local = frequencies(local_rope_theta(settings))
        return local if is_local is None else jnp.where(is_local, local, frequencies(settings.rope_theta))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x times the normal distribution function (Hendrycks & Gimpel 2016), through erf: jax.nn.gelu's erfc takes
    twice as long."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,  # Shazeer 2020: the gated forms
    "geglu": gelu,
}


class MLP(nnx.Module):
    """Two linear layers around an activation, gated when the activation says so."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        embed = {"embed": settings.hidden_size}
        inner = {"mlp": intermediate_size(settings)}
        stddev, bias, activation = settings.initializer_range, settings.bias, settings.activation
        self.up = Linear(embed, inner, bias=bias, stddev=stddev, rngs=rngs)
        self.gate = Linear(embed, inner, bias=bias, stddev=stddev, rngs=rngs) if activation in GATED else None
        self.down = Linear(inner, embed, bias=bias, stddev=output_stddev(settings), rngs=rngs)
        self.activation = activation

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gates = () if self.gate is None else (self.gate,)
        *gate, up = (checkpoint_name(y, "mlp_hidden") for y in column_parallel(x, *gates, self.up))
        activate = ACTIVATIONS[self.activation]
        hidden = activate(gate[0]) * up if gate else activate(up)
        return checkpoint_name(row_parallel(hidden, self.down), "mlp_output")


class Experts(nnx.Module):
    """Many MLPs, of which each token takes a few (Shazeer et al. 2017); see `jaxlm.parallel.experts`."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        experts, embed = {"experts": settings.num_experts}, {"embed": settings.hidden_size}
        inner, stddev, activation = {"mlp": intermediate_size(settings)}, settings.initializer_range, settings.activation
        linear = functools.partial(Linear, bias=False, rngs=rngs)
        self.router = linear(embed, {None: settings.num_experts}, stddev=stddev, role="router")
        self.up = linear(experts | embed, inner, stddev=stddev)
        self.gate = linear(experts | embed, inner, stddev=stddev) if activation in GATED else None
        self.down = linear(experts | inner, embed, stddev=output_stddev(settings))
        self.activation = activation
        self.routing = MixtureOfExperts(settings.num_experts, settings.experts_per_token, settings.capacity_factor)

    @jax.named_scope("experts")
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], RouterSums]:
        linears = {"up": self.up, "gate": self.gate, "down": self.down}
        kernels = {name: linear.kernel[...] for name, linear in linears.items() if linear is not None}
        out, sums = mixture(x, self.router.kernel[...], kernels, ACTIVATIONS[self.activation], self.routing)
        return checkpoint_name(out, "mlp_output"), sums


# ---- the stack -------------------------------------------------------------------------------------------------------

def remat_policy(choices: Mapping[str, str]) -> Callable[..., Any]:
    """What of a block the backward pass finds, from "keep", "host" or "recompute" for each of
    `jaxlm.settings.ACTIVATIONS`."""
    kept, moved = ([name for name, choice in choices.items() if choice == wanted] for wanted in ("keep", "host"))
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept, names_which_can_be_offloaded=moved, offload_src="device", offload_dst="pinned_host")


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num_layers` blocks as one module whose parameters have a leading axis, "layers"."""
    return nnx.vmap(make_block, in_axes=0, out_axes=0)(rngs.split(num_layers))


class Execution(NamedTuple):
    """How a model runs. Nothing of it changes what comes out."""

    remat: Callable[..., Any] | None = None  # policy of what is kept for the backward pass; None: everything
    micro_batches: int = 1  # in which a pipeline takes the rows, at most
    repeats: int = 1  # groups of layers in each stage of a pipeline
    loss_chunk: int | None = None  # positions whose logits exist at a time; None: by `jaxlm.models.sizes.loss_chunk`
    logits_memory: float = 0.0  # bytes of each device that may be filled with float32 logits


class Auxiliary(NamedTuple):
    """What a block gives beside the states; of a whole stack with a leading dimension L."""

    cache: Cache | None = None  # the updated KV cache
    router: RouterSums | None = None  # of mixtures of experts


def run_stack(blocks: nnx.Module, x: Float[Array, "B T D"], context: Context, *, remat: Callable[..., Any] | None = None,
              cache: Cache | None = None) -> tuple[Float[Array, "B T D"], Auxiliary]:
    """Scans x through the stacked blocks; compile time does not grow with the depth."""
    graph, params = nnx.split(blocks)
    numbers = jnp.arange(jax.tree.leaves(params)[0].shape[0])
    return _scan_layers(graph, params, numbers, x, context, remat, cache)


def _scan_layers(graph: Any, params: Any, numbers: Int32[Array, " L"], x: Float[Array, "B T D"], context: Context,
                 remat: Callable[..., Any] | None, cache: Cache | None) -> tuple[Float[Array, "B T D"], Auxiliary]:
    def body(x: Float[Array, "B T D"], layer: tuple) -> tuple[Float[Array, "B T D"], Auxiliary]:
        number, layer_params, layer_cache = layer
        x = checkpoint_name(x, "residual")
        layer_context = context._replace(dropout_keys=fold_in(context.dropout_keys, number), layer=number)
        x, aux = nnx.merge(graph, layer_params)(x, layer_context, layer_cache)
        return constrain(x, *residual_axes(x.shape[1])), aux

    if remat is not None:  # only in a loop XLA does not take what is computed again for what was computed before
        body = jax.checkpoint(body, policy=remat, prevent_cse=False)
    return jax.lax.scan(body, x, (numbers, params, cache), unroll=len(numbers) if remat is None and _loops_are_slow() else 1)


def embed_and_run(model: Any, inputs: tuple, context: Context, execution: Execution
                  ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
    """`model.embed(*inputs, context)` through `model.blocks`, in a pipeline where the mesh has stages."""
    if num_stages() == 1:
        x, aux = run_stack(model.blocks, model.embed(*inputs, context), context, remat=execution.remat)
        return x, aux.router
    graph, layers, embedding, rest = nnx.split(model, _path_has("blocks"), _path_has("embedding"), ...)
    block_graph, token_indices = nnx.split(model.blocks)[0], context.token_indices  # those of every row: not cut into pieces

    def first(embedding: Any, piece: tuple) -> Float[Array, "B T D"]:
        inputs, context = piece
        return nnx.merge(graph, layers, embedding, rest).embed(*inputs, context._replace(token_indices=token_indices))

    def stage(group: Any, numbers: Int32[Array, " L"], x: Float[Array, "b T D"], piece: tuple
              ) -> tuple[Float[Array, "b T D"], RouterSums | None]:
        context = piece[1]._replace(token_indices=token_indices)
        x, aux = _scan_layers(block_graph, group, numbers, x, context, execution.remat, None)
        return x, aux.router

    return run_pipeline(first, stage, embedding, layers["blocks"], (inputs, context._replace(token_indices=None)),
                        micro_batches=execution.micro_batches, repeats=execution.repeats)


def _path_has(word: str) -> Callable[[tuple, Any], bool]:
    return lambda path, _: word in path[0]


def _loops_are_slow() -> bool:
    """On one CPU device a loop's stacking of activations costs as much as its arithmetic (docs/lab-notes.md)."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def output_stddev(settings: ModelSettings) -> float:
    """Initial scale of the layers that write into the residual stream: GPT-2 divides it by the root of their number."""
    return settings.initializer_range / (math.sqrt(2 * settings.num_layers) if settings.scaled_initialization else 1)
