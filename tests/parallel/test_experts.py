"""A mixture of experts against all experts for all tokens, with zeros for those that were not chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.parallel.experts import MixtureOfExperts, mixture
from jaxlm.parallel.mesh import make_mesh
from jaxlm.settings import MeshSettings

WIDTH, INNER, EXPERTS, ROWS, LENGTH, CHOSEN = 16, 32, 8, 8, 16, 2
MESHES = {"one": MeshSettings(), "8": MeshSettings(expert=8), "fsdp": MeshSettings(expert=2, fsdp=2, tensor=2),
          "without": MeshSettings(data=2, context=2, tensor=2), "context": MeshSettings(expert=4, context=2)}


def everything(x, router, kernels):
    """Output, balance, z, load; the formulas of Jiang et al. 2024, DeepSeek-V3 and Zoph et al. 2022 as they stand."""
    logits = x @ router
    best, chosen = jax.lax.top_k(logits, CHOSEN)
    weights = (jax.nn.one_hot(chosen, EXPERTS) * jax.nn.softmax(best)[..., None]).sum(2)
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, kernels["gate"])) * jnp.einsum("btd,edf->btef", x, kernels["up"])
    picks, probability = jax.nn.one_hot(chosen, EXPERTS).sum((1, 2)), jax.nn.softmax(logits).mean(1)
    balance = (EXPERTS / (CHOSEN * LENGTH) * picks * probability).sum()
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean(1).sum()
    return jnp.einsum("btef,efd,bte->btd", hidden, kernels["down"], weights), balance, z, picks.sum(0)


def draw():
    random = np.random.default_rng(0)
    normal = [random.normal(size=shape).astype(np.float32) for shape in (
        (ROWS, LENGTH, WIDTH), (WIDTH, EXPERTS), *[(EXPERTS, WIDTH, INNER)] * 2, (EXPERTS, INNER, WIDTH), (ROWS, LENGTH, WIDTH))]
    x, router, up, gate, down, grad = normal
    return x, router, {"up": up * 0.2, "gate": gate * 0.2, "down": down * 0.2}, grad


def with_gradients(function):
    x, router, kernels, grad = draw()

    def loss(x, router, kernels):
        out, balance, z, load = function(x, router, kernels)
        return (out * grad).sum() + 3 * balance + 0.1 * z, (out, balance, z, load)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, router, kernels)


def routed(capacity_factor):
    def run(x, router, kernels):
        out, sums = mixture(x, router, kernels, jax.nn.silu, MixtureOfExperts(EXPERTS, CHOSEN, capacity_factor))
        return out, sums.balance, sums.z, sums.load

    return run


@pytest.mark.parametrize("capacity_factor", [None, 4.0])  # 4: room for every token of every expert
@pytest.mark.parametrize("mesh", MESHES)
def test_output_sums_and_gradients(mesh, capacity_factor):
    want = with_gradients(everything)
    with jax.set_mesh(make_mesh(MESHES[mesh], jax.devices()[: 1 if mesh == "one" else 8])):
        got = with_gradients(routed(capacity_factor))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_finds_its_expert_full_is_counted_and_passed_by():
    x, _, kernels, _ = draw()
    router = jnp.zeros((WIDTH, EXPERTS)).at[:, 3].set(100.0).at[:, 5].set(50.0)
    x = jnp.abs(x)  # every token wants experts 3 and 5
    out, sums = jax.jit(lambda x: mixture(x, router, kernels, jax.nn.silu, MixtureOfExperts(EXPERTS, CHOSEN, 1.0)))(x)
    tokens, room = ROWS * LENGTH, ROWS * LENGTH * CHOSEN // EXPERTS
    np.testing.assert_array_equal(sums.load, tokens * np.isin(np.arange(EXPERTS), [3, 5]))
    assert float(sums.dropped) == 2 * (tokens - room)
    flat = np.asarray(out).reshape(tokens, WIDTH)
    assert np.abs(flat[:room]).max() > 0 and np.abs(flat[room:]).max() == 0
    _, dropless = jax.jit(lambda x: mixture(x, router, kernels, jax.nn.silu, MixtureOfExperts(EXPERTS, CHOSEN, None)))(x)
    assert float(dropless.dropped) == 0
