"""Lines 19 and 20: help that fits a screen, one key's help, the reference page, near misses, the version."""

import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import pytest

import jaxlm
from jaxlm import cli, config, manual, near_misses
from jaxlm.command_line import ALL_VERBS, OPTIONS
from jaxlm.settings import sections

ROOT = Path(__file__).parents[1]
KEYS = [key.name for key in config.key_table()]


@pytest.fixture
def shown(capsys, monkeypatch, tmp_path):
    """`shown("help optimizer", columns=80)`: the lines that a command prints, which must end well and write nothing."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, columns: int = 80) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.main(shlex.split(command)) == 0
        captured = capsys.readouterr()
        assert captured.err == "" and not list(tmp_path.iterdir())
        return captured.out.splitlines()

    return run


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """`refused("train --lr 1")`: the one line with which a command must be refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {vocab_size: 300}")

    def run(command: str) -> str:
        assert cli.main(shlex.split(command)) == 2
        captured = capsys.readouterr()
        [line] = captured.err.splitlines()
        assert captured.out == "" and line.startswith("jaxlm: ")
        return line

    return run


# ----------------------------------------------------------------------------------------------------------------- help

@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("verb", ALL_VERBS)
def test_the_help_of_a_verb_fits_a_screen(shown, verb, columns):
    lines = shown(f"{verb} --help", columns)
    assert len(lines) <= 24 and max(map(len, lines)) < columns
    text = " ".join(" ".join(lines).split())
    assert all(option.written in text for option in OPTIONS if verb in option.verbs)
    assert verb == "report" or ("`jaxlm help learning_rate`" in text and "`jaxlm help optimizer`" in text)
    assert lines == shown(f"help {verb}", columns)[:len(lines)] == shown(f"{verb} run.yaml -h", columns)


@pytest.mark.parametrize("command", ["", "--help", "-h", "help"])
def test_the_overview_fits_a_screen_and_names_every_verb_and_section(shown, command):
    lines = shown(command)
    assert len(lines) <= 24 and max(map(len, lines)) < 80
    assert all(any(line.startswith(f"  {verb} ") for line in lines) for verb in ALL_VERBS)
    text = " ".join(" ".join(lines).split())
    assert all(f" {name}" in text for name, _ in sections()) and "jaxlm help learning_rate" in text


@pytest.mark.parametrize("columns", [60, 80, 119, 120, 200])
def test_every_key_is_shown_in_its_section_with_all_that_is_known_of_it(shown, columns):
    lines = [line for name in manual.section_names() for line in shown(f"help {name}", columns)]
    words = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= columns
    for key in config.key_table():
        value = key.default if isinstance(key.default, str) and key.default else json.dumps(key.default)
        if columns < 120:
            assert f"{key.name}={value} {key.type}" in words and " ".join(key.help.split()) in words, key.name
        else:  # a table, whose cells may be folded
            row = next(line for line in lines if line.startswith(f"{key.name} "))
            assert key.type.split()[0][:20] in row and value[:20] in row and key.help.split()[0] in row and key.unit in row


@pytest.mark.parametrize(("words", "names"), [
    ("learning_rate", ["optimizer.learning_rate"]), ("optimizer.learning_rate", ["optimizer.learning_rate"]),
    ("learning-rate", ["optimizer.learning_rate"]), ("LR", ["optimizer.learning_rate"]), ("batch_size", ["eval.batch_size"]),
    ("every_steps", ["checkpoint.every_steps", "eval.every_steps", "logging.every_steps"]),
    ("optimizer.learning_rate=1e-3", ["optimizer.learning_rate"]), ("block_size", ["data.sequence_length"]),
    ("seed", ["seed"]), ("b1 b2", ["optimizer.b1", "optimizer.b2"]), ("predictions", ["data.masking.max_predictions"])])
def test_one_key_by_its_last_name_or_by_what_others_call_it(shown, words, names):
    found = [line.partition("=")[0] for line in shown(f"help {words}") if re.match(r"[a-z_.0-9]+=", line)]
    assert found == names


