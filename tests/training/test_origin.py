"""What a run begins with: another run's weights, as far as they fit, on any mesh; and checkpoints of older versions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm import config
from jaxlm.checkpoints.format1 import old_place, todays_place
from jaxlm.data.corpus import Corpus
from jaxlm.errors import UserError
from jaxlm.models.model import Model
from jaxlm.reporting.metrics import read_metrics
from jaxlm.settings import TaskSettings
from jaxlm.tasks.find import find_task
from jaxlm.training.step import make_trainer
from jaxlm.training.transfer import RunWeights, begin_with

GOLDEN = Path(__file__).parents[1] / "golden" / "format1"
# Steps 5 to 8 of that run, uninterrupted, by the version that wrote it (commit ec849c5): loss, and validation loss.
WANTED = [4.405981063842773, 4.370731830596924, 4.347691059112549, 4.326294898986816], 4.360240372744474


def begun(run_dir, mesh, tokenizer=None, seed=1, **changes):
    """Parameters of a run on `mesh` that begins with `run_dir`'s, its fresh ones, and the lines that are said."""
    settings = config.load(run_dir)
    model = replace(settings.model, **{key: value for key, value in changes.items() if key != "init_positions"})
    settings = replace(settings, model=model, init_positions=changes.get("init_positions", "fresh"))
    if mesh.shape["stage"] > 1:
        settings = replace(settings, train=replace(settings.train, gradient_accumulation=mesh.shape["stage"]))
    trainer = make_trainer(Model(model, settings.train, find_task(settings).objectives()), settings, mesh)
    own = tokenizer or RunWeights(run_dir).tokenizer
    with jax.set_mesh(mesh):
        fresh = trainer.init(seed).params
        kept = jax.tree.map(np.asarray, fresh)
        params, lines = begin_with(RunWeights(run_dir), trainer, own, fresh)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == trainer.params.shardings
    return jax.tree.map(np.asarray, params), kept, lines


@pytest.mark.parametrize("mesh", ["one", "fsdp8", "2x2x2", "stage2data4"])
def test_any_mesh_begins_with_the_same_weights(mesh, finished, meshes, restore):
    _, state = restore(finished)
    params, _, lines = begun(finished, meshes[mesh])
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(got, want)
    assert lines == [f"weights from step 12 of {finished} ({len(jax.tree.leaves(params))} arrays)"]


def test_longer_positions_are_fresh_or_stretched(finished, meshes, restore):
    want = np.asarray(restore(finished)[1].params["position_embedding"]["embedding"])
    params, fresh, lines = begun(finished, meshes["2x2x2"], max_length=48)
    table = params["position_embedding"]["embedding"]
    np.testing.assert_array_equal(table[:32], want)
    np.testing.assert_array_equal(table[32:], fresh["position_embedding"]["embedding"][32:])
    assert lines[1:] == ["init: learned positions: 32 taken, 16 fresh"]
    params, _, lines = begun(finished, meshes["one"], max_length=63, init_positions="interpolate")
    at = np.linspace(0, 31, 63)
    by_hand = np.stack([np.interp(at, np.arange(32), column) for column in want.T], axis=1)
    np.testing.assert_allclose(params["position_embedding"]["embedding"], by_hand, atol=1e-6)
    assert lines[1:] == ["init: learned positions: 32 rows stretched to 63"]
    params, _, lines = begun(finished, meshes["one"], max_length=16)
    np.testing.assert_array_equal(params["position_embedding"]["embedding"], want[:16])
    assert lines[1:] == ["init: learned positions: the first 16 of 32 taken"]


def test_another_vocabulary_takes_rows_by_the_text_of_their_tokens(finished, meshes, restore, folder):
    """Characters of another text; an output table and its heads follow the same rows."""
    want = np.asarray(restore(finished)[1].params["token_embedding"]["embedding"])
    before = Corpus(folder / "one").tokenizer
    own = type(before).of("xyzabcdehnot ", end_mark=True)
    params, fresh, lines = begun(finished, meshes["2x2x2"], own, vocab_size=own.vocab_size)
    table, new = (tree["token_embedding"]["embedding"] for tree in (params, fresh))
    known = {letter: number for number, letter in enumerate(before.characters)}
    rows = [before.special.eos if number == own.special.eos else known.get(own.characters[number], -1)
            for number in range(own.vocab_size)]
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(table[number], new[number] if row < 0 else want[row])
    found = sum(row >= 0 for row in rows)
    assert 0 < found < own.vocab_size
    assert lines[1] == (f"init: another tokenizer: {found} of {own.vocab_size} tokens have the weights of the same token there, "
                        f"{own.vocab_size - found} are fresh")


def test_heads_are_taken_where_they_are_and_the_rest_is_said(finished, meshes):
    """The output table of the trunk's embedding stays; an untied head is fresh."""
    params, fresh, lines = begun(finished, meshes["one"], tied_embeddings=False, rope_theta=5.0)
    np.testing.assert_array_equal(params["heads"]["next_token"]["embedding"], fresh["heads"]["next_token"]["embedding"])
    assert lines[1:] == ["init: model.rope_theta was 10000.0 there, and is 5.0 here",
                         "init: model.tied_embeddings was true there, and is false here", "init: heads.next_token: fresh"]


