"""benchmarks/same_curve.py notices a single bit, and nothing but what differs."""

import importlib.util
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxlm.config import load
from jaxlm.settings import AXES

ROOT = Path(__file__).parents[1]


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


same_curve = module_of(ROOT / "benchmarks/same_curve.py")


def with_bit(array: np.ndarray, index: int, bit: int) -> np.ndarray:
    """A copy in which one bit is another."""
    changed = array.copy()
    changed.view(f"u{array.dtype.itemsize}").reshape(-1)[index] ^= 1 << bit
    return changed


# ---- arrays ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.int32])
def test_one_bit_of_an_array_is_noticed(dtype):
    array = np.arange(1, 13).reshape(3, 4).astype(dtype)
    assert same_curve.differing(array, array.copy()) is None
    for index in (0, 11):
        assert same_curve.differing(array, with_bit(array, index, 0)) > 0


def test_a_difference_is_relative_to_the_largest_number():
    assert same_curve.differing(np.array([1.0, -4.0]), np.array([1.0, -3.0])) == 0.25


def test_nan_is_nan_and_zero_is_not_minus_zero():
    nan, other_nan = (np.frombuffer(struct.pack("<II", bits, 0x3F800000), np.float32) for bits in (0x7FC00000, 0xFFC00001))
    assert np.isnan(nan[0]) and np.isnan(other_nan[0]) and nan.tobytes() != other_nan.tobytes()
    assert same_curve.differing(nan, other_nan) is None
    assert same_curve.differing(nan, with_bit(other_nan, 1, 0)) > 0
    assert same_curve.differing(nan, np.ones(2, np.float32)) == np.inf
    assert same_curve.differing(np.zeros(1), -np.zeros(1)) == 0.0


TREE = {"blocks.kernel": np.ones((2, 3)), "mlm_bias": np.arange(4.0), "table": np.ones((4, 3))}


def test_a_renamed_leaf_is_paired_by_its_place_and_listed():
    heads = {"blocks.kernel": TREE["blocks.kernel"], "heads.masked_token.bias": TREE["mlm_bias"], "table": TREE["table"]}
    assert same_curve.compare_arrays(TREE, heads) == ([], {"mlm_bias": "heads.masked_token.bias"})
    heads["heads.masked_token.bias"] = with_bit(TREE["mlm_bias"], 3, 0)
    (found,), _ = same_curve.compare_arrays(TREE, heads)
    assert found.where == "heads.masked_token.bias" and 0 < found.size < 1e-15


def test_all_leaves_may_be_renamed():
    under = {f"trunk.{path}": array for path, array in TREE.items()}
    assert same_curve.compare_arrays(TREE, under) == ([], {path: f"trunk.{path}" for path in TREE})


@pytest.mark.parametrize(("change", "where", "what"), [
    ({"table": np.ones((3, 4))}, "table", "float64[4, 3] -> table, float64[3, 4]"),
    ({"table": np.ones((4, 3), np.float32)}, "table", "float64[4, 3] -> table, float32[4, 3]"),
    ({"table": None}, "table", "only before"),
    ({"zzz": np.ones(1)}, "zzz", "only after"),
])
def test_other_shapes_types_and_leaves_are_differences(change, where, what):
    after = {path: array for path, array in (TREE | change).items() if array is not None}
    (found,), renamed = same_curve.compare_arrays(TREE, after)
    assert (found.where, found.what, found.size, renamed) == (where, what, np.inf, {})


# ---- rows ------------------------------------------------------------------------------------------------------------

ROWS = [{"step": 1, "time": 5.0, "tokens": 8, "loss": 2.5, "grad_norm": None, "step_seconds": 0.5, "mfu": None},
        {"step": 2, "time": 6.0, "tokens": 9, "loss": 2.25, "grad_norm": 1.5, "step_seconds": 0.25, "mfu": None},
        {"step": 2, "time": 7.0, "tokens": 9, "val_loss": 3.0}, {"step": 2, "changed": {"train.steps": [1, 2]}}]


def changed_rows(row: int, **columns) -> list[dict]:
    return [old | columns if number == row else old for number, old in enumerate(ROWS)]


def found_in(after: list[dict]) -> list[tuple[str, str]]:
    differences, new = same_curve.compare_rows(ROWS, after)
    assert not new
    return [(difference.where, difference.what) for difference in differences]


def test_times_speeds_and_texts_are_not_compared():
    assert found_in(changed_rows(0, time=9.0, step_seconds=1.0, mfu=0.5)) == []
    assert found_in(ROWS[:3]) == []


def test_the_last_bit_of_a_loss_is_noticed():
    after = np.nextafter(2.25, 3)
    assert found_in(changed_rows(1, loss=after)) == [("step 2, loss", f"2.25 -> {after}")]


def test_what_is_not_finite_is_so_on_both_sides():
    assert found_in(changed_rows(0, grad_norm=1.0)) == [("step 1, grad_norm", "nan -> 1.0")]
    assert found_in(changed_rows(1, grad_norm=None)) == [("step 2, grad_norm", "1.5 -> nan")]


