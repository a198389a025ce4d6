"""Objectives of labelled rows against their formulas in NumPy, for every pooler, and whatever the mesh."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import scipy.special

from jaxlm.models.labelled import OneLabelObjective, ScoreObjective, SeveralLabelsObjective
from jaxlm.models.model import Model
from jaxlm.settings import ModelSettings, TrainSettings
from jaxlm.training.step import batch_sharding

CLASSES = 3
SHAPE = {"num_layers": 2, "num_heads": 2, "hidden_size": 16, "vocab_size": 300, "max_length": 32}
FAMILIES = ("bert", "distilbert", "modernbert", "gpt")  # tanh, relu, gelu and norm, no pooler
OBJECTIVES = {"one": OneLabelObjective(CLASSES), "several": SeveralLabelsObjective(CLASSES), "score": ScoreObjective(1)}


def labelled_batch(kind, rows=16, length=16, seed=0):
    """Rows of different lengths; two of them without a label."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, length + 1, rows)
    slots = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    real = slots < lengths[:, None]
    batch = {"tokens": (random.integers(0, 300, (rows, length)) * real).astype(np.int32), "segment_ids": real.astype(np.int32),
             "positions": slots * real, "last_position": (lengths - 1).astype(np.int32),
             "label_mask": ~np.isin(np.arange(rows), (2, rows - 1))}
    if kind == "several":
        return batch | {"labels": random.random((rows, CLASSES)) < 0.4}
    label = random.integers(0, CLASSES, rows).astype(np.int32) if kind == "one" else random.normal(2, 3, rows).astype(np.float32)
    return batch | {"label": label}


def erf_gelu(x):
    return x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))


def head_in_numpy(states, batch, params, settings):
    """From the trunk's states [B, T, D] to logits, in float64."""
    [head] = params["heads"].values()
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), head)
    rows = np.arange(len(states))
    state = states[rows, batch["last_position"] if settings.causal else 0].astype(np.float64)
    if settings.pooling == "mean":
        present = batch["segment_ids"][..., None] > 0
        state = (states.astype(np.float64) * present).sum(1) / np.maximum(present.sum(1), 1)
    if settings.pooler:
        state = state @ head["pooler"]["kernel"] + head["pooler"].get("bias", 0)
        state = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0), "gelu": erf_gelu}[settings.pooler](state)
    if settings.pooler == "gelu":
        state = (state - state.mean(-1, keepdims=True)) / np.sqrt(state.var(-1, keepdims=True) + settings.norm_epsilon)
        state = state * head["norm"]["scale"]
    assert ("bias" in head["classifier"]) == (not settings.causal)
    return state @ head["classifier"]["kernel"] + head["classifier"].get("bias", 0)


def expected(kind, logits, batch):
    """Loss sums, counts and figures by their definitions, from the rows that have a label."""
    kept = batch["label_mask"]
    logits = logits[kept]
    if kind == "score":
        return {"loss": np.sum((logits[:, 0] - batch["label"][kept]) ** 2), "count": kept.sum()}
    if kind == "one":
        label = batch["label"][kept]
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        counts = np.zeros((CLASSES, CLASSES))
        np.add.at(counts, (label, logits.argmax(1)), 1)
        return {"loss": -np.log(probabilities[np.arange(len(label)), label]).sum(), "count": kept.sum(), "counts": counts,
                "all_right": np.sum(logits.argmax(1) == label)}
    labels, probabilities = batch["labels"][kept], 1 / (1 + np.exp(-logits))
    said = probabilities > 0.5
    losses = -np.where(labels, np.log(probabilities), np.log(1 - probabilities))
    counts = np.stack([(one & other).sum(0) for one, other in (
        (labels, said), (~labels, said), (labels, ~said), (~labels, ~said))], axis=1)
    return {"loss": losses.mean(1).sum(), "count": kept.sum(), "counts": counts, "all_right": (labels == said).all(1).sum()}


@pytest.fixture(scope="module")
def made(random_params):
    """(family, kind) -> the model and its parameters."""
    def get(family, kind, **changes):
        model = Model(replace(ModelSettings(family=family, **SHAPE), **changes), TrainSettings(), (OBJECTIVES[kind],))
        return model, random_params(model)

    return get


@pytest.mark.parametrize(("family", "kind", "pooling"), [
    *[(family, "one", None) for family in FAMILIES], ("bert", "several", None), ("gpt", "score", None),
    ("modernbert", "one", "mean"), ("gpt", "one", "mean")])
