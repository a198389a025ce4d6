"""Figures of labels and scores, from sums over a whole set: whatever the batches and hosts were, the figures are
those of the set.

Counts are int64 and everything else float64. A figure that is not defined is NaN (a correlation with something that
never changes); a share of nothing is 0. Both as scikit-learn and SciPy have it.
"""

import math
from typing import NamedTuple

import numpy as np

Figures = dict[str, float]


# ---- one label a row -------------------------------------------------------------------------------------------------

def confusion_figures(confusion: np.ndarray) -> Figures:
    """Of `confusion` [C, C], rows with a label and a prediction: [true class, predicted class].

    Precision, recall and macro F1 are means over the classes that occur as a label or a prediction; each class counts
    the same. Micro F1 counts every row the same, which with one label a row is the accuracy.
    """
    confusion = np.asarray(confusion, np.int64)
    of_class = class_figures(class_counts(confusion))
    occurs = confusion.sum(0) + confusion.sum(1) > 0
    accuracy = _share(np.trace(confusion), confusion.sum())
    return {"accuracy": float(accuracy), **_macro({name: values[occurs] for name, values in of_class.items()}),
            "micro_f1": float(accuracy), "matthews": matthews(confusion)}


def class_counts(confusion: np.ndarray) -> np.ndarray:
    """[C, C] to [C, 4]: true positives, false positives, false negatives, true negatives of each class."""
    right = np.diagonal(confusion)
    wrongly, missed = confusion.sum(0) - right, confusion.sum(1) - right
    return np.stack([right, wrongly, missed, confusion.sum() - right - wrongly - missed], axis=1)


def matthews(confusion: np.ndarray) -> float:
    """Matthews correlation of [C, C] for any number of classes (Gorodkin 2004), from -1 to 1; 0 where labels or
    predictions never change."""
    # Python's integers: in float64 the products of large counts would round before they cancel.
    predicted, true, rows = confusion.sum(0).astype(object), confusion.sum(1).astype(object), int(confusion.sum())
    covariance = int(np.trace(confusion)) * rows - true @ predicted
    variances = float(rows**2 - predicted @ predicted) * float(rows**2 - true @ true)
    return float(covariance / math.sqrt(variances)) if variances else 0.0


# ---- several labels a row --------------------------------------------------------------------------------------------

def labels_figures(counts: np.ndarray, all_right: int, rows: int) -> Figures:
    """Of `counts` [L, 4]: each label's true positives, false positives, false negatives, true negatives.

    Args:
      counts: over all rows.
      all_right: rows of which every label is right; their share is the accuracy.
      rows: how many there are.
    """
    counts = np.asarray(counts, np.int64)
    micro = class_figures(counts.sum(0, keepdims=True))["f1"][0]
    return {"accuracy": float(_share(all_right, rows)), **_macro(class_figures(counts)), "micro_f1": float(micro)}


def class_figures(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 [C] of each class, from [C, 4] as `class_counts` has them."""
    right, wrongly, missed = counts[:, :3].T
    return {"precision": _share(right, right + wrongly), "recall": _share(right, right + missed),
            "f1": _share(2 * right, 2 * right + wrongly + missed)}


def _macro(of_class: dict[str, np.ndarray]) -> Figures:
    means = {name: float(values.mean()) if len(values) else 0.0 for name, values in of_class.items()}
    return {"precision": means["precision"], "recall": means["recall"], "macro_f1": means["f1"]}


def _share(part: np.ndarray | int, whole: np.ndarray | int) -> np.ndarray:
    """part / whole; 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)


# ---- scores ----------------------------------------------------------------------------------------------------------

class Moments(NamedTuple):
    """What Pearson's correlation needs of pairs (x, y), about their means: sums about zero would cancel where the mean
    is large beside the spread. Moments of parts make those of the whole (Chan, Golub, LeVeque 1979)."""

    count: int = 0
    x: float = 0.0  # mean
    y: float = 0.0
    xx: float = 0.0  # sum of (x - mean)^2
    yy: float = 0.0
    xy: float = 0.0

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "Moments":
        """Of two arrays [N]."""
        if not len(x):
            return cls()
        (x, mean_x), (y, mean_y) = _centered(x), _centered(y)
        return cls(len(x), mean_x, mean_y, float(x @ x), float(y @ y), float(x @ y))

    def merged(self, other: "Moments") -> "Moments":
        """Of all pairs of both."""
        count = self.count + other.count
        if not (self.count and other.count):
            return max(self, other, key=lambda moments: moments.count)
        x, y, weight = other.x - self.x, other.y - self.y, self.count * other.count / count
        return Moments(count, self.x + x * other.count / count, self.y + y * other.count / count,
                       self.xx + other.xx + x * x * weight, self.yy + other.yy + y * y * weight,
                       self.xy + other.xy + x * y * weight)

    @property
    def pearson(self) -> float:
        """From -1 to 1. NaN where one of the two never changes."""
        spread = math.sqrt(self.xx) * math.sqrt(self.yy)  # one root of the product would underflow
        return float(np.clip(self.xy / spread, -1, 1)) if spread else math.nan


def score_figures(scores: np.ndarray, targets: np.ndarray) -> Figures:
    """Of predicted and true numbers [N], one pair a row, all rows of the set."""
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    return {"pearson": Moments.of(scores, targets).pearson, "spearman": spearman(scores, targets),
            "mean_squared_error": float(np.mean((scores - targets) ** 2)) if len(scores) else math.nan}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks of [N] and [N]; values that are equal share the mean of their ranks."""
    return Moments.of(ranks(x), ranks(y)).pearson if np.isfinite(x).all() and np.isfinite(y).all() else math.nan


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest of [N]."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def _centered(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Without their mean; and the mean. What never changes becomes exactly 0, as it would not by a rounded mean."""
    shifted = np.asarray(values, np.float64) - values[0]
    return shifted - shifted.mean(), float(values[0] + shifted.mean())
