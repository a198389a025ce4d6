"""Bad input, through the front door: exit code 2, one line that names the culprit, and nothing left behind."""

import gzip
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import yaml

from jaxlm import cli
from jaxlm.runtime import processes

RUN = {
    "run_dir": "run",
    "model": {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "max_length": 32},
    "data": {"raw": "text.txt", "document": "line", "tokenizer": "characters", "validation": 0.2, "sequence_length": 16,
             "prepare_processes": 1},
    "train": {"steps": 2}, "logging": {"tensorboard": False}, "generate": {"max_new_tokens": 2},
    "devices": {"platform": "cpu", "count": 1},
}
YAML_FILES = {
    "syntax.yaml": "seed: 1\nmodel: [1,\ntrain: {}\n",
    "tab.yaml": "model:\n\tfamily: gpt\n",
    "list.yaml": "- seed\n- 1\n",
    "scalar.yaml": "seed",
    "unknown.yaml": "train:\n  steps: 3\n  stpes: 4\n",
    "section.yaml": "model: gpt\n",
    "twice.yaml": "seed: 1\ntrain: {steps: 2}\nseed: 2\n",
    "type.yaml": "optimizer:\n  learning_rate: fast\n",
    "nan.yaml": "optimizer:\n  weight_decay: .nan\n",
}


