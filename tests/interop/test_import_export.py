"""`jaxlm import` and `jaxlm export`, as a user types them: the same weights, bit by bit, out and in again."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import cli
from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.interop import exporting
from jaxlm.interop.configuration import decisive, read_configuration
from jaxlm.interop.safetensors import open_weights
from jaxlm.runtime import processes

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import import_export as benchmark  # noqa: E402
from check_exports import compare, with_tokenizer  # noqa: E402

FOLDERS = sorted((GOLDEN / "huggingface").iterdir())
EIGHT = ["devices.count=8", "mesh.fsdp=2", "mesh.tensor=2", "mesh.stage=2", "train.gradient_accumulation=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current directory, where JAX's devices are already there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "initialize", lambda settings: jax.devices()[: settings.count or 1])
    return tmp_path


def run(*words):
    """The verb's exit code."""
    return cli.main(list(map(str, words)))


def given(name):
    return with_tokenizer(GOLDEN / "huggingface" / name, Path("given"))


def numbers(folder):
    found = {}
    for name, tensor in open_weights(Path(folder)).items():
        found[name] = np.empty(tensor.matrix, np.float32)
        tensor.read(found[name], (0, tensor.matrix[0]), (0, tensor.matrix[1]))
    return found


def assert_same_weights(export, original):
    got, want = numbers(export), numbers(original)
    skipped = {name: want[name][2:] for name in want if "roberta.embeddings.position" in name}  # never read
    for name, array in (want | skipped).items():
        if name.endswith(".bias"):
            array = want.get(name.replace(".bias", ".decoder.bias"), array)  # of an untied head, which reads only that one
        np.testing.assert_array_equal(got[name][-len(array):], array, err_msg=name)
    assert got.keys() == want.keys()


EVERY_DAY = {"gpt2": [], "bert": EIGHT, "modernbert": EIGHT}
CASES = [pytest.param(folder.name, EVERY_DAY.get(folder.name, []), id=folder.name,
                      marks=[] if folder.name in EVERY_DAY else pytest.mark.slow)
         for folder in FOLDERS if folder.name != "bert_bare"]  # which has no head


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_folder_comes_out_as_it_went_in(name, mesh, capsys):
    original = given(name)
    assert run("import", original, "run_dir=run", *mesh) == 0, capsys.readouterr().err
    assert run("export", "run", "out=out", "max_shard=10k", *(mesh if len(name) % 2 else [])) == 0, capsys.readouterr().err
    told = capsys.readouterr()
    assert "read back: logits of 8 rows differ by at most 0" in told.err + told.out
    assert len(list(Path("out").glob("*.safetensors"))) > 1
    assert_same_weights("out", original)
    was, now = read_configuration(original), read_configuration(Path("out"))
    assert decisive(was.model) == decisive(now.model) and (was.heads, was.labels) == (now.heads, now.labels)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((original / file).read_text()) == json.loads(Path("out", file).read_text())


def test_transformers_loads_an_export_and_says_the_same():
    """With torch and transformers installed; without them tests/golden/check_exports.py does it in two environments."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for folder in FOLDERS:
        if folder.name != "bert_bare":
            original = with_tokenizer(folder, Path("given") / folder.name)
            assert run("import", original, f"run_dir=runs/{folder.name}") == 0
            assert run("export", f"runs/{folder.name}", f"out=out/{folder.name}") == 0
            assert compare(Path("out") / folder.name, folder) == []


def test_old_files_are_read(capsys):
    """Without the prefix, with gamma and beta, with buffers and copies of tied weights, as before 2020; from inside of
    torch's wrappers."""
    original = given("bert")
    plain = numbers(original)

    def old(name):
        name = name.removeprefix("bert.").replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        return f"module._orig_mod.{name}" if "layer.1" in name else name

    table = plain["bert.embeddings.word_embeddings.weight"]
    shapes = {name: tensor.shape for name, tensor in open_weights(original).items()}
    arrays = {old(name): array.reshape(shapes[name]) for name, array in plain.items()}
    arrays |= {"cls.predictions.decoder.weight": table, "cls.predictions.decoder.bias": plain["cls.predictions.bias"].ravel(),
               "embeddings.position_ids": np.zeros((1, 24), np.float32)}
    save(original, arrays)
    assert run("import", original, "run_dir=run") == 0, capsys.readouterr().err
    assert "'embeddings.position_ids' not taken over" in capsys.readouterr().err
    assert run("export", "run", "out=out") == 0
    assert_same_weights("out", GOLDEN / "huggingface" / "bert")
    arrays["cls.predictions.decoder.weight"] = table + 1
    save(original, arrays)
    assert run("import", original, "run_dir=other") == 2
    error = capsys.readouterr().err
    assert "weight 'cls.predictions.decoder.weight' differs from 'embeddings.word_embeddings.weight'" in error
    assert not Path("other").exists()


