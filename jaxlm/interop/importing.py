"""`jaxlm import`: a folder of transformers becomes a run directory, whose only checkpoint is step 0, without an
optimizer's state."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.checkpoints.manifest import CHECKPOINTS, finished_steps
from jaxlm.console.progress import print_line
from jaxlm.console.units import counted, format_count
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop.names import shown_names
from jaxlm.interop.parameters import as_tree, by_path, find_parameters, parameters, parameters_of
from jaxlm.interop.source import TOKENIZER, Source, is_run, open_source, task_of
from jaxlm.interop.tokenizers import read_tokenizer
from jaxlm.models.objectives import Objectives, pretraining_objectives
from jaxlm.models.parameters import num_parameters
from jaxlm.models.parameters import parameters as model_parameters
from jaxlm.runtime.processes import is_main
from jaxlm.settings import Settings, TaskSettings, dump, to_dict
from jaxlm.storage.files import as_path, check_folder, exists, make_folder, name_of, write_text
from jaxlm.tasks.find import find_task
from jaxlm.training.run import versions
from jaxlm.training.setup import lay_mesh
from jaxlm.training.step import Trainer, start
from jaxlm.training.transfer import RunWeights, Weights


class Loaded(NamedTuple):
    """A folder of transformers as a model on a mesh."""

    trainer: Trainer
    params: dict[str, Any]
    tokenizer: Tokenizer
    told: list[str]  # what it is, and what was left out, changed or is fresh, a line each


def import_folder(folder: str, settings: Settings) -> None:
    """Makes `settings.run_dir`. Raises UserError: the folder is not what it says, or run_dir is taken."""
    run_dir = as_path(settings.run_dir)
    check_folder(run_dir, "run_dir")
    if finished_steps(run_dir) or exists(run_dir / "config.yaml"):
        raise UserError(f"run_dir={run_dir}: a run is there already; choose another")
    trainer, params, tokenizer, told = load_folder(folder, settings)
    make_folder(run_dir)
    streams = ["text", *(["pair"] if "pair" in settings.task.fields else [])]  # which of both, no folder says
    metadata = {"settings": to_dict(trainer.settings), "tokenizer": tokenizer.to_dict(), "tokenizer_digest": tokenizer.digest,
                "corpora": [], "streams": streams, "mesh": dict(trainer.mesh.shape), "versions": versions(),
                "imported": name_of(folder)}
    with jax.set_mesh(trainer.mesh), Checkpoints(run_dir, settings.checkpoint) as checkpoints:
        checkpoints.save({"params": params}, 0, metadata, None)
    if is_main():
        tokenizer.save(run_dir / TOKENIZER)
        write_text(run_dir / "config.yaml", dump(trainer.settings))
        for line in [*told, f"weights: {run_dir / CHECKPOINTS / '0'}"]:
            print_line(line)


def load_folder(folder: str, settings: Settings) -> Loaded:
    """Reads a folder onto the mesh of `settings`, which are `settings_of` the folder. Raises UserError."""
    source = open_source(folder)
    tokenizer = read_tokenizer(source.folder, source.foreign.model.vocab_size)
    settings, mesh = lay_mesh(settings)
    trainer = start(settings, mesh)
    with jax.set_mesh(mesh):
        params, notes = read_params(source, trainer)
        notes += _not_numbers(params)
    return Loaded(trainer, params, tokenizer, [_description(source, trainer), *source.foreign.notes, *notes])


@jax.jit
def _all_finite(params: dict[str, Any]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda array: jnp.isfinite(array.sum()), params)  # a sum takes no memory


def _not_numbers(params: dict[str, Any]) -> list[str]:
    found = [path for path, is_finite in by_path(jax.device_get(_all_finite(params))).items() if not is_finite]
    return [f"WARNING: {shown_names(found)}: NaN or infinite; nothing that is computed with them means anything"] if found else []


def _description(source: Source, trainer: Trainer) -> str:
    files = len({tensor.file for tensor in source.tensors.values()})
    heads, numbers = ", ".join(source.heads) or "none", num_parameters(trainer.settings.model, trainer.model.objectives)
    return (f"{source.folder}: {source.foreign.family.model_type} of {format_count(numbers)} parameters, "
            f"{counted(len(source.tensors), 'tensor')} in {counted(files, 'file')}; heads: {heads}")


def read_params(source: Source, trainer: Trainer) -> tuple[dict[str, Any], list[str]]:
    """The model's parameters from a folder, laid out as the trainer has them, and what was left out, changed or is
    fresh, a line each. Parameters of heads that the folder does not have are initialized with the run's seed."""
    layout, shardings = trainer.params, by_path(trainer.params.shardings)
    found = find_parameters(source.foreign, source.tensors, parameters_of(source.foreign, layout), source.heads)
    fresh = initialized(trainer, found.missing)
    notes = [f"fresh (seed {trainer.settings.seed}): {shown_names(found.missing)}; the folder has none"] if fresh else []
    arrays = {path: found.load(path, shardings[path], layout.layer_order) for path in found.parameters} | fresh
    return as_tree({path: arrays[path] for path in shardings}), [*found.notes, *notes]


def initialized(trainer: Trainer, paths: Sequence[str]) -> dict[str, jax.Array]:
    """Fresh arrays for these parameters alone: what is not asked for is not computed."""
    if not paths:
        return {}
    shardings = by_path(trainer.params.shardings)
    init = jax.jit(lambda: {path: by_path(trainer.init(trainer.settings.seed).params)[path] for path in paths},
                   out_shardings={path: shardings[path] for path in paths})
    return init()


class FolderWeights:
    """A folder of transformers as weights to begin with (`jaxlm.training.transfer.Weights`). Raises UserError."""

    def __init__(self, folder: str):
        source = open_source(folder)
        foreign, self.where, self.model = source.foreign, folder, source.foreign.model
        self.tokenizer = read_tokenizer(source.folder, self.model.vocab_size)
        arrays = model_parameters(self.model, _objectives(source))
        wanted = parameters(foreign, {path: array.sizes for path, array in arrays.items()},
                            {path: array.axes for path, array in arrays.items()})
        self._found = find_parameters(foreign, source.tensors, wanted, source.heads)
        self.shapes = {tuple(path.split(".")): parameter.shape for path, parameter in self._found.parameters.items()}
        self.notes = self._found.notes

    def read(self, wanted: dict[tuple[str, ...], jax.ShapeDtypeStruct]) -> tuple[dict[tuple[str, ...], jax.Array], np.ndarray]:
        order = np.arange(self.model.num_layers)
        return {place: self._found.load(".".join(place), leaf.sharding, order) for place, leaf in wanted.items()}, order


def _objectives(source: Source) -> Objectives:
    """Those whose heads the folder has, and for encoders those that it may have a part of: a pooler alone."""
    model, family = source.foreign.model, source.foreign.family
    own = find_task(Settings(model=model, task=TaskSettings(**task_of(source.foreign)))).objectives() if source.heads else ()
    paired = dataclasses.replace(model, next_sentence="heads.next_sentence.pooler" in family.names)
    names = {objective.name for objective in own}
    others = [objective for objective in pretraining_objectives(paired) if objective.name not in names]
    return (*own, *([] if model.causal else others))


def open_weights(place: str) -> Weights:
    """What `init` names: a run directory, or a folder of transformers."""
    return RunWeights(place) if is_run(place) else FolderWeights(place)
