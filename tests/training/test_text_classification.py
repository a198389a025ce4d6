"""A classifier from its first step to its predictions: one label, several, scores, pairs; also of causal models."""

import csv
import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml

from jaxlm.planning.vocabulary import with_vocabulary
from jaxlm.reporting.figures import class_figures
from jaxlm.reporting.metrics import read_metrics
from jaxlm.settings import ModelSettings, Settings, TaskSettings
from jaxlm.training.bench import random_batch

STEPS, ROWS = 12, 8
TIMES = ("time", "tokens_per_second", "slots_per_second", "step_seconds", "data_wait_seconds")
GOOD, BAD, PLAIN = ["fine", "lovely", "great"], ["awful", "bad", "poor"], ["a", "the", "film", "plot", "of", "it"]


def sentence(draw, word=None):
    words = draw.choices(PLAIN, k=draw.randint(1, 6))
    return " ".join(words if word is None else [*words[:2], word, *words[2:]])


def one_label(draw):
    label = draw.choice(["good", "bad", "neither"])
    words = {"good": draw.choice(GOOD), "bad": draw.choice(BAD)}
    return {"id": draw.randint(0, 99), "review": sentence(draw, words.get(label)), "label": label}


def several(draw):
    good, bad = draw.random() < 0.5, draw.random() < 0.3
    words = [draw.choice(GOOD)] * good + [draw.choice(BAD)] * bad
    return {"text": " ".join([sentence(draw), *words]), "labels": ["praise"] * good + ["blame"] * bad}


def pair(draw):
    same, word = draw.random() < 0.5, draw.choice(GOOD)
    other = word if same else draw.choice(BAD)
    return {"sentence1": sentence(draw, word), "sentence2": sentence(draw, other), "label": int(same)}


def scored(draw):
    number = draw.randint(0, 3)
    return {"text": " ".join([sentence(draw), *["great"] * number]), "score": number + draw.choice([0.25, 0.5])}


def write_csv(path, records):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