def test_terms_answers_and_verdicts_are_those_of_the_formulas(family, kind, pooling, made):
    model, params = made(family, kind, pooling=pooling)
    batch = labelled_batch(kind)
    states = np.asarray(jax.jit(lambda params, batch: model.bind(params).states(batch).x)(params, batch))
    logits = head_in_numpy(states, batch, params, model.settings)
    terms, verdicts = jax.jit(model.evaluated)(params, batch)
    [terms], want = terms.values(), expected(kind, logits, batch)
    assert {name for name, value in terms._asdict().items() if value is not None} == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(getattr(terms, name), value, rtol=1e-5, err_msg=name)
    [count] = model.counts(batch).values()
    assert int(count) == want["count"] == 14
    answers = jax.jit(model.answers)(params, {name: array for name, array in batch.items() if not name.startswith("label")})
    said = {"one": scipy.special.softmax(logits, axis=1), "several": scipy.special.expit(logits), "score": logits[:, 0]}[kind]
    np.testing.assert_allclose(answers["score" if kind == "score" else "probabilities"], said, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(verdicts["mask"], batch["label_mask"])
    rows = np.arange(len(said))
    if kind == "one":
        off = np.where(said.argmax(1) == batch["label"], 0, 1 - said[rows, batch["label"]])
        np.testing.assert_array_equal(verdicts["predicted"], said.argmax(1))
        np.testing.assert_allclose(verdicts["probability"], said.max(1), rtol=1e-4)
    elif kind == "several":
        each = np.where((said > 0.5) == batch["labels"], 0, np.abs(said - batch["labels"]))
        off = each.max(1)
        np.testing.assert_array_equal(verdicts["which"], each.argmax(1))
        np.testing.assert_array_equal(verdicts["label"], batch["labels"][rows, each.argmax(1)])
    else:
        off = np.abs(said - batch["label"])
    np.testing.assert_allclose(verdicts["error"], off, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_an_answer_depends_on_its_row_alone(family, made):
    """Not on the padding, nor on the other rows."""
    model, params = made(family, "one")
    answer = jax.jit(model.answers)
    batch = {name: array for name, array in labelled_batch("one").items() if not name.startswith("label")}
    want = np.asarray(answer(params, batch)["probabilities"])
    longer = {name: np.pad(array, [(0, 0), (0, 16)]) if array.ndim > 1 else array for name, array in batch.items()}
    np.testing.assert_allclose(answer(params, longer)["probabilities"], want, rtol=1e-5)
    few = {name: array[5:8] for name, array in batch.items()}
    np.testing.assert_allclose(answer(params, few)["probabilities"], want[5:8], rtol=1e-5)


@pytest.mark.parametrize(("mesh", "family", "kind", "pooling"), [
    ("data8", "bert", "several", None), ("2x2x2", "modernbert", "one", None), ("fsdp2context2tensor2", "gpt", "one", None),
    pytest.param("fsdp2context2tensor2", "gpt", "one", "mean", marks=pytest.mark.slow),
    pytest.param("2x2x2", "gpt", "score", None, marks=pytest.mark.slow),
    pytest.param("stage2fsdp2tensor2", "bert", "one", "mean", marks=pytest.mark.slow),
    pytest.param("context8", "bert", "one", None, marks=pytest.mark.slow)])
def test_eight_devices_say_what_one_says(mesh, family, kind, pooling, made, meshes):
    """Also where sequences are cut, so that the state of a row is on one of the devices."""
    def found(mesh):
        model, params = made(family, kind, num_heads=8, hidden_size=32, pooling=pooling)
        with jax.set_mesh(mesh):
            batch = jax.device_put(labelled_batch(kind), batch_sharding(mesh))
            gradient = jax.grad(lambda params: next(iter(model.terms(params, batch).values())).loss)
            return jax.device_get((*jax.jit(model.evaluated)(params, batch), jax.jit(gradient)(params)))

    for got, want in zip(jax.tree.leaves(found(meshes[mesh])), jax.tree.leaves(found(meshes["one"])), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 1e-5 * np.linalg.norm(want) + 1e-6


def test_dropout_stands_before_the_classifier_too(made):
    """With a trunk that drops nothing of what is looked at: the loss still changes with the key."""
    model, params = made("bert", "score", dropout=0.5, attention_dropout=0.0)
    params = jax.tree.map(np.array, params)
    params["embedding_norm"]["scale"] *= 0  # the trunk's dropout acts on what is 0 afterwards
    params["blocks"]["attention_norm"]["scale"] *= 0
    params["blocks"]["mlp_norm"]["scale"] *= 0
    batch = labelled_batch("score")
    losses = jax.jit(lambda params, keys: model.terms(params, batch, keys)["regression"].loss)
    keys = [jax.random.split(jax.random.key(seed), 16) for seed in (0, 0, 1)]
    first, again, other = (float(losses(params, key)) for key in keys)
    assert first == again != other
