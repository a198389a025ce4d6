"""Update rules and learning-rate schedules, put together from Optax."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxlm.parallel.sharding import Axes
from jaxlm.settings import OptimizerSettings, ScheduleSettings


def make_schedule(settings: ScheduleSettings, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate of update number `count` (from 0), with a linear warmup: (count + 1) / (warmup_steps + 1) of the
    peak.

    linear, cosine: down to final_ratio * peak at decay_steps, constant after. inverse_square_root: peak * sqrt(w /
    count) after a warmup of w steps, peak / sqrt(count + 1) without one (Vaswani et al. 2017). warmup_stable_decay:
    constant, then linear down over the last decay_steps of the run (Hu et al. 2024): by default a fifth of it, at
    least two, where one step would lower nothing, and at most what the warmup leaves.
    """
    warmup, final = settings.warmup_steps, settings.final_ratio * peak
    end = settings.decay_steps or total_steps
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)  # a first step of rate 0 would be a step lost
    if settings.name == "cosine":
        after = optax.cosine_decay_schedule(peak, end - warmup, alpha=settings.final_ratio)
    elif settings.name == "linear":
        after = optax.linear_schedule(peak, final, end - warmup)
    elif settings.name == "inverse_square_root":
        def after(count):
            return peak * jnp.sqrt(max(warmup, 1) / (count + max(warmup, 1)))
    elif settings.name == "warmup_stable_decay":
        length = settings.decay_steps or min(max(2, total_steps // 5), total_steps - warmup)
        after = optax.linear_schedule(peak, final, length, transition_begin=total_steps - warmup - length)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def make_optimizer(settings: OptimizerSettings, axes: Any) -> optax.GradientTransformation:
    """The direction of an update, which the step multiplies by minus the learning rate: the schedule goes by the
    run's own clock, also past steps that were skipped. `axes` is the parameters' tree of `Axes`. Clipping happens in
    the step, where the norm is known.
    """
    def decay(axes: Any) -> optax.GradientTransformation:
        weight_decay = settings.weight_decay
        return optax.add_decayed_weights(weight_decay, mask=decayed(axes)) if weight_decay else optax.identity()

    b1, b2, epsilon = settings.b1, settings.b2, settings.epsilon
    momentum = optax.trace(b1) if b1 else optax.identity()
    match settings.name:
        case "adamw":
            return optax.chain(optax.scale_by_adam(b1, b2, epsilon), decay(axes))
        case "adam":
            return optax.chain(decay(axes), optax.scale_by_adam(b1, b2, epsilon))
        case "sgd":
            return optax.chain(decay(axes), momentum)
        case "rmsprop":
            return optax.chain(decay(axes), optax.scale_by_rms(b2, epsilon, eps_in_sqrt=False), momentum)
        case "lion":
            return optax.chain(optax.scale_by_lion(b1, b2), decay(axes))
        case "lamb":
            return per_layer(lambda axes: optax.chain(optax.scale_by_adam(b1, b2, epsilon), decay(axes),
                                                      optax.scale_by_trust_ratio()), axes)
        case "adafactor":
            # Optax's own weight decay comes after the learning rate, and its sign is turned; here both are as
            # everybody's.
            factored = optax.chain(optax.adafactor(learning_rate=None, decay_rate=0.8), optax.scale(-1.0))
            return per_layer(lambda axes: optax.chain(factored, decay(axes)), axes)
        case "muon":
            return optax.chain(_muon_or_adam(settings, axes), decay(axes))
    raise ValueError(settings.name)


def decayed(axes: Any) -> Any:
    """True for the matrices and tables, False for biases and norms."""
    return jax.tree.map(lambda leaf: leaf.role in ("kernel", "router", "table"), axes)


def per_layer(make: Callable[[Any], optax.GradientTransformation], axes: Any) -> optax.GradientTransformation:
    """Applies a rule that looks at whole tensors (a trust ratio, a factored moment) to each layer of the stack by
    itself. `make`: from a tree of `Axes` to the rule for these parameters."""

    def split(tree: dict | None) -> tuple[dict | None, dict | None]:
        if tree is None:
            return None, None
        return tree["blocks"], {name: value for name, value in tree.items() if name != "blocks"}

    stacked, alone = map(make, split(axes))

    def init(params: dict) -> dict:
        blocks, rest = split(params)
        return {"layers": jax.vmap(stacked.init)(blocks), "rest": alone.init(rest)}

    def update(updates: dict, state: dict, params: dict | None = None) -> tuple[dict, dict]:
        (blocks, rest), (block_params, rest_params) = split(updates), split(params)
        blocks, layers_state = jax.vmap(stacked.update)(blocks, state["layers"], block_params)
        rest, rest_state = alone.update(rest, state["rest"], rest_params)
        return {"blocks": blocks, **rest}, {"layers": layers_state, "rest": rest_state}

    return optax.GradientTransformation(init, update)


def state_axes(optimizer: optax.GradientTransformation, shapes: Any, axes: Any) -> Any:
    """`Axes` of every leaf of the optimizer's state.

    A leaf that mirrors a parameter (its path ends in the parameter's, the shape is the same) is laid out like it;
    counters and factored moments are small and stay whole, but for the dimension of the layers.
    """
    names = {tuple(entry.key for entry in path): leaf for path, leaf in
             jax.tree_util.tree_flatten_with_path(axes)[0]}
    sizes = {tuple(entry.key for entry in path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]}
    # per_layer strips "blocks" from the paths of the stack's leaves
    names |= {path[1:]: leaf for path, leaf in names.items() if path[0] == "blocks"}
    sizes |= {path[1:]: leaf for path, leaf in sizes.items() if path[0] == "blocks"}

    def leaf_axes(path: tuple, leaf: jax.ShapeDtypeStruct) -> Axes:
        keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        for start in range(len(keys)):
            if sizes.get(keys[start:]) == leaf.shape:
                return names[keys[start:]]
        return Axes(("layers" if keys[:1] == ("layers",) else None, *(None,) * (leaf.ndim - 1))[: leaf.ndim])

    return jax.tree_util.tree_map_with_path(leaf_axes, jax.eval_shape(optimizer.init, shapes))


def _muon_or_adam(settings: OptimizerSettings, axes: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the hidden matrices, Adam for embeddings, heads, norms and biases."""
    dimensions = jax.tree.map(_muon_dimensions, axes)
    labels = jax.tree.map(
        lambda leaf: "adam" if isinstance(leaf, optax.MaskedNode) else "muon", dimensions, is_leaf=_is_muon_leaf)

    def scale(dimensions: contrib.MuonDimensionNumbers | optax.MaskedNode, update: jax.Array) -> jax.Array:
        """Liu et al. 2025, equation 4: updates as large as Adam's, so that its learning rates carry over."""
        if isinstance(dimensions, optax.MaskedNode):
            return update
        sides = (math.prod(update.shape[i] for i in side) for side in dimensions)
        return 0.2 * math.sqrt(max(sides)) * update

    muon = optax.chain(
        contrib.scale_by_muon(beta=settings.b1, eps=settings.epsilon, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(scale, dimensions, updates, is_leaf=_is_muon_leaf)))
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(settings.b1, settings.b2, settings.epsilon)}, labels)


def _muon_dimensions(leaf: Axes) -> contrib.MuonDimensionNumbers | optax.MaskedNode:
    """Which dimensions of a hidden matrix are its rows and columns; a MaskedNode for what is none."""
    names = leaf.names
    if leaf.role not in ("kernel", "router") or names[0] != "layers":
        return optax.MaskedNode()
    embed = names.index("embed")
    others = tuple(i for i in range(1, len(names)) if i != embed and names[i] != "experts")
    inputs, outputs = ((embed,), others) if embed < others[0] else (others, (embed,))
    return contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)


def _is_muon_leaf(node: Any) -> bool:
    return isinstance(node, (contrib.MuonDimensionNumbers, optax.MaskedNode))
