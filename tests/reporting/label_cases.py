"""Labels and predictions to compute figures of: random ones, and those that books forget. NumPy alone, so that
tests/golden/make_figures.py gives scikit-learn the same."""

import numpy as np


def single_label_case(number: int) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted classes [N] of 2 to 7: some never present, some never predicted, some neither; constants."""
    random = np.random.default_rng(number)
    rows, classes = int(random.integers(1, 60)) if number % 5 else 2, int(random.integers(2, 8))
    true, predicted = random.integers(0, classes, (2, rows))
    match number % 6:
        case 1:
            predicted[:] = random.integers(classes)
        case 2:
            true[:] = random.integers(classes)
        case 3:
            predicted = true.copy()
        case 4:  # one class never predicted, and another never there
            predicted[predicted == classes - 1], true[true == 0] = 0, classes - 1
        case 5:
            predicted = np.where(random.random(rows) < 0.7, true, predicted)
    return true, predicted


def several_labels_case(number: int) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted labels, bool [N, L]: labels that no row has or none is predicted to have, rows without."""
    random = np.random.default_rng(number)
    rows, labels = int(random.integers(1, 50)) if number % 5 else 2, int(random.integers(2, 7))
    true = random.random((rows, labels)) < random.random(labels)
    predicted = np.where(random.random((rows, labels)) < 0.7, true, random.random((rows, labels)) < 0.5)
    match number % 4:
        case 1:
            predicted[:, 0] = False
        case 2:
            true[:, -1] = False
        case 3:
            true[:, 0], predicted[:, 0], predicted[rows // 2 :] = False, False, False
    return true, predicted