def test_help_behind_a_key_is_about_the_key(shown):
    assert shown("train run.yaml optimizer.b1=3 --help")[0] == "optimizer.b1=0.9"
    assert shown("help keys")[0].startswith("run: ")


def test_a_word_without_help_is_refused_with_the_nearest(refused):
    assert "did you mean 'learning_rate'?" in refused("help lerning_rate")
    assert "did you mean 'optimizer'?" in refused("help optimiser")
    assert "jaxlm help names the verbs" in refused("help qqqq")
    assert "goes on from the checkpoints in its own run_dir" in refused("help resume_from")


def test_the_reference_page_is_up_to_date(capsys):
    """`jaxlm help --markdown > docs/reference.md` makes it again."""
    assert cli.main(["help", "--markdown"]) == 0
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert page == capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 120
    assert all(f"`{name}`" in page for name in KEYS) and all(f"### jaxlm {verb}" in page for verb in ALL_VERBS)


# -------------------------------------------------------------------------------------------------------------- version

@pytest.mark.parametrize("command", ["--version", "-V", "version"])
def test_the_version_names_what_numbers_depend_on(shown, command):
    lines = shown(command)
    for name in ("jax", "jaxlib", "flax"):
        assert f"{name} {importlib.metadata.version(name)}" in lines
    assert lines[0] == f"jaxlm {jaxlm.__version__}" and lines[-1].startswith("accelerators: ")


def test_there_is_one_version_a_licence_and_a_changelog():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = {attr = "jaxlm.__version__"}' in project and 'license = "Apache-2.0"' in project
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert f"## {jaxlm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("extra", ["cuda", "tpu", "remote"])
def test_the_extras_are_there(extra):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras[extra] == {"cuda": ["jax[cuda13]"], "tpu": ["jax[tpu]"]}.get(extra, extras[extra]) and extras[extra]


# ---------------------------------------------------------------------------------------------------------- near misses

def test_the_table_of_near_misses_holds_keys_and_values_that_are_there():
    assert set(near_misses.KEYS.values()) <= set(KEYS)
    assert not set(near_misses.KEYS) & set(KEYS) and not set(near_misses.KEYS) & set(near_misses.MISSING)
    kinds = {key.name: key.type.split(" | ") for key in config.key_table()}
    assert all(right in kinds[key] for key, values in near_misses.VALUES.items() for right in values.values())
    assert not any(name in kinds[key] for key, values in near_misses.VALUES.items() for name in values)
    assert set(near_misses.VERBS.values()) <= set(ALL_VERBS)
    assert not (set(near_misses.VERBS) | set(near_misses.NOT_YET)) & set(ALL_VERBS)
    assert set(near_misses.NOTES) <= set(near_misses.KEYS)


@pytest.mark.parametrize(("typed", "right"), [
    ("batch_size=4", "data.global_batch_size"), ("lr=1", "optimizer.learning_rate"), ("max_steps=1", "train.steps"),
    ("max_tokens=1", "generate.max_new_tokens"), ("epochs=3", "train.epochs"), ("train.num_epochs=3", "train.epochs"),
    ("warmup=1", "schedule.warmup_steps"), ("warmup_ratio=0.1", "It is in steps"),
    ("init_from=gpt2", "'init'"), ("resume=x", "by itself"),
    ("fp16=true", "train.precision=bfloat16"), ("bf16=true", "train.precision=bfloat16"), ("n_layer=2", "model.num_layers"),
    ("n_head=2", "model.num_heads"), ("n_embd=2", "model.hidden_size"), ("d_model=2", "model.hidden_size"),
    ("block_size=2", "data.sequence_length"), ("model.block_size=2", "data.sequence_length"), ("dropout=0", "model.dropout"),
    ("weight_decay=0", "optimizer.weight_decay"), ("gradient_accumulation_steps=2", "train.gradient_accumulation"),
    ("per_device_train_batch_size=2", "data.global_batch_size"), ("num_train_epochs=2", "train.epochs"),
    ("output_dir=x", "run_dir"),
    ("learning-rate=1", "optimizer.learning_rate"), ("Train.Steps=1", "train.steps"), ("train.lr=1", "optimizer.learning_rate"),
    ("lora.rank=3", "adapters"), ("tp=2", "mesh.tensor"), ("num_gpus=2", "devices.count")])
