"""Whole runs of the recurrent trunk, by the commands that a user types."""

import json

import pytest


@pytest.mark.slow
def test_an_lstm_is_trained_evaluated_and_continues_text(run_file, folder, jaxlm, capsys):
    """Far below the frequencies of letters within 40 steps of five words; its state is its cache, prompts of different
    lengths included."""
    run_dir = folder / "lstm"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", "model.family=lstm", "train.steps=40") == 0
    capsys.readouterr()
    assert jaxlm("evaluate", run_dir, "--baseline", "ngram", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["val_loss"] < found["baseline"]["n-gram (1)"]["loss"] - 0.3
    assert jaxlm("generate", run_dir, "--prompt", "ban", "--prompt", "c", "generate.temperature=0", "--json") == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for sample in together:
        assert jaxlm("generate", run_dir, "--prompt", sample["prompt"], "generate.temperature=0", "--json") == 0
        assert json.loads(capsys.readouterr().out) == sample
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "| model | lstm, 2 layers, width 32 |" in report


@pytest.mark.slow
def test_both_ways_it_learns_masked_tokens_and_goes_on_where_it_stopped(run_file, folder, jaxlm):
    keys = ["model.family=lstm", "model.causal=false", "model.dropout=0.1", "data.tokenizer=bytes",
            f"data.corpus={folder / 'lstm_bytes'}"]
    whole, stopped = folder / "lstm_whole", folder / "lstm_stopped"
    assert jaxlm("train", run_file, f"run_dir={whole}", *keys) == 0
    for steps in (4, 12):  # of a schedule of 12
        assert jaxlm("train", run_file, f"run_dir={stopped}", *keys, f"train.steps={steps}", "schedule.decay_steps=null") == 0
    losses = [[row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
              for run in (whole, stopped)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
