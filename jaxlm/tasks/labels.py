"""What a label can be: one of several names, several of them, or a number. The host's half of `jaxlm.models.labelled`:
which arrays hold labels, by which figures they are judged, and how they are said in words."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.data.labels import MULTI, REGRESSION, SINGLE
from jaxlm.data.rows import Field, Rows, Spec
from jaxlm.reporting.figures import class_counts, class_figures

if TYPE_CHECKING:
    from jaxlm.models.objectives import Objective

SHARES = dict.fromkeys(("accuracy", "precision", "recall", "macro_f1", "micro_f1"), "max")
CLOSENESS = {"pearson": "max", "spearman": "max", "mean_squared_error": "min"}
MASK = Field((), np.dtype(bool), "mask")
Words = dict[str, Any]


class OneLabel:
    kind = "OneLabelObjective"  # of `jaxlm.models.labelled`
    figures = SHARES | {"matthews": "max"}  # of an evaluation, and whether more is better; the first is the usual one

    def __init__(self, names: tuple[str, ...]):
        self.names = names  # of what the head says

    def spec(self) -> Spec:
        """The arrays of a row that hold its label."""
        return {"label": Field((), np.dtype(np.int32), "class", bound=len(self.names)), "label_mask": MASK}

    def objective(self) -> "Objective":
        from jaxlm.models import labelled

        return getattr(labelled, self.kind)(len(self.names))

    def said(self, row: Rows) -> str:
        """The label of a row of a batch."""
        return self.names[row["label"]]

    def answer(self, answers: Rows) -> Words:
        """What `predict` writes of a record; `answers`: of its row (`Objective.answers`)."""
        return {"label": self.names[answers["probabilities"].argmax()], "probabilities": self.by_name(answers)}

    def mistake(self, verdict: Words) -> Words:
        """How far off an answer is; `verdict`: of a row (`Objective.verdicts`)."""
        predicted, label = (self.names[int(verdict[which])] for which in ("predicted", "label"))
        return {"probability": verdict["probability"], "predicted": predicted, "label": label}

    def classes(self, terms: Any) -> Words:
        """What an evaluation found of each class, and the confusion matrix."""
        confusion = {"classes": self.names, "counts": terms.counts.astype(int).tolist()}
        return self.of_counts(class_counts(terms.counts)) | {"confusion": confusion}

    def of_counts(self, counts: np.ndarray) -> Words:
        right, wrongly, missed = counts.astype(int)[:, :3].T
        columns = {"class": self.names, "rows": right + missed, "predicted": right + wrongly, **class_figures(counts)}
        return {"classes": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]}

    def by_name(self, answers: Rows) -> dict[str, float]:
        return dict(zip(self.names, map(short, answers["probabilities"]), strict=True))


class SeveralLabels(OneLabel):
    kind = "SeveralLabelsObjective"
    figures = {"micro_f1": "max"} | SHARES

    def spec(self) -> Spec:
        return {"labels": Field((len(self.names),), np.dtype(bool), "mask"), "label_mask": MASK}

    def said(self, row: Rows) -> str:
        return self.joined(row["labels"])

    def answer(self, answers: Rows) -> Words:
        chosen = np.flatnonzero(answers["probabilities"] > 0.5)
        return {"labels": [self.names[number] for number in chosen], "probabilities": self.by_name(answers)}

    def mistake(self, verdict: Words) -> Words:
        """Of the label that is farthest off."""
        name = self.names[int(verdict["which"])]
        predicted, label = (name if has else f"not {name}" for has in (verdict["probability"] > 0.5, verdict["label"]))
        return {"probability": verdict["probability"], "predicted": predicted, "label": label}

    def classes(self, terms: Any) -> Words:
        return self.of_counts(terms.counts)

    def joined(self, has: np.ndarray) -> str:
        return ", ".join(self.names[number] for number in np.flatnonzero(has)) or "none"


class Score(OneLabel):
    kind = "ScoreObjective"
    figures = CLOSENESS

    def __init__(self, names: tuple[str, ...] = ()):
        super().__init__(("score",))

    def spec(self) -> Spec:
        return {"label": Field((), np.dtype(np.float32), "number"), "label_mask": MASK}

    def said(self, row: Rows) -> str:
        return f"{row['label']:g}"

    def answer(self, answers: Rows) -> Words:
        return {"score": short(answers["score"])}

    def mistake(self, verdict: Words) -> Words:
        return {"error": verdict["predicted"] - verdict["label"], "predicted": verdict["predicted"], "label": verdict["label"]}

    def classes(self, terms: Any) -> Words:
        return {}


PROBLEMS = {SINGLE: OneLabel, MULTI: SeveralLabels, REGRESSION: Score}


def short(number: np.float32) -> float:
    """With the digits that a float32 has: 0.1, and not 0.10000000149."""
    return float(str(np.float32(number)))
