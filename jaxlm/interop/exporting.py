"""`jaxlm export`: a run becomes a folder of transformers, which is read back and compared before it counts."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.console.progress import print_line
from jaxlm.console.units import counted, format_size
from jaxlm.data.sequences import start_token
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import RunError, UserError
from jaxlm.interop.configuration import CONFIG, Foreign, decisive, find_family, written
from jaxlm.interop.importing import read_params
from jaxlm.interop.model_card import model_card
from jaxlm.interop.parameters import by_path, file_shapes, parameters_of, write_parameters
from jaxlm.interop.safetensors import make_files, plan_shards
from jaxlm.interop.source import open_source
from jaxlm.interop.tokenizers import special_ids, write_tokenizer
from jaxlm.models.model import Params
from jaxlm.parallel.rules import cutting
from jaxlm.runtime.processes import is_main
from jaxlm.settings import Settings
from jaxlm.storage.files import delete, exists, names_in, write_json, write_text
from jaxlm.storage.remote import is_remote
from jaxlm.training.setup import lay_mesh
from jaxlm.training.stages import of_checkpoint
from jaxlm.training.step import Trainer, dropless
from jaxlm.training.trained import opened

GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
TOLERANCE = 1e-4  # of the largest logit
ROWS, LENGTH = 8, 16  # of the tokens that both are asked about


def export_run(settings: Settings) -> None:
    """Makes the folder `out` from a checkpoint of `run_dir`, on any mesh.

    Raises:
      UserError: there is no such run, transformers has no such model, or the folder is taken.
      RunError: what was written computes something else; nothing is left, then.
    """
    out = free_folder(settings.out)
    settings, mesh = lay_mesh(of_checkpoint(settings))
    with opened(settings, mesh, lambda settings: _exactly(dropless(settings))) as trained:
        export_model(trained.trainer, trained.params, trained.tokenizer, out, trained.step)


def export_model(trainer: Trainer, read: Callable[[], Params], tokenizer: Tokenizer, out: Path,
                 step: int) -> None:
    """Makes the folder `out` of a model in float32, whose parameters `read` gives, and compares. Called under its mesh.
    Errors as in `export_run`."""
    find_family(trainer.settings.model, heads_of(trainer))  # refuses what transformers has not, before anything is read
    params = read()
    said = logits(trainer, params)
    staging = out.with_name(f".{out.name}.partial")
    _on_main(lambda: (delete(staging), staging.mkdir(parents=True)))
    try:
        _write(trainer, params, tokenizer, staging, step)
        del params  # before the same are read again
        difference = _compare(trainer, said, staging)
    except BaseException:
        if is_main():
            delete(staging)
        raise
    _on_main(lambda: os.rename(staging, out))
    if is_main():
        files = sum(file.suffix == ".safetensors" for file in out.iterdir())
        size = sum(file.stat().st_size for file in out.iterdir())
        print_line(f"{out}: {counted(files, 'safetensors file')}, {format_size(size)} in all")
        print_line(f"read back: logits of {ROWS} rows differ by at most {difference:.2g} of the largest")


def _exactly(settings: Settings) -> Settings:
    """The same in float32: two copies of the weights are to be told apart."""
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision="float32"))


def free_folder(out: str | None) -> Path:
    """Where an export can be made. Raises UserError."""
    if out is None:
        raise UserError("export: out=FOLDER is missing: the folder to make")
    if is_remote(out):
        raise UserError(f"out={out}: expected a folder of this machine; copy it to the bucket when it is done")
    path = Path(out).absolute()
    if exists(path) and (not path.is_dir() or names_in(path)):
        raise UserError(f"out={out}: {'has files in it' if path.is_dir() else 'is a file'}; expected a name that is free")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"out={out}: no folder can be made in {above}")
    return path


def heads_of(trainer: Trainer) -> tuple[str, ...]:
    """The heads of the model that is trained, by the names of their objectives."""
    return tuple(objective.name for objective in trainer.model.objectives if objective.is_evaluated)


def _on_main(action: Callable[[], Any]) -> None:
    """What one process does, and all wait for."""
    if is_main():
        action()
    if jax.process_count() > 1:
        sync_global_devices("export")


def _write(trainer: Trainer, params: dict[str, Any], tokenizer: Tokenizer, folder: Path, step: int) -> None:
    settings, order = trainer.settings, trainer.params.layer_order
    model, heads = settings.model, heads_of(trainer)
    family, ids = find_family(model, heads), special_ids(tokenizer)
    if family.pads_first and "pad_token_id" not in ids:
        raise UserError(f"the tokenizer of {settings.run_dir} has no padding token, behind whose number {family.model_type}'s "
                        "positions begin")
    wanted = parameters_of(Foreign(family, model, heads, pad_token=ids.get("pad_token_id", 1)), trainer.params)
    twins = {} if model.tied_embeddings else {second: family.weight(path).name for path, second in family.twins.items()
                                              if path in wanted}
    shapes = file_shapes(wanted, order)
    shards, files = plan_shards(folder, shapes | {twin: shapes[name] for name, twin in twins.items()}, settings.max_shard)
    _on_main(lambda: make_files(folder, shards, files))
    write_parameters(wanted, by_path(params), shards, order, twins)
    if is_main():
        content = written(family, model, heads, *_labels(settings, heads), ids)
        write_json(folder / CONFIG, content)
        if model.causal:
            write_json(folder / "generation_config.json", {name: token for name, token in ids.items() if name in GENERATION})
        opens = model.causal and settings.data.packing == "documents" and settings.data.start_token  # as prompts are opened
        begins_after = start_token(tokenizer.special, settings.data.packing) if opens else None
        check = write_tokenizer(tokenizer, folder, model_type=family.model_type, max_length=model.max_length, causal=model.causal,
                                start=begins_after)
        write_text(folder / "README.md", model_card(settings, step, content["architectures"][0], family.model_type))
        print_line(f"tokenizer: {check.strings:,} texts, {check.differences} differences")
        for note in check.notes:
            print_line(note)
    _on_main(lambda: None)


def _labels(settings: Settings, heads: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """(what a classifier's outputs are, their names)."""
    if "regression" in heads:
        return "regression", settings.task.labels or ["LABEL_0"]
    return (settings.task.problem or "single_label", settings.task.labels or []) if "classification" in heads else (None, [])


def _compare(trainer: Trainer, own: dict[str, np.ndarray], folder: Path) -> float:
    """The largest difference between the run's logits, `own`, and those of the folder, as a share of the largest.
    Raises RunError where it is more than TOLERANCE."""
    source = open_source(str(folder))
    was, now = decisive(trainer.settings.model), decisive(source.foreign.model)
    if was != now:
        key = next(key for key in was if was[key] != now[key])
        raise RunError(f"{folder}: {CONFIG} says model.{key}={now[key]}, and the run {was[key]}; this is an error of jaxlm")
    read = logits(trainer, read_params(source, trainer)[0])
    largest = max(float(np.abs(each).max()) for each in own.values())
    difference = max(float(np.abs(each - read[name]).max()) for name, each in own.items()) / max(largest, 1e-30)
    if not difference <= TOLERANCE:
        raise RunError(f"{folder}: read back, it computes other logits, by {difference:.3g} of the largest; nothing is left of "
                       "it; this is an error of jaxlm, or of the disk")
    return difference


def logits(trainer: Trainer, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of every head, for rows of random tokens that are padded at their ends; padding has none."""
    model, batch = trainer.model, _probe(trainer)

    def run(params: dict[str, Any]) -> dict[str, jax.Array]:
        network = model.bind(params)
        states = network.states(batch)
        return {objective.name: objective.every_logit(network, states, batch)
                for objective in model.objectives if objective.is_evaluated}

    replicated = NamedSharding(trainer.mesh, PartitionSpec())  # every process compares
    found = jax.device_get(jax.jit(model.traced(run), out_shardings=replicated)(params))
    return {name: each[batch["segment_ids"] > 0] if each.ndim == 3 else each for name, each in found.items()}


def _probe(trainer: Trainer) -> dict[str, np.ndarray]:
    """int32 rows, at least ROWS and as many as the mesh needs."""
    model, random = trainer.settings.model, np.random.default_rng(0)
    ways = math.prod(trainer.mesh.shape[axis] for axis in cutting("batch")) * trainer.settings.train.gradient_accumulation
    shape = (-(-ROWS // ways) * ways, min(LENGTH, model.max_length))
    lengths = np.linspace(shape[1], shape[1] // 2 + 1, shape[0]).astype(np.int32)
    batch = {"tokens": random.integers(0, model.vocab_size, shape), "segment_ids": np.arange(shape[1]) < lengths[:, None],
             "last_position": lengths - 1}
    if model.type_vocab_size:
        batch["token_types"] = random.integers(0, model.type_vocab_size, shape)
    return {name: array.astype(np.int32) for name, array in batch.items()}
