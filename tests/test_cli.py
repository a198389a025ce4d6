"""What the verbs print, for people and for scripts. Whole runs stand in tests/training."""

import json
import subprocess
import sys

import jax
import pytest
import yaml

from jaxlm import cli
from jaxlm.reporting.metrics import MetricsWriter
from jaxlm.runtime import processes
from jaxlm.storage.files import write_json


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, where JAX's devices are already there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "initialize", lambda settings: jax.devices()[: settings.count or 1])
    return tmp_path


def write_config(path, **sections):
    path.write_text(yaml.safe_dump(sections))


def test_prepare_says_what_became_of_the_text(folder, capsys):
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"this is the text number {number}" if number else "")
    write_config(folder / "run.yaml", data={"raw": "*.txt", "corpus": "corpus", "tokenizer": "bytes",
                                            "cleaning": {"exact_duplicates": True}})
    (folder / "copy.txt").write_text((folder / "3.txt").read_text())
    for _ in range(2):  # the second time it is there already
        assert cli.main(["prepare", "run.yaml"]) == 0
        lines = {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}
        assert lines["corpus"] == str(folder / "corpus")
        assert lines["sources"] == "11 files, 250B"
        assert lines["documents"] == "11 read, 9 kept (0 of them mended or with replaced characters)"
        assert lines["dropped"] == "1 empty, 1 exact duplicate"
        assert lines["train"] == "8 documents, 208 tokens, 0.96 bytes a token"  # 25 bytes and an end mark each
        assert lines["validation"] == "1 document, 26 tokens, 0.96 bytes a token"
        assert lines["tokenizer"].startswith("bytes, 260 tokens, digest ")


def test_bench_prints_the_figures(folder, capsys):
    write_config(folder / "run.yaml", data={"sequence_length": 8}, bench={"steps": 2, "warmup_steps": 1},
                 model={"num_layers": 1, "num_heads": 2, "hidden_size": 16, "vocab_size": 50, "max_length": 8})
    assert cli.main(["bench", "run.yaml", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {
        "median_step_ms", "tokens_per_second", "mfu", "peak_memory_bytes", "state_bytes", "compile_seconds", "devices", "mesh"}
    assert figures["tokens_per_second"] == pytest.approx(8 * 8 / figures["median_step_ms"] * 1000)
    assert figures["mfu"] is None and figures["devices"] == 1 and set(figures["mesh"].values()) == {1}
    assert figures["peak_memory_bytes"] > 3 * 4 * 16 * 128  # the vocabulary's table and its two moments
    assert 3 * 4 * 16 * 128 < figures["state_bytes"] < figures["peak_memory_bytes"]


def test_processes_leave_standard_output_to_the_figures(tmp_path):
    """Gloo greets on file descriptor 1, where a script reads."""
    write_config(tmp_path / "run.yaml", data={"sequence_length": 8}, bench={"steps": 1, "warmup_steps": 1},
                 mesh={"data": 2}, devices={"platform": "cpu"},
                 model={"num_layers": 1, "num_heads": 2, "hidden_size": 16, "vocab_size": 50, "max_length": 8})
    command = [sys.executable, "-m", "jaxlm", "bench", "run.yaml", "--processes", "2", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == 2


def test_figures_for_people(capsys):
    cli._print_figures({"step": 20, "val_loss": 1.23456789, "mfu": None, "mesh": {"data": 2, "fsdp": 4}}, as_json=False)
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["step", "20"], ["val_loss", "1.23457"], ["mfu", "not known"], ["mesh", "data=2 fsdp=4"]]


def test_report_of_one_run_and_of_two(folder, capsys):
    for name, rate in (("one", 1e-3), ("two", 2e-3)):
        with MetricsWriter(folder / name, tensorboard=False, resume_step=0) as writer:
            for step in (1, 2):
                writer.write({"step": step, "loss": 4.0 - step, "step_seconds": 0.1, "tokens_per_second": 10.0})
            writer.write({"step": 2, "val_loss": 2.5 + rate})
        write_config(folder / name / "config.yaml", optimizer={"learning_rate": rate})
        write_json(folder / name / "summary.json", {"steps": 2, "val_loss": 2.5 + rate, "wall_seconds": 5.0})
    assert cli.main(["report", "one"]) == 0
    out = capsys.readouterr().out
    assert out.startswith((folder / "one" / "report.md").read_text()) and out.endswith("written to one/report.md\n")
    assert cli.main(["report", "one", "two"]) == 0
    out = capsys.readouterr().out
    assert "optimizer.learning_rate" in out and "2.5010" in out and "2.5020" in out
    assert out.endswith("loss curves: one/comparison.png\n")
    assert (folder / "one" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_width_is_the_terminals_or_columns_or_80(monkeypatch):
    monkeypatch.setattr(sys, "__stdout__", None)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli._console().width == 80
    monkeypatch.setenv("COLUMNS", "133")
    assert cli._console().width == 133
