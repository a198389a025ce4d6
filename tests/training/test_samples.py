"""Samples while a run trains (line 22: logging.samples_every_steps)."""

import re

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.data.corpus import Corpus
from jaxlm.models.layers import Context
from jaxlm.models.objectives import MaskedToken
from jaxlm.reporting.metrics import read_metrics
from jaxlm.serving.sampling import generate_from_run
from jaxlm.tasks.find import find_task

BERT = ("model.family=bert", "model.vocab_size=40", "data.tokenizer=wordpiece")
GREEDY = ("generate.temperature=0", "generate.prompts=[ba, cab]")


def losses(run_dir) -> list[float]:
    return [row.get("loss", row.get("val_loss")) for row in read_metrics(run_dir)]


def test_samples_change_no_number_and_are_what_generate_gives(finished, folder, run_file, jaxlm, capsys):
    """Bitwise the same losses as without. The last samples are of the weights that the run ends with."""
    run_dir = folder / "sampled_on_the_way"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", "logging.samples_every_steps=6", *GREEDY) == 0
    told = capsys.readouterr().err
    assert losses(run_dir) == losses(finished)
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == ["12.txt", "6.txt"]
    text = (run_dir / "samples" / "12.txt").read_text()
    assert "samples after step 6:\n" in told and "samples after step 12:\n" not in told  # the end shows those
    assert text == (run_dir / "samples.txt").read_text() and text.startswith("ba[prompt ends]") and "\ncab[prompt ends]" in text
    assert text != (run_dir / "samples" / "6.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [
    ["mesh.fsdp=2", "mesh.tensor=2"], ["mesh.stage=2", "mesh.data=2", "train.stage_repeats=1", "train.gradient_accumulation=2"],
    ["mesh.context=2", "mesh.data=2"]], ids=["cut", "pipeline", "context"])
def test_every_mesh_shows_what_its_checkpoint_says(mesh, folder, run_file, jaxlm):
    """Weights that lie in stages, or in another order, are laid out anew for decoding."""
    run_dir = folder / f"sampled_{mesh[0]}"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", "train.steps=4", "logging.samples_every_steps=4", "devices.count=4",
                 *mesh, *GREEDY) == 0
    one = [f"mesh.{axis}=1" for axis in ("data", "stage", "fsdp", "tensor", "context")]
    alone = config.load(run_dir, ["devices.count=1", *one, "train.gradient_accumulation=1"])
    want = [sample.marked() for sample in generate_from_run(alone)]
    assert (run_dir / "samples" / "4.txt").read_text().split("\n" + "-" * 40 + "\n") == [want[0], want[1] + "\n"]


def test_a_bert_fills_masks_of_the_validation_text(folder, run_file, jaxlm, restore):
    """The text itself, with its masks, and with what the model puts there: the likeliest token, by logits of all
    positions."""
    run_dir = folder / "sampled_bert"
    assert jaxlm("train", run_file, f"run_dir={run_dir}", *BERT, f"data.corpus={folder / 'masked'}", "train.steps=6",
                 "optimizer.learning_rate=3e-3", "logging.samples_every_steps=6") == 0
    blocks = (run_dir / "samples" / "6.txt").read_text().split("-" * 40 + "\n")
    assert len(blocks) == 3
    settings, corpus = config.load(run_dir), Corpus(folder / "masked")
    batch = find_task(settings).validation_batches([corpus], batch_size=3).batch(0)
    trainer, state = restore(run_dir)
    mask = corpus.tokenizer.special.mask

    @jax.jit
    def every_logit(params, tokens, positions, segments):
        bert = trainer.model.bind(params)
        states, _ = bert.hidden(tokens, Context(positions, np.arange(tokens.shape[1])[None], segments))
        return MaskedToken().logits(bert, states)

    best = np.asarray(every_logit(state.params, batch["tokens"], batch["positions"], batch["segment_ids"])).argmax(-1)
    for row, block in enumerate(blocks):
        places = batch["masked_positions"][row][batch["masked_mask"][row]]
        wanted = batch["masked_targets"][row][batch["masked_mask"][row]]
        text, decode = batch["tokens"][row].copy(), corpus.tokenizer.decode
        text[places] = wanted
        lines = block.splitlines()
        assert lines[0] == f"text:   {decode(text.tolist())}"
        assert lines[1].startswith("masked: ") and lines[1].count("[MASK]") == (batch["tokens"][row] == mask).sum() > 0
        found = best[row][places]
        assert re.findall(r"\[(.*?)\]", lines[2]) == [decode([token]).strip() for token in found.tolist()]
        rest = decode(np.delete(batch["tokens"][row], places).tolist())  # letters; a piece that goes on with a word has ##
        assert re.sub(r"\[.*?\]|[ #]", "", lines[2]) == "filled:" + re.sub("[ #]", "", rest)
        assert lines[3] == f"{(found == wanted).sum()} of {len(wanted)} right"
