"""What is kept, and what a run that goes on may not change."""

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.settings import CheckpointSettings, Settings, to_dict
from jaxlm.training.checkpoints import FIXED_KEYS, MODEL_KEYS, Checkpoints, refuse_changes
from jaxlm.training.step import TrainState

VAL_LOSSES = {2: 5.0, 4: 1.0, 6: None, 8: 3.0, 10: float("nan"), 12: 4.0, 14: 2.0, 16: 9.0}


def small_state(step: int) -> TrainState:
    return TrainState(jax.numpy.int32(step), jax.numpy.zeros(2, jax.numpy.uint32), {"kernel": jax.numpy.full(3, float(step))},
                      {"mean": jax.numpy.zeros(3)})


@pytest.mark.parametrize(("keep", "kept"), [
    (CheckpointSettings(keep_last=2, keep_best=0), [14, 16]),
    (CheckpointSettings(keep_last=1, keep_best=1), [4, 16]),
    (CheckpointSettings(keep_last=1, keep_best=3), [4, 8, 14, 16]),
    (CheckpointSettings(keep_last=1, keep_best=0, keep_every_steps=6), [6, 12, 16]),
    (CheckpointSettings(keep_last=3, keep_best=1, keep_every_steps=8), [4, 8, 12, 14, 16]),
])
def test_the_newest_the_regular_and_the_best_are_kept(tmp_path, keep, kept):
    for some in ([2, 4, 6, 8], [10, 12, 14, 16]):  # the second time as a run that goes on
        with Checkpoints(tmp_path, keep) as checkpoints:
            for step in some:
                checkpoints.save(small_state(step), step, {"tokenizer": {"é": [1, None]}}, VAL_LOSSES[step])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == kept
        assert checkpoints.choose(None) == 16
        assert [checkpoints.metadata(step) for step in kept] == [{"tokenizer": {"é": [1, None]}, "step": step} for step in kept]
        with pytest.raises(UserError, match=r"checkpoint.step=2: not in .*there are .*16"):
            checkpoints.choose(2)


def test_reading_needs_a_folder_and_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoints folder"):
        Checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no complete checkpoint yet"):
        checkpoints.choose(None)


def test_saving_does_not_wait_for_the_state_to_stay(tmp_path):
    state = small_state(1)
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        checkpoints.save(state, 1, {}, None)
        state.params["kernel"].delete()  # as the step does, which donates its state
    with Checkpoints(tmp_path) as checkpoints:
        loaded = checkpoints._checkpointer.load_checkpointables(1, {"params": None})["params"]
    np.testing.assert_array_equal(loaded["kernel"], np.ones(3))


# ---- resume ----------------------------------------------------------------------------------------------------------

def changed(**overrides: object) -> dict:
    values = to_dict(Settings())
    for name, value in overrides.items():
        section, _, key = name.rpartition("__")
        inner = values
        for part in section.split("__") if section else []:
            inner = inner[part]
        inner[key] = value
    return values


@pytest.mark.parametrize(("key", "value"), [
    ("model.num_layers", 13), ("model.tied_embeddings", False), ("optimizer.name", "lamb"), ("optimizer.b1", 0.0), ("seed", 1),
    ("data.global_batch_size", 16), ("data.sequence_length", 64), ("data.packing", "documents"),
    ("data.masking.probability", 0.2),
])
def test_what_the_state_or_the_examples_depend_on_may_not_change(tmp_path, key, value):
    before, now = changed(), changed(**{key.replace(".", "__"): value})
    refuse_changes(FIXED_KEYS, before, before, tmp_path)
    with pytest.raises(UserError, match=rf"^{key}={value}: the checkpoints in {tmp_path} were made with .*; set it back"):
        refuse_changes(FIXED_KEYS, before, now, tmp_path)


@pytest.mark.parametrize(("key", "value"), [
    ("model.dropout", 0.1), ("model.attention", "xla"), ("optimizer.learning_rate", 1.0), ("train.precision", "bfloat16"),
    ("mesh.fsdp", 8), ("train.gradient_accumulation", 2), ("data.prefetch", 1),
])
def test_the_rest_may_change(tmp_path, key, value):
    refuse_changes(FIXED_KEYS, changed(), changed(**{key.replace(".", "__"): value}), tmp_path)


def test_only_the_architecture_counts_where_only_parameters_are_read(tmp_path):
    refuse_changes(MODEL_KEYS, changed(), changed(seed=1, optimizer__name="sgd"), tmp_path)
    with pytest.raises(UserError, match=r"model\.num_heads"):
        refuse_changes(MODEL_KEYS, changed(), changed(model__num_heads=6), tmp_path)


def test_every_fixed_key_is_a_key():
    assert set(FIXED_KEYS) <= {name for name, *_ in config.key_table()}
