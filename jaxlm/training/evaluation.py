"""Metrics of a whole validation set, from global sums and counts."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxlm.data.batches import Batches
from jaxlm.data.corpus import bytes_per_token
from jaxlm.errors import RunError
from jaxlm.models.model import Params
from jaxlm.models.objectives import Objectives
from jaxlm.training.setup import Corpora, SkippedRows, on_devices
from jaxlm.training.step import Batch, Terms, Trainer


def evaluate_run(trainer: Trainer, params: Params, validation: Batches, corpora: Corpora, whole: bool,
                 through: Callable[[Iterable[Batch]], Iterable[Batch]] = iter) -> dict[str, float | None]:
    """Metrics over the whole validation set, or over eval.steps batches of it, which come `through` what watches
    over them."""
    steps = len(validation) if whole else min(len(validation), trainer.settings.eval.steps or len(validation))
    with on_devices(validation, 0, steps, trainer.mesh, trainer.settings.data.prefetch) as source:
        row = evaluate(trainer, params, through(source), bytes_per_token([corpus for corpus, _ in corpora]))
    return row | SkippedRows(validation, trainer.mesh).column(steps, "val_skipped_rows")


def evaluate(trainer: Trainer, params: dict, batches: Iterable[Batch], bytes_per_token: float | None) -> dict[str, float | None]:
    """Runs every batch and returns the metrics, `val_loss` first.

    Args:
      trainer: its `evaluate` is used.
      params: on the mesh.
      batches: of device arrays; padded rows and positions carry a false mask and count nothing.
      bytes_per_token: UTF-8 bytes of text per predicted token, for bits per byte. None where the tokenizer lost text,
        and then so are they: the bits left out would be those of what was lost.

    Raises RunError: there are batches, and nothing in them to predict.
    """
    totals: Any = None
    pending = None
    for batch in batches:
        terms = trainer.evaluate(params, batch)
        if pending is not None:  # fetched one batch late, so that the device never waits for the host
            totals = _added(totals, pending)
        pending = terms
    if pending is not None:
        totals = _added(totals, pending)
    if totals and not any(terms.count for terms in totals.values()):
        raise RunError("validation: nothing to predict in any row; with data.damaged=skip, all of them may be damaged: see "
                       "the warnings, and prepare the corpus again", exit_code=3)
    return _metrics(trainer.model.objectives, totals or {}, bytes_per_token)


def _added(totals: Any, terms: Terms) -> Any:
    """Sums in float64: those of a whole set are long."""
    terms = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(terms))
    return terms if totals is None else jax.tree.map(np.add, totals, terms)


def _metrics(objectives: Objectives, totals: Terms, bytes_per_token: float | None) -> dict[str, float | None]:
    found = [(objective, totals[objective.name]) for objective in objectives if objective.name in totals]
    metrics = {"val_loss": sum(objective.loss(terms) for objective, terms in found)}
    for objective, terms in found:
        metrics |= objective.figures(terms, bytes_per_token)
    return {name: value if value is None else float(value) for name, value in metrics.items()}
