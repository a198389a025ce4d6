"""A mixture of experts: every token goes to a few of many MLPs, wherever they are.

Tokens are sorted by expert, sent to the devices of the expert axis that hold theirs (all-to-all), go through grouped
matrix products, come back the same way, and are added up with the router's weights (GShard, Lepikhin et al. 2020;
grouped products and no dropped tokens: MegaBlocks, Gale et al. 2022). Softmax over the chosen experts only, as in
Mixtral (Jiang et al. 2024).

Dropless, what a device sends to another has room for all of its tokens, since all may choose the same experts:
nothing is lost, whatever the router does, and results do not depend on the mesh. With a capacity, which is for
training only, an expert takes at most `capacity_factor` times its even share of each device's tokens; the traffic is
that much, the rest passes the layer by.

Shapes: `jaxlm.parallel.shapes`; and here n tokens of one device, k experts for each of them, m = n k choices, Q devices
that hold E / Q experts each, C rows that an expert takes at most.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.parallel.products import MeshAxes, Names, gather, residual_axes, scatter_sum, sum_over
from jaxlm.parallel.shapes import Array, Float, Float32, Int32, Shaped
from jaxlm.parallel.sharding import mesh_axes, per_device

KERNELS = {"up": ("experts", "embed", "mlp"), "gate": ("experts", "embed", "mlp"), "down": ("experts", "mlp", "embed")}
SENT = "sent_to_experts"  # what an exchange has brought: to come by it again, it would have to travel again


class MixtureOfExperts(NamedTuple):
    """Static facts of a mixture."""

    num_experts: int
    per_token: int
    capacity_factor: float | None  # None: dropless


class RouterSums(NamedTuple):
    """Sums over sequences, so that neither micro-batches nor meshes change them; float32."""

    # E / (k T^2) sum_e (picks of e) (probability of e), for each sequence (DeepSeek-V3, 2024, eq. 17-20)
    balance: Float32[Array, ""]
    z: Float32[Array, ""]  # mean squared log-partition of the router's logits, for each sequence (ST-MoE, Zoph et al. 2022)
    load: Float32[Array, " E"]  # tokens that chose each expert
    dropped: Float32[Array, ""]  # choices that found their expert full


ExpertMLPs = Callable[[Array, Array | None], Array]  # over rows sorted by expert, and how many each has; or [E, C, D]


def mixture(x: Float[Array, "B T D"], router: Float32[Array, "D E"], kernels: dict[str, Float[Array, "E _ _"]],
            activate: Callable, routing: MixtureOfExperts) -> tuple[Float[Array, "B T D"], RouterSums]:
    """The residual stream through the experts, back into it.

    Args:
      router: axes ("embed", None).
      kernels: "up" and perhaps "gate" [E, D, F], "down" [E, F, D]; axes as in KERNELS.
      activate: the activation, of the gate where there is one.
    """
    states = residual_axes(x.shape[1])
    sums = RouterSums((), (), (None,), ())
    axes = (states, ("embed", None), {name: KERNELS[name] for name in kernels})
    run = functools.partial(_mixture, activate=activate, routing=routing, cuts=MixtureCuts.here(states))
    return per_device(run, axes, (states, sums))(x, router, kernels)


class MixtureCuts(NamedTuple):
    """Mesh axes that cut what a mixture works on."""

    embed: MeshAxes
    experts: MeshAxes
    tokens: MeshAxes
    sequence: MeshAxes
    scattered: MeshAxes  # what cuts the sequence of the residual stream beyond that
    columns: MeshAxes

    @classmethod
    def here(cls, states: Names) -> "MixtureCuts":
        sequence = mesh_axes("sequence")
        return cls(mesh_axes("embed"), mesh_axes("experts"), mesh_axes("batch") + sequence, sequence,
                   tuple(axis for axis in mesh_axes(states[1]) if axis not in sequence), mesh_axes("mlp"))


# ---- one device ------------------------------------------------------------------------------------------------------

def _mixture(x: Float[Array, "B T_own D"], router: Float32[Array, "D_own E"], kernels: dict[str, Float[Array, "E_own _ _"]], *,
             activate: Callable, routing: MixtureOfExperts, cuts: MixtureCuts) -> tuple[Float[Array, "B T_own D"], RouterSums]:
    # The backward pass finds the products and what has travelled; kernels are fetched for it again.
    policy = jax.checkpoint_policies.save_only_these_names("mlp_hidden", SENT)
    run = jax.checkpoint(functools.partial(_routed, activate=activate, routing=routing, cuts=cuts), policy=policy)
    return run(x, router, kernels)


def _routed(x: Float[Array, "B T_own D"], router: Float32[Array, "D_own E"], kernels: dict[str, Float[Array, "E_own _ _"]], *,
            activate: Callable, routing: MixtureOfExperts, cuts: MixtureCuts) -> tuple[Float[Array, "B T_own D"], RouterSums]:
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


def _router_sums(logits: Float32[Array, "B T E"], chosen: Int32[Array, "B T k"], dropped: Float32[Array, ""],
                 routing: MixtureOfExperts, cuts: MixtureCuts) -> RouterSums:
    length = logits.shape[1] * _size(cuts.sequence)
    picks = jax.nn.one_hot(chosen, routing.num_experts).sum((1, 2))  # [B, E]
    probability = sum_over(jax.nn.softmax(logits).sum(1), cuts.sequence)
    balance = routing.num_experts / (routing.per_token * length**2) * (sum_over(picks, cuts.sequence) * probability).sum()
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1)).sum() / length
    rows = tuple(axis for axis in cuts.tokens if axis not in cuts.sequence)
    return RouterSums(sum_over(balance, rows), *(sum_over(part, cuts.tokens) for part in (z, picks.sum(0), dropped)))


def _dropless(tokens: Float[Array, "n D"], chosen: Int32[Array, "n k"], weights: Float32[Array, "n k"], experts: ExpertMLPs,
              routing: MixtureOfExperts, cuts: MixtureCuts) -> Float32[Array, "n D"]:
    """Each token's sum over its experts."""
    order = jnp.argsort(chosen.ravel())  # stable
    rows, sizes = tokens[order // routing.per_token], jnp.bincount(chosen.ravel(), length=routing.num_experts)
    rows = _there_and_back(rows, sizes, experts, cuts) if cuts.experts else checkpoint_name(experts(rows, sizes), SENT)
    return _add_up(rows, order, weights, tokens.shape)


# Shapes are static, routing is not: a device may send all of its m rows to one other, or none. So every pair of
# devices exchanges m slots, the first of them filled, and with them how many rows are meant for each expert. Rows
# are sorted by expert, and a device holds neighbouring experts, so what goes to a device is one contiguous run.
#
#     experts a b | c d on 2 devices, m = 5, sizes = [2, 1, 0, 2]     rows     a a b d d
#     slots[0] = 0 1 2 3 4, slots[1] = 3 4 5 6 7                      sent[0]  a a b . .
#     . is padding: the next run's rows, or 0 beyond the last row     sent[1]  d d . . .
#
# On arrival each of Q pieces is sorted by expert by itself, but grouped products want all rows of an expert
# together: `expert` finds each row's from the sizes sent along (searchsorted of its number in the piece), argsort
# joins the pieces. Padding counts as expert number E / Q, one too many: it sorts behind all others, where the sizes
# do not reach. Results go back through the inverse of that sort and the same exchange, and `slots` puts each where
# it came from. Padding must be zeroed on the way back: beyond its sizes a grouped product promises nothing, and
# runs of neighbours overlap in `slots`, so what is not zero there would be added to somebody else's row.
def _there_and_back(rows: Float[Array, "m D"], sizes: Int32[Array, " E"], experts: ExpertMLPs, cuts: MixtureCuts
                    ) -> Float[Array, "m D"]:
    """`experts` for sorted rows of which expert e has sizes[e], on the devices where the experts are."""
    devices, most = _size(cuts.experts), len(rows)
    exchange = functools.partial(_exchange, axes=cuts.experts)
    per_device_sizes = sizes.reshape(devices, -1)
    starts = jnp.cumsum(per_device_sizes.sum(1)) - per_device_sizes.sum(1)
    slots = starts[:, None] + jnp.arange(most)  # [Q, m]: rows for each device, and beyond them others that count nothing
    sent = jnp.where((slots < most)[..., None], rows[jnp.minimum(slots, most - 1)], 0)
    came, came_sizes = exchange(sent), exchange(per_device_sizes)  # [Q, m, D], [Q, E / Q]
    bounds = jnp.cumsum(came_sizes, axis=1)
    expert = jax.vmap(lambda bounds: jnp.searchsorted(bounds, jnp.arange(most), side="right"))(bounds)  # [Q, m]
    order = jnp.argsort(expert.ravel())  # what is beyond the last expert comes last
    done = experts(came.reshape(-1, came.shape[-1])[order], came_sizes.sum(0))
    back = jnp.zeros_like(done).at[order].set(done).reshape(came.shape)
    back = jnp.where((expert < came_sizes.shape[1])[..., None], back, 0)
    returned = exchange(back)
    return jnp.zeros((most, rows.shape[1]), returned.dtype).at[slots].add(returned, mode="drop")


def _with_capacity(tokens: Float[Array, "n D"], chosen: Int32[Array, "n k"], weights: Float32[Array, "n k"], experts: ExpertMLPs,
                   routing: MixtureOfExperts, cuts: MixtureCuts) -> tuple[Float32[Array, "n D"], Float32[Array, ""]]:
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
    buffer = buffer.reshape(_size(cuts.experts), -1, capacity, tokens.shape[1])  # [Q, E / Q, C, D]
    exchange = functools.partial(_exchange, axes=cuts.experts)
    came = jnp.moveaxis(exchange(buffer), 0, 1)  # [E / Q, Q, C, D]
    done = experts(came.reshape(came.shape[0], -1, came.shape[-1]), None).reshape(came.shape)
    returned = exchange(jnp.moveaxis(done, 1, 0)).reshape(-1, tokens.shape[1])
    rows = jnp.where((place < capacity)[:, None], returned[jnp.minimum(slot, len(returned) - 1)], 0)
    return _add_up(rows, order, weights, tokens.shape), (place >= capacity).sum().astype(jnp.float32)


def _exchange(array: Shaped[Array, "Q ..."], axes: MeshAxes) -> Shaped[Array, "Q ..."]:
    """Piece q goes to device q, and each device's piece for this one comes back (all-to-all)."""
    return checkpoint_name(jax.lax.all_to_all(array, axes, split_axis=0, concat_axis=0, tiled=True) if axes else array, SENT)


def _experts(rows: Float[Array, "*rows D"], sizes: Int32[Array, " E"] | None, *, kernels: dict[str, Float[Array, "E _ _"]],
             activate: Callable) -> Float[Array, "*rows D"]:
    """The experts' MLPs for rows [m, D] sorted by expert, or, with sizes None, for [E, C, D]."""
    def product(rows: Float[Array, "*rows D"], kernel: Float[Array, "E D F"]) -> Float[Array, "*rows F"]:
        if sizes is None:
            return jnp.einsum("ecd,edf->ecf", rows, kernel, preferred_element_type=jnp.float32).astype(rows.dtype)
        return jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)

    inside = {name: checkpoint_name(product(rows, kernels[name]), "mlp_hidden") for name in ("gate", "up") if name in kernels}
    hidden = activate(inside["gate"]) * inside["up"] if "gate" in inside else activate(inside["up"])
    return product(hidden, kernels["down"])


def _add_up(rows: Float[Array, "m D"], order: Int32[Array, " m"], weights: Float32[Array, "n k"], shape: tuple[int, int]
            ) -> Float32[Array, "n D"]:
    per_token = weights.shape[1]
    weighted = rows.astype(jnp.float32) * weights.ravel()[order][:, None]
    return jnp.zeros(shape, jnp.float32).at[order // per_token].add(weighted)


def _size(axes: MeshAxes) -> int:
    return jax.lax.axis_size(axes) if axes else 1
