"""What is told of labelled rows: which class, which labels, how much (Devlin et al. 2019, section 4.1)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.models.objectives import Facts, Figures, PerRow
from jaxlm.models.rows import RowObjective, validation
from jaxlm.models.states import States
from jaxlm.parallel.shapes import Array, Batch, Float32
from jaxlm.reporting.figures import confusion_figures, labels_figures, score_figures


class Counted(NamedTuple):
    """Sums over rows."""

    loss: Float32[Array, ""]
    count: Float32[Array, ""]  # rows
    all_right: Float32[Array, ""] | None = None  # rows of which every label is right
    counts: Float32[Array, "C C"] | Float32[Array, "C 4"] | None = None  # true, predicted class; or see `labels_figures`


class OneLabelObjective(RowObjective):
    """One of C classes, by softmax. Labels: int32 [B]."""

    name = "classification"

    def terms(self, network: Any, states: States, batch: Batch) -> Counted:
        logits, label, mask = self.logits(network, states, batch), batch["label"], batch["label_mask"]
        true, predicted = jax.nn.one_hot(label, self.outputs), jax.nn.one_hot(logits.argmax(-1), self.outputs)
        loss = jnp.where(mask, -(true * jax.nn.log_softmax(logits)).sum(-1), 0)
        counts = jnp.einsum("bt,bp->tp", true, predicted * mask[:, None])
        return Counted(loss.sum(), mask.sum(dtype=jnp.float32), jnp.trace(counts), counts)

    def answers(self, network: Any, states: States, batch: Batch) -> PerRow:
        return {"probabilities": jax.nn.softmax(self.logits(network, states, batch))}

    def verdicts(self, network: Any, states: States, batch: Batch) -> PerRow:
        probabilities, label = self.answers(network, states, batch)["probabilities"], batch["label"]
        of_label = jnp.take_along_axis(probabilities, label[:, None], axis=1)[:, 0]
        predicted = probabilities.argmax(-1)
        return {"mask": batch["label_mask"], "label": label, "predicted": predicted, "probability": probabilities.max(-1),
                "error": jnp.where(predicted == label, 0, 1 - of_label)}

    def figures(self, terms: Counted, facts: Facts) -> Figures:
        return validation(confusion_figures(terms.counts))


class SeveralLabelsObjective(RowObjective):
    """Any of C labels, each by a sigmoid of its own. Labels: bool [B, C]."""

    name = "classification"

    def terms(self, network: Any, states: States, batch: Batch) -> Counted:
        logits, labels, mask = self.logits(network, states, batch), batch["labels"], batch["label_mask"][:, None]
        loss = jnp.where(mask, -jax.nn.log_sigmoid(jnp.where(labels, logits, -logits)), 0).mean(-1)  # all labels count alike
        predicted = logits > 0
        kinds = [labels & predicted, ~labels & predicted, labels & ~predicted, ~labels & ~predicted]
        counts = jnp.stack([(kind & mask).sum(0, dtype=jnp.float32) for kind in kinds], axis=1)
        all_right = ((labels == predicted) & mask).all(-1)
        return Counted(loss.sum(), *(rows.sum(dtype=jnp.float32) for rows in (mask, all_right)), counts)

    def answers(self, network: Any, states: States, batch: Batch) -> PerRow:
        return {"probabilities": jax.nn.sigmoid(self.logits(network, states, batch))}

    def verdicts(self, network: Any, states: States, batch: Batch) -> PerRow:
        """Of the label that is farthest off."""
        probabilities, labels = self.answers(network, states, batch)["probabilities"], batch["labels"]
        off = jnp.where((probabilities > 0.5) == labels, 0, jnp.abs(probabilities - labels))
        which, arrays = off.argmax(-1), {"label": labels, "probability": probabilities, "error": off}
        taken = {name: jnp.take_along_axis(array, which[:, None], axis=1)[:, 0] for name, array in arrays.items()}
        return {"mask": batch["label_mask"], "which": which} | taken

    def figures(self, terms: Counted, facts: Facts) -> Figures:
        return validation(labels_figures(terms.counts, int(terms.all_right), int(terms.count)))


class ScoreObjective(RowObjective):
    """A number, by the squared error. Labels: float32 [B]."""

    name = "regression"

    def terms(self, network: Any, states: States, batch: Batch) -> Counted:
        off, mask = self.logits(network, states, batch)[:, 0] - batch["label"], batch["label_mask"]
        return Counted(jnp.where(mask, off**2, 0).sum(), mask.sum(dtype=jnp.float32))

    def answers(self, network: Any, states: States, batch: Batch) -> PerRow:
        return {"score": self.logits(network, states, batch)[:, 0]}

    def verdicts(self, network: Any, states: States, batch: Batch) -> PerRow:
        score, label = self.answers(network, states, batch)["score"], batch["label"]
        return {"mask": batch["label_mask"], "label": label, "predicted": score, "error": jnp.abs(score - label)}

    def figures(self, terms: Counted, facts: Facts) -> Figures:
        """Of every row's score: ranks are no sums."""
        return validation(score_figures(facts.verdicts["predicted"], facts.verdicts["label"]))
