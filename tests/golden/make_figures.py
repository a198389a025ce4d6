"""Writes figures.npz: what scikit-learn computes for the cases of tests/reporting/label_cases.py.

    pip install scikit-learn
    python tests/golden/make_figures.py            # writes the file beside this script
    python tests/golden/make_figures.py --check    # makes it again, compares, exits 1 where it differs
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_score, recall_score

FOLDER = Path(__file__).parent
CASES = 250
sys.path.append(str(FOLDER.parent / "reporting"))


def shared(true: np.ndarray, predicted: np.ndarray) -> list[float]:
    macro = {"average": "macro", "zero_division": 0}
    return [accuracy_score(true, predicted), precision_score(true, predicted, **macro), recall_score(true, predicted, **macro),
            f1_score(true, predicted, **macro), f1_score(true, predicted, average="micro", zero_division=0)]


def make() -> dict[str, np.ndarray]:
    """float64 [CASES, 6] and [CASES, 5]: accuracy, macro precision, recall and F1, micro F1, and Matthews."""
    from label_cases import several_labels_case, single_label_case

    single = [single_label_case(number) for number in range(CASES)]
    return {"single_label": np.array([[*shared(*case), matthews_corrcoef(*case)] for case in single]),
            "several_labels": np.array([shared(*several_labels_case(number)) for number in range(CASES)])}


if __name__ == "__main__":
    made, path = make(), FOLDER / "figures.npz"
    if "--check" in sys.argv[1:]:
        with np.load(path) as file:
            sys.exit(any(not np.allclose(file[name], array, rtol=0, atol=1e-12) for name, array in made.items()))
    np.savez_compressed(path, **made)
