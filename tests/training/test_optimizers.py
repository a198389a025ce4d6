"""Update rules and schedules against their papers' formulas in NumPy, and where their state lies on a mesh."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.model import Model
from jaxlm.parallel.sharding import Axes, shardings
from jaxlm.settings import OptimizerSettings, ScheduleSettings, TrainSettings
from jaxlm.training.optimizers import decayed, make_optimizer, make_schedule, state_axes

RATE, DECAY, B1, B2, EPSILON = 0.01, 0.1, 0.8, 0.9, 1e-3
AXES = {
    "blocks": {"attention": {"query": {"kernel": Axes(("layers", "embed", "heads", "head_dim"), "kernel"),
                                       "bias": Axes(("layers", "heads", "head_dim"), "bias")},
                             "output": {"kernel": Axes(("layers", "heads", "head_dim", "embed"), "kernel")}},
               "norm": {"scale": Axes(("layers", "residual"), "scale")}},
    "token_embedding": {"embedding": Axes(("vocab", "embed"), "table")},
    "final_norm": {"bias": Axes(("residual",), "bias")},
}
SHAPES = {
    "blocks": {"attention": {"query": {"kernel": (2, 12, 3, 2), "bias": (2, 3, 2)}, "output": {"kernel": (2, 3, 2, 12)}},
               "norm": {"scale": (2, 12)}},
    "token_embedding": {"embedding": (10, 12)},
    "final_norm": {"bias": (12,)},
}
MATRICES = {"blocks.attention.query.kernel", "blocks.attention.output.kernel", "token_embedding.embedding"}


def is_shape(node):
    return isinstance(node, tuple)


def draw(seed, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: random.normal(size=shape).astype(np.float32), shapes, is_leaf=is_shape)


def by_path(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}


def settings(name, **changes):
    values = {"learning_rate": RATE, "weight_decay": DECAY, "b1": B1, "b2": B2, "epsilon": EPSILON}
    return OptimizerSettings(name=name, **values | changes)


def two_updates(name, shapes=SHAPES, axes=AXES, **changes):
    """path -> (parameter, its two gradients, the parameter after each update)."""
    optimizer = make_optimizer(settings(name, **changes), axes)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda param, update: param - RATE * update, params, updates), state

    params, grads = draw(0, shapes), [draw(1, shapes), draw(2, shapes)]
    state, results, history = jax.jit(optimizer.init)(params), by_path(params), []
    for grad in grads:
        params, state = update(params, state, grad)
        history.append(by_path(params))
    return {path: (value, [by_path(grad)[path] for grad in grads], [step[path] for step in history])
            for path, value in results.items()}


# ---- one tensor, step by step: (parameter, gradients, weight decay) -> the parameter after each step -----------------

def adam_direction(grads):
    """Kingma & Ba 2015, algorithm 1."""
    first = second = 0.0
    for step, grad in enumerate(grads, start=1):
        first, second = B1 * first + (1 - B1) * grad, B2 * second + (1 - B2) * grad**2
        yield first / (1 - B1**step) / (np.sqrt(second / (1 - B2**step)) + EPSILON)


def adamw(param, grads, decay):
    """Loshchilov & Hutter 2019, algorithm 2."""
    for direction in adam_direction(grads):
        param = param - RATE * (direction + decay * param)
        yield param


def adam(param, grads, decay):
    """L2: the decay is a part of the gradient."""
    first = second = 0.0
    for step, grad in enumerate(grads, start=1):
        grad = grad + decay * param
        first, second = B1 * first + (1 - B1) * grad, B2 * second + (1 - B2) * grad**2
        param = param - RATE * first / (1 - B1**step) / (np.sqrt(second / (1 - B2**step)) + EPSILON)
        yield param


def sgd(param, grads, decay):
    """Heavy ball (Polyak 1964)."""
    velocity = 0.0
    for grad in grads:
        velocity = B1 * velocity + grad + decay * param
        param = param - RATE * velocity
        yield param


def rmsprop(param, grads, decay):
    """Tieleman & Hinton 2012, with momentum."""
    second = velocity = 0.0
    for grad in grads:
        grad = grad + decay * param
        second = B2 * second + (1 - B2) * grad**2
        velocity = B1 * velocity + grad / (np.sqrt(second) + EPSILON)
        param = param - RATE * velocity
        yield param


def lion(param, grads, decay):
    """Chen et al. 2023, algorithm 2."""
    momentum = 0.0
    for grad in grads:
        direction = np.sign(B1 * momentum + (1 - B1) * grad)
        param = param - RATE * (direction + decay * param)
        momentum = B2 * momentum + (1 - B2) * grad
        yield param


def lamb(param, grads, decay):
    """You et al. 2020, algorithm 2, with the identity as phi."""
    for direction in adam_direction(grads):
        direction = direction + decay * param
        param = param - RATE * np.linalg.norm(param) / np.linalg.norm(direction) * direction
        yield param


def adafactor(param, grads, decay):
    """Shazeer & Stern 2018, algorithms 4 (matrices) and 5 (vectors), without momentum; the step's size is relative
    to the RMS."""
    def rms(array):
        return np.sqrt(np.mean(array**2))

    rows = columns = whole = 0.0
    for step, grad in enumerate(grads, start=1):
        b2, square = 1 - step**-0.8, grad**2 + 1e-30
        if grad.ndim == 2 and min(grad.shape) >= 128:
            rows = b2 * rows + (1 - b2) * square.mean(1, keepdims=True)
            columns = b2 * columns + (1 - b2) * square.mean(0, keepdims=True)
            second = rows * columns / rows.mean()
        else:
            second = whole = b2 * whole + (1 - b2) * square
        direction = grad / np.sqrt(second)
        direction = direction / max(1, rms(direction)) * max(1e-3, rms(param))
        param = param - RATE * (direction + decay * param)
        yield param


@pytest.mark.parametrize("rule", [adamw, adam, sgd, rmsprop, lion, lamb, adafactor], ids=lambda rule: rule.__name__)
def test_two_updates_follow_the_paper(rule):
    for path, (param, grads, results) in two_updates(rule.__name__).items():
        decay = DECAY if path in MATRICES else 0.0
        stacked = path.startswith("blocks.")  # each layer of the stack is a tensor of its own
        for layer in range(2) if stacked else [...]:
            wanted = rule(param[layer].astype(np.float64), [grad[layer].astype(np.float64) for grad in grads], decay)
            for got, want in zip(results, wanted, strict=True):
                np.testing.assert_allclose(got[layer], want, rtol=1e-4, atol=1e-6, err_msg=path)


def test_adafactor_factors_the_moments_of_large_matrices():
    shapes = {"blocks": {"up": {"kernel": (2, 128, 130)}}}
    axes = {"blocks": {"up": {"kernel": Axes(("layers", "embed", "mlp"), "kernel")}}}
    (param, grads, results), = two_updates("adafactor", shapes, axes).values()
    for layer in range(2):
        for got, want in zip(results, adafactor(param[layer], [grad[layer] for grad in grads], DECAY), strict=True):
            np.testing.assert_allclose(got[layer], want, rtol=1e-4, atol=1e-5)


def test_muon_makes_each_hidden_matrix_orthogonal():
    """Jordan et al. 2024; five Newton-Schulz steps bring every singular value near 1. Scale: Liu et al. 2025,
    equation 4."""
    updates = two_updates("muon", weight_decay=0.0)
    for name, matrix in (("query", lambda array: array.reshape(12, 6)), ("output", lambda array: array.reshape(6, 12))):
        param, _, results = updates.pop(f"blocks.attention.{name}.kernel")
        for before, after in zip((param, results[0]), results, strict=True):
            for layer in range(2):
                singular = np.linalg.svd(matrix((before - after)[layer]) / RATE / (0.2 * math.sqrt(12)), compute_uv=False)
                assert len(singular) == 6 and singular.min() > 0.6 and singular.max() < 1.3
    for path, (param, grads, results) in updates.items():  # everything else: Adam
        for got, want in zip(results, adamw(param, grads, 0.0), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=path)


def test_muon_never_decays_vectors():  # the formulas above show it for the other rules
    with_decay, without = two_updates("muon"), two_updates("muon", weight_decay=0.0)
    for path, (param, _, results) in with_decay.items():
        decay = RATE * DECAY * param if path in MATRICES else 0 * param
        np.testing.assert_allclose(without[path][2][0] - results[0], decay, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_what_decays_in_the_models(family, models):
    model = Model(models[family], TrainSettings())
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.shapes)
    for (path, leaf), decays in zip(leaves, jax.tree.leaves(decayed(model.axes)), strict=True):
        dimensions = len(leaf.shape) - (path[0].key == "blocks")
        is_bias = path[-1].key == "bias"  # those of query, key and value are written as heads x width
        assert decays == (dimensions > 1 and not is_bias), path


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("adam", 2), ("sgd", 1), ("rmsprop", 2), ("lion", 1), ("lamb", 2),
                                               ("adafactor", 1), ("muon", None)])
@pytest.mark.parametrize("mesh", ["fsdp8", "tensor8", "2x2x2"])
def test_state_lies_like_its_parameters(name, moments, mesh, models, meshes):
    """Bytes on one device: `moments` times those of the parameters, and a few counters."""
    def bytes_per_device(layout, shapes):
        return sum(4 * math.prod(one.shard_shape(leaf.shape)) for one, leaf in
                   zip(jax.tree.leaves(layout), jax.tree.leaves(shapes), strict=True))

    model = Model(replace(models["gpt"], num_layers=3), TrainSettings())
    optimizer = make_optimizer(settings(name), model.axes)
    state_shapes = jax.eval_shape(optimizer.init, model.shapes)
    layout = shardings(meshes[mesh], state_axes(optimizer, model.shapes, model.axes))
    params = bytes_per_device(shardings(meshes[mesh], model.axes), model.shapes)
    whole = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))
    assert params < (0.2 if mesh == "fsdp8" else 0.3) * whole  # what is cut is most of it
    state = bytes_per_device(layout, state_shapes)
    low, high = (1, 2) if moments is None else (moments, moments)  # muon: one moment of the matrices, two of the rest
    small = 1024  # counters, and adafactor's placeholders
    assert low * params <= state <= high * params + small


def test_adafactor_keeps_less_than_the_parameters(models):
    model = Model(replace(models["gpt"], hidden_size=256, vocab_size=1000), TrainSettings())
    optimizer = make_optimizer(settings("adafactor"), model.axes)
    sizes = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
             for tree in (jax.eval_shape(optimizer.init, model.shapes), model.shapes)]
    assert sizes[0] < 0.3 * sizes[1]  # all but the attention's, whose heads are narrower than the 128 it asks for


# ---- schedules -------------------------------------------------------------------------------------------------------

def expected_rate(name, step, warmup, steps, decay_steps, final):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    end = decay_steps or steps
    done = min(1, (step - warmup) / (end - warmup))
    match name:
        case "linear":
            return 1 - done * (1 - final)
        case "cosine":  # Loshchilov & Hutter 2017, equation 5
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
        case "inverse_square_root":  # Vaswani et al. 2017, equation 3, scaled to a peak of 1
            return math.sqrt(warmup / step) if warmup else math.sqrt(1 / (step + 1))
        case "warmup_stable_decay":  # Hu et al. 2024, equation 1, with a linear end
            length = decay_steps or steps // 5
            return 1 - (1 - final) * max(0, (step - (steps - length)) / length)
        case "constant":
            return 1.0


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("decay_steps", [None, 20])
@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "inverse_square_root", "warmup_stable_decay"])
def test_schedule_at_every_step(name, warmup, decay_steps, final):
    peak, steps = 0.02, 40
    settings = ScheduleSettings(name=name, warmup_steps=warmup, decay_steps=decay_steps, final_ratio=final)
    schedule = make_schedule(settings, peak, steps)
    got = np.broadcast_to(schedule(jnp.arange(steps + 1)), steps + 1)
    want = [peak * expected_rate(name, step, warmup, steps, decay_steps, final) for step in range(steps + 1)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)
    if warmup:
        assert got[warmup] == got.max() == pytest.approx(peak)


@pytest.mark.parametrize(("warmup", "steps", "want"), [
    (0, 5, [1, 1, 1, 1, 0.5]),  # a fifth of them would be one step, which is the peak's
    (6, 8, [1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1, 0.5]),  # what the warmup leaves
    (36, 40, [*(step / 37 for step in range(1, 37)), 1, 0.75, 0.5, 0.25]),
    (7, 8, [*(step / 8 for step in range(1, 8)), 1]),
])
def test_the_final_decay_fits_what_the_warmup_leaves(warmup, steps, want):
    """Line 15: by default warmup_stable_decay comes down in whole, however few steps there are."""
    schedule = make_schedule(ScheduleSettings(name="warmup_stable_decay", warmup_steps=warmup), 3.0, steps)
    np.testing.assert_allclose([schedule(step) for step in range(steps)], 3 * np.array(want), rtol=1e-6)
