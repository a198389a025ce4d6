"""Whole runs over a corpus that is damaged: they end with one line, or do without what is damaged, and say so."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm import config
from jaxlm.data.corpus import Corpus
from jaxlm.reporting.metrics import read_metrics
from jaxlm.tasks.find import find_task

SHARD_TOKENS, STEPS, ROWS = 1000, 12, 8
SMALL = (f"data.shard_tokens={SHARD_TOKENS}", "logging.tensorboard=false")
PATIENCE = 120.0  # seconds that a process on a busy machine may take to get where it should be


@pytest.fixture
def whole(folder, run_file, jaxlm) -> Path:
    """The tests' text in shards smaller than a block."""
    path = folder / "small_shards"
    if not path.exists():
        assert jaxlm("prepare", run_file, f"data.corpus={path}", *SMALL) == 0
    return path


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 4
    path.write_bytes(data)


def shard(corpus: Path, number: int) -> Path:
    return corpus / f"train-{number:05d}.tokens.npy"


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
    """A copy with a flipped bit in one shard, and another shard gone."""
    path = shutil.copytree(whole, tmp_path / "corpus")
    flip_a_bit(shard(path, 1))
    shard(path, 4).unlink()
    return path


@pytest.fixture
def skipped_by_step(whole, run_file) -> np.ndarray:
    """int [STEPS]: rows of each step whose text is in the shards 1 or 4."""
    batches = find_task(config.load(run_file)).training_batches([(Corpus(whole), 1.0)])
    spans = [[example.spans[0] for example in batches.examples(step)] for step in range(STEPS)]
    touched = [[any(start < (number + 1) * SHARD_TOKENS and number * SHARD_TOKENS < stop for number in (1, 4))
                for start, stop in step] for step in spans]
    assert 5 < np.sum(touched) < STEPS * ROWS / 2
    return np.sum(touched, axis=1)


def step_rows(run_dir: Path) -> list[dict]:
    return [row for row in read_metrics(run_dir) if "loss" in row]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in step_rows(run_dir)]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_skipped_rows_are_counted_and_named(damaged, skipped_by_step, tmp_path, run_file, jaxlm, capsys):
    run_dir = tmp_path / "run"
    arguments = ("train", run_file, f"data.corpus={damaged}", *SMALL, "data.damaged=skip")
    assert jaxlm(*arguments, f"run_dir={run_dir}") == 0
    captured = capsys.readouterr()
    so_far = np.cumsum(skipped_by_step).tolist()
    assert [row.get("skipped_rows") for row in step_rows(run_dir)] == [count or None for count in so_far]
    assert summary(run_dir)["skipped_rows"] == so_far[-1] and f"{so_far[-1]} rows skipped" in captured.out
    assert f"| rows skipped for damage | {so_far[-1]} |" in (run_dir / "report.md").read_text()
    for path, problem in ((shard(damaged, 1), "differ from their checksum"), (shard(damaged, 4), "missing")):
        assert [problem in line for line in captured.err.splitlines() if line.startswith(f"{path}: ")] == [True]
    assert all(np.isfinite(losses(run_dir))) and losses(run_dir)[-1] < 0.9 * losses(run_dir)[0]

    again = tmp_path / "again"  # in two parts and on other devices
    mesh = ("devices.count=8", "mesh.fsdp=4", "mesh.tensor=2")
    assert jaxlm(*arguments, f"run_dir={again}", "train.steps=7", *mesh) == 0
    assert jaxlm(*arguments, f"run_dir={again}") == 0
    np.testing.assert_allclose(losses(again), losses(run_dir), rtol=1e-5)
    assert summary(again)["skipped_rows"] == so_far[-1]


def test_a_skipped_row_counts_nothing_in_an_evaluation(whole, tmp_path, run_file, jaxlm):
    damaged = shutil.copytree(whole, tmp_path / "corpus")
    (damaged / "validation-00000.tokens.npy").unlink()
    assert len(list(damaged.glob("validation-*.tokens.npy"))) == 1
    run_dir = tmp_path / "run"
    assert jaxlm("train", run_file, f"data.corpus={damaged}", *SMALL, "data.damaged=skip", f"run_dir={run_dir}") == 0
    evaluations = [row for row in read_metrics(run_dir) if "val_loss" in row]
    assert len(evaluations) == 2 and all(row["val_skipped_rows"] > 0 for row in evaluations)
    assert summary(run_dir)["skipped_rows"] == 0 and not any("skipped_rows" in row for row in step_rows(run_dir))


