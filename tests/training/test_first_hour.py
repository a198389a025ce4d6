"""Line 22: evaluating on other text is one key, --prompt, neutral prompts, and the last line of a verb names the
next command."""

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml
from test_run import evaluations, surprise, windows

from jaxlm import config
from jaxlm.command_line import parse
from jaxlm.data.corpus import Corpus
from jaxlm.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ending(jaxlm, capsys):
    """`ending("evaluate", run)`: what a verb prints on standard output, the lines before its last on standard error,
    and the words of the command that this last line names, which must be one."""
    def run(*arguments) -> tuple[str, list[str], list[str]]:
        capsys.readouterr()
        assert jaxlm(*arguments) == 0
        captured = capsys.readouterr()
        *said, last = captured.err.splitlines()
        assert last.startswith("next: jaxlm ")
        words = shlex.split(last.removeprefix("next: "))
        parsed = parse(words[1], words[2:])
        if words[1] != "report":
            config.load(parsed.config, parsed.overrides)
        return captured.out, said, words

    return run


def write_other(folder: Path) -> Path:
    """A text of the letters that the run's tokenizer knows, a document a line."""
    path = folder / "other.txt"
    path.write_text("date cocoa\nbanana bean cabbage date\n" * 20, encoding="utf-8")
    return path


def test_evaluating_on_another_corpus_is_one_key(finished, folder, ending, restore):
    other = folder / "other corpus"
    _, _, words = ending("prepare", finished, f"data.raw={write_other(folder)}", f"data.corpus={other}", "data.validation=0.5",
                         f"data.tokenizer={folder / 'one/tokenizer'}")
    assert words[:3] == ["jaxlm", "train", str(finished)] and f"data.corpus={other}" in words
    out, said, words = ending("evaluate", finished, f"data.corpus={other}", "--json")
    assert words == ["jaxlm", "generate", str(finished), "--prompt", "TEXT"]
    text = Corpus(other).validation
    assert said[-1].startswith(f"evaluating on the validation text of {other}: {text.num_documents} documents, {text.num_tokens}")
    row = json.loads(out)
    assert row["val_loss"] == pytest.approx(surprise(finished, restore, windows(text, 32)).mean(), rel=1e-5)
    assert row["val_loss"] != evaluations(finished)[-1]["val_loss"]


def test_evaluating_on_other_text_takes_all_of_it_with_the_tokenizer_of_the_run(finished, folder, ending, restore):
    path = write_other(folder)
    out, said, _ = ending("evaluate", finished, f"data.raw={path}", "--json")
    [corpus] = [Corpus(found) for found in (finished / "evaluated").iterdir()]
    letters = len(path.read_text(encoding="utf-8").replace("\n", ""))
    assert said[-1].endswith(f": 40 documents, {letters + 40} tokens")  # an end mark for each
    assert corpus.tokenizer.digest == Corpus(folder / "one").tokenizer.digest
    row = json.loads(out)
    assert row["val_loss"] == pytest.approx(surprise(finished, restore, windows(corpus.validation, 32)).mean(), rel=1e-5)
    assert json.loads(ending("evaluate", finished, f"data.validation={path}", "--json")[0]) == row


@pytest.mark.parametrize(("overrides", "words"), [
    (["data.corpus=nowhere"], ["data.corpus=nowhere: no prepared corpus; jaxlm prepare", "data.tokenizer="]),
    (["data.raw=nowhere.txt"], ["data.raw: 'nowhere.txt' matches no file"]),
    (["data.corpus=bytes corpus"], ["another tokenizer (model.vocab_size=260)", "data.tokenizer="])])
def test_what_a_run_cannot_be_evaluated_on_is_refused(finished, folder, jaxlm, capsys, monkeypatch, overrides, words):
    monkeypatch.chdir(folder)
    if not (folder / "bytes corpus").exists():
        assert jaxlm("prepare", finished, "data.tokenizer=bytes", "model.vocab_size=null", "data.corpus=bytes corpus") == 0
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert jaxlm("evaluate", finished, *overrides) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in words) and sorted(folder.rglob("*")) == before


def test_a_prompt_is_taken_as_typed_and_wins_over_the_key(finished, ending):
    same = ("generate.temperature=0", "--json")
    out, _, words = ending("generate", finished, "--prompt", "banana bean", "generate.prompts=date", "--prompt", "", *same)
    samples = [json.loads(line) for line in out.splitlines()]
    assert [sample["prompt"] for sample in samples] == ["banana bean", ""]
    assert words == ["jaxlm", "evaluate", str(finished)]
    assert out == ending("generate", finished, 'generate.prompts=["banana bean", ""]', *same)[0]


@pytest.mark.parametrize("text", ["[INST] # x: {y} [/INST]", "- x", "a\nb", "['", "null", "日本", "\a\x7f\x85", "1e3",
                                  "'quoted'"])
def test_any_text_is_a_prompt(text, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {vocab_size: 300}")
    parsed = parse("generate", [str(tmp_path / "run.yaml"), f"--prompt={text}", "--prompt", f"{text} "])
    assert config.load(parsed.config, parsed.overrides).generate.prompts == [text, f"{text} "]


def test_default_prompts_suit_any_text():
    """Nothing of Python, of Shakespeare, or of a language: a tokenizer of characters may not know it."""
    assert Settings().generate.prompts == [""]
    for path in (ROOT / "configs").glob("*.yaml"):
        prompts = yaml.safe_load(path.read_text(encoding="utf-8")).get("generate", {}).get("prompts", [""])
        assert all(not prompt.strip() for prompt in prompts), path.name


def test_the_end_of_a_run_names_what_comes_next_and_tensorboard(run_file, folder, ending):
    run_dir = folder / "one step"
    _, said, words = ending("train", run_file, f"run_dir={run_dir}", "train.steps=3")
    assert words == ["jaxlm", "generate", str(run_dir), "--prompt", "TEXT"]
    assert f"curves: tensorboard --logdir '{run_dir}' (pip install tensorboard)" in said
    _, _, words = ending("report", run_dir)
    assert words == ["jaxlm", "report", str(run_dir), "OTHER_RUN"]


def test_a_pipe_is_not_evaluated_on(finished, jaxlm, capsys):
    """It can be read once only, and is needed twice: as the text, and as what is held out of it."""
    ear, mouth = os.pipe()
    try:
        assert jaxlm("evaluate", finished, f"data.raw=/dev/fd/{ear}") == 2
    finally:
        os.close(ear)
        os.close(mouth)
    assert "is a pipe, and evaluate reads a text twice" in capsys.readouterr().err