def test_training_begins_with_a_folder_or_with_an_imported_run(capsys):
    """init=: the same first loss; an imported run itself stays as it is."""
    original = given("gpt2")
    Path("text.txt").write_text("\n".join(f"w{number % 50 + 6} w{number % 7 + 9} w8" for number in range(400)))
    assert run("import", original, "run_dir=run") == 0
    keys = ["data.raw=text.txt", "data.document=line", "data.sequence_length=16", "train.steps=1", "logging.tensorboard=false"]
    losses = []
    for init in ("given", "run"):
        Path("train.yaml").write_text(f"init: {init}\nrun_dir: from_{init}\n")
        capsys.readouterr()
        assert run("train", "train.yaml", *keys) == 0, capsys.readouterr().err
        told = capsys.readouterr()
        assert "weights from" in told.err + told.out
        losses.append(json.loads(Path(f"from_{init}", "summary.json").read_text())["loss"])
    assert losses[0] == losses[1]
    assert run("train", "run", *keys) == 2
    assert "begin another run with init=run" in capsys.readouterr().err
    assert sorted(path.name for path in Path("run").iterdir()) == ["checkpoints", "config.yaml", "tokenizer"]


def test_a_pooler_without_its_head_is_taken(capsys):
    """Of a bare BertModel; a classifier begins with it, as in transformers."""
    Path("train.tsv").write_text("text\tlabel\n" + "\n".join(f"w{number % 50 + 6} w9\t{number % 2}" for number in range(60)))
    given("bert_bare")
    Path("train.yaml").write_text("init: given\nrun_dir: run\ntask: {name: text_classification}\n")
    assert run("train", "train.yaml", "data.raw=train.tsv", "data.sequence_length=16", "train.steps=1",
               "logging.tensorboard=false") == 0, capsys.readouterr().err
    told = capsys.readouterr()
    said = told.err + told.out
    assert "heads.classification.pooler.kernel from heads.next_sentence.pooler.kernel" in said
    assert "init: heads.classification.classifier: fresh" in said
    assert run("export", "run", "out=out") == 0
    content = json.loads(Path("out/config.json").read_text())
    assert content["architectures"] == ["BertForSequenceClassification"] and content["id2label"] == {"0": "0", "1": "1"}


def test_half_precision_is_said_and_widened(capsys):
    original = given("gpt2")
    plain = numbers(original)
    shapes = {name: tensor.shape for name, tensor in open_weights(original).items()}
    halves = {name: (array.view(np.uint32) >> 16).astype(np.uint16).reshape(shapes[name]) for name, array in plain.items()}
    save(original, halves, "BF16")
    assert run("import", original, "run_dir=run") == 0
    assert "BF16: held as float32 from here on" in capsys.readouterr().err
    assert run("export", "run", "out=out") == 0
    for name, array in numbers("out").items():
        np.testing.assert_array_equal(array.ravel(), (halves[name].astype(np.uint32) << 16).view(np.float32).ravel())


def test_what_is_no_number_is_said(capsys):
    original = given("gpt2")
    shapes = {name: tensor.shape for name, tensor in open_weights(original).items()}
    arrays = {name: array.reshape(shapes[name]) for name, array in numbers(original).items()}
    arrays["transformer.h.1.ln_1.bias"][3] = np.nan
    save(original, arrays)
    assert run("import", original, "run_dir=run") == 0
    assert "WARNING: 'blocks.attention_norm.bias': NaN or infinite" in capsys.readouterr().err


