"""The recurrent trunk against torch.nn.LSTM, against the formula one number at a time, and on meshes."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.checks import check
from jaxlm.errors import UserError
from jaxlm.models.layers import Context, run_stack
from jaxlm.models.model import Model
from jaxlm.models.parameters import num_parameters
from jaxlm.models.sizes import block_flops
from jaxlm.parallel.sharding import shardings
from jaxlm.settings import DataSettings, MeshSettings, ModelSettings, Settings, TrainSettings
from jaxlm.training.step import batch_sharding

GOLDEN = Path(__file__).parents[1] / "golden" / "lstm.npz"  # see tests/golden/make_lstm.py
SETTINGS = ModelSettings(family="lstm", num_layers=2, hidden_size=32, vocab_size=300, max_length=16)
ONE_WAY, BOTH_WAYS = SETTINGS, replace(SETTINGS, causal=False)


def from_torch(weights, width):
    """Parameters of the layers from those of torch.nn.LSTM: (out, in) there, gates one after the other."""
    def kernel(name):
        return np.concatenate([weights[f"{name}{way}"].reshape(4, -1, weights[f"{name}{way}"].shape[1]).transpose(2, 0, 1)
                               for way in ways], axis=1)

    ways = ("", "_reverse") if "weight_ih_l0_reverse" in weights else ("",)
    layers = []
    for layer in range(sum(name.startswith("weight_ih") for name in weights) // len(ways)):
        bias = np.concatenate([(weights[f"bias_ih_l{layer}{way}"] + weights[f"bias_hh_l{layer}{way}"]).reshape(4, -1)
                               for way in ways])
        layers.append({"input": {"kernel": kernel(f"weight_ih_l{layer}"), "bias": bias},
                       "recurrent": {"kernel": kernel(f"weight_hh_l{layer}")}})
    return jax.tree.map(lambda *each: np.stack(each), *layers)


@pytest.mark.parametrize("way", ["causal", "both_ways"])
def test_states_and_gradients_are_those_of_torch(way):
    """Two layers; parameters, inputs, states and every gradient are torch's."""
    with np.load(GOLDEN) as file:
        arrays = {name.removeprefix(f"{way}/"): file[name] for name in file if name.startswith(f"{way}/")}
    x, weights = arrays["x"], arrays["weights"]
    _, length, width = x.shape
    model = Model(replace(SETTINGS, hidden_size=width, causal=way == "causal"), TrainSettings())
    named = {kind: {name.removeprefix(f"{kind}/"): array for name, array in arrays.items() if name.startswith(f"{kind}/")}
             for kind in ("parameter", "gradient")}
    params = model.shapes | {"blocks": from_torch(named["parameter"], width)}
    graph, state = nnx.split(model.bind(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.shapes)).blocks)

    def loss(blocks, x):
        layers = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(blocks)))
        y, _ = run_stack(layers, x, Context(jnp.zeros((1, length), jnp.int32)))
        return (y * weights).sum(), y

    (_, states), (grad_blocks, grad_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params["blocks"], x)
    np.testing.assert_allclose(states, arrays["states"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad_x, arrays["gradient/x"], rtol=1e-5, atol=1e-6)
    # our one bias is the sum of torch's two, and each of these has the gradient of the sum
    halved = {name: grad / 2 if name.startswith("bias") else grad for name, grad in named["gradient"].items()}
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6), grad_blocks,
                 from_torch(halved, width))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def read(x, kernel, recurrent, bias, segments):
    """One direction of one layer over one row, from the left, as the paper has it."""
    units = kernel.shape[-1]
    hidden, cell, states = np.zeros(units), np.zeros(units), []
    for t in range(len(x)):
        if t and segments[t] != segments[t - 1]:
            hidden, cell = np.zeros(units), np.zeros(units)
        i, f, g, o = (x[t] @ kernel[:, gate] + hidden @ recurrent[:, gate] + bias[gate] for gate in range(4))
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        states.append(hidden)
    return np.array(states)


@pytest.fixture(scope="module")
def batches(make_batch):
    """Rows of two documents and padding (causal), and of one document and padding."""
    bert = make_batch("bert", 0)
    return {True: make_batch("gpt", 0), False: {name: array for name, array in bert.items() if not name.startswith("next")}}


@pytest.mark.parametrize("settings", [ONE_WAY, BOTH_WAYS], ids=["causal", "both ways"])
def test_documents_of_a_row_are_read_one_by_one(settings, batches, random_params):
    model, batch = Model(settings, TrainSettings()), batches[settings.causal]
    params = random_params(model)
    states = np.asarray(jax.jit(lambda params, batch: model.bind(params).states(batch).x)(params, batch))
    blocks = jax.tree.map(np.asarray, params["blocks"])
    for row in range(4):
        segments = batch["segment_ids"][row]
        x = np.sqrt(32) * np.asarray(params["token_embedding"]["embedding"])[batch["tokens"][row]]
        for layer in range(2):
            kernel, bias, recurrent = (blocks["input"]["kernel"][layer], blocks["input"]["bias"][layer],
                                       blocks["recurrent"]["kernel"][layer])
            left = read(x, kernel[:, :4], recurrent[:, :4], bias[:4], segments)
            if settings.causal:
                x = left
            else:
                right = read(x[::-1], kernel[:, 4:], recurrent[:, 4:], bias[4:], segments[::-1])[::-1]
                x = np.concatenate([left, right], axis=-1)
        np.testing.assert_allclose(states[row], x, rtol=1e-4, atol=1e-5)


