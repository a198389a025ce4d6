"""Eight emulated CPU devices for every test, and the tiny models and batches that the tests of models and training
share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# In the environment, so that processes started by tests have it too. Compiling is most of the tests' time: what is
# compiled stays for the next time. Without optimizations tiny programs compile twice as fast, to the same results.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.model import Model, Params
from jaxlm.parallel.mesh import make_mesh
from jaxlm.settings import MeshSettings, ModelSettings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # a backend starts only once: now, before a test asks for fewer

ROWS, LENGTH, VOCAB, PREDICTIONS = 16, 16, 300, 4  # the vocabulary's table has 384 rows
SHAPE = {"num_layers": 2, "num_heads": 8, "hidden_size": 32, "vocab_size": VOCAB, "max_length": LENGTH}
MODELS = {"gpt": ModelSettings(family="gpt", **SHAPE), "bert": ModelSettings(family="bert", next_sentence=True, **SHAPE),
          "moe": ModelSettings(family="gpt", num_experts=4, activation="swiglu", **SHAPE)}
MESHES = {
    "one": MeshSettings(),
    "data8": MeshSettings(data=8),
    "fsdp8": MeshSettings(fsdp=8),
    "tensor8": MeshSettings(tensor=8),
    "2x2x2": MeshSettings(data=2, fsdp=2, tensor=2),
    "stage2data4": MeshSettings(stage=2, data=4),
    "stage2fsdp2tensor2": MeshSettings(stage=2, fsdp=2, tensor=2),
    "stage2context2data2": MeshSettings(stage=2, context=2, data=2),
    "expert4data2": MeshSettings(expert=4, data=2),
    "stage2expert2tensor2": MeshSettings(stage=2, expert=2, tensor=2),
    "context8": MeshSettings(context=8),
    "fsdp2context2tensor2": MeshSettings(fsdp=2, context=2, tensor=2),
}


def _batch(family: str, seed: int) -> dict[str, np.ndarray]:
    """Random arrays of the kinds that `jaxlm.data.batches` describes; rows differ in length and in number of
    predictions."""
    random = np.random.default_rng(seed)
    ends = random.integers(LENGTH // 2, LENGTH + 1, size=(ROWS, 1))
    slots = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))
    real = slots < ends
    batch = {"tokens": random.integers(0, VOCAB, (ROWS, LENGTH)) * real}
    if family in ("gpt", "moe"):  # two documents in each row, then padding
        second = slots >= LENGTH // 3
        batch |= {"targets": np.roll(batch["tokens"], -1, axis=1), "loss_mask": real & (slots < LENGTH - 1),
                  "segment_ids": (1 + second) * real, "positions": np.where(second, slots - LENGTH // 3, slots)}
    else:
        batch |= {"segment_ids": 1 * real, "token_types": (slots > LENGTH // 3) & real,
                  "masked_positions": np.sort(random.permuted(slots, axis=1)[:, :PREDICTIONS], axis=1),
                  "masked_targets": random.integers(0, VOCAB, (ROWS, PREDICTIONS)),
                  "masked_mask": random.random((ROWS, PREDICTIONS)) < np.linspace(0.2, 1, ROWS)[:, None],
                  "next_sentence": random.integers(0, 2, ROWS), "next_sentence_mask": np.arange(ROWS) != 3}
    return {name: array if array.dtype == bool and name.endswith("mask") else array.astype(np.int32)
            for name, array in batch.items()}


@pytest.fixture(scope="session")
def models() -> dict[str, ModelSettings]:
    """Settings of a tiny gpt and a tiny bert that every mesh of `meshes` can hold."""
    return MODELS


@pytest.fixture(scope="session")
def make_batch() -> Callable[[str, int], dict[str, np.ndarray]]:
    """`make_batch(family, seed)`: a batch for `models[family]`."""
    return _batch


@pytest.fixture(scope="session")
def random_params() -> Callable[[Model], Params]:
    """`random_params(model)`: normal numbers everywhere, no bias 0 and no scale 1. (`Model.init` takes long to
    compile.)"""
    def draw(model: Model) -> Params:
        random = np.random.default_rng(0)
        return jax.tree.map(lambda leaf: jnp.asarray(random.normal(scale=0.2, size=leaf.shape), leaf.dtype), model.shapes)

    return draw


@pytest.fixture(scope="session")
def meshes() -> dict[str, jax.sharding.Mesh]:
    """One device, and eight along each axis and all of them."""
    return {name: make_mesh(mesh, jax.devices()[: 1 if name == "one" else 8]) for name, mesh in MESHES.items()}


@pytest.fixture(scope="session")
def array_shapes() -> Callable[..., set[tuple[int, ...]]]:
    """`array_shapes(function, *arguments)`: the shape of every array that the traced function computes, inside loops
    too."""
    def walk(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
        for equation in jaxpr.eqns:
            yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from walk(getattr(inner, "jaxpr", inner))

    return lambda function, *arguments: set(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


class Golden:
    """Reads what transformers computed and compares with it."""

    def assert_same(self, got: Any, want: Any) -> None:
        """1e-4 of each array's norm. What theory makes zero, like the gradient of a key's bias, is rounding in both:
        1e-5."""
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for (path, one), other in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True):
            assert one.shape == other.shape, path
            assert np.linalg.norm(np.asarray(one) - other) <= max(1e-4 * np.linalg.norm(other), 1e-5), path


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()