def test_an_imported_classifier_predicts(capsys):
    assert run("import", given("bert_classes"), "run_dir=run") == 0
    Path("texts.tsv").write_text("text\nw7 w8\nw30 w31 w32\n")
    assert run("predict", "run", "data.raw=texts.tsv") == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["probabilities"].keys() == {"LABEL_0", "LABEL_1", "LABEL_2"}


@pytest.mark.slow
def test_two_processes_read_and_write_their_parts(tmp_path):
    """On a mesh that cuts rows, columns and layers of what lies in the files."""
    original = given("bert")
    mesh = ["devices.platform=cpu", "devices.count=4", "mesh.fsdp=2", "mesh.tensor=2", "mesh.stage=2",
            "train.gradient_accumulation=2"]
    for words in (["import", str(original), "run_dir=run"], ["export", "run", "out=out", "max_shard=10k"]):
        command = [sys.executable, "-m", "jaxlm", *words, *mesh, "--processes", "2"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "read back: logits of 8 rows differ by at most 0" in done.stderr + done.stdout
    assert_same_weights("out", original)


@pytest.mark.slow
def test_an_import_holds_its_shards_and_little_else(tmp_path):
    """Of half a GiB: the resident set grows by the weights and a block, not by a second copy."""
    size, largest = benchmark.make_folder(tmp_path / "big", 1024, 10, 2816)
    benchmark.make_folder(tmp_path / "small", 64, 2, 128)
    peaks = {}
    for model in ("small", "big"):
        words = ["import", str(tmp_path / model), f"run_dir={tmp_path / model}-run", "devices.platform=cpu", "devices.count=8",
                 "mesh.fsdp=2", "mesh.tensor=4"]
        _, peaks[model] = benchmark.run(words, tmp_path / "peak")
    assert peaks["big"] - peaks["small"] < 1.1 * size + largest


def test_a_model_without_a_head_gets_a_fresh_one(capsys):
    assert run("import", given("bert_bare"), "run_dir=run", "seed=3") == 0
    told = capsys.readouterr().err
    assert "fresh (seed 3): 'heads.masked_token.bias' and 4 more; the folder has none" in told
    assert "'bert.pooler.dense.bias' and 1 more left out" in told


def test_a_wider_checkpoint_than_its_class_says(capsys):
    """bert-base-uncased is BertForMaskedLM by its config.json, and has the head for next sentences."""
    original = given("bert")
    content = json.loads((original / "config.json").read_text())
    for classes in (["BertForMaskedLM"], None):
        (original / "config.json").write_text(json.dumps(content | {"architectures": classes}))
        run_dir = f"run_{bool(classes)}"
        assert run("import", original, f"run_dir={run_dir}") == 0, capsys.readouterr().err
        with Checkpoints(run_dir) as checkpoints:
            assert checkpoints.metadata(0)["settings"]["model"]["next_sentence"]


def test_an_export_that_computes_something_else_is_taken_back(capsys, monkeypatch):
    assert run("import", given("gpt2"), "run_dir=run") == 0
    written = exporting.write_parameters

    def broken(wanted, params, shards, *rest):
        written(wanted, params, shards, *rest)
        shards.write("transformer.h.1.mlp.c_fc.weight", np.full((1, 4), 3, np.float32), 2, 8)

    monkeypatch.setattr(exporting, "write_parameters", broken)
    assert run("export", "run", "out=out") == 1
    assert "read back, it computes other logits" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["given", "run"]


def save(folder, arrays, dtype="F32"):
    """model.safetensors, by the description of the format alone."""
    header, body = {}, b""
    for name, array in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes]}
        body += np.ascontiguousarray(array).tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


# ---- bad input -------------------------------------------------------------------------------------------------------

def changed(name, **fields):
    """config.json with these fields; None removes one."""
    def change(folder):
        content = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def without(*names):
    def change(folder):
        tensors = {name: (array, open_weights(folder)[name].shape) for name, array in numbers(folder).items()}
        save(folder, {name: array.reshape(shape) for name, (array, shape) in tensors.items() if name not in names})

    return change


