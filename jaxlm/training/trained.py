"""A trained model, opened: what generating, predicting, exporting and the Python API begin with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.models.model import Params
from jaxlm.settings import Settings, to_dict
from jaxlm.training.changes import MODEL_KEYS, START_KEY, refuse_changes
from jaxlm.training.corpora import resolve
from jaxlm.training.length import with_any_steps
from jaxlm.training.origin import say_which
from jaxlm.training.step import Trainer, dropless, start


class Trained(NamedTuple):
    """A checkpoint of a run; its weights are read when they are asked for."""

    trainer: Trainer
    tokenizer: Tokenizer
    step: int
    saved: dict[str, Any]  # what the checkpoint says of itself
    checkpoints: Checkpoints

    def params(self) -> Params:
        """Says which, and reads them."""
        say_which(self.checkpoints.directory, self.step)
        return self.checkpoints.restore_params(self.step, self.trainer.params)


@contextmanager
def opened(settings: Settings, mesh: Mesh, changed: Callable[[Settings], Settings] = dropless) -> Iterator[Trained]:
    """checkpoint.step of run_dir, or the newest good one, under `jax.set_mesh(mesh)`. `changed`: makes settings that
    change no architecture.

    Raises:
      UserError: there is none, or the settings are another model's.
    """
    with Checkpoints(settings.run_dir) as checkpoints, jax.set_mesh(mesh):
        step = checkpoints.choose(settings.checkpoint.step)
        saved = checkpoints.metadata(step)
        tokenizer = Tokenizer.from_dict(saved["tokenizer"])
        settings = resolve(settings, tokenizer)
        refuse_changes(MODEL_KEYS | START_KEY, saved["settings"], to_dict(settings), checkpoints.directory)
        yield Trained(start(changed(with_any_steps(settings)), mesh), tokenizer, step, saved, checkpoints)
