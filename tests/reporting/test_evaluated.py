import json
import shutil

import numpy as np
import pytest
from matplotlib import image
from test_report import SUMMARY, make_run, printed

from jaxlm.errors import UserError
from jaxlm.reporting.evaluated import in_a_line, write_evaluation
from jaxlm.reporting.plots import plot_confusion, plot_loss
from jaxlm.reporting.report import compare, write_report

EVALUATION = {
    "step": 40, "rows": 1200, "figures": {"val_accuracy": np.float64(0.75), "val_matthews": float("nan")},
    "classes": [{"class": "good|fair", "rows": 1000, "predicted": 900, "precision": 0.8, "recall": 0.72, "f1": 0.7578947},
                {"class": "bad", "rows": 200, "predicted": 300, "precision": 0.06, "recall": 0.1, "f1": 0.075}],
    "confusion": {"classes": ["good|fair", "bad"], "counts": [[720, 280], [180, 20]]},
    "mistakes": [{"probability": 0.98765, "predicted": "good|fair", "label": "bad",
                  "text": "so ```dull```\n\x1b[31m" + "and long " * 99},
                 {"probability": 0.5, "predicted": "bad", "label": "good|fair", "text": "fine"}],
}


def test_the_report_has_each_class_and_the_worst_mistakes(tmp_path):
    run_dir = make_run(tmp_path / "run")
    write_evaluation(run_dir, EVALUATION)
    report = write_report(run_dir).read_text()
    assert "## Each class (step 40, 1,200 validation rows)" in report
    assert "| class | rows | predicted | precision | recall | f1 |\n| --- | ---: | ---: | ---: | ---: | ---: |" in report
    assert "| good&#124;fair | 1,000 | 900 | 0.800 | 0.720 | 0.758 |" in report
    assert "![True and predicted classes](confusion.png)" in report and (run_dir / "confusion.png").exists()
    mistakes = report[report.index("## Worst mistakes"):].split("\n")
    assert mistakes[2] == "````text"  # a fence that the text cannot close
    assert mistakes[3] == "probability  predicted  label      text"
    assert mistakes[4].startswith("0.988        good|fair  bad        so ```dull``` \\x1b[31mand long") and len(mistakes[4]) < 170
    assert mistakes[5:7] == ["0.500        bad        good|fair  fine", "````"]
    stored = json.loads((run_dir / "evaluation.json").read_text())
    assert stored["figures"] == {"val_accuracy": 0.75, "val_matthews": None}


def test_scores_have_mistakes_alone_and_leave_no_picture_of_before(tmp_path):
    run_dir = make_run(tmp_path / "run")
    write_evaluation(run_dir, EVALUATION)
    write_evaluation(run_dir, {"step": 40, "rows": 2, "figures": {}, "mistakes": [
        {"error": -1.25, "predicted": 1.0, "label": 2.25, "text": "one"}]})
    report = write_report(run_dir).read_text()
    assert "-1.250  1.000      2.250  one" in report
    assert "Each class" not in report and "confusion" not in report
    assert sorted(file.name for file in run_dir.iterdir()) == ["config.yaml", "evaluation.json", "metrics.jsonl", "report.md"]


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"step": 1, "rows": "x", "classes": [{}]}',
                                     '{"step": 1, "rows": 2, "classes": [{"a": 1}, {}]}', "[" * 10**5,
                                     '{"step": 1, "rows": 2, "mistakes": 3}'])
def test_a_broken_file_is_named(tmp_path, content):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json: expected what .* delete the file"):
        write_report(run_dir)


def test_the_best_checkpoint_is_named_where_it_is_so_by_a_figure_of_the_task(tmp_path):
    best = {"figure": "val_macro_f1", "step": 30, "value": 0.71236}
    one = make_run(tmp_path / "one", summary=SUMMARY | {"best": best})
    other = make_run(tmp_path / "other", summary=SUMMARY | {"best": {"figure": "val_loss", "step": 20, "value": 2.0}})
    assert "| best checkpoint | macro f1 0.7124 at step 30 |" in write_report(one).read_text()
    assert "best checkpoint" not in write_report(other).read_text()
    assert ["best", "macro f1 0.7124 at step 30", "-"] in printed(compare([one, other]))
    assert not any(row[0] == "best" for row in printed(compare([other, other])))


@pytest.mark.parametrize("best", [3, "x", {}, {"figure": None, "value": 1.0}, {"figure": "val_f1", "value": "much"}])
def test_a_best_that_is_none_is_left_out(tmp_path, best):
    assert "best checkpoint" not in write_report(make_run(tmp_path / "run", summary=SUMMARY | {"best": best})).read_text()


def test_text_in_a_line():
    assert in_a_line(" a\n\n b\t") == "a b"
    assert len(in_a_line("word " * 10**6)) == 120 and in_a_line("word " * 10**6).endswith("...")


@pytest.mark.parametrize("classes", [2, 12, 50, 300])
def test_the_picture_of_a_confusion_matrix(tmp_path, classes):
    """Each cell is as dark as its share of the row."""
    random = np.random.default_rng(classes)
    counts = random.integers(0, 30, (classes, classes)) + np.diag(random.integers(100, 10**6, classes))
    plot_confusion([f"$label {number}" + "|x" * number for number in range(classes)], counts, tmp_path / "confusion.png")
    picture = image.imread(tmp_path / "confusion.png")
    height, width = picture.shape[:2]
    assert 300 < height < 2600 and 300 < width < 2800
    dark = (np.abs(picture[..., :3] - np.array([8, 48, 107]) / 255).max(-1) < 0.05).sum()  # the end of Blues
    assert dark > 0.2 * min(classes, 50) * (height / (2.2 * min(classes, 50) + 6)) ** 2
    assert [file.name for file in tmp_path.iterdir()] == ["confusion.png"]


def test_a_task_s_figure_has_a_panel_below_the_loss(tmp_path):
    run_dir = make_run(tmp_path / "run")
    plot_loss(run_dir)
    alone = image.imread(run_dir / "loss.png").shape
    shutil.copy(run_dir / "loss.png", run_dir / "one.png")
    plot_loss(run_dir, "bits_per_byte")
    assert image.imread(run_dir / "loss.png").shape[0] == 2 * alone[0]
    plot_loss(run_dir, "val_accuracy")  # which no row has
    assert image.imread(run_dir / "loss.png").shape == alone