def with_extra(name, shape):
    def change(folder):
        shapes = {known: tensor.shape for known, tensor in open_weights(folder).items()}
        arrays = {known: array.reshape(shapes[known]) for known, array in numbers(folder).items()}
        save(folder, arrays | {name: np.ones(shape, np.float32)})

    return change


def removed(name):
    return lambda folder: (folder / name).unlink()


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(("change", "words", "message"), [
    (removed("config.json"), [], "no config.json"), (removed("model.safetensors"), [], "no model.safetensors"),
    (removed("tokenizer.json"), [], "tokenizer"), (only_pickled, [], "only safetensors are read"), (cut_short, [], "cut short"),
    (changed("config.json", model_type="t5"), [], "model_type='t5': not supported"),
    (changed("config.json", n_layer=3), [], "weight 'transformer.h.2.attn.c_attn.bias' and 11 more: missing"),
    (changed("config.json", n_layer=1), [], "no place for it in a gpt2 of 1 layers"),
    (changed("config.json", vocab_size=62), [], "weight 'transformer.wte.weight' has shape [61, 16]; expected [62, 16]"),
    (changed("config.json", vocab_size=60), [], "vocab_size=60, but the tokenizer has 61 tokens"),
    (changed("config.json", tie_word_embeddings=False), [], "weight 'lm_head.weight': missing"),
    (without("transformer.ln_f.bias"), [], "weight 'transformer.ln_f.bias': missing"),
    (without("transformer.wte.weight"), [], "weight 'transformer.wte.weight': missing"),
    (with_extra("transformer.h.0.attn.q_norm.weight", 4), [], "'transformer.h.0.attn.q_norm.weight': no place for it in a gpt2"),
    (with_extra("lm_head.weight", (61, 16)), [], "'lm_head.weight' differs from 'transformer.wte.weight', and tie_"),
    (with_extra("wte.weight", (61, 16)), [], "weight 'wte.weight' is also there as 'transformer.wte.weight'"),
    (None, ["model.num_layers=3"], "model.num_layers=3:"), (None, ["model.family=bert"], "model."),
    (None, ["model.n_layer=3"], "did you mean 'model.num_layers'?"), (None, ["mesh.tensor=3"], "mesh.tensor=3"),
    (None, ["run_dir=there"], "run_dir=there: a run is there already"), (None, ["run_dir=given/config.json"], "run_dir="),
])
def test_a_folder_that_is_refused_leaves_nothing(change, words, message, capsys):
    original = given("gpt2")
    Path("there").mkdir()
    Path("there/config.yaml").write_text("seed: 1")
    if change:
        change(original)
    assert run("import", original, "run_dir=run", *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("jaxlm: ")
    assert not Path("run").exists() and [path.name for path in Path("there").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(("words", "message"), [
    (["import"], "FOLDER"), (["import", "gpt2", "run_dir=run"], "gpt2: no such folder; a model of the Hugging Face hub"),
    (["import", "run_dir=run"], "import: FOLDER is missing before 'run_dir=run'"),
    (["import", "empty"], "import: run_dir=RUN is missing"),
    (["import", "empty", "run_dir=run"], "empty: expected a folder with config.json"),
    (["export", "empty", "out=out"], "a folder without config.yaml"), (["export", "out=out"], "export: RUN_DIR is missing"),
    (["import", "empty", "run_dir=run", "--json"], "--json is an option of"),
])
def test_words_that_are_refused(words, message, capsys):
    Path("empty").mkdir()
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_an_export_that_is_refused_leaves_nothing(capsys):
    assert run("import", given("gpt2"), "run_dir=run") == 0
    Path("taken").touch()
    for words, message in ((["run"], "export: out=FOLDER is missing"), (["run", "out=taken"], "out=taken: is a file"),
                           (["run", "out=given"], "out=given: has files in it"),
                           (["run", "out=s3://bucket/x"], "of this machine"),
                           (["run", "out=given/config.json/out"], "no folder can be made"),
                           (["run", "out=out", "checkpoint.step=7"], "checkpoint.step=7: not in"),
                           (["run", "out=out", "max_shard=0"], "max_shard=0: expected integer > 0")):
        capsys.readouterr()
        assert run("export", *words) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["given", "run", "taken"]