def test_where_nothing_is_left_nothing_is_learned(whole, tmp_path, run_file, jaxlm, capsys):
    for number, (split, message) in enumerate((("train", "4 steps in a row were skipped"), ("validation", "nothing to predict"))):
        damaged = shutil.copytree(whole, tmp_path / split)
        for path in damaged.glob(f"{split}-*.tokens.npy"):
            path.unlink()
        assert jaxlm("train", run_file, f"data.corpus={damaged}", *SMALL, "data.damaged=skip", "guards.most_skipped=2",
                     f"run_dir={tmp_path / str(number)}") == 3
        assert message in capsys.readouterr().err


def test_without_damage_nothing_is_said(finished, folder, run_file, jaxlm):
    run_dir = folder / "nothing_to_skip"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", "data.damaged=skip") == 0
    assert losses(run_dir) == losses(finished)
    assert not any("skipped_rows" in row or "val_skipped_rows" in row for row in read_metrics(run_dir))
    assert summary(run_dir)["skipped_rows"] == summary(finished)["skipped_rows"] == 0


def test_damage_ends_the_run_with_one_line_and_it_goes_on_when_told_to_skip(
        whole, tmp_path, run_file, jaxlm, capsys, skipped_by_step):
    damaged, run_dir = shutil.copytree(whole, tmp_path / "corpus"), tmp_path / "run"
    flip_a_bit(shard(damaged, 1))
    flip_a_bit(shard(damaged, 4))
    arguments = ("train", run_file, f"data.corpus={damaged}", *SMALL, f"run_dir={run_dir}")
    assert jaxlm(*arguments) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"jaxlm: {damaged}/train-0000") and "Traceback" not in last
    for words in ("bytes ", "differ from their checksum", "restore the file", "prepare the corpus again", "data.damaged=skip"):
        assert words in last
    assert jaxlm(*arguments, "data.damaged=skip") == 0
    assert summary(run_dir)["skipped_rows"] == skipped_by_step.sum()


def test_a_shard_that_vanishes_ends_the_run_with_one_line(whole, tmp_path, run_file, start_jaxlm):
    corpus, run_dir = shutil.copytree(whole, tmp_path / "corpus"), tmp_path / "run"
    process = start_jaxlm("train", run_file, f"run_dir={run_dir}", f"data.corpus={corpus}", *SMALL, "train.steps=100000",
                          "eval.every_steps=100000", "checkpoint.every_steps=100000")
    end = time.monotonic() + PATIENCE
    while len(step_rows(run_dir)) < 5:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    shard(corpus, 3).unlink()
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1 and "Traceback" not in output
    assert f"jaxlm: {shard(corpus, 3)}: missing; restore the file" in output.splitlines()[-1]


def test_damage_that_one_process_meets_ends_them_all(whole, tmp_path, run_file, start_jaxlm):
    corpus, run_dir = shutil.copytree(whole, tmp_path / "corpus"), tmp_path / "run"
    flip_a_bit(shard(corpus, 1))
    process = start_jaxlm("train", run_file, "--processes", 2, f"run_dir={run_dir}", f"data.corpus={corpus}", "mesh.data=2",
                          *SMALL)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 1 and "Traceback" not in output
    first, *_ = [line for line in output.splitlines() if line.startswith("jaxlm: ")]
    assert f"{shard(corpus, 1)}: bytes 128 to 2,128 differ from their checksum" in first


@pytest.mark.slow
def test_processes_whose_copies_are_damaged_in_different_places_stay_together(
        whole, damaged, skipped_by_step, tmp_path, run_file, jaxlm):
    """Both hold every row (tensor=2); the first one's reading counts."""
    arguments = ("train", run_file, *SMALL, "data.damaged=skip", "devices.count=1")
    assert jaxlm(*arguments, f"data.corpus={damaged}", f"run_dir={tmp_path / 'alone'}") == 0
    other = tmp_path / "other"
    shutil.copytree(whole, other / "corpus")
    shard(other / "corpus", 2).unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    run_dir, processes = tmp_path / "together", []
    source = str(Path(config.__file__).parents[1])
    for number, directory in enumerate((tmp_path, other)):
        environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number),
                                    "PYTHONPATH": source}
        command = [*map(str, arguments), "data.corpus=corpus", f"run_dir={run_dir}", "mesh.tensor=2"]
        processes.append(subprocess.Popen([sys.executable, "-m", "jaxlm", *command], cwd=directory, env=environment,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    np.testing.assert_allclose(losses(run_dir), losses(tmp_path / "alone"), rtol=1e-5)
    assert summary(run_dir)["skipped_rows"] == skipped_by_step.sum()
    assert f"{shard(tmp_path / 'corpus', 4)}: missing" in outputs[0] and f"{shard(other / 'corpus', 2)}: missing" in outputs[1]
