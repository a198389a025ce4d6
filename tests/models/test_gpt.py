"""GPT against transformers' GPT-2, and what must hold for every choice of settings."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.layers import Context
from jaxlm.models.model import Model
from jaxlm.models.objectives import NextToken
from jaxlm.parallel.dropout import token_keys
from jaxlm.settings import TrainSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "gpt2.npz"
LLAMA = {"positions": "rope", "rope_theta": 100.0, "normalization": "rmsnorm", "activation": "swiglu", "bias": False,
         "tied_embeddings": False, "num_kv_heads": 2, "head_dim": 6, "intermediate_size": 48, "qk_norm": True,
         "logit_soft_cap": 5.0, "z_loss": 0.01}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def shape(request, models, random_params):
    """A model, random parameters of it, and its compiled logits(tokens, positions, segment_ids)."""
    model = Model(replace(models["gpt"], **(LLAMA if request.param == "llama" else {})), TrainSettings())
    params = random_params(model)

    @jax.jit
    def logits(tokens, positions, segment_ids):
        bound = model.bind(params)
        return NextToken().logits(bound, bound.hidden(tokens, Context(positions, segment_ids=segment_ids))[0])

    return model, params, logits


def documents(*lengths):
    random = np.random.default_rng(7)
    return [random.integers(0, 300, length).astype(np.int32) for length in lengths]


def row(parts, length=16):
    """tokens, positions, segment_ids [1, length] of documents packed into one row, then padding of token 299."""
    tokens, positions, segment_ids = (np.full((1, length), value, np.int32) for value in (299, 0, 0))
    start = 0
    for number, part in enumerate(parts, start=1):
        place = slice(start, start + len(part))
        tokens[0, place], positions[0, place], segment_ids[0, place] = part, np.arange(len(part)), number
        start += len(part)
    return tokens, positions, segment_ids


def test_packed_documents_do_not_see_each_other(shape):
    _, _, logits = shape
    first, second = documents(6, 7)
    packed = logits(*row([first, second]))[0]
    np.testing.assert_allclose(packed[:6], logits(*row([first]))[0, :6], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[6:13], logits(*row([second]))[0, :7], rtol=1e-4, atol=1e-5)


def test_padding_and_the_future_change_nothing(shape):
    _, _, logits = shape
    document, = documents(9)
    tokens, positions, segment_ids = row([document])
    before = logits(tokens, positions, segment_ids)[0, :9]
    tokens[:, 9:] = 5
    np.testing.assert_array_equal(logits(tokens, positions, segment_ids)[0, :9], before)
    changed, = documents(9)
    changed[5:] = 11
    np.testing.assert_array_equal(logits(*row([changed]))[0, :5], before[:5])
    assert not np.allclose(logits(*row([changed]))[0, 5:9], before[5:])


def test_decoding_with_a_cache_equals_the_whole_pass(shape):
    model, params, logits = shape
    tokens, _, _ = row(documents(16))
    cache = model.bind(params).empty_cache(1, 20)  # with slots to spare

    @jax.jit
    def decode(tokens, start, cache):
        bound = model.bind(params)
        positions = start + jnp.arange(tokens.shape[1])[None]
        x, cache = bound.hidden_with_cache(tokens, Context(positions, cache_index=start), cache)
        return NextToken().logits(bound, x), cache

    pieces = []
    for start, stop in ((0, 7), *((index, index + 1) for index in range(7, 16))):  # the prompt, then one by one
        out, cache = decode(tokens[:, start:stop], start, cache)
        pieces.append(out)
    whole = logits(*row(documents(16)))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=1e-4, atol=1e-4)


def test_soft_cap_bounds_the_logits_and_padding_is_not_among_them(models, random_params):
    model = Model(replace(models["gpt"], **LLAMA), TrainSettings())
    logits = NextToken().logits(model.bind(random_params(model)), 100 * jnp.ones((1, 2, 32)))
    assert logits.shape == (1, 2, 300) and logits.dtype == jnp.float32
    assert np.abs(logits).max() <= 5.0


REMAT = {"none": "none", "dots": "dots", "full": "full", "named": {"query_key_value": "keep", "attention": "keep"},
         "host": {"residual": "host", "mlp_hidden": "host", "attention_output": "keep"}}


def test_remat_changes_no_gradient(models, make_batch, random_params):
    batch, grads = make_batch("gpt", 0), {}
    for remat, choices in REMAT.items():
        model = Model(models["gpt"], TrainSettings(remat=choices))
        gradient = jax.jit(jax.grad(lambda params, model=model: model.terms(params, batch)["next_token"].loss))
        traced = gradient.trace(random_params(model))
        assert ("remat" in str(traced.jaxpr)) == (remat != "none")
        assert ("<host>" in str(traced.jaxpr)) == (remat == "host")
        grads[remat] = traced.lower().compile()(random_params(model))
    for remat in REMAT:
        for got, want in zip(jax.tree.leaves(grads[remat]), jax.tree.leaves(grads["none"]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_every_layer_drops_other_elements(models, random_params):
    """With one layer's weights in both layers and no attention, equal masks would make the residual's steps equal."""
    model = Model(replace(models["gpt"], dropout=0.5), TrainSettings())
    params = jax.tree.map(np.zeros_like, random_params(model))
    params["blocks"]["mlp"]["down"]["bias"] += np.array([[1], [10]], np.float32)  # what layer 0 and layer 1 add
    params["final_norm"]["scale"] += 1
    keys = token_keys(jax.random.split(jax.random.key(0), 4), jnp.arange(16))

    def residual(params):
        positions = jnp.broadcast_to(jnp.arange(16), (4, 16))
        return model.bind(params).hidden(jnp.zeros((4, 16), jnp.int32), Context(positions, dropout_keys=keys))[0]

    states = np.asarray(jax.jit(residual)(params))  # normalized sums: four values, one for each pair of masks
    low, middle_low, middle_high, high = (np.isclose(rank, index) for index in range(4) for rank in [ranks(states)])
    shares = [float(one.mean()) for one in (low, middle_low, middle_high, high)]
    assert all(0.2 < share < 0.3 for share in shares), shares


def ranks(states):
    """0..3 for the sums 0, 2, 20, 22, which the final norm shifts and scales for each token but leaves in their
    order."""
    ranked = np.zeros_like(states)
    for place in np.ndindex(states.shape[:2]):
        values, inverse = np.unique(states[place].round(4), return_inverse=True)
        assert len(values) == 4
        ranked[place] = inverse
    return ranked


def test_full_logits_never_exist(models, make_batch, array_shapes):
    batch = make_batch("gpt", 0)
    model = Model(models["gpt"], TrainSettings(loss_chunk=2))
    shapes = array_shapes(jax.grad(lambda params: model.terms(params, batch)["next_token"].loss), model.shapes)
    assert (16, 2, 384) in shapes
    sizes = [np.prod(shape) for shape in shapes if 384 in shape or 300 in shape]
    assert max(sizes) == max(384 * 32, 16 * 2 * 384)  # the table, and one chunk of the logits of 16 rows
