"""`jaxlm evaluate`: a checkpoint over a whole validation set."""

from typing import Any

import jax

from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.console.progress import print_line
from jaxlm.runtime import processes
from jaxlm.settings import Settings, to_dict
from jaxlm.training.baseline import beside, check_baseline
from jaxlm.training.changes import MODEL_KEYS, START_KEY, refuse_changes
from jaxlm.training.evaluated_text import describe, open_evaluated
from jaxlm.training.evaluation import evaluate_run
from jaxlm.training.length import with_any_steps
from jaxlm.training.origin import say_which
from jaxlm.training.setup import lay_mesh
from jaxlm.training.stages import of_checkpoint
from jaxlm.training.step import start


def evaluate_checkpoint(settings: Settings, with_baseline: bool = False) -> dict[str, Any]:
    """A checkpoint of run_dir over the whole validation set: `step` and the metrics; and as `baseline` what n-grams
    make of it (`jaxlm.baselines`), if asked for. Raises UserError."""
    if with_baseline:
        check_baseline(settings)
    settings, mesh = lay_mesh(of_checkpoint(settings))
    with Checkpoints(settings.run_dir) as checkpoints, jax.set_mesh(mesh):
        step = checkpoints.choose(settings.checkpoint.step)
        saved = checkpoints.metadata(step)
        settings, corpora, validation = open_evaluated(settings, saved)
        trainer = start(with_any_steps(settings), mesh)
        refuse_changes(MODEL_KEYS | START_KEY, saved["settings"], to_dict(trainer.settings), checkpoints.directory)
        say_which(checkpoints.directory, step)
        if processes.is_main():
            print_line(describe(corpora))
        params = checkpoints.restore_params(step, trainer.params)
        row = {"step": step} | evaluate_run(trainer, params, validation, corpora, whole=True).metrics
        return row | {"baseline": beside(trainer.settings, saved, corpora, validation)} if with_baseline else row