def write_inputs(folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    for name, text in YAML_FILES.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "text.txt").write_text("".join(f"the line number {number} of a text\n" for number in range(80)))
    (folder / "short.txt").write_text("ab\nba\n")
    (folder / "binary.txt").write_bytes(b"text\0text\n" * 9)
    (folder / "blank.txt").write_text("\n   \n\n")
    (folder / "no_text").mkdir()
    (folder / "no_text" / "data.bin").write_bytes(b"\0")
    whole = gzip.compress(np.random.default_rng(0).bytes(5000))
    (folder / "truncated.txt.gz").write_bytes(whole[:2000])
    (folder / "plain.txt.gz").write_text("not compressed")
    (folder / "bad.jsonl").write_text('{"text": "one"}\n{"text": "two"\n')
    (folder / "other_field.jsonl").write_text('{"txt": "one"}\n')
    (folder / "number.jsonl").write_text('{"text": "one"}\n\n{"text": 5}\n')
    (folder / "table.parquet").write_text("no parquet")
    (folder / "reviews.csv").write_text("id,review\n1,good\n")
    (folder / "train-v1.1.json").write_text('{"version": "1.1", "data": [{"title": "t", "paragraphs": []}]}')
    (folder / "latin.txt").write_bytes("Die Straße führt über die Brücke\n".encode("latin-1") * 20)
    (folder / "page.pdf").write_bytes(b"%PDF-1.7\n")
    (folder / "garbage.model").write_bytes(b"\1\2\3")
    (folder / "garbage.json").write_text("{}")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "line": 2}, unk_token="[UNK]")
    tokenizers.Tokenizer(words).save(str(folder / "no_mask.json"))


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with good and bad inputs, a finished gpt run, and corpora, whole and damaged."""
    folder, before = tmp_path_factory.mktemp("house"), Path.cwd()
    write_inputs(folder)
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "initialize", lambda settings: jax.devices()[: settings.count or 1])
        assert cli.main(["train", "run.yaml"]) == 0
        for corpus, *overrides in (("bytes", "data.tokenizer=bytes"), ("none_held_out", "data.validation=0"), ("damaged",),
                                   ("no_manifest",)):
            assert cli.main(["prepare", "run.yaml", f"data.corpus={corpus}", *overrides]) == 0
    os.chdir(before)
    shard = folder / "damaged" / "train-00000.tokens.npy"
    shard.write_bytes(shard.read_bytes()[:-6])
    (folder / "no_manifest" / "manifest.json").unlink()
    shutil.copytree(folder / "run", folder / "stopped_early")
    shutil.rmtree(folder / "stopped_early" / "checkpoints")
    (folder / "stopped_early" / "checkpoints").mkdir()
    shutil.copytree(folder / "run", folder / "torn")
    for params in (folder / "torn" / "checkpoints").glob("*/state/params"):
        shutil.rmtree(params)
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in folder.rglob("*")}


@pytest.fixture
def refuse(house, monkeypatch, capfd):
    """`refuse("train run.yaml seed=x")`: the lines on stderr of a command that must end with code 2 and leave
    nothing."""
    monkeypatch.chdir(house)
    monkeypatch.setattr(processes, "initialize", lambda settings: jax.devices()[: settings.count or 1])

    def run(command: str) -> list[str]:
        before = tree(house)
        code = cli.main(shlex.split(command))
        captured = capfd.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert tree(house) == before
        return captured.err.splitlines()

    return run


# --------------------------------------------------------------------------- known before anything is read, or computed

NEW = "train run.yaml run_dir=new"
BERT = f"{NEW} model.family=bert data.tokenizer=bytes"
AT_ONCE = {
    # the command line
    "trian run.yaml": ("unknown verb 'trian'", "did you mean 'train'?"),
    "train": ("jaxlm train", "CONFIG.yaml", "--help"),
    "report": ("jaxlm report", "RUN_DIR"),
    "train run.yaml --proceses 2": ("--proceses",),
    "train run.yaml --processes 0": ("--processes", "positive number", "'0'"),
    "train run.yaml --processes -1": ("--processes", "'-1'"),
    "train run.yaml --processes x": ("--processes", "'x'"),
    "prepare run.yaml --json": ("--json",),
    "train run.yaml --restart=--": ("'--restart=--'", "expected a value"),
    f"{NEW} train.steps": ("'train.steps'", "key=value"),
    f"{NEW} =5": ("'=5'", "key=value"),
    # the run file
    "train rum.yaml": ("rum.yaml: no such run file", "did you mean 'run.yaml'?"),
    "train run.yaml/below": ("run.yaml/below: cannot be read",),
    "train no_text": ("no_text: a folder without config.yaml",),
    "train binary.yaml": ("binary.yaml: not UTF-8 text",),
    "train syntax.yaml": ("syntax.yaml:4: not valid YAML", "expected ',' or ']'"),
    "train tab.yaml": ("tab.yaml:2: not valid YAML",),
    "train list.yaml": ("list.yaml: expected a mapping of keys, found list",),
    "train scalar.yaml": ("scalar.yaml: expected a mapping of keys, found str",),
    "train unknown.yaml": ("unknown.yaml:3: unknown key 'train.stpes'", "did you mean 'train.steps'?"),
    "train section.yaml": ("section.yaml:1: model is a section", "found 'gpt'"),
    "train twice.yaml": ("twice.yaml:3: seed is already set in line 1",),
    "train type.yaml": ("type.yaml:2: optimizer.learning_rate='fast': expected number > 0",),
    "train nan.yaml": ("nan.yaml:2: optimizer.weight_decay=nan: expected number >= 0",),
    # keys and values
    f"{NEW} trian.steps=3": ("unknown key 'trian.steps'", "did you mean 'train.steps'?"),
    f"{NEW} train=3": ("train is a section", "train.steps"),
    f"{NEW} seed=-1": ("seed=-1: expected integer >= 0",),
    f"{NEW} train.steps=1.5": ("train.steps=1.5: expected integer > 0",),
    f"{NEW} model.bias=maybe": ("model.bias='maybe': expected true | false",),
    f"{NEW} optimizer.name=adamax": ("optimizer.name='adamax'", "did you mean 'adam'?"),
    f"{NEW} optimizer.learning_rate=.inf": ("optimizer.learning_rate=inf",),
    f"{NEW} 'seed=['": ("seed='['", "expected integer >= 0"),
    f"{NEW} run_dir=": ("run_dir is empty",),
    # contradictions
    f"{NEW} model.num_heads=3": ("model.hidden_size=16", "model.num_heads=3"),
    f"{NEW} model.num_kv_heads=3": ("model.num_heads=2", "model.num_kv_heads=3"),
    f"{NEW} data.sequence_length=64": ("data.sequence_length=64", "model.max_length=32"),
    f"{NEW} train.gradient_accumulation=3": ("data.global_batch_size=8", "train.gradient_accumulation=3"),
    f"{NEW} schedule.warmup_steps=2": ("schedule.warmup_steps=2", "train.steps=2"),
    f"{NEW} generate.prompts=[]": ("generate.prompts is empty",),
    f"{NEW} generate.num_samples=0": ("generate.num_samples=0",),
    f"{NEW} model.family=bert": ("data.tokenizer=characters", "model.family=bert"),
    "train run.yaml run_dir=gs:/bucket/run": ("run_dir=gs:/bucket/run", "did you mean 'gs://bucket/run'?"),
    f"{NEW} data.tokenizer=bpe": ("model.vocab_size: missing", "bpe"),
    # the mesh and its devices
    f"{NEW} mesh.data=3 devices.count=2 data.global_batch_size=9": ("mesh.data=3 does not make 2 device(s)", "devices.count"),
    f"{NEW} mesh.data=1 mesh.fsdp=2 mesh.tensor=2 devices.count=8": ("mesh.fsdp=2 * mesh.tensor=2 does not make 8 device(s)",),
    f"{NEW} mesh.tensor=-1 devices.count=8": ("mesh.tensor=8 does not divide model.num_heads=2",),
    f"{NEW} mesh.fsdp=-1 devices.count=5 data.global_batch_size=5": ("mesh.fsdp=5 does not divide model.hidden_size=16",),
    f"{NEW} mesh.fsdp=-1 devices.count=8 data.global_batch_size=4": ("= 4 sequences do not divide over", "= 8 devices"),
    f"{NEW} devices.count=4 eval.batch_size=6": ("eval.batch_size = 6 sequences do not divide",),
    "bench run.yaml": ("model.vocab_size: missing", "bench"),
    # where to write
    f"{NEW} run_dir=text.txt": ("run_dir=text.txt", "is a file"),
    f"{NEW} run_dir=text.txt/below/it": ("run_dir=text.txt/below/it", "text.txt is a file"),
    f"{NEW} data.corpus=text.txt/below": ("data.corpus=", "text.txt is a file"),
    # the tokenizer
    f"{NEW} data.tokenizer=bytes model.vocab_size=300": ("model.vocab_size=300", "260 tokens"),
    f"{NEW} data.tokenizer=nowhere.model": ("data.tokenizer: 'nowhere.model'",),
    f"{NEW} data.tokenizer=character": ("data.tokenizer: 'character'", "did you mean 'characters'?"),
    f"{NEW} data.tokenizer=garbage.model": ("garbage.model", "not a SentencePiece model"),
    f"{NEW} data.tokenizer=garbage.json": ("garbage.json", "not a Hugging Face tokenizer"),
    f"{NEW} data.tokenizer=no_text": ("no_text", "tokenizer.json"),
    f"{BERT} data.tokenizer=no_mask.json": ("no_mask.json", "mask", "model.family=bert"),
    # raw text
    f"{NEW} data.raw=null": ("data.raw: missing", "new/corpus"),
    f"{NEW} data.raw=texd.txt": ("data.raw: 'texd.txt' matches no file", "did you mean 'text.txt'?"),
    f"{NEW} 'data.raw=[text.txt, x/*.txt]'": ("data.raw: 'x/*.txt' matches no file",),
    f"{NEW} data.raw=no_text": ("data.raw: no text file in 'no_text'",),
    f"{NEW} data.raw=python://stdlip": ("data.raw: 'python://stdlip'", "did you mean 'python://stdlib'?"),
    f"{NEW} data.encoding=latn-1": ("data.encoding=latn-1", "did you mean 'latin-1'?"),
    f"{NEW} data.raw=page.pdf": ("page.pdf: a PDF document", "pdftotext"),
    f"{NEW} data.raw=train-v1.1.json": ("train-v1.1.json: SQuAD JSON", "jq"),
    f"{NEW} data.raw=latin.txt": ("latin.txt", "not utf-8", "data.encoding=cp1252"),
    f"{NEW} data.raw=/dev/zero": ("data.raw: /dev/zero is a device", "a pipe"),
    f"{NEW} data.text_field=review": ("data.text_field=review", "text.txt is plain text"),
    f"{NEW} data.validation=nowhere.txt": ("data.validation: 'nowhere.txt' matches no file",),
    f"{NEW} data.cleaning.scripts=[latn]": ("data.cleaning.scripts", "did you mean 'latin'?"),
    # corpora
    f"{NEW} data.corpus=nowhere data.raw=null": ("nowhere", "no prepared corpus"),
    f"{NEW} data.corpus=no_text": ("no_text: exists and is not a corpus",),
    f"{NEW} data.corpus=no_manifest data.raw=null": ("no_manifest",),
    f"{NEW} data.corpus=damaged": ("damaged/train-00000.tokens.npy", "bytes, expected"),
    f"{NEW} data.corpus=run/corpus data.document=file": ("data.document", '"file"', '"line"', "run/corpus"),
    f"{NEW} data.corpus=bytes data.raw=null model.vocab_size=99": ("model.vocab_size=99", "260 tokens"),
    f"{NEW} data.corpus=run/corpus data.raw=null model.family=bert": ("run/corpus", "no cls, sep, mask token"),
    f"{NEW} 'data.corpus={{bytes: 1, run/corpus: 2}}' data.raw=null": ("data.corpus", "different tokenizers"),
    f"{NEW} 'data.corpus={{bytes: 1, nowhere: 2}}' data.raw=null": ("nowhere: not a corpus",),
    f"{NEW} data.corpus=run/corpus model.max_length=8192 data.sequence_length=8192": ("data.sequence_length=8,192", "run/corpus"),
    f"{NEW} data.corpus=run/corpus generate.prompts=[Zoë]": ("generate.prompts: 'Zoë'", "'Z'"),
    # going on with a run
    "train run train.steps=3 model.num_layers=2": ("model.num_layers=2", "run/checkpoints", "made with 1"),
    "train run train.steps=3 seed=5": ("seed=5", "run/checkpoints"),
    "train run train.steps=3 data.global_batch_size=16": ("data.global_batch_size=16", "made with 8"),
    "train run train.steps=3 optimizer.name=sgd": ("optimizer.name=sgd", "made with adamw"),
    "train run train.steps=3 data.corpus=none_held_out data.raw=null": ("data.corpus", "run/checkpoints"),
    "train run train.steps=1": ("train.steps=1", "run/checkpoints", "2 steps"),
    # with a run
    "report nowhere": ("nowhere: expected the directory of a run",),
    "report run no_text": ("no_text: expected the directory of a run", "config.yaml"),
    "evaluate nowhere": ("nowhere: no such run file or run directory",),
    "evaluate run.yaml run_dir=nowhere": ("nowhere: no checkpoints folder",),
    "evaluate stopped_early": ("stopped_early/checkpoints: no complete checkpoint",),
    "evaluate run checkpoint.step=77": ("checkpoint.step=77", "there are 2"),
    "evaluate run model.hidden_size=32": ("model.hidden_size=32", "made with 16"),
    "evaluate run data.corpus=bytes data.raw=null model.vocab_size=null": ("model.vocab_size=260",),
    "evaluate run data.corpus=none_held_out data.raw=null": ("data.validation", "no validation text"),
    "generate run.yaml run_dir=nowhere": ("nowhere: no checkpoints folder",),
    "evaluate torn": ("torn/checkpoints/", "damaged"),
    "train torn train.steps=50": ("torn/checkpoints/", "damaged"),
    "generate run checkpoint.step=1": ("checkpoint.step=1",),
    "generate run model.family=bert data.raw=null": ("model.family=bert", "only models of task.name=causal_lm"),
    "generate run generate.prompts=[été]": ("generate.prompts: 'été'", "'é'", "position 0"),
    f"generate run generate.prompts=[{'the' * 11}]": ("generate.prompts: 'thethe", "33 tokens", "model.max_length=32"),
    "generate run generate.top_p=0": ("generate.top_p=0",),
    "generate run mesh.data=8": ("mesh.data=8 does not make 1 device(s)",),
}


@pytest.mark.parametrize("command", AT_ONCE)
def test_bad_input_is_refused_in_one_line(refuse, command):
    [line] = refuse(command)
    assert line.startswith("jaxlm: ")
    for word in AT_ONCE[command]:
        assert word in line


# ---------------------------------------------------------------------------------------- only the text itself shows it

READING = {
    f"{NEW} data.raw=truncated.txt.gz": ("truncated.txt.gz: truncated or not valid gzip",),
    f"{NEW} data.raw=plain.txt.gz": ("plain.txt.gz: truncated or not valid gzip",),
    f"{NEW} data.raw=binary.txt": ("binary.txt: byte 4 is zero", "UTF-8"),
    f"{NEW} data.raw=bad.jsonl": ("bad.jsonl, line 2: not a JSON object",),
    f"{NEW} data.raw=other_field.jsonl": ("other_field.jsonl, line 1: no field 'text'", "txt"),
    f"{NEW} data.raw=number.jsonl": ("number.jsonl, line 3: field 'text'", "int, expected a string"),
    f"{NEW} data.raw=table.parquet": ("table.parquet: not a valid Parquet file",),
    f"{NEW} data.raw=blank.txt": ("data.raw: no document is left", "empty"),
    f"{NEW} data.raw=reviews.csv": ("reviews.csv: no column 'text' (data.text_field)", "id, review"),
    f"{NEW} data.raw=reviews.csv data.text_field=review": ("data.document=line", "reviews.csv is CSV"),
    f"{NEW} data.cleaning.max_bytes=10": ("data.cleaning.max_bytes=10", "80 documents", "the largest has 28 bytes"),
    f"{NEW} data.cleaning.min_characters=1000": ("data.raw: no document is left", "data.cleaning"),
    f"{NEW} data.document=file data.validation_split=documents": ("data.validation", "data.validation_split=tail"),
    f"{NEW} data.tokenizer=bpe model.vocab_size=5000": ("model.vocab_size: 5000", "at most"),
    f"{NEW} data.tokenizer=wordpiece model.vocab_size=10": ("model.vocab_size: 10", "at least"),
    f"{NEW} model.vocab_size=99": ("model.vocab_size=99", "tokens"),
    f"{NEW} data.raw=short.txt data.validation=0": ("data.sequence_length=16", "train split"),
    f"{NEW} generate.prompts=[Zoë]": ("generate.prompts: 'Zoë'", "'Z'"),
    f"{BERT} model.next_sentence=true data.document=file data.validation=0": ("model.next_sentence=true", "at least 2 documents"),
    "prepare run.yaml run_dir=new data.raw=bad.jsonl": ("bad.jsonl, line 2",),
}


@pytest.mark.parametrize("command", READING)
def test_bad_text_is_refused_and_what_was_prepared_is_removed(refuse, command):
    *progress, line = refuse(command)
    assert line.startswith("jaxlm: ")
    assert not any("jaxlm: " in other or "Traceback" in other for other in progress)
    for word in READING[command]:
        assert word in line


# ----------------------------------------------------------------------------------------------- processes of their own

@pytest.mark.parametrize(("command", "words"), [
    (f"{NEW} data.globl_batch_size=1", ["data.globl_batch_size", "data.global_batch_size"]),
    (f"{NEW} devices.platform=gpu devices.count=4", ["devices.platform=gpu: no such backend here", "jaxlm[cuda]"]),
    (f"{NEW} devices.platform=tpu", ["devices.platform=tpu: no TPU here", "jaxlm[tpu]"]),
])
def test_a_process_of_its_own_says_no_more(house, command, words):
    before = tree(house)
    done = subprocess.run([sys.executable, "-m", "jaxlm", *shlex.split(command)], cwd=house, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("jaxlm: ") and all(word in line for word in words)
    assert tree(house) == before


def test_the_programs_own_failure_is_no_bad_input(house, monkeypatch):
    monkeypatch.chdir(house)

    def fail(*_):
        """bench: fail"""
        raise RuntimeError("out of memory")

    monkeypatch.setitem(cli.VERBS, "bench", fail)
    with pytest.raises(RuntimeError):  # Python prints the traceback and ends with code 1
        cli.main(["bench", "run.yaml"])


def test_an_interruption_says_how_to_go_on(house, monkeypatch, capsys):
    monkeypatch.chdir(house)

    def interrupt(*_):
        """train: be interrupted"""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "train", interrupt)
    assert cli.main(["train", "run.yaml"]) == 130
    assert capsys.readouterr().err == "jaxlm: interrupted; the same command goes on where it was stopped\n"


def test_a_finished_run_says_so_and_stays(refuse, house, capfd):
    before = tree(house / "run")
    assert cli.main(["train", "run"]) == 0
    captured = capfd.readouterr()
    assert "run: finished, all 2 steps are done; raise train.steps to go on" in captured.err
    assert tree(house / "run") == before
    assert json.loads((house / "run" / "summary.json").read_text())["steps"] == 2
