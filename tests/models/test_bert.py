"""BERT against transformers' BertForPreTraining, and what reaches its heads."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.models.model import Model
from jaxlm.settings import TrainSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "bert.npz"
IGNORED = -100


def gather_masked(labels):
    """masked_positions, masked_targets, masked_mask [B, P] of labels [B, T] that are -100 where nothing is
    predicted."""
    predicted = labels != IGNORED
    order = np.argsort(~predicted, axis=1, kind="stable")[:, : predicted.sum(1).max() + 1]  # and a slot to spare
    mask = np.take_along_axis(predicted, order, axis=1)
    return {"masked_positions": order.astype(np.int32), "masked_mask": mask,
            "masked_targets": np.where(mask, np.take_along_axis(labels, order, axis=1), 0).astype(np.int32)}


@pytest.fixture(scope="module")
def tiny(models, random_params):
    """A model, random parameters of it, and its compiled losses(batch)."""
    model = Model(models["bert"], TrainSettings())
    params = random_params(model)
    return model, params, jax.jit(lambda batch: model.terms(params, batch))


def test_tokens_see_both_sides_but_no_padding(tiny, make_batch):
    _, _, losses = tiny
    batch = make_batch("bert", 0)
    batch["masked_positions"][:] = batch["masked_positions"] % 8  # every row has 8 real tokens or more
    before = losses(batch)
    padding = batch["segment_ids"] == 0
    same = losses(batch | {"tokens": np.where(padding, 7, batch["tokens"])})
    assert padding.any() and jax.tree.all(jax.tree.map(np.array_equal, same, before))
    last = np.arange(16) == batch["segment_ids"].sum(1, keepdims=True) - 1
    changed = losses(batch | {"tokens": np.where(last, 7, batch["tokens"])})
    assert changed["masked_token"].loss != before["masked_token"].loss
    assert changed["next_sentence"].loss != before["next_sentence"].loss


def test_missing_token_types_are_type_0(tiny, make_batch):
    _, _, losses = tiny
    batch = make_batch("bert", 0) | {"token_types": np.zeros((16, 16), np.int32)}
    missing = losses({name: array for name, array in batch.items() if name != "token_types"})
    assert jax.tree.all(jax.tree.map(np.allclose, losses(batch), missing))


def test_masked_out_predictions_do_not_count(tiny, make_batch):
    model, _, losses = tiny
    batch = make_batch("bert", 0)
    sums = losses(batch)
    assert sums["masked_token"].count == batch["masked_mask"].sum() == model.counts(batch)["masked_token"]
    assert sums["next_sentence"].count == 15  # one row has none
    other = {"masked_targets": np.where(batch["masked_mask"], batch["masked_targets"], 5),
             "masked_positions": np.where(batch["masked_mask"], batch["masked_positions"], 0),
             "next_sentence": np.where(batch["next_sentence_mask"], batch["next_sentence"], 1 - batch["next_sentence"])}
    assert jax.tree.all(jax.tree.map(np.array_equal, losses(batch | other), sums))


def test_without_next_sentence_there_is_no_pooler(models, make_batch):
    model = Model(replace(models["bert"], next_sentence=False), TrainSettings())
    assert model.shapes["heads"].keys() == {"masked_token"}
    sums = jax.eval_shape(lambda params: model.terms(params, make_batch("bert", 0)), model.shapes)
    assert sums.keys() == {"masked_token"}


def test_only_masked_positions_reach_the_vocabulary(tiny, make_batch, array_shapes):
    model, _, _ = tiny
    batch = make_batch("bert", 0)
    shapes = array_shapes(jax.grad(lambda params: model.terms(params, batch)["masked_token"].loss), model.shapes)
    with_vocabulary = {shape for shape in shapes if 384 in shape or 300 in shape}
    assert (16, 4, 384) in with_vocabulary  # the logits: 4 predictions in each of 16 rows
    assert max(np.prod(shape) for shape in with_vocabulary) == 16 * 4 * 384
