"""What is kept, and what a run that goes on may not change."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.checkpoints.checkpoints import Best, Checkpoints
from jaxlm.checkpoints.manifest import commit, read_manifest
from jaxlm.errors import UserError
from jaxlm.models.model import Model
from jaxlm.parallel.layout import reorder_layers
from jaxlm.parallel.mesh import make_mesh
from jaxlm.safety.guards import nothing_yet
from jaxlm.settings import CheckpointSettings, MeshSettings, OptimizerSettings, Settings, TrainSettings, to_dict
from jaxlm.storage.files import sizes_below
from jaxlm.training.changes import FIXED_KEYS, MODEL_KEYS, refuse_changes
from jaxlm.training.step import TrainState, as_saved, from_saved, make_trainer

VAL_LOSSES = {2: 5.0, 4: 1.0, 6: None, 8: 3.0, 10: float("nan"), 12: 4.0, 14: 2.0, 16: 9.0}


def small_state(step: int) -> TrainState:
    return TrainState(jax.numpy.int32(step), jax.numpy.zeros(2, jax.numpy.uint32), {"kernel": jax.numpy.full(3, float(step))},
                      {"mean": jax.numpy.zeros(3)}, nothing_yet())


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
                checkpoints.save(as_saved(small_state(step)), step, {"tokenizer": {"é": [1, None]}},
                                 {"val_loss": VAL_LOSSES[step], "val_accuracy": 0.5})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == kept
        assert checkpoints.choose(None) == 16
        assert [checkpoints.metadata(step) for step in kept] == [{"tokenizer": {"é": [1, None]}}] * len(kept)
        with pytest.raises(UserError, match=r"checkpoint.step=2: not in .*there are .*16"):
            checkpoints.choose(2)


@pytest.mark.parametrize(("best", "kept", "found"), [
    (Best("val_accuracy", "max"), [4, 6], (4, 0.75)),  # of two as accurate the one with the lower loss
    (Best("val_mean_squared_error", "min"), [2, 6], (2, 0.25)),
    (Best(), [4, 6], (4, 0.5)),
    (Best("val_f1", "max"), [6], None)])
def test_the_best_are_so_by_the_task_s_figure(tmp_path, best, kept, found):
    rows = {2: {"val_loss": 1.0, "val_accuracy": 0.75, "val_mean_squared_error": 0.25},
            4: {"val_loss": 0.5, "val_accuracy": 0.75, "val_mean_squared_error": None}, 6: {"val_loss": 0.9, "val_accuracy": 0.5}}
    for some in ([2], [4, 6]):
        with Checkpoints(tmp_path, CheckpointSettings(keep_last=1, keep_best=1), best=best) as checkpoints:
            for step in some:
                checkpoints.save(as_saved(small_state(step)), step, {}, rows[step])
    assert (checkpoints.steps, checkpoints.best) == (kept, found)


def test_a_checkpoint_of_before_there_were_figures_counts_by_its_loss(tmp_path):
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        checkpoints.save(as_saved(small_state(2)), 2, {}, {"val_loss": 1.0})
    folder = tmp_path / "checkpoints" / "2"
    about = read_manifest(folder)
    older = {name: value for name, value in about.items() if name not in ("figures", "files", "digest")}
    commit(folder, older, about["files"], num_processes=1)
    with Checkpoints(tmp_path, CheckpointSettings(keep_last=1)) as checkpoints:
        assert checkpoints.best == (2, 1.0)
        for step in (4, 6):
            checkpoints.save(as_saved(small_state(step)), step, {}, {"val_loss": 2.0})
    assert checkpoints.steps == [2, 6]


def test_what_was_made_to_stay_stays_whatever_a_later_start_keeps(tmp_path):
    for keep, some in ((CheckpointSettings(keep_every_steps=6), [4, 6]), (CheckpointSettings(keep_last=1, keep_best=0), [8, 10])):
        with Checkpoints(tmp_path, keep) as checkpoints:
            for step in some:
                checkpoints.save(as_saved(small_state(step)), step, {"settings": to_dict(Settings(checkpoint=keep))}, None)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [6, 10]


def test_reading_needs_a_folder_and_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoints folder"):
        Checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no complete checkpoint yet"):
        checkpoints.choose(None)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints: a file; expected the folder of the run's checkpoints"):
        Checkpoints(tmp_path, CheckpointSettings())


def save_two(run_dir: Path) -> None:
    with Checkpoints(run_dir, CheckpointSettings()) as checkpoints:
        for step in (1, 2):
            checkpoints.save(as_saved(small_state(step)), step, {}, None)


def test_a_turned_bit_in_any_file_is_noticed_and_the_one_before_taken(tmp_path, capsys):
    save_two(tmp_path)
    newest = tmp_path / "checkpoints" / "2"
    for name in sizes_below(newest):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(bytes([content[0] ^ 1]) + content[1:] if content else b"\0")
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.choose(None) == 1
        assert f"checkpoints/2/{name}: damaged" in capsys.readouterr().err
        (newest / name).write_bytes(content)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.choose(None) == 2
    (newest / "manifest.json").write_text("{")
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        assert checkpoints.choose(None) == 1 and checkpoints.steps == [1]
    assert (tmp_path / "checkpoints" / "2.damaged" / "manifest.json").exists()


def test_where_none_is_good_each_is_named(tmp_path):
    save_two(tmp_path)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "manifest.json").write_text("{")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.choose(None)
    assert all(f"checkpoints/{step}/manifest.json: " in str(error.value) for step in (1, 2))
    assert ": no checkpoint is good; " in str(error.value) and (tmp_path / "checkpoints" / "2").exists()


def test_saving_does_not_wait_for_the_state_to_stay(tmp_path):
    state = small_state(1)
    with Checkpoints(tmp_path, CheckpointSettings()) as checkpoints:
        checkpoints.save(as_saved(state), 1, {}, None)
        state.params["kernel"].delete()  # as the step does, which donates its state
    with Checkpoints(tmp_path) as checkpoints:
        loaded = checkpoints._load(1, {"params": None})["params"]
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


WITHOUT_START = {"data__packing": "documents", "model__family": "bert", "model__causal": False}


def test_a_run_from_before_start_tokens_does_not_silently_get_other_examples(tmp_path):
    """Issue 14, line 6: its checkpoints lack data.start_token; with false it goes on as it was, and only such runs
    are asked."""
    old = changed(data__packing="documents")
    del old["data"]["start_token"]
    with pytest.raises(UserError, match=r"^data\.start_token=True: the checkpoints in .* were made with False"):
        refuse_changes(FIXED_KEYS, old, changed(data__packing="documents"), tmp_path)
    refuse_changes(FIXED_KEYS, old, changed(data__packing="documents", data__start_token=False), tmp_path)
    for keys in ({"data__packing": "concatenate"}, WITHOUT_START):
        old = changed(**keys)
        del old["data"]["start_token"]
        refuse_changes(FIXED_KEYS, old, changed(**keys), tmp_path)


def test_every_fixed_key_is_a_key():
    assert set(FIXED_KEYS) <= {name for name, *_ in config.key_table()}


# ---- from any mesh to any other --------------------------------------------------------------------------------------

LAYOUTS = {
    "one": MeshSettings(), "tensor8": MeshSettings(tensor=8), "expert4data2": MeshSettings(expert=4, data=2),
    "stage4fsdp2": MeshSettings(stage=4, fsdp=2), "stage2context2tensor2": MeshSettings(stage=2, context=2, tensor=2),
    "fsdp4context2": MeshSettings(fsdp=4, context=2),
}
CHANGES = {"stage2context2tensor2": {"stage_repeats": 2, "gradient_accumulation": 2}, "stage4fsdp2": {"gradient_accumulation": 4}}


def test_a_checkpoint_of_any_mesh_restores_on_any_other(tmp_path, models):
    """Of a mixture of experts of 4 layers: with and without stages, interleaved ones, experts cut or not, moments on
    the host."""
    runs = {}
    for name, layout in LAYOUTS.items():
        settings = Settings(
            mesh=layout, model=replace(models["moe"], num_layers=4), train=TrainSettings(**CHANGES.get(name, {})),
            optimizer=OptimizerSettings(offload=name == "fsdp4context2"))
        mesh = make_mesh(layout, jax.devices()[: 1 if name == "one" else 8])
        trainer = make_trainer(Model(settings.model, settings.train), settings, mesh)
        runs[name] = trainer, {"settings": to_dict(settings), "mesh": dict(mesh.shape)}
    random = np.random.default_rng(0)
    shapes, axes = runs["one"][0].layout.shapes, runs["one"][0].layout.axes
    numbers = jax.tree.map(lambda leaf: random.integers(0, 1000, leaf.shape).astype(leaf.dtype), shapes)
    for name, (trainer, metadata) in runs.items():
        state = jax.device_put(reorder_layers(numbers, axes, trainer.layout.layer_order), trainer.layout.shardings)
        with Checkpoints(tmp_path / name, CheckpointSettings()) as checkpoints:
            checkpoints.save(as_saved(state), 1, metadata, None)
        with Checkpoints(tmp_path / name) as checkpoints:
            for other, _ in runs.values():
                restored = from_saved(checkpoints.restore(1, other.saved))
                want = reorder_layers(numbers, axes, other.layout.layer_order)
                for got, leaf, sharding in zip(*map(jax.tree.leaves, (restored, want, other.layout.shardings)), strict=True):
                    assert got.sharding == sharding
                    np.testing.assert_array_equal(got, leaf)
