"""A mixture of experts: every token goes to a few of many MLPs, wherever they are.

Tokens are sorted by expert, sent to the devices of the expert axis that hold theirs (all-to-all), go through grouped
matrix products, come back the same way, and are added up with the router's weights (GShard, Lepikhin et al. 2020;
grouped products and no dropped tokens: MegaBlocks, Gale et al. 2022). Softmax over the chosen experts only, as in
Mixtral (Jiang et al. 2024).

Dropless, what a device sends to another has room for all of its tokens, since all may choose the same experts:
nothing is lost, whatever the router does, and results do not depend on the mesh. With a capacity, which is for
training only, an expert takes at most `capacity_factor` times its even share of each device's tokens; the traffic is
that much, the rest passes the layer by.

Shapes: n tokens of one device, E experts on P devices, k experts per token, D hidden size, F MLP width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.parallel.products import Names, gather, residual_axes, scatter_sum, sum_over
from jaxlm.parallel.sharding import mesh_axes, per_device

KERNELS = {"up": ("experts", "embed", "mlp"), "gate": ("experts", "embed", "mlp"), "down": ("experts", "mlp", "embed")}
SENT = "sent_to_experts"  # what an exchange has brought: to come by it again, it would have to travel again


class Routing(NamedTuple):
    """Static facts of a mixture."""

    num_experts: int
    per_token: int
    capacity_factor: float | None  # None: dropless


class RouterSums(NamedTuple):
    """Sums over sequences, so that neither micro-batches nor meshes change them; float32."""

    balance: jax.Array  # []: E / (k T^2) sum_e (picks of e) (probability of e), for each sequence (DeepSeek-V3, 2024, eq. 17-20)
    z: jax.Array  # []: mean squared log-partition of the router's logits, for each sequence (ST-MoE, Zoph et al. 2022)
    load: jax.Array  # [E]: tokens that chose each expert
    dropped: jax.Array  # []: choices that found their expert full


def mixture(x: jax.Array, router: jax.Array, kernels: dict[str, jax.Array], activate: Callable, routing: Routing
            ) -> tuple[jax.Array, RouterSums]:
    """x [B, T, D] in the residual stream through the experts, back into it.

    Args:
      router: float32 [D, E], axes ("embed", None).
      kernels: float32, "up" and perhaps "gate" [E, D, F], "down" [E, F, D]; axes as in KERNELS.
      activate: the activation, of the gate where there is one.
    """
    states = residual_axes(x.shape[1])
    sums = RouterSums((), (), (None,), ())
    axes = (states, ("embed", None), {name: KERNELS[name] for name in kernels})
    run = functools.partial(_mixture, activate=activate, routing=routing, cuts=Cuts.here(states))
    return per_device(run, axes, (states, sums))(x, router, kernels)


class Cuts(NamedTuple):
    """Mesh axes that cut what a mixture works on."""

    embed: tuple[str, ...]
    experts: tuple[str, ...]
    tokens: tuple[str, ...]
    sequence: tuple[str, ...]
    scattered: tuple[str, ...]
    columns: tuple[str, ...]

    @classmethod
    def here(cls, states: Names) -> "Cuts":
        sequence = mesh_axes("sequence")
        return cls(mesh_axes("embed"), mesh_axes("experts"), mesh_axes("batch") + sequence, sequence,
                   tuple(axis for axis in mesh_axes(states[1]) if axis not in sequence), mesh_axes("mlp"))


# ---- one device ------------------------------------------------------------------------------------------------------

def _mixture(x, router, kernels, *, activate, routing, cuts):
    # The backward pass finds the products and what has travelled; kernels are fetched for it again.
    policy = jax.checkpoint_policies.save_only_these_names("mlp_hidden", SENT)
    run = jax.checkpoint(functools.partial(_routed, activate=activate, routing=routing, cuts=cuts), policy=policy)
    return run(x, router, kernels)


def _routed(x, router, kernels, *, activate, routing, cuts):
    x = gather(x, cuts.scattered, axis=1)
    rows, length, width = x.shape
    tokens = x.reshape(-1, width)
    # In float32 whatever the compute type: a rounded logit may choose another expert, and these products cost next to
    # nothing.
    logits = jnp.matmul(tokens.astype(jnp.float32), gather(router, cuts.embed, axis=0), precision=jax.lax.Precision.HIGHEST)
    chosen_logits, chosen = jax.lax.top_k(logits, routing.per_token)
    weights = jax.nn.softmax(chosen_logits)
    kernels = {name: gather(kernel.astype(x.dtype), cuts.embed, KERNELS[name].index("embed")) for name, kernel in kernels.items()}
    experts = functools.partial(_experts, kernels=kernels, activate=activate)
    if routing.capacity_factor is None:
        out, dropped = _dropless(tokens, chosen, weights, experts, routing, cuts), jnp.zeros(())
    else:
        out, dropped = _with_capacity(tokens, chosen, weights, experts, routing, cuts)
    out = out.astype(x.dtype).reshape(x.shape)
    out = scatter_sum(out, cuts.scattered, axis=1) if cuts.scattered else sum_over(out, cuts.columns)
    return out, _router_sums(logits.reshape(rows, length, -1), chosen.reshape(rows, length, -1), dropped, routing, cuts)


def _router_sums(logits, chosen, dropped, routing, cuts):
    length = logits.shape[1] * _size(cuts.sequence)
    picks = jax.nn.one_hot(chosen, routing.num_experts).sum((1, 2))  # [B, E]
    probability = sum_over(jax.nn.softmax(logits).sum(1), cuts.sequence)
    balance = routing.num_experts / (routing.per_token * length**2) * (sum_over(picks, cuts.sequence) * probability).sum()
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1)).sum() / length
    rows = tuple(axis for axis in cuts.tokens if axis not in cuts.sequence)
    return RouterSums(sum_over(balance, rows), *(sum_over(part, cuts.tokens) for part in (z, picks.sum(0), dropped)))


def _dropless(tokens, chosen, weights, experts, routing, cuts):
    """Each token's sum over its experts, float32 [n, D]."""
    order = jnp.argsort(chosen.ravel())  # stable
    rows, sizes = tokens[order // routing.per_token], jnp.bincount(chosen.ravel(), length=routing.num_experts)
    rows = _there_and_back(rows, sizes, experts, cuts) if cuts.experts else checkpoint_name(experts(rows, sizes), SENT)
    return _add_up(rows, order, weights, tokens.shape)


def _there_and_back(rows, sizes, experts, cuts):
    """`experts` for sorted rows [m, D] of which expert e has sizes[e], on the devices where the experts are."""
    devices, most = _size(cuts.experts), len(rows)
    exchange = functools.partial(_exchange, axes=cuts.experts)
    per_device_sizes = sizes.reshape(devices, -1)
    starts = jnp.cumsum(per_device_sizes.sum(1)) - per_device_sizes.sum(1)
    slots = starts[:, None] + jnp.arange(most)  # [P, m]: rows for each device, and beyond them others that count nothing
    sent = jnp.where((slots < most)[..., None], rows[jnp.minimum(slots, most - 1)], 0)
    came, came_sizes = exchange(sent), exchange(per_device_sizes)  # [P, m, D], [P, E / P]
    bounds = jnp.cumsum(came_sizes, axis=1)
    expert = jax.vmap(lambda bounds: jnp.searchsorted(bounds, jnp.arange(most), side="right"))(bounds)  # [P, m]
    order = jnp.argsort(expert.ravel())  # what is beyond the last expert comes last
    done = experts(came.reshape(-1, came.shape[-1])[order], came_sizes.sum(0))
    back = jnp.zeros_like(done).at[order].set(done).reshape(came.shape)
    back = jnp.where((expert < came_sizes.shape[1])[..., None], back, 0)
    returned = exchange(back)
    return jnp.zeros((most, rows.shape[1]), returned.dtype).at[slots].add(returned, mode="drop")


def _with_capacity(tokens, chosen, weights, experts, routing, cuts):
    """The same, and how many choices found their expert full."""
    number = routing.num_experts
    capacity = max(1, round(routing.capacity_factor * len(tokens) * routing.per_token / number))
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=number)
    sorted_expert = chosen.ravel()[order]
    place = jnp.arange(len(order)) - (jnp.cumsum(sizes) - sizes)[sorted_expert]
    slot = jnp.where(place < capacity, sorted_expert * capacity + place, number * capacity)
    rows = tokens[order // routing.per_token]
    buffer = jnp.zeros((number * capacity, tokens.shape[1]), tokens.dtype).at[slot].set(rows, mode="drop")
    buffer = buffer.reshape(_size(cuts.experts), -1, capacity, tokens.shape[1])  # [P, E / P, C, D]
    exchange = functools.partial(_exchange, axes=cuts.experts)
    came = jnp.moveaxis(exchange(buffer), 0, 1)  # [E / P, P, C, D]
    done = experts(came.reshape(came.shape[0], -1, came.shape[-1]), None).reshape(came.shape)
    returned = exchange(jnp.moveaxis(done, 1, 0)).reshape(-1, tokens.shape[1])
    rows = jnp.where((place < capacity)[:, None], returned[jnp.minimum(slot, len(returned) - 1)], 0)
    return _add_up(rows, order, weights, tokens.shape), (place >= capacity).sum().astype(jnp.float32)


def _exchange(array, axes):
    """[P, ...]: piece p goes to device p, and each device's piece for this one comes back."""
    return checkpoint_name(jax.lax.all_to_all(array, axes, split_axis=0, concat_axis=0, tiled=True) if axes else array, SENT)


def _experts(rows, sizes, *, kernels, activate):
    """The experts' MLPs for rows [m, D] sorted by expert, or, with sizes None, for [E, C, D]."""
    def product(rows, kernel):
        if sizes is None:
            return jnp.einsum("ecd,edf->ecf", rows, kernel, preferred_element_type=jnp.float32).astype(rows.dtype)
        return jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)

    inside = {name: checkpoint_name(product(rows, kernels[name]), "mlp_hidden") for name in ("gate", "up") if name in kernels}
    hidden = activate(inside["gate"]) * inside["up"] if "gate" in inside else activate(inside["up"])
    return product(hidden, kernels["down"])


def _add_up(rows, order, weights, shape):
    per_token = weights.shape[1]
    weighted = rows.astype(jnp.float32) * weights.ravel()[order][:, None]
    return jnp.zeros(shape, jnp.float32).at[order // per_token].add(weighted)


def _size(axes):
    return jax.lax.axis_size(axes) if axes else 1
