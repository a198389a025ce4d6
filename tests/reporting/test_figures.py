"""Figures from sums are those of the rows: computed here row by row from their definitions, by scikit-learn
(tests/golden/make_figures.py) and by SciPy."""

import functools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from label_cases import several_labels_case, single_label_case

from jaxlm.reporting.figures import Moments, class_counts, confusion_figures, labels_figures, matthews, ranks, score_figures

GOLDEN = Path(__file__).parents[1] / "golden" / "figures.npz"
CASES = 1000
CLASSES = 7  # one more than any case has: a class that is only known by name


def confusion_of(true, predicted):
    """In three parts added up, as batches and hosts do."""
    def part(rows):
        counted = np.zeros((CLASSES, CLASSES), np.int64)
        np.add.at(counted, (true[rows], predicted[rows]), 1)
        return counted

    return sum(part(slice(start, None, 3)) for start in range(3))


def counts_of(true, predicted):
    return np.stack([(true & predicted).sum(0), (~true & predicted).sum(0), (true & ~predicted).sum(0),
                     (~true & ~predicted).sum(0)], axis=1)


def share(part, whole):
    return part / whole if whole else 0.0


def means_over(pairs):
    """Macro precision, recall and F1 and micro F1, by their definitions; `pairs`: of each class (true, predicted)
    [N]."""
    precision, recall, f1 = [], [], []
    for true, predicted in pairs:
        right = np.sum(true & predicted)
        precision.append(share(right, predicted.sum()))
        recall.append(share(right, true.sum()))
        f1.append(share(2 * precision[-1] * recall[-1], precision[-1] + recall[-1]))
    right = sum(np.sum(true & predicted) for true, predicted in pairs)
    all_predicted, all_true = (sum(column.sum() for column in columns) for columns in reversed(list(zip(*pairs, strict=True))))
    return [np.mean(precision), np.mean(recall), np.mean(f1), share(2 * right, all_predicted + all_true)]


def correlation_of_indicators(true, predicted):
    """Gorodkin's R_K: the correlation of the two one-hot matrices [N, C]."""
    one, other = (np.eye(CLASSES)[labels] - np.eye(CLASSES)[labels].mean(0) for labels in (true, predicted))
    return share(np.sum(one * other), np.sqrt(np.sum(one**2) * np.sum(other**2)))


def test_one_label_a_row_by_the_definitions():
    for number in range(CASES):
        true, predicted = single_label_case(number)
        pairs = [(true == name, predicted == name) for name in np.union1d(true, predicted)]
        want = [np.mean(true == predicted), *means_over(pairs), correlation_of_indicators(true, predicted)]
        got = confusion_figures(confusion_of(true, predicted))
        assert list(got) == ["accuracy", "precision", "recall", "macro_f1", "micro_f1", "matthews"]
        np.testing.assert_allclose(list(got.values()), want, rtol=0, atol=1e-12, err_msg=f"case {number}")


def test_several_labels_a_row_by_the_definitions():
    for number in range(CASES):
        true, predicted = several_labels_case(number)
        right = (true == predicted).all(1)
        want = [right.mean(), *means_over(list(zip(true.T, predicted.T, strict=True)))]
        got = labels_figures(counts_of(true, predicted), right.sum(), len(true))
        assert list(got) == ["accuracy", "precision", "recall", "macro_f1", "micro_f1"]
        np.testing.assert_allclose(list(got.values()), want, rtol=0, atol=1e-12, err_msg=f"case {number}")


def test_both_as_scikit_learn_has_them():
    with np.load(GOLDEN) as golden:
        for number, want in enumerate(golden["single_label"]):
            got = confusion_figures(confusion_of(*single_label_case(number)))
            np.testing.assert_allclose(list(got.values()), want, rtol=0, atol=1e-12, err_msg=f"case {number}")
        for number, want in enumerate(golden["several_labels"]):
            true, predicted = several_labels_case(number)
            got = labels_figures(counts_of(true, predicted), (true == predicted).all(1).sum(), len(true))
            np.testing.assert_allclose(list(got.values()), want, rtol=0, atol=1e-12, err_msg=f"case {number}")


def test_counts_of_classes_add_up_to_the_rows():
    true, predicted = single_label_case(5)
    counts = class_counts(confusion_of(true, predicted))
    assert counts.sum(1).tolist() == [len(true)] * CLASSES
    assert counts[:, 0].sum() == np.sum(true == predicted)


def test_nothing_counted_is_zero_everywhere():
    assert set(confusion_figures(np.zeros((3, 3))).values()) == {0.0}
    assert set(labels_figures(np.zeros((3, 4)), 0, 0).values()) == {0.0}


def test_matthews_of_billions_of_rows():
    """Products of such counts round in float64: the correlation of independent labels would not be zero."""
    independent = np.array([[9, 3], [15, 5]], np.int64) * 3_000_000_019
    assert matthews(independent) == 0.0


# ---- scores ----------------------------------------------------------------------------------------------------------

def score_case(number):
    """Scores and targets [N]: two rows, ties, large means with small spread, and tiny or huge values."""
    random = np.random.default_rng(number)
    rows = int(random.integers(2, 80)) if number % 5 else 2
    x = random.normal(size=rows)
    y = x * random.normal() + random.normal(size=rows)
    match number % 6:
        case 1:
            x, y = x.round(), y.round()
        case 2:
            x, y = 1e6 + x, 1e6 + y
        case 3:
            x, y = x * 1e-30, y * 1e20
        case 4:
            y = -x
        case 5:
            x, y = x.round(1), np.full(rows, 0.1)
    return x, y


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning", "ignore::scipy.stats.NearConstantInputWarning")
def test_scores_as_scipy_has_them():
    constant = 0
    for number in range(CASES):
        x, y = score_case(number)
        got = score_figures(x, y)
        want = [scipy.stats.pearsonr(x, y)[0], scipy.stats.spearmanr(x, y)[0]]
        np.testing.assert_allclose([got["pearson"], got["spearman"]], want, rtol=0, atol=1e-9, err_msg=f"case {number}")
        np.testing.assert_array_equal(ranks(x), scipy.stats.rankdata(x))
        np.testing.assert_allclose(got["mean_squared_error"], sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x))
        constant += np.isnan(want[0])
    assert constant > CASES / 10


def test_moments_of_parts_are_those_of_the_whole_also_with_a_mean_that_hides_the_spread():
    random = np.random.default_rng(0)
    x = 1e8 + random.normal(size=1000)
    y = 1e8 - 0.5 * x + random.normal(size=1000)
    parts = [Moments.of(x[start:stop], y[start:stop]) for start, stop in [(0, 1), (1, 1), (1, 400), (400, 1000)]]
    merged = functools.reduce(Moments.merged, parts, Moments())
    np.testing.assert_allclose(merged, Moments.of(x, y), rtol=1e-9)
    assert merged.pearson == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-9)
    sums = len(x) * (x @ y) - x.sum() * y.sum()  # what sums about zero have left of it
    assert abs(sums / len(x) - merged.xy) > 0.01 * abs(merged.xy)


def test_scores_that_are_not_numbers_have_no_correlation():
    got = score_figures([0.0, np.nan, 1.0], [0.0, 1.0, 2.0])
    assert all(np.isnan(value) for value in got.values())
    assert np.isnan(list(score_figures([], []).values())).all()