def loss_and_gradients(settings, mesh, batch, random_params):
    with jax.set_mesh(mesh):
        model = Model(settings, TrainSettings())
        params = jax.device_put(random_params(model), shardings(mesh, model.axes))
        placed = jax.device_put(batch, batch_sharding(mesh))
        keys = jax.device_put(jax.random.split(jax.random.key(0), len(batch["tokens"])), batch_sharding(mesh))

        def loss(params, batch, keys):
            return sum(terms.loss for terms in model.terms(params, batch, keys).values())

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, placed, keys))


MORE = [("2x2x2", True), ("data8", True), ("fsdp8", False), ("tensor8", True), ("tensor8", False)]


@pytest.mark.parametrize(("mesh", "causal"), [("2x2x2", False), *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)])
def test_eight_devices_give_what_one_gives(mesh, causal, batches, meshes, random_params):
    """With dropout: loss, and every gradient."""
    settings = replace(SETTINGS, causal=causal, dropout=0.1)
    batch = batches[settings.causal]
    loss, gradients = loss_and_gradients(settings, meshes["one"], batch, random_params)
    other_loss, other_gradients = loss_and_gradients(settings, meshes[mesh], batch, random_params)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4 * np.abs(one).max() + 1e-6),
                 gradients, other_gradients)


def test_a_text_that_is_read_piece_by_piece_gives_the_same_states(random_params, batches):
    model, tokens = Model(ONE_WAY, TrainSettings()), batches[True]["tokens"]
    params = random_params(model)
    network = model.bind(params)
    whole = jax.jit(lambda tokens: network.states({"tokens": tokens}).x)(tokens)
    cache, found, step = network.empty_cache(*tokens.shape), [], jax.jit(lambda tokens, cache: network.hidden_with_cache(
        tokens, Context(jnp.zeros_like(tokens)), cache))
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 16)):
        x, cache = step(tokens[:, begin:end], cache)
        found.append(x)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-5, atol=1e-6)


def products(jaxpr, times=1):
    """FLOPs of all matrix products of a traced program; those in loops as often as the loops go round."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (inner, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in inner])
            total += times * 2 * depth * np.prod(equation.outvars[0].aval.shape)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                total += products(getattr(value, "jaxpr", value), times * turns)
    return total


@pytest.mark.parametrize("settings", [ONE_WAY, BOTH_WAYS], ids=["causal", "both ways"])
def test_flops_are_those_of_the_traced_program(settings, batches, random_params):
    """Of the layers, forward and backward: three times what `block_flops` says."""
    model, batch = Model(settings, TrainSettings()), batches[settings.causal]

    def loss(blocks, x):
        network = model.bind(random_params(model) | {"blocks": blocks})
        return run_stack(network.blocks, x, Context(jnp.zeros((1, 16), jnp.int32), segment_ids=batch["segment_ids"]))[0].sum()

    shapes = model.shapes["blocks"], jax.ShapeDtypeStruct((16, 16, 32), jnp.float32)
    traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*shapes)
    assert products(traced.jaxpr) == 3 * 16 * settings.num_layers * block_flops(settings, 16)


def test_parameters_are_as_many_as_the_formula_says():
    """4 (D H + H^2 + H) for each direction of a layer, and the table."""
    assert num_parameters(ONE_WAY) == 300 * 32 + 2 * 4 * (32 * 32 + 32**2 + 32)
    masked_head = 32 * 32 + 32 + 2 * 32 + 300
    assert num_parameters(BOTH_WAYS) == 300 * 32 + 2 * 2 * 4 * (32 * 16 + 16**2 + 16) + masked_head


@pytest.mark.parametrize(("changes", "message"), [
    ({"mesh": {"context": 2}}, "mesh.context=2 is for transformers"),
    ({"mesh": {"stage": 2}}, "mesh.stage=2 is for transformers"),
    ({"mesh": {"expert": 2}}, "mesh.expert=2 is for transformers"),
    ({"mesh": {"tensor": 3}}, "mesh.tensor=3 does not divide model.hidden_size=32; 2 does"),
    ({"model": {"causal": False, "hidden_size": 33}}, "no two halves"),
    ({"model": {"causal": False}, "mesh": {"tensor": 32}}, "does not divide model.hidden_size / 2=16"),
    ({"model": {"attention_window": 8}}, "model.attention_window=8 is for transformers"),
    ({"model": {"num_experts": 4}}, "model.num_experts=4 is for transformers"),
])
def test_what_an_lstm_cannot_do_is_told_in_a_line(changes, message):
    settings = Settings(model=replace(SETTINGS, **changes.get("model", {})), data=DataSettings(sequence_length=16),
                        mesh=MeshSettings(**changes.get("mesh", {})), train=TrainSettings(gradient_accumulation=2))
    with pytest.raises(UserError, match=message):
        check(settings)
