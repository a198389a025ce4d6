"""jaxlm from Python: what its functions give, beside what the command line gives."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxlm as package
from jaxlm.api import LoadedModel
from jaxlm.errors import UserError
from jaxlm.reporting.metrics import read_metrics
from jaxlm.serving.sampling import generate_from_run

ROOT = Path(__file__).parents[2]
TEXTS = ["banana bean", "cocoa date cabbage bean", "date"]


@pytest.fixture
def model(finished) -> LoadedModel:
    return package.load(finished)


def test_a_loaded_run_says_what_the_run_says(model, finished, restore):
    """Logits and states of padded batches, against each text alone in the trainer's own model."""
    trainer, state = restore(finished)
    network = trainer.model.bind(state.params)
    assert model.step == 12 and model.settings.model.vocab_size == model.tokenizer.vocab_size
    together = model.logits(TEXTS)
    for text, got, vector, last in zip(TEXTS, together, model.encode(TEXTS), model.encode(TEXTS, "last"), strict=True):
        ids = jnp.asarray([model.tokenizer.encode(text)])
        states = network.states({"tokens": ids}).x
        want = np.asarray(states[0] @ state.params["token_embedding"]["embedding"].T)[:, : model.tokenizer.vocab_size]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(vector, np.asarray(states[0]).mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(last, np.asarray(states[0, -1]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.logits(TEXTS[0]), together[0], rtol=1e-5, atol=1e-5)
    assert model.encode(TEXTS[0]).shape == (32,)


def test_it_generates_as_the_verb_does(model, finished):
    keys = {"prompts": ["banana", "date "], "temperature": 0.0, "max_new_tokens": 6}
    words = [f"generate.{name}={json.dumps(value)}" for name, value in keys.items()]
    want = [sample.text for sample in generate_from_run(package.load_settings(finished, *words))]
    assert model.generate(keys["prompts"], temperature=0.0, max_new_tokens=6) == want
    assert model.generate("banana", temperature=0.0, max_new_tokens=6) == want[0]
    assert len(model.generate("banana", num_samples=3, max_new_tokens=2)) == 3


def test_out_and_in_again(model, tmp_path):
    model.export(tmp_path / "out")
    again = package.load(tmp_path / "out")
    np.testing.assert_allclose(again.logits(TEXTS[1]), model.logits(TEXTS[1]), rtol=1e-5, atol=1e-5)
    assert again.tokenizer.encode(TEXTS[1]) == model.tokenizer.encode(TEXTS[1])
    with pytest.raises(UserError, match="has files in it"):
        model.export(tmp_path / "out")


def test_training_and_planning(folder, run_file, devices_are_there):
    run_dir = folder / "from_python"
    summary = package.train(run_file, f"run_dir={run_dir}", "train.steps=3", "logging.tensorboard=false")
    assert summary["steps"] == 3 and read_metrics(run_dir)[-1]["val_loss"] == pytest.approx(summary["val_loss"])
    settings = package.load_settings(run_dir, "train.steps=4")
    assert package.train(settings)["steps"] == 4
    plan = package.plan(ROOT / "configs" / "gpt2_124m.yaml", "h100:8", fast=True)
    assert plan.parameters == 124_337_664 and plan.fits


@pytest.mark.parametrize(("call", "words"), [
    (lambda model: model.predict("a"), "says nothing of a text"),
    (lambda model: model.generate("a", temprature=1), "no key temprature; expected some of prompts"),
    (lambda model: model.encode("a", pooling="cls"), "expected mean, first or last"),
    (lambda model: model.logits("banana " * 10), "tokens; expected 1 to model.max_length=32"),
    (lambda model: package.load("nowhere"), "nowhere: no such folder"),
    (lambda model: package.train(model.settings, "train.steps=3"), "dataclasses.replace"),
])
def test_wrong_calls_are_refused_in_a_line(model, call, words):
    with pytest.raises(UserError, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_a_classifier_predicts(tmp_path, devices_are_there):
    """As its verb does: the label, and probabilities that add up to one; alone as among others, pairs as pairs."""
    records = [("good fine film", "good"), ("bad poor film", "bad")] * 20
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in records))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "run_dir": str(tmp_path / "run"), "task": {"name": "text_classification"}, "train": {"steps": 30},
        "model": {"family": "bert", "num_layers": 1, "num_heads": 2, "hidden_size": 16, "max_length": 32},
        "data": {"raw": str(tmp_path / "train.tsv"), "tokenizer": "bytes", "sequence_length": 32, "validation": 0.2,
                 "prepare_processes": 1},
        "optimizer": {"learning_rate": 1e-2}, "schedule": {"name": "constant"}, "logging": {"tensorboard": False}}))
    package.train(tmp_path / "run.yaml")
    model = package.load(tmp_path / "run")
    answers = model.predict(["good fine film", "bad poor film", "a fine good film"])
    assert [answer["label"] for answer in answers[:2]] == ["good", "bad"]
    assert all(sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5) for answer in answers)
    alone = model.predict("a fine good film")["probabilities"]
    assert alone == pytest.approx(answers[2]["probabilities"], abs=1e-5)


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, jaxlm; assert 'jax' not in sys.modules; assert set(jaxlm.__all__) <= set(dir(jaxlm)); jaxlm.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        package.lod  # noqa: B018


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Every cell of it, one after the other, in a folder of its own."""
    cells = json.loads((ROOT / "examples" / "python.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_whole_life(tmp_path):
    """examples/life.sh, which checks itself what it has made."""
    done = subprocess.run(["bash", str(ROOT / "examples" / "life.sh"), str(tmp_path / "life")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "life" / "classifier" / "predictions.jsonl").exists()
