"""The run file: what is read, what is refused and how, and what is written back."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxlm import cli, config
from jaxlm.checks import check_layout
from jaxlm.errors import UserError
from jaxlm.settings import AXES, Settings, dump, flatten, to_dict

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """`load(text, "a.b=c", ...)`: the settings of a run file with this text."""
    def load_text(text: str = "", *overrides: str) -> Settings:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return config.load(tmp_path / "run.yaml", overrides)

    return load_text


def refusal(load, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- loading

def test_an_empty_file_is_all_defaults(load):
    assert load() == Settings()
    assert load("model:\ntrain: {}\n") == Settings()


def test_values_come_from_the_file_and_then_from_the_overrides(load):
    settings = load("seed: 3\ntrain:\n  steps: 20\n  precision: bfloat16\n", "train.steps=30", "optimizer.learning_rate=1e-3")
    assert (settings.seed, settings.train.steps, settings.train.precision) == (3, 30, "bfloat16")
    assert settings.optimizer.learning_rate == 1e-3
    assert settings == dataclasses.replace(
        Settings(), seed=3, train=dataclasses.replace(Settings().train, steps=30, precision="bfloat16"),
        optimizer=dataclasses.replace(Settings().optimizer, learning_rate=1e-3))


@pytest.mark.parametrize(("override", "value"), [
    ("data.raw=a.txt", "a.txt"), ("data.raw=[a.txt, 'b*.gz']", ["a.txt", "b*.gz"]), ("data.raw=null", None),
    ("data.corpus={one: 2, two: 0.5}", {"one": 2.0, "two": 0.5}), ("data.validation=0", 0.0),
    ("data.validation=held/*.txt", "held/*.txt"), ("data.cleaning.near_duplicates=0.8", 0.8),
    ("generate.prompts=['', \"\\n\"]", ["", "\n"]), ("logging.tensorboard=false", False), ("run_dir=a=b", "a=b")])
def test_overrides_are_read_by_what_their_key_takes(load, override, value):
    settings = load("model: {vocab_size: 300}", override)
    assert flatten(to_dict(settings))[override.partition("=")[0]] == value


def test_a_run_directory_is_a_config_wherever_it_has_been_moved(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "config.yaml").write_text(dump(dataclasses.replace(Settings(), run_dir=str(old), seed=5)))
    assert config.load(old).run_dir == str(old)
    old.rename(new)
    assert (config.load(new).run_dir, config.load(new).seed) == (str(new), 5)
    assert config.load(new, ["run_dir=elsewhere"]).run_dir == "elsewhere"
    assert config.load(new / "config.yaml").run_dir == str(old)  # a file says what it says


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_what_it_is(path):
    settings = config.load(path)
    assert settings.run_dir == f"runs/{path.stem}"
    header = path.read_text(encoding="utf-8").split("\nrun_dir")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"jaxlm train configs/{path.name}" in header and "Hardware:" in header


# ----------------------------------------------------------------------------------------------------------- round trip

def test_dump_and_load_change_nothing(load):
    for settings in (Settings(), *(config.load(path) for path in CONFIGS)):
        assert load(dump(settings)) == settings
        assert json.loads(json.dumps(to_dict(settings))) == to_dict(settings)


def test_every_value_survives_the_round_trip(load):
    text = yaml.safe_dump({
        "run_dir": "années/日本",
        "data": {"corpus": {"a b": 1.5, "c": 2}, "validation": "x/*.gz", "cleaning": {"scripts": ["latin"]}},
        "generate": {"prompts": ["", "\n", "a: b # c", "1e5", "null"]}, "optimizer": {"learning_rate": 1e-7, "clip_norm": None}})
    settings = load(text)
    assert settings.generate.prompts == ["", "\n", "a: b # c", "1e5", "null"]
    assert load(dump(settings)) == settings


def test_flatten_keeps_values_that_are_mappings():
    flat = flatten(to_dict(dataclasses.replace(
        Settings(), data=dataclasses.replace(Settings().data, corpus={"one": 1.0}))))
    assert flat["data.corpus"] == {"one": 1.0} and flat["data.masking.probability"] == 0.15 and flat["seed"] == 0
    assert set(flat) == {name for name, *_ in config.key_table()}


# ----------------------------------------------------------------------------------------------------------------- help

def test_help_says_types_for_people():
    kinds = {name: kind for name, kind, *_ in config.key_table()}
    assert kinds["data.global_batch_size"] == "integer > 0"
    assert kinds["model.dropout"] == "number >= 0, < 1"
    assert kinds["model.family"] == "gpt | llama | mistral | qwen2 | qwen3 | lstm | bert | roberta | distilbert | modernbert"
    assert kinds["model.next_sentence"] == "true | false"
    assert kinds["data.corpus"] == "text | mapping of text to number > 0 | null"
    assert kinds["generate.prompts"] == "list of text"


def test_another_store_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(CONFIGS[0]), "run_dir=hdfs://name/runs"]) == 2
    assert "hdfs://name/runs: expected a folder or file of this machine, or s3://" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "jaxlm", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# ------------------------------------------------------------------------------------------------------------- refusals

def test_aliases_to_aliases_are_refused_before_they_grow(load):
    letters = "abcdefghijkl"
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]", *(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]"
                                            for before, name in itertools.pairwise(letters))]
    assert "not valid YAML: too long once its aliases are written out" in refusal(load, "\n".join([*lines, "seed: *l"]))
    assert "too long once its aliases are written out" in refusal(load, "", f"mesh.across={{{', '.join(lines)}}}")
    merged = "\n".join(["a: &a {x: 1}", *(f"{name}: &{name} {{<<: [{','.join([f'*{before}'] * 9)}]}}"
                                          for before, name in itertools.pairwise(letters))])
    assert "too long" in refusal(load, merged)
    assert load("train: {steps: &n 7}\nlogging: {every_steps: *n}\n").logging.every_steps == 7


@pytest.mark.parametrize(("name", "nearest"), [
    ("train.step", "train.steps"), ("trian.steps", "train.steps"), ("learning_rate", "optimizer.learning_rate"),
    ("train.learning_rate", "optimizer.learning_rate"), ("model.n_heads", "model.num_heads"), ("modle.bias", "model.bias"),
    ("checkpoint.keep", "checkpoint.keep_last"),
    ("data.cleaning.min_chars", "data.cleaning.min_characters"), ("sed", "seed")])
def test_an_unknown_key_is_answered_with_the_nearest(load, name, nearest):
    assert refusal(load, "", f"{name}=1") == f"unknown key '{name}'; did you mean '{nearest}'?"
    *sections, last = name.split(".")
    values = {last: 1}
    for section in reversed(sections):
        values = {section: values}
    assert "run.yaml:1: unknown key '" in refusal(load, yaml.safe_dump(values, default_flow_style=True))


def test_a_refusal_says_where(load):
    text = "seed: 1\ntrain:\n  # longer\n  steps: -2\n"
    assert refusal(load, text).endswith("run.yaml:4: train.steps=-2: expected integer > 0 | null")
    assert refusal(load, text, "train.steps=-3") == "train.steps=-3: expected integer > 0 | null"
    assert load(text, "train.steps=3").train.steps == 3
    assert "run.yaml:6: train.steps is already set in line 4" in refusal(load, text + "  precision: float32\n  steps: 3\n")
    wrong = refusal(load, "model:\n  family: gtp\n")
    assert "run.yaml:2: model.family='gtp': expected gpt | llama | " in wrong and "did you mean 'gpt'?" in wrong


CONTRADICTIONS = {
    "model.hidden_size=100 is not a multiple of model.num_heads=12": ["model.hidden_size=100"],
    "model.num_heads=12 is not a multiple of model.num_kv_heads=5": ["model.num_kv_heads=5"],
    "model.positions=rope needs an even head width": ["model.positions=rope", "model.head_dim=5"],
    "model.next_sentence=true needs a model that is not causal, as model.family=bert is, not gpt": ["model.next_sentence=true"],
    "model.global_every=3 needs local layers": ["model.global_every=3"],
    "model.first_norm=false needs model.norm_position=pre": ["model.family=bert", "model.first_norm=false"],
    "model.attention=splash knows no model.attention_window": ["model.attention=splash", "model.attention_window=64"],
    "model.rope_scaling needs model.positions=rope, not learned": ["model.rope_scaling={type: linear, factor: 2}"],
    "model.rope_scaling: type is yarn, expected linear or llama3": [
        "model.family=llama", "model.rope_scaling={type: yarn, factor: 2}"],
    "model.rope_scaling: type=llama3 takes the numbers factor, low_freq_factor": [
        "model.family=llama", "model.rope_scaling={type: llama3, factor: 2}"],
    "model.rope_scaling: low_freq_factor is below high_freq_factor": [
        "model.family=llama", "model.rope_scaling={type: llama3, factor: 2, low_freq_factor: 4, high_freq_factor: 1, "
        "original_max_length: 8192}"],
    "task.name=causal_lm and model.family=bert, which is not causal: expected task.name=masked_lm": [
        "model.family=bert", "task.name=causal_lm"],
    "task.name=bert and model.family=gpt, which is causal: expected task.name=causal_lm": ["task.name=bert"],
    "model.type_vocab_size=1": ["model.family=bert", "model.next_sentence=true", "model.type_vocab_size=1"],
    "model.attention=cudnn has no attention dropout": ["model.attention=cudnn", "model.dropout=0.1"],
    "data.sequence_length=2048 is longer than model.max_length=1024": ["data.sequence_length=2048"],
    "data.sequence_length=1 is too short; at least 2": ["data.sequence_length=1"],
    "data.sequence_length=4 is too short; at least 5": ["model.family=bert", "data.sequence_length=4"],
    "data.global_batch_size=8 is not a multiple of train.gradient_accumulation=3": ["train.gradient_accumulation=3"],
    "data.tokenizer=characters has no cls, sep and mask": ["model.family=bert", "data.tokenizer=characters", "data.raw=x"],
    "data.corpus is an empty mixture": ["data.corpus={}"],
    "data.raw cannot be prepared into a mixture": ["data.corpus={a: 1}", "data.raw=x", "data.tokenizer=bytes"],
    "run_dir is empty": ["run_dir= "],
    "generate.prompts is empty": ["generate.prompts=[]"],
    "schedule.warmup_steps=1000 leaves nothing of train.steps=1000": ["schedule.warmup_steps=1000"],
    "schedule.decay_steps=2000 is more than train.steps=1000": ["schedule.decay_steps=2000"],
    "schedule.decay_steps=50 is not more than schedule.warmup_steps=50": ["schedule.decay_steps=50", "schedule.warmup_steps=50"],
    "schedule.decay_steps=1: warmup_stable_decay would lower nothing, for a decay begins at the peak; expected at least 2":
        ["schedule.name=warmup_stable_decay", "schedule.decay_steps=1"],
    "schedule.decay_steps=200 is more than the 100 steps that schedule.warmup_steps=900 leaves of train.steps=1000":
        ["schedule.name=warmup_stable_decay", "schedule.decay_steps=200", "schedule.warmup_steps=900"],
    "mesh.expert=2 needs experts": ["mesh.expert=2"],
    "mesh.expert=2 does not divide model.num_experts=3": ["mesh.expert=2", "model.num_experts=3"],
    "model.capacity_factor=1.5 needs experts": ["model.capacity_factor=1.5"],
    "train.remat: residual is what a block is recomputed from": ["train.remat={residual: recompute}"],
    "data.sequence_length=100: model.attention=splash takes multiples of 128; use 128":
        ["model.attention=splash", "data.sequence_length=100"],
    "model.attention=splash has no attention dropout": ["model.attention=splash", "model.dropout=0.1"],
    "model.experts_per_token=2 is more than model.num_experts=1": ["model.num_experts=1"],
    "model.num_experts=4 needs a causal model": ["model.num_experts=4", "model.family=bert"],
    "train.gradient_accumulation=3: a pipeline of mesh.stage=2 stages takes a multiple of as many micro-batches; use 4":
        ["mesh.stage=2", "train.gradient_accumulation=3", "data.global_batch_size=12"],
    "model.num_layers=12 does not divide into mesh.stage * train.stage_repeats = 10 groups":
        ["mesh.stage=2", "train.gradient_accumulation=2", "train.stage_repeats=5"],
    "train.stage_repeats=2 needs a pipeline": ["train.stage_repeats=2"],
    "mesh.context=3 cuts data.sequence_length=128 into 6 pieces, which are not equal; use 126":
        ["mesh.context=3", "data.sequence_length=128"],
    "model.attention=xla needs whole sequences, and mesh.context * mesh.tensor = 8 does not divide model.num_heads=12":
        ["mesh.context=8", "model.attention=xla", "data.sequence_length=128"],
    "mesh.fsdp=0; expected a positive number": ["mesh.fsdp=0"],
    "mesh.data=-1 and mesh.tensor=-1: only one axis": ["mesh.data=-1", "mesh.tensor=-1"],
    "mesh.tensor=8 does not divide model.num_heads=12": ["mesh.tensor=8"],
    "mesh.tensor=4 does not divide model.num_kv_heads=2": ["mesh.tensor=4", "model.num_kv_heads=2"],
    "mesh.tensor=4 does not divide model.intermediate_size=50": ["mesh.tensor=4", "model.intermediate_size=50"],
    "mesh.tensor=3 does not divide the vocabulary": ["mesh.tensor=3"],
    "mesh.fsdp=5 does not divide model.hidden_size=768": ["mesh.fsdp=5"],
    "data.global_batch_size / train.gradient_accumulation = 2 sequences do not divide over mesh.data":
        ["mesh.data=2", "mesh.fsdp=2", "train.gradient_accumulation=4"],
    "eval.batch_size = 3 sequences do not divide": ["mesh.data=4", "eval.batch_size=3"],
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions_are_refused(load, message):
    assert refusal(load, "", *CONTRADICTIONS[message]).startswith(message)


def test_what_looks_like_a_contradiction_and_is_none(load):
    load("", "model.hidden_size=100", "model.head_dim=8")
    load("", "model.attention=cudnn", "model.dropout=0.1", "model.attention_dropout=0")
    load("", "schedule.name=constant", "schedule.decay_steps=50", "schedule.warmup_steps=50")
    load("", "schedule.name=warmup_stable_decay", "schedule.decay_steps=50", "schedule.warmup_steps=900")
    load("", "mesh.data=-1", "mesh.fsdp=2", "mesh.tensor=4")


def test_a_mesh_is_checked_again_once_its_devices_are_known(load):
    settings = load("", "mesh.fsdp=-1", "mesh.tensor=2", "data.global_batch_size=12")
    rest = dict.fromkeys(AXES, 1) | {"tensor": 2}
    check_layout(settings, rest | {"fsdp": 4})
    for fsdp, message in ((8, "12 sequences do not divide over .* = 8 devices"),
                          (5, "mesh.fsdp=5 does not divide model.hidden_size=768")):
        with pytest.raises(UserError, match=message):
            check_layout(settings, rest | {"fsdp": fsdp})


def test_numbers_are_numbers(load):
    for value in ("nan", ".inf", "-.inf", "true", "'text'", "[1]", "null"):
        for name in ("optimizer.learning_rate", "data.global_batch_size"):
            assert refusal(load, "", f"{name}={value}").startswith(f"{name}=")
    settings = load("optimizer: {learning_rate: 1e-4}", "train.steps=10", "seed=0")
    assert (settings.optimizer.learning_rate, settings.train.steps) == (1e-4, 10)


def test_sections_are_sections(load):
    assert "run.yaml:1: train is a section: expected keys under it, found '5'" in refusal(load, "train: 5")
    assert refusal(load, "", "train=5") == "'train=5': train is a section; set one of its keys, for example train.steps=..."
