"""Whole runs through the front door: what a run directory holds, and that its figures are true."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxlm import config
from jaxlm.data.corpus import Corpus, Documents
from jaxlm.models.layers import Context
from jaxlm.models.objectives import NextToken
from jaxlm.reporting.metrics import read_metrics
from jaxlm.tasks.find import find_task
from jaxlm.training.run import train

WAY = {"time", "tokens", "epoch"}  # of every row
STEP_KEYS = WAY | {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds"}
SUMMARY_KEYS = {"steps", "tokens", "slots", "loss", "val_loss", "tokens_per_second", "slots_per_second", "mfu", "devices", "mesh",
                "parameters", "wall_seconds", "compile_seconds", "diverged"}
GPT_KEYS = {"step", "val_loss", "val_perplexity", "val_accuracy", "val_bits_per_byte"}
BERT_KEYS = {"step", "val_loss", "val_mlm_loss", "val_mlm_accuracy", "val_mlm_perplexity", "val_nsp_loss", "val_nsp_accuracy"}


def step_rows(run_dir: Path) -> list[dict]:
    return [row for row in read_metrics(run_dir) if "loss" in row]


def losses(run_dir: Path) -> list[float | None]:
    return [row["loss"] for row in step_rows(run_dir)]


def evaluations(run_dir: Path) -> list[dict]:
    """What was measured, without when and where on the way."""
    rows = [row for row in read_metrics(run_dir) if "val_loss" in row]
    assert all(set(row) >= WAY for row in rows)
    return [{name: value for name, value in row.items() if name not in WAY} for row in rows]


def test_a_run_directory_holds_what_the_contract_names(finished):
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "summary.json", "samples.txt", "report.md"):
        assert (finished / name).stat().st_size, name
    assert list(finished.glob("tensorboard/events.*"))
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"8", "12"}

    rows = step_rows(finished)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(set(row) == STEP_KEYS for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(Corpus(finished.parent / "one").tokenizer.vocab_size), rel=0.05)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert all(row["mfu"] is None for row in rows)  # nobody publishes a CPU's peak
    assert [row["tokens"] for row in rows] == [8 * 32 * step for step in range(1, 13)]
    sequences = (Corpus(finished.parent / "one").train.num_tokens - 1) // 32
    assert [row["epoch"] for row in rows] == pytest.approx([8 * step / sequences for step in range(1, 13)], rel=0.02)
    times = [row["time"] for row in read_metrics(finished)]
    assert times == sorted(times) and os.path.getmtime(finished / "checkpoints") - 600 < times[0] < time.time()
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2 / 3, 2e-2 / 3] + 10 * [1e-2])

    assert [row["step"] for row in evaluations(finished)] == [6, 12]
    assert all(set(row) == GPT_KEYS for row in evaluations(finished))
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 8 * 32
    assert summary["val_loss"] == evaluations(finished)[-1]["val_loss"]
    assert summary["tokens_per_second"] == pytest.approx(8 * 32 / np.median([row["step_seconds"] for row in rows]))


def test_the_saved_config_reproduces_the_run(finished, folder, jaxlm):
    again = folder / "again"
    assert jaxlm("train", finished / "config.yaml", f"run_dir={again}") == 0
    assert losses(again) == losses(finished)
    assert evaluations(again) == evaluations(finished)
    first, second = (yaml.safe_load((run_dir / "config.yaml").read_text()) for run_dir in (finished, again))
    assert first | {"run_dir": None} == second | {"run_dir": None}


def test_training_a_finished_run_again_changes_nothing(finished, jaxlm):
    files = {name: (finished / name).read_text() for name in ("metrics.jsonl", "summary.json", "config.yaml")}
    assert jaxlm("train", finished) == 0
    assert {name: (finished / name).read_text() for name in files} == files


def test_evaluate_gives_what_training_logged(finished, jaxlm, capsys):
    assert jaxlm("evaluate", finished, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == evaluations(finished)[-1]


def test_the_last_evaluation_is_of_everything(finished, folder, run_file, jaxlm):
    run_dir = folder / "sampled"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", "eval.steps=1") == 0
    first, last = evaluations(run_dir)
    assert last == evaluations(finished)[-1] and first != evaluations(finished)[0]


# ---- whole validation sets, against predictions made one sequence at a time ------------------------------------------

def windows(documents: Documents, length: int) -> Iterable[np.ndarray]:
    """The stream in windows of `length` predictions; the last is shorter."""
    stream = documents.read(0, documents.num_tokens)
    return [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]


def pieces(documents: Documents, length: int, start_token: int) -> Iterable[np.ndarray]:
    """Every document by itself, after its start token; one that is longer than `length` in windows."""
    bounds = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    for document in ([start_token, *documents.read(start, stop)] for start, stop in bounds):
        yield from (np.array(document[start : start + length + 1]) for start in range(0, len(document) - 1, length))


def surprise(run_dir: Path, restore: Callable, sequences: Iterable[np.ndarray]) -> np.ndarray:
    """-log probability, float64, of every token but the first of each sequence, which is read alone."""
    trainer, state = restore(run_dir)
    length = config.load(run_dir).data.sequence_length

    @jax.jit
    def logits(tokens):
        gpt = trainer.model.bind(state.params)
        return NextToken().logits(gpt, gpt.hidden(tokens[None], Context(np.arange(length)[None]))[0])[0]

    found = []
    for sequence in sequences:
        tokens = np.zeros(length, np.int32)  # what comes after a sequence cannot be seen from it
        tokens[: len(sequence) - 1] = sequence[:-1]
        scores = np.asarray(logits(tokens), np.float64)[: len(sequence) - 1]
        chosen = np.take_along_axis(scores, sequence[1:, None], axis=1)[:, 0]
        found.append(np.log(np.exp(scores).sum(axis=1)) - chosen)
    return np.concatenate(found)


def test_validation_covers_every_token_once(finished, folder, run_file, restore):
    text = Corpus(folder / "one").validation
    assert len(list(windows(text, 32))) % 8 and (text.num_tokens - 1) % 32  # rows and positions of padding in the last batch
    nats = surprise(finished, restore, windows(text, 32))
    assert len(nats) == text.num_tokens - 1
    row = evaluations(finished)[-1]
    assert row["val_loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert row["val_perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert row["val_bits_per_byte"] == pytest.approx(nats.mean() / math.log(2) * text.num_tokens / text.num_bytes, rel=1e-5)


def test_lost_text_has_no_bits_per_byte(finished, folder, jaxlm, capsys):
    """Issue 14, line 3: null in JSON, and said to people; the other figures stay."""
    corpus = folder / "lossy"
    shutil.copytree(folder / "one", corpus)
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["splits"]["validation"]["lost_characters"] == 0
    manifest["splits"]["validation"]["lost_characters"] = 1
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    assert jaxlm("evaluate", finished, f"data.corpus={corpus}", "data.raw=null", "--json") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row == evaluations(finished)[-1] | {"val_bits_per_byte": None}
    assert jaxlm("evaluate", finished, f"data.corpus={corpus}", "data.raw=null") == 0
    assert re.search(r"val_bits_per_byte +not known", capsys.readouterr().out)


@pytest.mark.slow
def test_an_empty_prompt_begins_as_documents_begin(folder, run_file, jaxlm, capsys):
    """Issue 14, line 6: 30 of 30, where packed documents have been learnt by heart."""
    texts = [f"Once upon a time there was a {what}." for what in ("fox in the wood", "dog in the house", "bird in the sky")]
    (folder / "tales.txt").write_text("\n".join(texts * 40), encoding="utf-8")
    run_dir, keys = folder / "tales", ["data.packing=documents", "data.sequence_length=64", "model.max_length=64"]
    keys += [f"run_dir={run_dir}", f"data.raw={folder / 'tales.txt'}", f"data.corpus={folder / 'tales-corpus'}"]
    assert jaxlm("train", run_file, *keys, "train.steps=150", "checkpoint.every_steps=150", "eval.every_steps=150") == 0
    capsys.readouterr()
    assert jaxlm("generate", run_dir, "generate.prompts=['']", "generate.num_samples=30", "generate.max_new_tokens=60",
                 "generate.temperature=0.7", "--json") == 0
    samples = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert len(samples) == 30 and all(text.startswith("Once upon") for text in samples)


def test_a_mixture_of_packed_documents_trains_and_is_evaluated_whole(finished, folder, run_file, jaxlm, restore):
    assert jaxlm("prepare", run_file, f"data.raw={folder / 'two.txt'}", f"data.corpus={folder / 'two'}") == 0
    run_dir = folder / "mixture"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", f"data.corpus={{{folder / 'one'}: 3, {folder / 'two'}: 1}}",
                 "data.raw=null", "data.packing=documents", "eval.batch_size=5") == 0
    assert losses(run_dir)[-1] < 0.9 * losses(run_dir)[0]
    corpora = [Corpus(folder / name) for name in ("one", "two")]
    nats = surprise(run_dir, restore, (piece for corpus in corpora
                                       for piece in pieces(corpus.validation, 32, corpus.tokenizer.special.eos)))
    assert len(nats) == sum(corpus.validation.num_tokens for corpus in corpora)  # also the first of each document
    assert evaluations(run_dir)[-1]["val_loss"] == pytest.approx(nats.mean(), rel=1e-5)


def test_bert_trains_and_is_evaluated_whole(folder, run_file, jaxlm, restore):
    run_dir = folder / "bert"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", "model.family=bert", "model.next_sentence=true", "model.vocab_size=40",
                 "data.tokenizer=wordpiece", f"data.corpus={folder / 'wordpiece'}", "optimizer.learning_rate=3e-3") == 0
    rows = step_rows(run_dir)
    assert set(rows[0]) == STEP_KEYS | {"masked_token_loss", "next_sentence_loss", "slots_per_second"}
    assert rows[-1]["masked_token_loss"] < 0.95 * rows[0]["masked_token_loss"]
    assert all(row["loss"] == pytest.approx(row["masked_token_loss"] + row["next_sentence_loss"]) for row in rows)
    row = evaluations(run_dir)[-1]
    assert set(row) == BERT_KEYS
    assert not (run_dir / "samples.txt").exists()

    trainer, state = restore(run_dir)
    settings = config.load(run_dir)
    one_by_one = find_task(settings).validation_batches([Corpus(folder / "wordpiece")], batch_size=1)
    assert len(one_by_one) % 8
    totals = [trainer.evaluate(state.params, one_by_one.batch(number))[0] for number in range(len(one_by_one))]
    for name, short in (("masked_token", "mlm"), ("next_sentence", "nsp")):
        sums = [total[name] for total in totals]
        count = sum(int(term.count) for term in sums)
        assert row[f"val_{short}_loss"] == pytest.approx(sum(float(term.cross_entropy) for term in sums) / count, rel=1e-5)
        assert row[f"val_{short}_accuracy"] == pytest.approx(sum(int(term.correct) for term in sums) / count)
    assert row["val_loss"] == pytest.approx(row["val_mlm_loss"] + row["val_nsp_loss"])


# ---- other roads -----------------------------------------------------------------------------------------------------

def test_accumulated_gradients_give_the_same_losses(finished, folder, run_file, devices_are_there):
    run_dir = folder / "accumulated"
    train(config.load(run_file, [f"run_dir={run_dir}", "train.gradient_accumulation=4", "eval.batch_size=8"]))
    np.testing.assert_allclose(losses(run_dir), losses(finished), rtol=1e-5)


def test_a_run_that_diverges_says_so_and_fails(folder, run_file, jaxlm, capsys):
    """Line 15: exit code 3 (nothing is gained by starting again), the reason in the last line, JSON that any program
    reads."""
    run_dir = folder / "diverged"
    arguments = ["train", run_file, f"run_dir={run_dir}", "optimizer.learning_rate=1e30", "optimizer.clip_norm=null"]
    for _ in range(2):  # a finished run is not trained again, and is no better for it
        assert jaxlm(*arguments) == 3
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith(f"jaxlm: {run_dir}: ended after 12 steps with a loss that is not a number"), lines
    assert losses(run_dir)[0] > 0 and losses(run_dir)[-1] is None

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for name in ("metrics.jsonl", "goodput.jsonl", "summary.json"):
        text = (run_dir / name).read_text()
        for document in text.splitlines() if name.endswith("l") else [text]:
            json.loads(document, parse_constant=refuse)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["loss"], summary["val_loss"], summary["diverged"]) == (None, None, True)

    assert "Ended with a loss that is not a number" in (run_dir / "report.md").read_text()
    assert jaxlm("report", run_dir) == 0 and (run_dir / "loss.png").exists()
    capsys.readouterr()
    assert jaxlm("evaluate", run_dir, "--json") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=refuse)
    assert figures["step"] == 12 and figures["val_loss"] is None
