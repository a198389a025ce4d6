"""Metrics of a whole validation set, from global sums and counts."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.data.batches import Batches
from jaxlm.data.corpus import bytes_per_token
from jaxlm.errors import RunError
from jaxlm.models.model import Params
from jaxlm.models.objectives import Facts, Objectives
from jaxlm.training.corpora import Corpora
from jaxlm.training.feed import SkippedRows, on_devices
from jaxlm.training.step import Batch, Terms, Trainer


class Evaluated(NamedTuple):
    """What an evaluation came to."""

    metrics: dict[str, float | None]  # `val_loss` first
    terms: Terms  # sums over all rows, float64, by objective
    verdicts: dict[str, np.ndarray]  # of the rows that have a label (`Objective.verdicts`), and `row`: which ones they are


def evaluate_run(trainer: Trainer, params: Params, validation: Batches, corpora: Corpora, whole: bool,
                 through: Callable[[Iterable[Batch]], Iterable[Batch]] = iter) -> Evaluated:
    """Metrics over the whole validation set, or over eval.steps batches of it, which come `through` what watches
    over them."""
    steps = len(validation) if whole else min(len(validation), trainer.settings.eval.steps or len(validation))
    with on_devices(validation, 0, steps, trainer.mesh, trainer.settings.data.prefetch) as source:
        found = evaluate(trainer, params, through(source), bytes_per_token([corpus for corpus, _ in corpora]))
    return found._replace(metrics=found.metrics | SkippedRows(validation, trainer.mesh).column(steps, "val_skipped_rows"))


def evaluate(trainer: Trainer, params: dict, batches: Iterable[Batch], bytes_per_token: float | None) -> Evaluated:
    """Runs every batch.

    Args:
      trainer: its `evaluate` is used.
      params: on the mesh.
      batches: of device arrays; padded rows and positions carry a false mask and count nothing.
      bytes_per_token: UTF-8 bytes of text per predicted token, for bits per byte. None where the tokenizer lost text,
        and then so are they: the bits left out would be those of what was lost.

    Raises RunError: there are batches, and nothing in them to predict.
    """
    totals: Any = None
    verdicts: list[dict[str, np.ndarray]] = []

    def fetch(terms: Terms, of_rows: dict[str, jax.Array]) -> None:
        nonlocal totals
        totals = _added(totals, terms)
        verdicts.append(jax.device_get(of_rows))

    pending = None
    for batch in batches:
        found = trainer.evaluate(params, batch)
        if pending is not None:  # fetched one batch late, so that the device never waits for the host
            fetch(*pending)
        pending = found
    if pending is not None:
        fetch(*pending)
    if totals and not any(terms.count for terms in totals.values()):
        raise RunError("validation: nothing to predict in any row; with data.damaged=skip, all of them may be damaged: see "
                       "the warnings, and prepare the corpus again", exit_code=3)
    totals, of_rows = totals or {}, _of_labelled_rows(verdicts)
    return Evaluated(_metrics(trainer.model.objectives, totals, Facts(bytes_per_token, of_rows)), totals, of_rows)


def _of_labelled_rows(verdicts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Of all batches, one after the other."""
    arrays = {name: np.concatenate([batch[name] for batch in verdicts]) for name in (verdicts[0] if verdicts else ())}
    if not arrays:
        return {}
    rows = np.flatnonzero(arrays.pop("mask"))
    return {"row": rows} | {name: array[rows] for name, array in arrays.items()}


def _added(totals: Any, terms: Terms) -> Any:
    """Sums in float64: those of a whole set are long."""
    terms = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(terms))
    return terms if totals is None else jax.tree.map(np.add, totals, terms)


def _metrics(objectives: Objectives, totals: Terms, facts: Facts) -> dict[str, float | None]:
    found = [(objective, totals[objective.name]) for objective in objectives if objective.name in totals]
    metrics = {"val_loss": sum(objective.loss(terms) for objective, terms in found)}
    for objective, terms in found:
        metrics |= objective.figures(terms, facts)
    return {name: value if value is None else float(value) for name, value in metrics.items()}