def test_a_row_or_column_that_one_side_lacks_is_a_difference():
    assert found_in([ROWS[0], ROWS[2]]) == [("step 2, loss", "only before"), ("step 2, grad_norm", "only before")]
    assert found_in([*ROWS[:2], ROWS[3]]) == [("step 2, val_loss", "only before")]
    assert found_in([*ROWS, {"step": 3, "loss": 2.0}]) == [("step 3, loss", "only after")]


def test_the_first_step_that_differs_comes_first():
    after = [row | {"loss": 0.0} if "loss" in row else row for row in reversed(ROWS)]
    assert [where for where, _ in found_in(after)] == ["step 1, loss", "step 2, loss"]


def test_a_column_that_is_new_everywhere_is_named_and_no_difference():
    assert same_curve.compare_rows(ROWS, changed_rows(0, router_loss=1.0)) == ([], {"router_loss"})


# ---- text, folders, trainings ----------------------------------------------------------------------------------------

def test_the_corpus_is_compared_by_content(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "tokenizer").mkdir(parents=True)
    for name in ("train.tokens.npy", "train.crc32.npy", "manifest.json", "tokenizer/tokenizer.json"):
        (corpus / name).write_bytes(name.encode())
    before = same_curve.read_corpus(tmp_path)
    assert list(before) == ["tokenizer/tokenizer.json", "train.tokens.npy"]
    (corpus / "train.tokens.npy").rename(corpus / "train.text.tokens.npy")
    (corpus / "manifest.json").write_bytes(b"another format")
    assert same_curve.compare_files(before, same_curve.read_corpus(tmp_path)) == []
    (corpus / "train.text.tokens.npy").write_bytes(b"other tokens")
    (found,) = same_curve.compare_files(before, same_curve.read_corpus(tmp_path))
    assert found.where == "corpus, train.tokens.npy"


def test_a_folder_is_made_again_when_it_is_incomplete_or_of_something_else(tmp_path):
    def breaks(folder: Path) -> None:
        (folder / "half").write_text("")
        raise same_curve.Failed("no")

    made_by = []

    def make(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        made_by.append(folder)

    with pytest.raises(same_curve.Failed):
        same_curve.made(tmp_path / "run", "one", breaks)
    assert [same_curve.made(tmp_path / "run", recipe, make) for recipe in ("one", "one", "two", "two")] == [
        False, True, False, True]
    assert len(made_by) == 2


def test_twelve_trainings_cover_what_they_are_to_cover():
    loaded = {}
    for name, (_, changes, _) in same_curve.TRAININGS.items():
        loaded[name] = load(same_curve.CONFIG, [word for word in changes.split() if not word.startswith("--")])
    runs = list(loaded.values())
    assert len(runs) == 12
    assert {run.model.family for run in runs} == {"gpt", "bert"}
    assert {run.train.precision for run in runs} == {"float32", "bfloat16"}
    assert {run.data.packing for run in runs} == {"concatenate", "documents"}
    assert all(any((getattr(run.mesh, axis) or 1) > 1 for run in runs) for axis in AXES)
    for covered in (lambda run: run.model.num_experts, lambda run: run.model.dropout, lambda run: run.model.next_sentence,
                    lambda run: run.train.gradient_accumulation > 1, lambda run: run.train.stage_repeats > 1):
        assert any(covered(run) and run.devices.count > 1 for run in runs)
    assert sum("--processes=2" in training.changes for training in same_curve.TRAININGS.values()) == 2
    assert sum(len(training.starts) > 1 for training in same_curve.TRAININGS.values()) == 3
    assert all(run.eval.every_steps < min(same_curve.TRAININGS[name].starts) for name, run in loaded.items())


@pytest.mark.slow
def test_the_command_tells_a_changed_checkout_from_the_same_one(tmp_path):
    """A clone equals its commit; with other initial weights it does not."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    shutil.copytree(ROOT / "benchmarks", checkout / "benchmarks", dirs_exist_ok=True)

    def call() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(checkout / "benchmarks/same_curve.py"), "--against", "HEAD", "--share-packages", "--envs",
             str(tmp_path / "envs"), "--only", "gpt"], capture_output=True, text=True)

    same = call()
    assert same.returncode == 0, same.stdout + same.stderr
    assert re.search(r"\| gpt \| .* \| 6 \| equal \(\d+ numbers, \d+ arrays\) \| 0 \| 0 \|", same.stdout)
    settings = checkout / "jaxlm/settings.py"
    settings.write_text(re.sub(r"(initializer_range: .*key\()0\.02\b", r"\g<1>0.021", settings.read_text()))
    other = call()
    assert other.returncode == 1, other.stdout + other.stderr
    assert "step 1, grad_norm" in other.stdout and "0 of 1 equal" in other.stdout
    assert "gpt, HEAD: used again" in other.stderr
