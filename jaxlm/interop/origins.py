"""Trained weights wherever they are: `init` may name a run directory or a folder of transformers."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoints.format1 import Place
from jaxlm.interop.parameters import by_path, load_parameters
from jaxlm.interop.source import open_source, task_of
from jaxlm.interop.tokenizers import read_tokenizer
from jaxlm.models.model import Model
from jaxlm.parallel.layout import Layout
from jaxlm.settings import Settings, TaskSettings, TrainSettings
from jaxlm.storage.files import as_path, exists
from jaxlm.tasks.find import find_task
from jaxlm.training.transfer import RunWeights, Weights


def open_origin(place: str) -> Weights:
    """Raises UserError."""
    return RunWeights(place) if exists(as_path(place) / "config.yaml") else FolderWeights(place)


class FolderWeights:
    """Those of a folder of transformers. Raises UserError."""

    def __init__(self, folder: str):
        self._source = open_source(folder)
        foreign = self._source.foreign
        self.where, self.model, self.notes = folder, foreign.model, list(foreign.notes)
        self.tokenizer = read_tokenizer(self._source.folder, foreign.model.vocab_size)
        settings = Settings(model=foreign.model, task=TaskSettings(**task_of(foreign)))
        objectives = find_task(settings).objectives() if self._source.heads else ()
        self._model = Model(foreign.model, TrainSettings(), objectives)
        self._paths = {tuple(path.split(".")): path for path in by_path(self._model.shapes)}
        self.shapes: dict[Place, tuple[int, ...]] = {
            place: by_path(self._model.shapes)[path].shape for place, path in self._paths.items()}

    def read(self, wanted: dict[Place, jax.ShapeDtypeStruct]) -> tuple[dict[Place, jax.Array], np.ndarray]:
        mesh = next(iter(wanted.values())).sharding.mesh
        whole = NamedSharding(mesh, PartitionSpec())

        def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
            place = tuple(entry.key for entry in path)
            return wanted[place].sharding if place in wanted else whole  # a head that is left out is small

        order = np.arange(self.model.num_layers)
        layout = Layout(mesh, self._model.axes, self._model.shapes,
                        jax.tree_util.tree_map_with_path(sharding, self._model.shapes), order)
        loaded = load_parameters(self._source.foreign, self._source.tensors, layout, self._source.heads)
        self.notes += loaded.notes
        return {place: loaded.arrays[self._paths[place]] for place in wanted}, order
