"""Attention against a softmax in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.attention import attention
from jaxlm.parallel.dropout import attention_dropout
from jaxlm.parallel.ring import Tokens

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3]])


def loops(query, key, value, allowed):
    """Vaswani et al. 2017, equation 1, one query at a time; `allowed` bool [B, T, S]."""
    out = np.zeros_like(query, np.float64)
    group = query.shape[2] // key.shape[2]
    for row, token, head in np.ndindex(query.shape[:3]):
        seen = allowed[row, token]
        scores = key[row, seen, head // group].astype(np.float64) @ query[row, token, head] / np.sqrt(query.shape[3])
        weights = np.exp(scores - scores.max())
        out[row, token, head] = weights @ value[row, seen, head // group] / weights.sum()
    return out


def heads(num_heads, kv_heads, length=7, slots=7):
    random = np.random.default_rng(0)
    return [random.normal(size=(2, size, count, 6)).astype(np.float32)
            for size, count in ((length, num_heads), (slots, kv_heads), (slots, kv_heads))]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_against_loops(causal, segments, kv_heads):
    arrays = heads(4, kv_heads)
    allowed = np.ones((2, 7, 7), bool) if segments is None else segments[:, :, None] == segments[:, None, :]
    if causal:
        allowed = allowed & np.tri(7, dtype=bool)
    out = attention(*map(jnp.asarray, arrays), causal=causal, tokens=Tokens(segment_ids=segments))
    np.testing.assert_allclose(out, loops(*arrays, allowed), rtol=1e-4, atol=1e-5)


def test_mask_over_the_slots_of_a_cache():
    arrays = heads(4, 2, length=3, slots=9)
    mask = np.arange(9)[None, :] <= 4 + np.arange(3)[:, None]
    out = attention(*map(jnp.asarray, arrays), Tokens(), causal=False, mask=jnp.asarray(mask)[None, None])
    np.testing.assert_allclose(out, loops(*arrays, np.broadcast_to(mask, (2, 3, 9))), rtol=1e-4, atol=1e-5)


def test_a_token_that_may_see_nothing_gives_finite_values_and_gradients():
    arrays = list(map(jnp.asarray, heads(4, 2)))
    mask = jnp.ones((2, 1, 7, 7), bool).at[:, :, 3].set(False)
    grads = jax.jit(jax.grad(
        lambda *arrays: attention(*arrays, Tokens(), causal=False, mask=mask).sum(), argnums=(0, 1, 2)))(*arrays)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_dropout_is_applied_to_the_probabilities():
    query, key, value = heads(4, 2)
    keys = np.random.default_rng(1).integers(0, 2**32, (2, 7, 2), dtype=np.uint32)
    factors = np.asarray(attention_dropout(keys, np.arange(7), np.arange(4), 0.5))
    out = attention(*map(jnp.asarray, (query, key, value)), Tokens(dropout_keys=keys), causal=True, dropout_rate=0.5)
    key, value = (np.repeat(array, 2, axis=2) for array in (key, value))
    scores = np.where(np.tri(7, dtype=bool), np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(6), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) * factors
    np.testing.assert_allclose(out, np.einsum("bnts,bsnh->btnh", weights, value), rtol=1e-4, atol=1e-5)


def test_bfloat16_scores_are_summed_in_float32():
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in heads(4, 4)]
    out = attention(*arrays, Tokens(), causal=True)
    assert out.dtype == jnp.bfloat16
    wide = [np.asarray(array, np.float32) for array in arrays]
    np.testing.assert_allclose(np.asarray(out, np.float32), loops(*wide, np.broadcast_to(np.tri(7, dtype=bool), (2, 7, 7))),
                               rtol=0.03, atol=0.03)
