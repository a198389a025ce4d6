"""Metrics of a whole validation set, from global sums and counts."""

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from jaxlm.data.batches import Batches
from jaxlm.errors import RunError
from jaxlm.models.loss import Sums
from jaxlm.models.model import Params
from jaxlm.training.setup import Corpora, SkippedRows, on_devices
from jaxlm.training.step import Batch, Trainer


def evaluate_run(trainer: Trainer, params: Params, validation: Batches, corpora: Corpora, whole: bool,
                 through: Callable[[Iterable[Batch]], Iterable[Batch]] = iter) -> dict[str, float | None]:
    """Metrics over the whole validation set, or over eval.steps batches of it, which come `through` what watches
    over them."""
    steps = len(validation) if whole else min(len(validation), trainer.settings.eval.steps or len(validation))
    bytes_per_token = sum(c.validation.num_bytes for c, _ in corpora) / sum(c.validation.num_tokens for c, _ in corpora)
    if any(corpus.loses_text for corpus, _ in corpora):
        bytes_per_token = None
    with on_devices(validation, 0, steps, trainer.mesh, trainer.settings.data.prefetch) as source:
        row = evaluate(trainer, params, through(source), bytes_per_token)
    return row | SkippedRows(validation, trainer.mesh).column(steps, "val_skipped_rows")


def evaluate(trainer: Trainer, params: dict, batches: Iterable[Batch], bytes_per_token: float | None) -> dict[str, float | None]:
    """Runs every batch and returns the metrics, `val_loss` first.

    Args:
      trainer: its `evaluate` is used.
      params: on the mesh.
      batches: of device arrays; padded rows and positions carry a false mask and count nothing.
      bytes_per_token: UTF-8 bytes of text per predicted token, for bits per byte (gpt). None where the tokenizer lost
        text, and then so are they: the bits left out would be those of what was lost.

    Raises RunError: there are batches, and nothing in them to predict.
    """
    totals: dict[str, np.ndarray] = {}
    pending = None
    for batch in batches:
        sums = trainer.evaluate(params, batch)
        if pending is not None:  # fetched one batch late, so that the device never waits for the host
            _add(totals, pending)
        pending = sums
    if pending is not None:
        _add(totals, pending)
    if totals and not any(Sums(*values).count for values in totals.values()):
        raise RunError("validation: nothing to predict in any row; with data.damaged=skip, all of them may be damaged: see "
                       "the warnings, and prepare the corpus again", exit_code=3)
    return _metrics({name: Sums(*values) for name, values in totals.items()}, bytes_per_token)


def _add(totals: dict[str, np.ndarray], sums: dict[str, Sums]) -> None:
    for name, values in jax.device_get(sums).items():
        totals[name] = totals.get(name, np.zeros(len(values))) + np.asarray(values, np.float64)


def _metrics(totals: dict[str, Sums], bytes_per_token: float | None) -> dict[str, float | None]:
    entropy = {name: term.cross_entropy / max(term.count, 1) for name, term in totals.items()}
    metrics = {"val_loss": sum(entropy.values())}
    if "next_token" in entropy:
        metrics["val_perplexity"] = math.exp(min(entropy["next_token"], 700))
        metrics["val_accuracy"] = totals["next_token"].correct / max(totals["next_token"].count, 1)
        metrics["val_bits_per_byte"] = bytes_per_token and entropy["next_token"] / math.log(2) / bytes_per_token
    for name, short in (("masked_token", "mlm"), ("next_sentence", "nsp")):
        if name in totals:
            metrics[f"val_{short}_loss"] = entropy[name]
            metrics[f"val_{short}_accuracy"] = totals[name].correct / max(totals[name].count, 1)
    if "masked_token" in entropy:
        metrics["val_mlm_perplexity"] = math.exp(min(entropy["masked_token"], 700))
    return {name: value if value is None else float(value) for name, value in metrics.items()}
