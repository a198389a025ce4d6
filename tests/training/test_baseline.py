"""`jaxlm evaluate RUN --baseline ngram`."""

import json
import shutil

import pytest

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.training.baseline import _trained_on


@pytest.fixture
def run(folder, finished, tmp_path):
    """A copy of the finished run; its corpus stays where it was."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def evaluated(jaxlm, capsys, *arguments):
    capsys.readouterr()
    assert jaxlm("evaluate", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_it_stands_beside_the_model_and_in_the_report(run, jaxlm, capsys):
    alone = evaluated(jaxlm, capsys, run, f"run_dir={run}")
    assert "baseline" not in alone and "baseline" not in json.loads((run / "summary.json").read_text())
    both = evaluated(jaxlm, capsys, run, f"run_dir={run}", "--baseline", "ngram")
    assert {key: value for key, value in both.items() if key != "baseline"} == alone
    assert list(both["baseline"]) == [f"n-gram ({n})" for n in range(1, 6)]
    losses = [figures["loss"] for figures in both["baseline"].values()]
    assert losses == sorted(losses, reverse=True) and 0 < losses[4] < 1  # five words, of which each letter says the next
    summary = json.loads((run / "summary.json").read_text())
    assert summary["baseline"] == both["baseline"] and summary["steps"] == 12
    assert f"| n-gram (5) | loss {losses[4]:.4g}, " in (run / "report.md").read_text(encoding="utf-8")

    assert jaxlm("evaluate", run, f"run_dir={run}", "--baseline", "ngram") == 0
    printed = capsys.readouterr()
    assert f"{losses[4]:.6g}" in next(line for line in printed.out.splitlines() if line.startswith("n-gram (5)"))

    assert jaxlm("train", run, f"run_dir={run}", "train.steps=13", "checkpoint.allow=[schedule]") == 0
    assert json.loads((run / "summary.json").read_text())["baseline"] == both["baseline"]


def test_other_text_is_measured_by_what_the_run_was_trained_on(run, folder, jaxlm, capsys):
    own = evaluated(jaxlm, capsys, run, f"run_dir={run}", "--baseline", "ngram")["baseline"]
    before = (run / "summary.json").read_text()
    other = evaluated(jaxlm, capsys, run, f"run_dir={run}", f"data.raw={folder / 'two.txt'}", "--baseline", "ngram")["baseline"]
    assert other.keys() == own.keys() and other != own and other["n-gram (5)"]["loss"] < 1
    assert (run / "summary.json").read_text() == before  # which is of the run's own text


@pytest.mark.parametrize(("name", "said"), [("two", "was trained on"), ("none", "none")])
def test_the_text_it_is_counted_on_must_be_there(name, said, folder, run_file, jaxlm):
    """Where the corpus of the run was, there may be another by now, or none."""
    assert jaxlm("prepare", run_file, f"data.raw={folder / 'two.txt'}", f"data.corpus={folder / 'two'}") == 0
    with pytest.raises(UserError, match=said):
        _trained_on(config.load(run_file, ["run_dir=somewhere"]), str(folder / name), ["digest of the first"])


@pytest.mark.parametrize(("words", "said"), [(["--baseline", "kenlm"], "ngram"), (["--baseline"], "expected one argument")])
def test_what_it_is_called(words, said, run, jaxlm, capsys):
    assert jaxlm("evaluate", run, *words) == 2
    message = capsys.readouterr().err.strip()
    assert said in message and message.count("\n") == 0


@pytest.mark.slow
def test_with_two_processes_one_counts(run, start_jaxlm):
    process = start_jaxlm("evaluate", run, f"run_dir={run}", "--baseline", "ngram", "--processes", 2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("n-gram (5)") == 1