KINDS = {  # of a task: its records, how they are written, and what model learns them
    "one_label": (one_label, write_csv, {"family": "bert"}),
    "several": (several, write_lines, {"family": "bert"}),
    "pair": (pair, write_csv, {"family": "bert"}),
    "scored": (scored, write_lines, {"family": "gpt"}),
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """kind -> a run file with data for it, all of it tiny."""
    folder = tmp_path_factory.mktemp("labelled")

    def make(kind):
        path, (record, write, model) = folder / f"{kind}.yaml", KINDS[kind]
        if not path.exists():
            draw, suffix = random.Random(1), "csv" if write is write_csv else "jsonl"
            files = {name: folder / f"{kind}.{name}.{suffix}" for name in ("train", "dev")}
            write(files["train"], [record(draw) for _ in range(100)])
            write(files["dev"], [record(draw) for _ in range(37)])  # no multiple of a batch
            path.write_text(yaml.safe_dump({
                "run_dir": str(folder / kind), "task": {"name": "text_classification"},
                "model": {"num_layers": 2, "num_heads": 8, "hidden_size": 32, "max_length": 96, **model},
                "data": {"raw": str(files["train"]), "validation": str(files["dev"]), "tokenizer": "bytes",
                         "sequence_length": 80, "global_batch_size": ROWS, "prepare_processes": 1},
                "train": {"steps": STEPS}, "optimizer": {"learning_rate": 3e-3}, "schedule": {"name": "constant"},
                "checkpoint": {"every_steps": 4, "keep_last": 3}, "eval": {"every_steps": 4},
                "logging": {"every_steps": 1, "tensorboard": False}, "devices": {"platform": "cpu", "count": 1}}))
        return path

    return make


@pytest.fixture
def trained(labelled, jaxlm):
    """kind -> the directory of its run."""
    def get(kind):
        run_file = labelled(kind)
        run_dir = run_file.with_suffix("")
        if not run_dir.exists():
            assert jaxlm("train", run_file) == 0
        return run_dir

    return get


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def records_of(path):
    return lines_of(path) if path.suffix == ".jsonl" else list(csv.DictReader(path.open()))


def dev_of(run_dir):
    return next(run_dir.parent.glob(f"{run_dir.name}.dev.*"))


def macro(true, predicted, names):
    """Macro F1 by its definition."""
    f1 = []
    for name in names:
        right = np.sum((true == name) & (predicted == name))
        f1.append(2 * right / (np.sum(true == name) + np.sum(predicted == name)))
    return np.mean(f1)


def test_figures_of_the_run_are_those_of_its_predictions(trained, jaxlm, capsys):
    """evaluation.json, metrics.jsonl and `evaluate` against NumPy over predictions.jsonl and the file's own labels."""
    run_dir = trained("one_label")
    capsys.readouterr()
    assert jaxlm("predict", run_dir, f"data.raw={dev_of(run_dir)}") == 0
    said, records = lines_of(run_dir / "predictions.jsonl"), records_of(dev_of(run_dir))
    assert "37 records" in capsys.readouterr().out
    for line, record in zip(said, records, strict=True):
        assert list(line)[:3] == ["text", "label", "probabilities"]
        assert (line["text"], line["id"], line["given_label"]) == (record["review"], record["id"], record["label"])
        assert list(line["probabilities"]) == ["bad", "good", "neither"]
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
    true, predicted = (np.array([line[name] for line in said]) for name in ("given_label", "label"))
    last = [row for row in read_metrics(run_dir) if "val_loss" in row][-1]
    assert last["val_accuracy"] == pytest.approx(np.mean(true == predicted))
    assert last["val_macro_f1"] == pytest.approx(macro(true, predicted, np.union1d(true, predicted)))
    of_label = np.array([line["probabilities"][line["given_label"]] for line in said])
    assert last["val_loss"] == pytest.approx(-np.log(of_label).mean(), rel=1e-4)

    found = json.loads((run_dir / "evaluation.json").read_text())
    names = found["confusion"]["classes"]
    counts = [[int(np.sum((true == one) & (predicted == other))) for other in names] for one in names]
    assert found["confusion"]["counts"] == counts and found["step"] == STEPS and found["rows"] == 37
    assert [one["rows"] for one in found["classes"]] == np.sum(counts, axis=1).tolist()
    wrong = [place for place in np.argsort(of_label) if true[place] != predicted[place]]
    shown = [(mistake["text"], mistake["label"]) for mistake in found["mistakes"]]
    assert len(shown) == min(len(wrong), 20) and shown[0] == (said[wrong[0]]["text"], true[wrong[0]])
    report = (run_dir / "report.md").read_text()
    assert "confusion.png" in report and "## Worst mistakes" in report and (run_dir / "confusion.png").exists()

    assert jaxlm("evaluate", run_dir, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert jaxlm("evaluate", run_dir, f"data.raw={dev_of(run_dir)}", "--json") == 0
    prepared_anew = json.loads(capsys.readouterr().out)
    for name, value in last.items():
        if name.startswith("val_"):
            assert again[name] == pytest.approx(value) and prepared_anew[name] == pytest.approx(value), name


def test_what_is_said_before_the_first_step_and_at_the_end(labelled, jaxlm, capsys, tmp_path):
    run_file = labelled("one_label")
    assert jaxlm("train", run_file, f"run_dir={tmp_path / 'run'}", "train.steps=8", "task.best=macro_f1") == 0
    told = capsys.readouterr()
    shown = told.out + told.err
    data = yaml.safe_load(run_file.read_text())["data"]
    records = records_of(type(run_file)(data["raw"]))
    counts = {name: sum(record["label"] == name for record in records) for name in ("bad", "good", "neither")}
    assert f"bad {counts['bad']}, good {counts['good']}, neither {counts['neither']}" in shown
    assert shown.index("for example: ") < shown.index("step 1/8")
    assert f"] {records[0]['review']} [" in shown and f" -> {records[0]['label']}" in shown
    evaluations = {row["step"]: row for row in read_metrics(tmp_path / "run") if "val_loss" in row}
    best = max(evaluations, key=lambda step: (evaluations[step]["val_macro_f1"], -evaluations[step]["val_loss"]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"] == {"figure": "val_macro_f1", "step": best, "value": evaluations[best]["val_macro_f1"]}
    assert f"best macro f1 {evaluations[best]['val_macro_f1']:.4f} at step {best} (checkpoint.step={best})" in shown
    assert jaxlm("evaluate", tmp_path / "run", "checkpoint.step=4", "--json") == 0
    told = capsys.readouterr().err
    assert ("the best: macro f1" in told) == (best != 4)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["task"]["labels"] == ["bad", "good", "neither"] and config["task"]["problem"] == "single_label"


def test_predictions_depend_on_nothing_but_the_record(trained, jaxlm, tmp_path):
    """Not on batches, padding, devices; and blank texts are records, too."""
    run_dir = trained("one_label")
    records = tmp_path / "unlabelled.jsonl"
    write_lines(records, [{"text": record["review"], "more": [1, {"a": None}]} for record in records_of(dev_of(run_dir))]
                + [{"text": ""}, {"text": "zwei\u2028Zeilen, äöü 漢字 \x85"}, {"text": "x" * 500}])
    variants = {"usual": [], "small": ["eval.batch_size=5", "data.sequence_length=96"],
                "mesh": ["devices.count=8", "mesh.fsdp=2", "mesh.tensor=2", "eval.batch_size=16"]}
    said = {}
    for name, words in variants.items():
        out = tmp_path / f"{name}.jsonl"
        assert jaxlm("predict", run_dir, f"data.raw={records}", f"out={out}", *words) == 0
        said[name] = lines_of(out)
    assert len(said["usual"]) == 40 and said["usual"][0]["more"] == [1, {"a": None}]
    assert "given_label" not in said["usual"][0] and said["usual"][-3]["text"] == ""
    assert said["usual"][-2]["text"] == "zwei\u2028Zeilen, äöü 漢字 \x85" and "äöü 漢字" in (tmp_path / "usual.jsonl").read_text()
    for other in ("small", "mesh"):
        for one, line in zip(said["usual"][:-1], said[other][:-1], strict=True):  # the last one is cut elsewhere
            assert one["text"] == line["text"]
            assert list(line["probabilities"].values()) == pytest.approx(list(one["probabilities"].values()), abs=1e-5)


@pytest.mark.slow
def test_eight_devices_and_micro_batches_learn_as_one(trained, labelled, jaxlm, tmp_path):
    want = read_metrics(trained("one_label"))
    run_dir = tmp_path / "run"
    assert jaxlm("train", labelled("one_label"), f"run_dir={run_dir}", "devices.count=8", "mesh.fsdp=2", "mesh.data=2",
                 "mesh.tensor=2", "train.gradient_accumulation=2") == 0
    for name in ("loss", "val_loss", "val_accuracy"):
        got, one = ([row[name] for row in rows if name in row] for rows in (read_metrics(run_dir), want))
        np.testing.assert_allclose(got, one, rtol=1e-5)


@pytest.mark.slow
def test_killed_and_gone_on_it_is_the_same(labelled, jaxlm, start_jaxlm, tmp_path):
    """Bit for bit, with dropout: figures, the best checkpoint, what the last evaluation found."""
    words = ["train.steps=40", "model.dropout=0.2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert jaxlm("train", labelled("one_label"), f"run_dir={whole}", *words) == 0
    process = start_jaxlm("train", labelled("one_label"), f"run_dir={killed}", *words)
    while not list(killed.glob("checkpoints/*/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (killed / "summary.json").exists()
    assert jaxlm("train", killed) == 0
    rows = [[{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(run)]
            for run in (whole, killed)]
    assert rows[0] == rows[1]
    assert (whole / "evaluation.json").read_text() == (killed / "evaluation.json").read_text()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, killed)]
    assert summaries[0]["best"] == summaries[1]["best"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["several", "pair", "scored"])
def test_other_problems(kind, trained, jaxlm, capsys):
    run_dir = trained(kind)
    assert jaxlm("predict", run_dir, f"data.raw={dev_of(run_dir)}") == 0
    said, records = lines_of(run_dir / "predictions.jsonl"), records_of(dev_of(run_dir))
    last = [row for row in read_metrics(run_dir) if "val_loss" in row][-1]
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert found["rows"] == len(said) == 37
    if kind == "several":
        names = ["blame", "praise"]
        true = np.array([[name in record["labels"] for name in names] for record in records])
        assert all(line["labels"] == [name for name in names if line["probabilities"][name] > 0.5] for line in said)
        predicted = np.array([[name in line["labels"] for name in names] for line in said])
        assert last["val_accuracy"] == pytest.approx(np.mean((true == predicted).all(1)))
        counts = np.stack([(true & predicted).sum(0), (~true & predicted).sum(0), (true & ~predicted).sum(0)], axis=1)
        f1 = 2 * counts[:, 0] / np.maximum(2 * counts[:, 0] + counts[:, 1] + counts[:, 2], 1)
        assert last["val_macro_f1"] == pytest.approx(f1.mean())
        assert [one["f1"] for one in found["classes"]] == pytest.approx(f1.tolist()) and "confusion" not in found
        assert class_figures(np.pad(counts, [(0, 0), (0, 1)]))["f1"] == pytest.approx(f1)
        assert all(("not " in mistake["label"]) != ("not " in mistake["predicted"]) for mistake in found["mistakes"])
    elif kind == "pair":
        assert (said[0]["text"], said[0]["pair"]) == (records[0]["sentence1"], records[0]["sentence2"])
        assert last["val_accuracy"] == pytest.approx(np.mean([line["label"] == line["given_label"] for line in said]))
    else:
        scores, true = (np.array([line[name] for line in said]) for name in ("score", "given_score"))
        assert last["val_mean_squared_error"] == pytest.approx(np.mean((scores - true) ** 2), rel=1e-4)
        assert last["val_loss"] == pytest.approx(last["val_mean_squared_error"], rel=1e-4)
        assert last["val_pearson"] == pytest.approx(np.corrcoef(scores, true)[0, 1], rel=1e-4)
        assert abs(found["mistakes"][0]["error"]) == pytest.approx(np.abs(scores - true).max(), rel=1e-4)


@pytest.mark.slow
def test_two_processes_write_what_one_does(trained, start_jaxlm, jaxlm, tmp_path):
    run_dir = trained("one_label")
    for name, words in (("one", []), ("two", ["--processes", "2"])):
        process = start_jaxlm("predict", run_dir, f"data.raw={dev_of(run_dir)}", f"out={tmp_path / name}", *words)
        told = process.communicate()[0]
        assert process.returncode == 0, told
    one, two = ([line["probabilities"]["good"] for line in lines_of(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(("words", "message"), [
    (["predict", "RUN"], "predict: name the file of records, data.raw=FILE"),
    (["predict", "RUN", "data.raw=nowhere.tsv"], "nowhere.tsv"),
    (["predict", "RUN", "data.raw=DEV", "out=FOLDER/there/x.jsonl"], "out"),
    (["predict", "RUN", "data.raw=DEV", "out=FOLDER"], ": a folder; expected a file"),
    (["predict", "RUN", "data.raw=DEV", "out=DEV"], "the file of records, which would be lost"),
    (["predict", "RUN", "data.raw=FOLDER/empty.csv"], "empty.csv"),
    (["predict", "RUN", "data.raw=DEV", "checkpoint.step=3"], "checkpoint.step=3: not in"),
    (["evaluate", "RUN", "task.labels=[a, b]"], "task.labels"),
    (["train", "RUN", "task.best=f1"], "task.best=f1: no figure of task.name=text_classification; expected one of accuracy"),
    (["train", "RUN", "task.labels=[good, bad, neither]", "train.steps=20"], "task.labels"),
    (["train", "FILE", "data.validation=TRAIN", "run_dir=FOLDER/new"], "data.validation="),
    (["train", "FILE", "task.fields={text: reviews, label: label}", "run_dir=FOLDER/new"], "reviews"),
])
def test_what_is_wrong_is_told_in_a_line(words, message, trained, labelled, jaxlm, capsys, tmp_path):
    run_dir, run_file = trained("one_label"), labelled("one_label")
    capsys.readouterr()
    (tmp_path / "there").write_text("a file")
    (tmp_path / "empty.csv").write_text("review,label\n")
    places = {"RUN": run_dir, "DEV": dev_of(run_dir), "FOLDER": tmp_path, "FILE": run_file,
              "TRAIN": yaml.safe_load(run_file.read_text())["data"]["raw"]}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    before = (run_dir / "config.yaml").read_text()
    assert jaxlm(*words) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("jaxlm: ") and message in told
    assert (run_dir / "config.yaml").read_text() == before and not (tmp_path / "new").exists()


def test_a_language_model_predicts_nothing_of_a_record(finished, jaxlm, capsys):
    assert jaxlm("predict", finished, "data.raw=x.tsv") == 2
    assert "says nothing of a record" in capsys.readouterr().err


def test_plans_and_benchmarks_need_no_corpus(meshes):
    """Two labels are assumed, and that is said."""
    settings = Settings(model=ModelSettings(family="gpt", vocab_size=300), task=TaskSettings(name="text_classification"))
    assert with_vocabulary(settings)[1] == "task.labels are not said: planned with two"
    for problem, kind, highest in (("single_label", np.int32, 1), ("multi_label", bool, 1), ("regression", np.float32, np.inf)):
        own = replace(settings, task=replace(settings.task, problem=problem))
        batch = random_batch(own, meshes["one"])
        label = np.asarray(batch["labels" if problem == "multi_label" else "label"])
        assert label.dtype == kind and label.max() <= highest and len(label) == own.data.global_batch_size
        assert (np.asarray(batch["last_position"]) == own.data.sequence_length - 1).all()
    named = replace(settings, task=replace(settings.task, labels=["a", "b", "c"]))
    assert with_vocabulary(named) == (named, None)
