import pytest
import yaml
from rich.console import Console

from jaxlm.errors import UserError
from jaxlm.reporting.metrics import MetricsWriter
from jaxlm.reporting.report import compare, fitted, write_report
from jaxlm.reporting.runs import read_run
from jaxlm.storage.files import write_json

SUMMARY = {"steps": 40, "tokens": 40 * 8 * 16, "val_loss": 2.25, "tokens_per_second": 1234.5, "mfu": None, "devices": 8,
           "device_kind": "cpu",
           "mesh": {"data": 4, "fsdp": 2}, "parameters": 123456, "wall_seconds": 125.0, "compile_seconds": 9.5}


def make_run(path, learning_rate=0.001, steps=40, summary=None, family="gpt"):
    config = {"run_dir": str(path), "seed": 3, "model": {"family": family, "num_layers": 2, "hidden_size": 64, "num_heads": 4},
              "data": {"global_batch_size": 8, "sequence_length": 16}, "train": {"steps": 40, "precision": "float32"},
              "optimizer": {"name": "adamw", "learning_rate": learning_rate}, "schedule": {"name": "cosine"}}
    with MetricsWriter(path, tensorboard=False, resume_step=0) as writer:
        for step in range(10, steps + 1, 10):
            writer.write({"step": step, "loss": 4 - step / 40, "tokens_per_second": 1000.0 + step, "mfu": None,
                          "step_seconds": 0.1, "data_wait_seconds": 0.002})
            writer.write({"step": step, "val_loss": 3 - step / 100 if step < 40 else 2.8, "bits_per_byte": 1.2345678})
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    if summary:
        write_json(path / "summary.json", summary)
    return path


def printed(table):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return [[cell.strip() for cell in line.split("│")] for line in console.export_text().splitlines()]


def test_the_report_of_a_finished_run(tmp_path):
    run_dir = make_run(tmp_path / "small", summary=SUMMARY)
    (run_dir / "loss.png").touch()
    (run_dir / "samples.txt").write_text("Once ```upon```\n")
    assert write_report(run_dir) == run_dir / "report.md"
    report = (run_dir / "report.md").read_text()
    for line in [
        "# small",
        "Finished: 40 steps in 2m05s.",
        "![Training and validation loss](loss.png)",
        "| validation loss | 2.8000 (step 40) |",
        "| lowest validation loss | 2.7000 (step 30) |",
        "| bits per byte | 1.235 |",
        "| training loss | 3.0000 (first logged: 3.7500) |",
        "| model | gpt, 2 layers, width 64, 4 heads |",
        "| parameters | 123,456 |",
        "| tokens | 5.12k (5,120) |",
        "| devices | 8 x cpu |",
        "| mesh | data 4, fsdp 2 |",
        "| tokens per second | 1,234 |",
        "| step time | 100 ms |",
        "| waiting for data | 2.0 % of the step time |",
        "| MFU | not known: no published peak for this device |",
        "| compiling | 9.5s |",
        "````text",
    ]:
        assert line in report.splitlines()
    assert f"`jaxlm train {run_dir / 'config.yaml'} run_dir=" in report


def test_a_killed_run_reports_what_it_has(tmp_path):
    run_dir = make_run(tmp_path / "killed", steps=20, family="bert")
    report = write_report(run_dir).read_text()
    assert "Not finished (running, or stopped): 20 of 40 steps." in report
    assert "| validation loss | 2.8000 (step 20) |" in report
    assert "| tokens | 2.56k (2,560) |" in report
    assert "| tokens per second | 1,015 |" in report  # the median of 1010 and 1020
    assert "loss.png" not in report and "Samples" not in report


def test_a_run_that_logged_nothing_yet(tmp_path):
    run_dir = make_run(tmp_path / "new", steps=0)
    assert "nothing logged yet" in write_report(run_dir).read_text()


def test_the_summary_of_an_earlier_end_does_not_hide_later_steps(tmp_path):
    run = read_run(make_run(tmp_path / "longer", summary=SUMMARY | {"steps": 30, "val_loss": 9.0}))
    assert run.summary is None and run.figure("val_loss") == 2.8


def test_comparison_shows_differing_keys_then_figures(tmp_path):
    first = make_run(tmp_path / "first", summary=SUMMARY | {"mfu": 0.4127})
    second = make_run(tmp_path / "second", learning_rate=0.0003, steps=20)
    rows = [row for row in printed(compare([first, second])) if len(row) == 3]
    assert rows == [
        ["optimizer.learning_rate", "0.001", "0.0003"],
        ["steps", "40", "20"],
        ["val_loss", "2.2500", "2.8000"],
        ["tokens_per_second", "1,234", "1,015"],
        ["mfu", "41.3%", "-"],
        ["wall_seconds", "2m05s", "-"],
    ]


def test_runs_of_one_name_are_told_apart(tmp_path):
    table = compare([make_run(tmp_path / "a/run"), make_run(tmp_path / "b/run")])
    assert [column.header for column in table.columns[1:]] == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]


def test_what_is_no_run_is_refused_by_name(tmp_path):
    make_run(tmp_path / "baseline")
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "broken_config").joinpath("config.yaml").write_text("a: [1,\n b: 2")
    make_run(tmp_path / "broken_summary").joinpath("summary.json").write_text('{"steps"')
    for name, expected in {
        "baselin": f"is not there; did you mean '{tmp_path / 'baseline'}'?",
        "empty": "has no config.yaml",
        "broken_config": "config.yaml: expected the YAML",
        "broken_summary": "summary.json: expected one JSON object",
    }.items():
        with pytest.raises(UserError) as error:
            write_report(tmp_path / name)
        assert expected in str(error.value) and str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / name / "report.md").exists()


def test_a_comparison_that_does_not_fit_is_a_line_for_each_run(tmp_path):
    """Line 22: at 80 columns, no figure is cut or folded."""
    names = [f"a-run-with-a-long-name-{number}" for number in range(7)]
    runs = [make_run(tmp_path / name, learning_rate=(number + 1) / 1000) for number, name in enumerate(names)]
    assert fitted(compare(runs[:2]), 80) is not None and not isinstance(fitted(compare(runs[:2]), 80), str)
    lines = fitted(compare(runs), 80).splitlines()
    assert max(map(len, lines)) <= 80
    start = lines.index("optimizer.learning_rate")
    assert [line.split() for line in lines[start + 1:start + 8]] == [
        [name, str((number + 1) / 1000)] for number, name in enumerate(names)]
    assert [line for line in lines if not line.startswith(" ")][-3:] == ["tokens_per_second", "mfu", "wall_seconds"]
    names = ["n" * 70, "m" * 70]
    lines = fitted(compare([make_run(tmp_path / name, learning_rate=rate) for name, rate in zip(names, (1, 2), strict=True)]),
                   80).splitlines()
    assert max(map(len, lines)) <= 80 and lines[:3] == ["optimizer.learning_rate", f"  {names[0]}:", "      1.0"]


def test_bits_per_byte_of_lost_text_are_said_not_to_be_known(tmp_path):
    run_dir = make_run(tmp_path / "lossy", summary=SUMMARY)
    with MetricsWriter(run_dir, tensorboard=False, resume_step=40) as writer:
        writer.write({"step": 41, "val_loss": 2.5, "val_bits_per_byte": None})
    report = write_report(run_dir).read_text()
    assert "| val bits per byte | not known: the tokenizer lost some of the text |" in report
