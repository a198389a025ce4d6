"""Line 17: a text key takes the text as typed; numbers are as people write them, on the command line and in a run
file."""

import pytest
import yaml

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.reporting.runs import read_run
from jaxlm.settings import dump, flatten, to_dict
from jaxlm.values import number


@pytest.fixture
def value(tmp_path):
    """`value("train.steps=3")`, `value("train: {steps: 3}", "train.steps")`: what the key has become."""
    def read(text: str, key: str | None = None):
        (tmp_path / "run.yaml").write_text((text + "\n" if key else "") + "model: {vocab_size: 300}", encoding="utf-8")
        settings = config.load(tmp_path / "run.yaml", [] if key else [text])
        return flatten(to_dict(settings))[key or text.partition("=")[0]]

    return read


TEXTS = ["runs/exp #3", "2026-11-25", "null", "yes", "no", "007", "1e3", "0x1F", "1:30", "a: b", "[x]", "{x}", "- x",
         "'x'", '"x"', " x ", "*a", "&a", "!x", "%x", "@x", "|", ">", "? x", "x\ny", "日本語 #1",
         "true", "1_000", "<<", "=", "a=b", "\\n", "\t", "$HOME", "`x`"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_takes_the_text_as_typed(value, text):
    if text.strip():  # a run_dir of blanks is refused
        assert value(f"run_dir={text}") == text
    assert value(f"data.text_field={text}") == text
    assert value(f"data.tokenizer={text}") == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_survives_the_config_of_its_run(tmp_path, text):
    (tmp_path / "run.yaml").write_text("model: {vocab_size: 300}")
    settings = config.load(tmp_path / "run.yaml", [f"data.text_field={text}", f"data.raw=./{text}"])
    (tmp_path / "config.yaml").write_text(dump(settings), encoding="utf-8")
    again = config.load(tmp_path / "config.yaml")
    assert again == settings and again.data.text_field == text
    assert yaml.safe_load(dump(settings))["data"]["text_field"] == text  # for other readers of YAML, too
    assert read_run(tmp_path).config["data.text_field"] == text


@pytest.mark.parametrize(("written", "meant"), [
    ("1e-3", 1e-3), ("5e-4", 5e-4), ("1E-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("+3", 3.0), ("1e0", 1.0), ("0.1", 0.1),
    ("2.5k", 2500.0), ("1_0.5", 10.5), ("15%", 0.15), ("1e-320", 1e-320), (" 3 ", 3.0), ("1.0e-7", 1e-7),
    ("0100", 100.0), ("4_000", 4000.0)])
def test_numbers_are_as_people_write_them(value, written, meant):
    assert value(f"optimizer.learning_rate={written}") == meant
    assert value(f"optimizer: {{learning_rate: {written}}}", "optimizer.learning_rate") == meant
    assert value(f"optimizer: {{learning_rate: '{written}'}}", "optimizer.learning_rate") == meant


@pytest.mark.parametrize(("written", "meant"), [
    ("0100", 100), ("010", 10), ("08", 8), ("1e3", 1000), ("10k", 10_000), ("10K", 10_000), ("1_000", 1000), ("2.5M", 2_500_000),
    ("1G", 10**9), ("3B", 3 * 10**9), ("1T", 10**12), ("+3", 3), ("1000.0", 1000), ("1.5e3", 1500), ("1,000", 1000),
    ("12,345,678", 12_345_678),
    ("0x10", 16), ("10 k", 10_000), ("123456789012345678901", 123456789012345678901), ("1e20", 10**20)])
def test_whole_numbers_are_exact(value, written, meant):
    assert value(f"seed={written}") == meant and value(f"train.steps={written}") == meant
    assert value(f"seed: {written}", "seed") == meant
    assert isinstance(value(f"seed={written}"), int)


@pytest.mark.parametrize(("written", "meant"), [
    ("64MiB", 64 * 2**20), ("64Mi", 64 * 2**20), ("2GB", 2 * 10**9), ("1KiB", 1024), ("1kB", 1000), ("5M", 5 * 10**6),
    ("0.5GiB", 2**29)])
def test_bytes_have_their_own_units(value, written, meant):
    assert value(f"data.cleaning.max_bytes={written}") == meant
    assert value(f"data: {{tokenizer_sample: {written}}}", "data.tokenizer_sample") == meant


@pytest.mark.parametrize(("override", "hint"), [
    ("seed=1:30", "a number is written"), ("seed=2026-11-25", "a number is written"), ("train.steps=1.5", "expected integer > 0"),
    ("train.steps=10m", "may end with k, M, G or T"), ("train.steps=1 000", "a number is written 1000, 1_000"),
    ("train.steps=64MiB", "may end with k, M, G or T"), ("optimizer.learning_rate=0,001", "with a point before its decimals"),
    ("optimizer.learning_rate=1,000", "a number is written 1000"), ("train.steps=1,00", "a number is written 1000"),
    ("data.cleaning.max_bytes=1B", "KiB"), ("train.steps=1__0", "a number is written"), ("seed=1e9999", "a number is written"),
    ("seed=٣", "expected integer"), ("train.steps=", "expected integer"), ("train.steps=0o9", "expected integer"),
    ("optimizer.learning_rate=1e400", "=inf: expected number"), ("optimizer.weight_decay=NaN", "=nan: expected number"),
    ("logging.tensorboard=null", "expected true | false"), ("train.steps=yes", "expected integer"),
    ("optimizer.learning_rate=" + "9" * 5000, "expected number")])
def test_what_is_no_number_is_refused_with_how_to_write_it(value, override, hint):
    with pytest.raises(UserError) as caught:
        value(override)
    assert str(caught.value).startswith(override.partition("=")[0]) and hint in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["seed: 1:30", "seed: 2026-11-25", "train:\n  steps: 1.5", "optimizer:\n  learning_rate: 0,001",
                                  "train:\n  steps: 10m", "seed: yes"])
def test_the_same_in_a_run_file_names_the_line(value, text):
    key = text.split(":")[-2 if text != "seed: 1:30" else 0].strip()
    with pytest.raises(UserError, match=rf"run.yaml:{1 + text.count(chr(10))}: \S*{key}=.*expected (integer|number)"):
        value(text, "seed")


@pytest.mark.parametrize(("override", "meant"), [
    ("data.validation=1e-3", 1e-3), ("data.validation=5%", 0.05), ("data.validation=0", 0),
    ("data.validation=held.txt", "held.txt"),
    ("data.validation=./1e-3", "./1e-3"), ("data.raw=null", None), ("data.raw=~", None), ("data.raw=./null", "./null"),
    ("optimizer.clip_norm=null", None), ("optimizer.clip_norm=None", None), ("eval.steps=NULL", None), ("eval.steps=none", None),
    ("logging.tensorboard=no", False), ("logging.tensorboard=Off", False), ("logging.tensorboard=YES", True),
    ("model.bias=0", False),
    ("data.corpus={a: 1e0, 'b # c': 2k}", {"a": 1.0, "b # c": 2000.0}), ("mesh.across={data: 04}", {"data": 4}),
    ("train.remat={mlp_hidden: host}", {"mlp_hidden": "host"}), ("train.remat=none", "none")])
def test_a_key_of_several_types_takes_each(value, override, meant):
    assert value(override) == meant
    assert type(value(override)) is type(meant) or meant == 0


@pytest.mark.parametrize(("text", "meant"), [
    ("Once upon", ["Once upon"]), ('["a","b"]', ["a", "b"]), ("[a, 'b # c']", ["a", "b # c"]), ("- x", ["- x"]), ("", [""]),
    ("true", ["true"]), ("a: b #c", ["a: b #c"]), ("[MASK] is", ["[MASK] is"]), ("1e3", ["1e3"]),
    ("[1e3, no, 2026-11-25]", ["1e3", "no", "2026-11-25"]),
    ("[]x", ["[]x"]), ('["\\u0007"]', ["\a"]), ("x\ny", ["x\ny"])])
def test_one_text_is_a_list_of_one(value, text, meant):
    assert value(f"generate.prompts={text}") == meant


def test_a_list_in_a_run_file(value):
    assert value("generate: {prompts: Once upon}", "generate.prompts") == ["Once upon"]
    assert value("generate:\n  prompts:\n  - 1e3\n  - no\n  - '- x'\n", "generate.prompts") == ["1e3", "no", "- x"]
    assert value("data:\n  raw: 2026-11-25\n", "data.raw") == "2026-11-25"


@pytest.mark.parametrize(("override", "words"), [
    ("generate.prompts=[INST] x [/INST]", "generate.prompts='[\"[INST] x [/INST]\"]'"), ("data.raw=[a, b", "no file"),
    ("data.corpus={x}", "expected text | mapping"), ("data.raw=none", "./none"), ("data.corpus=None", "nothing is written null"),
    ("run_dir=a\udcff", "not UTF-8")])
def test_what_may_mean_two_things_is_refused(value, override, words):
    if words == "no file":  # a text, which the search for files refuses
        assert value(override) == "[a, b"
        return
    with pytest.raises(UserError) as caught:
        value(override)
    assert words in str(caught.value) and override.partition("=")[0] in str(caught.value)


def test_a_line_of_a_file_that_may_mean_two_things(value):
    with pytest.raises(UserError, match=r"run.yaml:2: data.corpus=None: nothing is written null"):
        value("data:\n  corpus: None\n", "data.corpus")


def test_no_number_takes_long():
    assert number("9" * 10**6, whole=True) is None and number("1e" + "9" * 300, whole=True) is None
