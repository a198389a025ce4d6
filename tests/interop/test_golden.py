"""Every family and head against transformers: logits, loss and the gradient of every weight, from its own folders."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.interop.parameters import as_tree, by_path, find_parameters, parameters_of
from jaxlm.interop.source import open_source, task_of
from jaxlm.models.model import Model
from jaxlm.parallel.layout import make_layout
from jaxlm.settings import Settings, TaskSettings
from jaxlm.tasks.find import find_task

FOLDERS = sorted(folder for folder in (Path(__file__).parents[1] / "golden" / "huggingface").iterdir()
                 if folder.name != "bert_bare")  # which has no head
IGNORED = -100
MESHES = ("one", "2x2x2")  # 1 and 8 devices


def expected(folder):
    """(inputs, outputs, gradients), each by name."""
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return [{name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}
            for group in ("inputs", "outputs", "gradients")]


def batch_of(inputs, heads):
    """What transformers was called with, as a batch."""
    tokens, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs.get("labels")
    batch = {"tokens": tokens, "segment_ids": mask}
    if "token_type_ids" in inputs:
        batch["token_types"] = inputs["token_type_ids"]
    if "next_token" in heads:  # transformers shifts the labels itself
        targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
        batch |= {"targets": np.maximum(targets, 0), "loss_mask": targets != IGNORED}
    if "masked_token" in heads:
        predicted = labels != IGNORED
        order = np.argsort(~predicted, axis=1, kind="stable")[:, : predicted.sum(1).max() + 1]
        chosen = np.take_along_axis(predicted, order, axis=1)
        batch |= {"masked_positions": order.astype(np.int32), "masked_mask": chosen,
                  "masked_targets": np.where(chosen, np.take_along_axis(labels, order, axis=1), 0)}
    if {"classification", "regression"} & set(heads):
        kind = "labels" if labels.ndim == 2 else "label"
        batch |= {kind: labels > 0 if labels.ndim == 2 else labels, "label_mask": np.ones(len(tokens), bool),
                  "last_position": mask.sum(1) - 1}
    if "next_sentence" in heads:
        batch |= {"next_sentence": inputs["next_sentence_label"], "next_sentence_mask": np.ones(len(tokens), bool)}
    return batch


def load(source, layout):
    found = find_parameters(source.foreign, source.tensors, parameters_of(source.foreign, layout), source.heads)
    assert not found.missing
    return as_tree({path: found.load(path, sharding, layout.layer_order)
                    for path, sharding in by_path(layout.shardings).items()})


def save(folder, arrays):
    """A safetensors file of float32 arrays, by the description of the format alone."""
    header, body = {}, b""
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes]}
        body += np.ascontiguousarray(array, "<f4").tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


def is_for_every_day(folder, mesh):
    """One folder of each family and three classifiers on one device, three on eight."""
    few = ("gpt2_classes", "bert_classes", "modernbert_classes") if mesh == "one" else ("gpt2", "qwen2", "modernbert")
    return folder.name in few or (mesh == "one" and "_" not in folder.name)


CASES = [pytest.param(folder, mesh, id=f"{folder.name}-{mesh}", marks=[] if is_for_every_day(folder, mesh) else pytest.mark.slow)
         for folder in FOLDERS for mesh in MESHES]


@pytest.mark.parametrize(("folder", "mesh_name"), CASES)
def test_logits_loss_and_every_gradient_equal_transformers(folder, mesh_name, meshes, golden, tmp_path):
    inputs, outputs, gradients = expected(folder)
    source, mesh = open_source(str(folder)), meshes[mesh_name]
    batch = batch_of(inputs, source.heads)
    settings = Settings(model=source.foreign.model, task=TaskSettings(**task_of(source.foreign)))
    model = Model(settings.model, settings.train, find_task(settings).objectives())
    layout = make_layout(mesh, model.axes, model.shapes, source.foreign.model.num_layers, 1)

    @jax.jit
    def run(params):
        def loss(params):
            network = model.bind(params)
            states = network.states(batch)
            terms = [objective.terms(network, states, batch) for objective in model.objectives]
            logits = [objective.every_logit(network, states, batch) for objective in model.objectives]
            return sum(term.loss / term.count for term in terms), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    with jax.set_mesh(mesh):
        (loss, logits), grads = run(load(source, layout))
        shutil.copy(folder / "config.json", tmp_path)
        save(tmp_path, gradients)
        wanted = load(open_source(str(tmp_path)), layout)
    if not source.foreign.model.first_norm:  # there is no such norm in transformers, and its scale here is not read
        scale = wanted["blocks"]["attention_norm"]["scale"]
        wanted["blocks"]["attention_norm"]["scale"] = scale.at[0].set(0)
    real = batch["segment_ids"] > 0  # what transformers computes for padding reads real tokens; ours reads padding
    got = {"loss": loss} | {head: each[real] if each.ndim == 3 else each
                            for head, each in zip(source.heads, logits, strict=True)}
    theirs = {"next_token": "logits", "masked_token": "prediction_logits" if "prediction_logits" in outputs else "logits",
              "next_sentence": "seq_relationship_logits", "classification": "logits", "regression": "logits"}
    want = {head: outputs[theirs[head]] for head in source.heads}
    want = {"loss": outputs["loss"]} | {head: each[real] if each.ndim == 3 else each for head, each in want.items()}
    golden.assert_same(got, want)
    golden.assert_same(grads, wanted)
