import io
import re
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from jaxlm.console import progress
from jaxlm.console.progress import TrainingProgress, progress_bar, waiting

ROW = {"step": 120, "loss": 3.41234, "learning_rate": 2.9e-4, "grad_norm": 1.0, "tokens_per_second": 12345.6, "mfu": None,
       "step_seconds": 0.083, "data_wait_seconds": 0.001}


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextmanager
def terminal(monkeypatch):
    """Stands in for stderr as a terminal of 120 columns; yields a function that returns what it shows, without
    colors."""
    stream = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "120")
        yield lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_pipe_gets_a_line_at_the_start_every_15_seconds_and_at_the_end(capsys, clock):
    with progress_bar("tokenize", 1000, "documents") as advance:
        for _ in range(100):
            clock[0] += 1
            advance(10)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "tokenize: 1,000 documents"
    assert lines[1] == "tokenize: 150/1,000 documents  10/s  eta 1m25s"
    assert lines[-1] == "tokenize: 1,000/1,000 documents in 1m40s (10/s)"
    assert len(lines) == 1 + 100 // 15 + 1


def test_unknown_amount(capsys, clock):
    with progress_bar("read", None, "documents") as advance:
        clock[0] += 20
        advance()
    assert capsys.readouterr().err.splitlines() == [
        "read: started", "read: 1 documents  0.05/s", "read: 1 documents in 20s (0.05/s)"]


def test_an_error_passes_through_and_claims_no_end(capsys):
    with pytest.raises(ValueError, match="boom"), progress_bar("tokenize", 5, "documents"):
        raise ValueError("boom")
    assert capsys.readouterr().err.splitlines() == ["tokenize: 5 documents"]


def test_disabled_shows_nothing(capsys):
    with progress_bar("tokenize", 5, "documents", enabled=False) as advance:
        advance(5)
    with TrainingProgress(10, 0, enabled=False) as training:
        training.update(1, ROW)
        training.print("note")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    with terminal(monkeypatch) as shown:
        with progress_bar("tokenize", 2000, "documents") as advance:
            advance(2000)
        with progress_bar("read", None, "documents") as advance:
            advance(7)
        assert re.search(r"tokenize ━+ 2,000/2,000 documents", shown())
        assert re.search(r"read ━+ 7 documents", shown())


def test_waiting_says_for_how_long(capsys, monkeypatch):
    """Line 21 of issue 14: a compilation is no empty screen, in a pipe or on a terminal."""
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_SECONDS", 0.05)
    with waiting("compiling"):
        time.sleep(0.3)
    first, *between, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("compiling: started", "compiling: done in 0.3s")
    assert between and all(re.fullmatch(r"compiling: 0\.\ds so far", line) for line in between)
    with pytest.raises(ValueError), waiting("compiling"):
        raise ValueError
    assert capsys.readouterr().err == "compiling: started\n"  # nothing was done
    with terminal(monkeypatch) as shown:
        with waiting("compiling"):
            time.sleep(0.1)
        assert re.search(r"compiling 0:00:00", shown())


def test_training_lines_in_a_log(capsys, clock):
    with TrainingProgress(1000, 110, enabled=True) as training:
        training.update(120, ROW)
        clock[0] += 10
        training.update(130, ROW | {"mfu": 0.4123})
        training.update(130, {"step": 130, "val_loss": 3.5, "accuracy": 0.123456, "mfu": None})
        training.print("saved [130]")
    assert capsys.readouterr().err.splitlines() == [
        "step 120/1000  loss 3.412  lr 2.9e-4  12.3k tokens/s  83 ms/step  eta 1m13s",  # from the step time: 880 * 0.083 s
        "step 130/1000  loss 3.412  lr 2.9e-4  12.3k tokens/s  mfu 41.2%  83 ms/step  eta 14m30s",  # from the clock: 870 * 1 s
        "step 130/1000  val_loss 3.5  accuracy 0.1235",
        "saved [130]",
    ]


def test_training_line_on_a_terminal(monkeypatch):
    with terminal(monkeypatch) as shown:
        with TrainingProgress(1000, 0, enabled=True) as training:
            training.update(120, ROW)
            training.update(120, {"val_loss": 3.25})
            training.print("a note [with brackets]")
        text = shown()
    assert re.search(r"step 120/1000 [━╸╺]+ loss 3\.412  lr 2\.9e-4  12\.3k tokens/s  83 ms/step  eta 1m13s", text)
    assert "step 120/1000  val_loss 3.25\n" in text
    assert "a note [with brackets]\n" in text


def test_a_loss_that_is_not_finite_is_shown(capsys):
    with TrainingProgress(10, 0) as training:
        training.update(1, {"loss": float("nan")})
        training.update(2, {"loss": None})
    assert [line.split("  eta")[0] for line in capsys.readouterr().err.splitlines()] == ["step 1/10  loss nan", "step 2/10"]


def test_importing_is_cheap():
    """Spawned workers import this module: no JAX, no rich, no matplotlib behind it."""
    code = ("import sys, jaxlm.console.progress, jaxlm.reporting.plots, jaxlm.reporting.report; "
            "print([m for m in ('jax', 'rich', 'matplotlib', 'tensorboardX') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
