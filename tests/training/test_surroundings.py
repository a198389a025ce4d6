"""Line 16: homes, names, streams and signals around a run are no reason for it to fail, or to be reported as failed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxlm import config
from jaxlm.errors import UserError


def test_a_home_is_expanded_for_every_key_that_names_a_place(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("run_dir: ~/runs/a\n")
    settings = config.load("~/run.yaml".replace("~", str(tmp_path)), [
        "data.raw=[~/a.txt, b.txt]", "data.corpus=~/corpus", "data.tokenizer=~/tokenizer.json", "data.validation=~/held.txt"])
    assert (settings.run_dir, settings.data.corpus, settings.data.tokenizer, settings.data.validation) == (
        f"{tmp_path}/runs/a", f"{tmp_path}/corpus", f"{tmp_path}/tokenizer.json", f"{tmp_path}/held.txt")
    assert settings.data.raw == [f"{tmp_path}/a.txt", "b.txt"]
    assert config.load(str(tmp_path / "run.yaml"), ["run_dir=./~x"]).run_dir == "./~x"
    with pytest.raises(UserError, match="no user 'nobody_is_called_so'"):
        config.load(str(tmp_path / "run.yaml"), ["run_dir=~nobody_is_called_so/x"])


def test_help_needs_no_docstrings():
    done = subprocess.run([sys.executable, "-OO", "-m", "jaxlm", "help"], capture_output=True, text=True)
    assert done.returncode == 0 and "raw text to tokenizer and corpus" in done.stdout


def test_a_folder_with_brackets_is_a_folder(folder, run_file, jaxlm, capsys):
    """Its name is no pattern: what was saved there can be read again."""
    run_dir = folder / "exp[1]* #2"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", "train.steps=4", "eval.every_steps=4") == 0
    capsys.readouterr()
    assert jaxlm("evaluate", run_dir, "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4


@pytest.mark.slow
def test_a_closed_terminal_saves_and_a_stream_without_letters_ends_well(folder, run_file):
    """SIGHUP is a notice, with an exit code of its own; then the same command goes on, into ASCII, to its end."""
    run_dir = folder / "aufgeh\u00e4ngt"  # which stands in the last lines
    command = [sys.executable, "-m", "jaxlm", "train", str(run_file), f"run_dir={run_dir}", "train.steps=100",
               "devices.platform=cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with open(folder / "hung_up.txt", "w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        metrics = run_dir / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 129
        said.seek(0)
        assert "SIGHUP: saving" in said.read()
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and (run_dir / "report.md").exists()
