"""`jaxlm import`: a folder of transformers becomes a run directory, whose only checkpoint is step 0, without an
optimizer's state."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.checkpoints.manifest import finished_steps
from jaxlm.console.progress import print_line
from jaxlm.console.units import counted, format_count
from jaxlm.errors import UserError
from jaxlm.interop.names import shown_names
from jaxlm.interop.parameters import as_tree, by_path, load_parameters
from jaxlm.interop.source import TOKENIZER, Source, open_source
from jaxlm.interop.tokenizers import read_tokenizer
from jaxlm.models.parameters import num_parameters
from jaxlm.runtime.processes import is_main
from jaxlm.settings import Settings, dump, to_dict
from jaxlm.storage.files import as_path, check_folder, exists, make_folder, name_of, write_text
from jaxlm.training.run import versions
from jaxlm.training.setup import lay_mesh, start
from jaxlm.training.step import Trainer


def import_folder(folder: str, settings: Settings) -> None:
    """Makes `settings.run_dir`. Raises UserError: the folder is not what it says, or run_dir is taken."""
    source = open_source(folder)
    run_dir = as_path(settings.run_dir)
    check_folder(run_dir, "run_dir")
    if finished_steps(run_dir) or exists(run_dir / "config.yaml"):
        raise UserError(f"run_dir={run_dir}: a run is there already; choose another")
    tokenizer = read_tokenizer(source.folder, source.foreign.model.vocab_size)
    settings, mesh = lay_mesh(settings)
    trainer = start(settings, mesh)
    with jax.set_mesh(mesh):
        params, notes = read_params(source, trainer)
        metadata = {"settings": to_dict(settings), "tokenizer": tokenizer.to_dict(), "tokenizer_digest": tokenizer.digest,
                    "corpora": [], "mesh": dict(mesh.shape), "versions": versions(), "imported": name_of(source.folder)}
        make_folder(run_dir)
        with Checkpoints(run_dir, settings.checkpoint) as checkpoints:
            checkpoints.save({"params": params}, 0, metadata, None)
    if is_main():
        tokenizer.save(run_dir / TOKENIZER)
        write_text(run_dir / "config.yaml", dump(settings))
        for line in [*_description(source, trainer), *source.foreign.notes, *notes]:
            print_line(line)


def _description(source: Source, trainer: Trainer) -> list[str]:
    files = len({tensor.file for tensor in source.tensors.values()})
    heads, numbers = ", ".join(source.heads) or "none", num_parameters(trainer.settings.model, trainer.model.objectives)
    return [f"{source.folder}: {source.foreign.family.model_type} of {format_count(numbers)} parameters, "
            f"{counted(len(source.tensors), 'tensor')} in {counted(files, 'file')}; heads: {heads}",
            f"weights: {as_path(trainer.settings.run_dir) / 'checkpoints' / '0'}"]


def read_params(source: Source, trainer: Trainer) -> tuple[dict[str, Any], list[str]]:
    """The model's parameters from a folder, laid out as the trainer has them, and what was left out, changed or is
    fresh, a line each. Parameters of heads that the folder does not have are initialized with the run's seed."""
    loaded = load_parameters(source.foreign, source.tensors, trainer.params, source.heads)
    fresh = initialized(trainer, loaded.missing)
    notes = [f"fresh (seed {trainer.settings.seed}): {shown_names(loaded.missing)}; the folder has none"] if fresh else []
    return as_tree({path: (loaded.arrays | fresh)[path] for path in by_path(trainer.params.shapes)}), [*loaded.notes, *notes]


def initialized(trainer: Trainer, paths: Sequence[str]) -> dict[str, jax.Array]:
    """Fresh arrays for these parameters alone: what is not asked for is not computed."""
    if not paths:
        return {}
    shardings = by_path(trainer.params.shardings)
    init = jax.jit(lambda: {path: by_path(trainer.init(trainer.settings.seed).params)[path] for path in paths},
                   out_shardings={path: shardings[path] for path in paths})
    return init()
