"""The parts against their papers' formulas in NumPy."""

from dataclasses import replace
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.models.layers import MLP, Norm, rope_frequencies, rotate
from jaxlm.models.model import Model
from jaxlm.models.sizes import padded_vocab_size
from jaxlm.settings import TrainSettings


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1000.0])  # the second is where E[x^2] - E[x]^2 loses every digit
@pytest.mark.parametrize(("kind", "bias"), [("layernorm", True), ("layernorm", False), ("rmsnorm", True)])
def test_norms_follow_their_papers(kind, bias, offset):
    epsilon = 1e-3
    norm = Norm(16, None, kind=kind, epsilon=epsilon, bias=bias)
    x, scale, shift = normal(3, 5, 16) + np.float32(offset), normal(16, seed=1), normal(16, seed=2)
    norm.scale[...] = jnp.asarray(scale)
    assert (norm.bias is not None) == (kind == "layernorm" and bias)
    if norm.bias is not None:
        norm.bias[...] = jnp.asarray(shift)
    wide = x.astype(np.float64)
    centered = wide - wide.mean(-1, keepdims=True) if kind == "layernorm" else wide
    want = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon) * scale + (0 if norm.bias is None else shift)
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=1e-4, atol=1e-3 if offset else 1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_rotate_turns_pairs_by_their_position():
    theta, x, positions = 500.0, normal(2, 6, 3, 8), np.random.default_rng(1).integers(0, 1000, (2, 6))
    frequencies = theta ** (-2 * np.arange(4) / 8)  # Su et al. 2021, section 3.2.2
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * frequencies)
    want = np.concatenate([turned.real, turned.imag], -1)
    got = rotate(jnp.asarray(x), jnp.asarray(positions), rope_frequencies(8, theta, None))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_rotations_for_longer_contexts():
    """Llama 3.1's own numbers (factor 8, 1 to 4 turns in 8,192 positions), by the formula of its released code; linear:
    positions divided."""
    plain = 500000.0 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(rope_frequencies(128, 500000.0, {"type": "linear", "factor": 4.0}), plain / 4, rtol=1e-5)
    want = []
    for frequency in plain:
        length = 2 * np.pi / frequency
        if length < 8192 / 4:
            want.append(frequency)
        elif length > 8192 / 1:
            want.append(frequency / 8)
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 8 + smooth * frequency)
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_length": 8192}
    np.testing.assert_allclose(rope_frequencies(128, 500000.0, scaling), want, rtol=1e-5)


ACTIVATIONS = {
    "gelu": np.vectorize(lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2)))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}
ACTIVATIONS["geglu"] = ACTIVATIONS["gelu"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, models):
    settings = replace(models["gpt"], intermediate_size=24, initializer_range=0.3, bias=False, activation=activation)
    mlp, x = MLP(settings, nnx.Rngs(0)), normal(2, 3, 32)
    up, down = np.asarray(mlp.up.kernel[...]), np.asarray(mlp.down.kernel[...])
    activate = ACTIVATIONS[activation]
    gated = activation in ("swiglu", "geglu")  # Shazeer 2020
    hidden = activate(x @ np.asarray(mlp.gate.kernel[...])) * (x @ up) if gated else activate(x @ up)
    np.testing.assert_allclose(mlp(jnp.asarray(x)), hidden @ down, rtol=1e-4, atol=1e-4)


def test_vocabulary_is_padded_to_multiples_of_128():
    assert [padded_vocab_size(size) for size in (1, 128, 129, 50257)] == [128, 128, 256, 50304]


def test_initial_weights(models):
    for family, residual_scale in (("gpt", 1 / np.sqrt(2 * 2)), ("bert", 1.0)):  # Radford et al. 2019, section 2.3
        model = Model(models[family], TrainSettings())
        # The blocks alone, and not the default generator: ten times quicker to compile
        blocks = jax.jit(lambda key, model=model: model.init(key)["blocks"])(jax.random.key(0, impl="rbg"))
        attention, mlp = blocks["attention"], blocks["mlp"]
        for kernel, scale in ((attention["query"]["kernel"], 1.0), (attention["output"]["kernel"], residual_scale),
                              (mlp["up"]["kernel"], 1.0), (mlp["down"]["kernel"], residual_scale)):
            assert np.std(kernel) == pytest.approx(0.02 * scale, rel=0.1)
            assert abs(np.corrcoef(np.ravel(kernel[0]), np.ravel(kernel[1]))[0, 1]) < 0.1  # each layer has its own
        assert not np.any(mlp["up"]["bias"]) and np.all(blocks["mlp_norm"]["scale"] == 1)
