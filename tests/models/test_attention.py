"""Attention against a softmax in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.attention import attention
from jaxlm.parallel.dropout import attention_dropout
from jaxlm.parallel.visible import Visible

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
    out = attention(*map(jnp.asarray, arrays), Visible(causal, segment_ids=segments))
    np.testing.assert_allclose(out, loops(*arrays, allowed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_the_slots_of_a_cache(window):
    """Three tokens that go to slots 4, 5 and 6 of nine."""
    arrays = heads(4, 2, length=3, slots=9)
    distance = 4 + np.arange(3)[:, None] - np.arange(9)[None, :]
    mask = (distance >= 0) & (distance < (window or 9))
    out = attention(*map(jnp.asarray, arrays), Visible(True, window, cache_index=jnp.asarray(4)))
    np.testing.assert_allclose(out, loops(*arrays, np.broadcast_to(mask, (2, 3, 9))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("local", [None, True, False])
def test_windows(local, segments):
    """Causal: the last 3 tokens with its own, as Mistral; both ways: at most 2 away with a window of 4 or 5, as
    ModernBERT. In a layer that is not local everything is seen."""
    arrays, distance = heads(4, 2), np.arange(7)[:, None] - np.arange(7)[None, :]
    same = np.ones((2, 7, 7), bool) if segments is None else segments[:, :, None] == segments[:, None, :]
    wide = local is False
    for visible, mask in (((True, 3), (distance >= 0) & ((distance < 3) | wide)), ((False, 4), (abs(distance) <= 2) | wide),
                          ((False, 5), (abs(distance) <= 2) | wide)):
        is_local = None if local is None else jnp.asarray(local)
        out = attention(*map(jnp.asarray, arrays), Visible(*visible, segment_ids=segments, is_local=is_local))
        np.testing.assert_allclose(out, loops(*arrays, mask & same), rtol=1e-4, atol=1e-5)


def test_a_token_that_may_see_nothing_gives_finite_values_and_gradients():
    arrays = list(map(jnp.asarray, heads(4, 2)))
    nothing = Visible(True, cache_index=jnp.asarray(-3))  # the first three queries stand before the first slot
    grads = jax.jit(jax.grad(lambda *arrays: attention(*arrays, nothing).sum(), argnums=(0, 1, 2)))(*arrays)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_dropout_is_applied_to_the_probabilities():
    query, key, value = heads(4, 2)
    keys = np.random.default_rng(1).integers(0, 2**32, (2, 7, 2), dtype=np.uint32)
    factors = np.asarray(attention_dropout(keys, np.arange(7), np.arange(4), 0.5))
    out = attention(*map(jnp.asarray, (query, key, value)), Visible(True), dropout_keys=keys, dropout_rate=0.5)
    key, value = (np.repeat(array, 2, axis=2) for array in (key, value))
    scores = np.where(np.tri(7, dtype=bool), np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(6), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) * factors
    np.testing.assert_allclose(out, np.einsum("bnts,bsnh->btnh", weights, value), rtol=1e-4, atol=1e-5)


def test_bfloat16_scores_are_summed_in_float32():
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in heads(4, 4)]
    out = attention(*arrays, Visible(True))
    assert out.dtype == jnp.bfloat16
    wide = [np.asarray(array, np.float32) for array in arrays]
    np.testing.assert_allclose(np.asarray(out, np.float32), loops(*wide, np.broadcast_to(np.tri(7, dtype=bool), (2, 7, 7))),
                               rtol=0.03, atol=0.03)