def test_a_classifier_takes_the_pooler_of_the_next_sentence(meshes):
    """BERT's pooler is pretrained with sentence pairs; the classifier on it is fresh, other heads are left out."""
    settings = config.load(GOLDEN)
    task = TaskSettings(name="text_classification", problem="single_label", labels=["a", "b", "c"])
    settings = replace(settings, task=task, model=replace(settings.model, next_sentence=False))
    trainer = make_trainer(Model(settings.model, settings.train, find_task(settings).objectives()), settings, meshes["2x2x2"])
    weights = RunWeights(GOLDEN)
    with jax.set_mesh(meshes["2x2x2"]):
        fresh = trainer.init(0).params
        kept = np.asarray(fresh["heads"]["classification"]["classifier"]["kernel"])
        params, lines = begin_with(weights, trainer, weights.tokenizer, fresh)
        own = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=jax.sharding.NamedSharding(meshes["2x2x2"], PartitionSpec()))
        want = weights.read({("heads", "next_sentence", "pooler", "kernel"): own})[0].popitem()[1]
    head = params["heads"]["classification"]
    np.testing.assert_array_equal(head["pooler"]["kernel"], want)
    np.testing.assert_array_equal(head["classifier"]["kernel"], kept)
    said = "\n".join(lines)
    for words in ("heads.classification.pooler.kernel from heads.next_sentence.pooler.kernel",
                  "heads.classification.classifier: fresh", "heads.masked_token.transform of step 4",
                  "heads.next_sentence.classifier of step 4"):
        assert words in said


@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_size": 64}, "model.hidden_size is 32 there, and 64 here"),
    ({"num_layers": 3}, "model.num_layers is 2 there, and 3 here"),
    ({"qk_norm": True}, "has no blocks.attention.key_norm.scale, which this model has"),
])
def test_another_trunk_is_refused(finished, meshes, changes, words):
    with pytest.raises(UserError, match=words):
        begun(finished, meshes["one"], **changes)


def test_a_run_goes_on_from_its_own_checkpoint_before_init(finished, folder, jaxlm, run_file, capfd):
    """The model and the tokenizer need not be said again; then init may be gone."""
    first, second = folder / "origin", folder / "second"
    shutil.copytree(finished, first)
    (folder / "second.yaml").write_text(
        f"init: {first}\ndata: {{raw: {folder / 'two.txt'}, document: line, global_batch_size: 8}}\ntrain: {{steps: 2}}\n"
        "logging: {tensorboard: false}\ndevices: {platform: cpu, count: 1}\n")
    assert jaxlm("train", folder / "second.yaml", f"run_dir={second}") == 0
    assert f"weights from step 12 of {first}" in capfd.readouterr().err
    again = config.load(second)
    assert again.model == replace(config.load(first).model) and again.data.tokenizer == str(first)
    assert Corpus(second / "corpus").tokenizer.digest == Corpus(folder / "one").tokenizer.digest
    before = next(row["loss"] for row in read_metrics(finished) if row["step"] == 1 and "loss" in row)
    assert next(row["loss"] for row in read_metrics(second) if "loss" in row) < before - 0.3  # it knows the words
    shutil.rmtree(first)
    assert jaxlm("train", second, "train.steps=3") == 0
    assert "resuming from step 2 of 3" in capfd.readouterr().err


@pytest.mark.parametrize(("init", "words"), [
    ("{folder}/nowhere", "neither a run directory (config.yaml) nor a Hugging Face folder (config.json)"),
    ("{finished}/checkpoints", "did you mean '{finished}'?"), ("{folder}/one.txt", "neither a run directory"),
])
def test_what_is_no_origin_is_refused(init, words, finished, folder, jaxlm, run_file, capfd):
    names = {"folder": folder, "finished": finished}
    assert jaxlm("train", run_file, f"run_dir={folder / 'never'}", f"init={init.format(**names)}") == 2
    assert words.format(**names) in capfd.readouterr().err and not (folder / "never").exists()


# ---- older checkpoints -----------------------------------------------------------------------------------------------

def test_a_checkpoint_of_format_1_goes_on_as_it_would_have(tmp_path, jaxlm, capfd):
    """A BERT with both heads, dropout and LAMB, written by the version before heads stood apart from the trunk."""
    run_dir = tmp_path / "bert"
    shutil.copytree(GOLDEN, run_dir)
    assert json.loads((run_dir / "checkpoints" / "4" / "manifest.json").read_text())["format"] == 1
    assert jaxlm("train", run_dir, "train.steps=8") == 0
    said = capfd.readouterr().err
    assert "resuming from step 4 of 8" in said and "changed at step 4: model." not in said
    losses = [row["loss"] for row in read_metrics(run_dir) if "loss" in row and row["step"] > 4]
    assert losses == pytest.approx(WANTED[0], rel=1e-5)
    assert read_metrics(run_dir)[-1]["val_loss"] == pytest.approx(WANTED[1], rel=1e-5)
    assert json.loads((run_dir / "checkpoints" / "8" / "manifest.json").read_text())["format"] == 2


def test_old_places_of_parameters_and_of_the_optimizers_copies():
    places = {("params", "heads", "next_token", "embedding"): ("params", "head", "embedding"),
              ("mu", "heads", "masked_token", "bias"): ("mu", "mlm_bias"),
              ("0", "nu", "heads", "masked_token", "norm", "scale"): ("0", "nu", "mlm_norm", "scale"),
              ("heads", "next_sentence", "pooler", "kernel"): ("pooler", "kernel"),
              ("heads", "next_sentence", "classifier", "bias"): ("next_sentence_head", "bias"),
              ("blocks", "mlp", "up", "kernel"): ("blocks", "mlp", "up", "kernel")}
    for now, before in places.items():
        assert (old_place(now), todays_place(before)) == (before, now)