def test_names_of_other_tools_are_answered_with_the_key_here(refused, typed, right):
    line = refused(f"train run.yaml {typed}")
    assert f"unknown key '{typed.partition('=')[0]}'" in line and right in line


@pytest.mark.parametrize(("typed", "right"), [
    ("train.precision=bf16", "bfloat16"), ("train.precision=fp16", "bfloat16"), ("train.precision=fp32", "float32"),
    ("optimizer.name=AdamW", "adamw"), ("model.family=GPT", "gpt"), ("model.family=llama3", "llama"),
    ("task.name=mlm", "masked_lm"),
    ("task.name=sequence_classification", "text_classification"), ("task.problem=multi_label_classification", "multi_label"),
    ("schedule.name=wsd", "warmup_stable_decay"),
    ("devices.platform=cuda", "gpu"), ("model.attention=flash", "auto"), ("model.positions=rotary", "rope"),
    ("train.remat=true", "full")])
def test_values_of_other_tools_are_answered_with_the_value_here(refused, typed, right):
    assert refused(f"train run.yaml {typed}").endswith(f"; did you mean '{right}'?")


@pytest.mark.parametrize(("command", "words"), [
    ("train run.yaml --batch-size 4", "keys are set without dashes: data.global_batch_size=4"),
    ("train --lr=1e-3 run.yaml", "keys are set without dashes: optimizer.learning_rate=1e-3"),
    ("train --config run.yaml", "the run file stands by itself"),
    ("train run.yaml --learning_rate 1", "optimizer.learning_rate=1"),
    ("train run.yaml --train.steps=5", "keys are set without dashes: train.steps=5"),
    ("train run.yaml --epochs 3", "train.epochs=3"),
    ("train run.yaml --bf16", "train.precision=bfloat16"), ("train run.yaml --resume", "goes on from the checkpoints"),
    ("train run.yaml --proceses 2", "did you mean '--processes'?"),
    ("train run.yaml --json", "option of evaluate, predict, generate, bench, plan"),
    ("evaluate run.yaml --prompt x", "--prompt is an option of generate"), ("plan run.yaml", "--target"),
    ("train train.steps=4", "CONFIG.yaml is missing before 'train.steps=4'"), ("train", "CONFIG.yaml"),
    ("generate run.yaml --prompt", "expected one argument"), ("train run.yaml -x", "unknown option -x")])
def test_options_that_are_keys_or_none(refused, command, words):
    assert words in refused(command)


@pytest.mark.parametrize(("word", "words"), [
    ("run.yaml", "expected a verb before it, for example jaxlm train run.yaml"),
    ("train.steps=4", "expected a verb and a run file"),
    ("finetune", "did you mean 'train'?"), ("fine-tune", "did you mean 'train'?"), ("infer", "did you mean 'predict'?"),
    ("classify", "did you mean 'predict'?"), ("predict_proba", "did you mean 'predict'?"), ("pedict", "did you mean 'predict'?"),
    ("serve", "nothing here serves a model yet"),
    ("import-hf", "did you mean 'import'?"), ("export-hf", "did you mean 'export'?"),
    ("from_pretrained", "did you mean 'import'?"),
    ("push_to_hub", "did you mean 'export'?"),
    ("convert", "'import' reads a Hugging Face folder, 'export' writes one"), ("eval", "did you mean 'evaluate'?"),
    ("sample", "did you mean 'generate'?"),
    ("preprocess", "did you mean 'prepare'?"), ("pretrain", "did you mean 'train'?"), ("benchmark", "did you mean 'bench'?"),
    ("trian", "did you mean 'train'?"), ("optimizer", "jaxlm help optimizer"), ("--target", "expected a verb before --target")])
def test_a_first_word_that_is_no_verb(refused, word, words):
    assert words in refused(f"{word} x")
