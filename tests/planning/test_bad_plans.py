"""Plans that cannot be: one line each, which says what to change."""

import pytest

from jaxlm import cli

SMALL = ["model.num_layers=4", "model.num_heads=12", "model.hidden_size=768", "model.vocab_size=1000",
         "data.global_batch_size=64"]
BAD = [  # target, keys, what the line says
    ("h10:8", [], "did you mean 'h100'?"),
    ("v5p", [], "expected KIND:SHAPE, for example"),
    ("v5p:8x8", [], "a v5p slice has 3 dimensions, for example v5p:4x4x4"),
    ("v6e:4x4x4", [], "a v6e slice has 2 dimensions, for example v6e:8x8"),
    ("v5p-100", [], "use v5p-128"),
    ("v5e-512", [], "use v5e-256"),
    ("2xh100:8", [], "expected h100:GPUs of a node x nodes, for example h100:8x4"),
    ("h100:8x2x2", [], "expected h100:GPUs of a node x nodes"),
    ("cpu:2x2", [], "expected cpu:N"),
    ("v5e:0x4", [], "sizes are positive numbers"),
    ("h100:8", ["mesh.fsdp=16"], "mesh.fsdp=16 does not make 8 device(s); change the mesh"),
    ("h100:8", ["mesh.data=2", "mesh.fsdp=2"], "mesh.data=2 * mesh.fsdp=2 does not make 8 device(s)"),
    ("h100:8", ["mesh.data=-1", "mesh.fsdp=-1"], "only one axis can take the rest"),
    ("h100:8", ["mesh.fsdp=0"], "expected a positive number, or -1"),
    ("h100:8", ["mesh.tensor=8"], "mesh.tensor=8 does not divide model.num_heads=12"),
    ("h100:8x12", ["mesh.fsdp=96", "model.hidden_size=720"], "mesh.fsdp=96 does not divide model.hidden_size=720"),
    ("h100:8", ["mesh.stage=8", "train.gradient_accumulation=8"], "model.num_layers=4 does not divide into mesh.stage"),
    ("h100:8", ["mesh.stage=4"], "train.gradient_accumulation=1: a pipeline of mesh.stage=4 stages takes a multiple"),
    ("h100:8", ["mesh.expert=8"], "mesh.expert=8 needs experts; set model.num_experts"),
    ("h100:8", ["mesh.expert=8", "model.num_experts=12"], "mesh.expert=8 does not divide model.num_experts=12"),
    ("h100:8", ["mesh.context=8", "data.sequence_length=1000"], "use 992"),
    ("h100:8x2", ["mesh.across={data: 3}"], "mesh.across: data=3 does not divide mesh.data=16"),
    ("h100:8", ["data.global_batch_size=9"], "use a multiple of 8, or more of mesh.tensor"),
    ("h100:8", ["train.gradient_accumulation=5"], "data.global_batch_size=64 is not a multiple of train.gradient_accumulation=5"),
    ("h100:8", ["model.num_heads=7"], "model.hidden_size=768 is not a multiple of model.num_heads=7; change one"),
    ("h100:8", ["model.num_kv_heads=5"], "model.num_heads=12 is not a multiple of model.num_kv_heads=5"),
    ("h100:8", ["data.sequence_length=2048"], "is longer than model.max_length=1024"),
    ("h100:8", ["model.attention=splash"], "runs on TPUs, and these devices are gpu; use model.attention=auto"),
    ("v5e:2x4", ["model.attention=cudnn"], "model.attention=cudnn runs on GPUs, and these devices are tpu"),
    ("h100:1", ["model.attention=cudnn", "model.attention_dropout=0", "train.precision=float32"],
     "model.attention=cudnn computes in bfloat16 only, and train.precision=float32; use model.attention=auto"),
    ("h100:8", ["train.gradient_precision=bfloat16"], "coarser than train.precision=float32; set both, or neither"),
    ("h100:8", ["train.remat=ful"], "train.remat"),
]
TOO_LARGE = ["model.num_layers=96", "model.num_heads=96", "model.hidden_size=12288", "model.vocab_size=50257",
             "data.global_batch_size=64", "train.precision=bfloat16", "train.remat=full", "mesh.fsdp=-1"]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    return str(path)


@pytest.mark.parametrize(("target", "keys", "words"), BAD, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_one_line_says_what_to_change(target, keys, words, config_file, capsys):
    assert cli.main(["plan", config_file, "--target", target, "--fast", *SMALL, *keys]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("jaxlm: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(("tokenizer", "size"), [
    ("gpt2/tokenizer.json", "50,257 (GPT-2's"), ("wordpiece", "30,522 (BERT's"), ("bpe", "32,000 (SentencePiece's"),
    ("meta-llama/Llama-3.1-8B", "128,256 (Llama 3's"), ("bytes", "260 (bytes has them")])
def test_a_vocabulary_that_nobody_has_said_is_the_tokenizers_usual_one(tokenizer, size, config_file, capsys):
    """Line 21: planned with it, and said."""
    assert cli.main(["plan", config_file, "--target", "h100:8", "--fast", f"data.tokenizer={tokenizer}"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("jaxlm: model.vocab_size is not said: planned with ") and size in err.splitlines()[0]
    assert size in " ".join(out.split())


def test_a_model_that_is_too_large_is_told_by_how_much_and_what_helps(config_file, capsys):
    assert cli.main(["plan", config_file, "--target", "h100:8", "--fast", *TOO_LARGE]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "DOES NOT FIT, " in out and "what helps: more devices" in out
    assert cli.main(["plan", config_file, "--target", "h100:8", "--search", *TOO_LARGE]) == 2
    assert "nothing fits, the least needs" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "words"), [
    (["train", "--target", "v5e:2x4"], "only with --compile-only"),
    (["train", "--compile-only", "--processes", "2"], "leave --processes away"),
    (["train", "--compile-only", "devices.compiled=null"], "needs a folder on this machine"),
    (["plan", "--target", "h100:8", "--fast", "--picture", "plan.txt"], "expected a name that ends in one of .png, .svg, .pdf"),
    (["plan", "--target", "h100:8", "--fast", "--picture", "/no/such/plan.png"], "there is no folder /no/such"),
    (["plan", "--target", "h100:8", "--explain", "--picture", "plan.png"], "--picture draws one plan"),
    (["plan", "--target", "h100:8", "--explain", "--json"], "leave --json away"),
    (["plan", "--target", "h100:8", "--fast", "--search"], "not allowed with argument"),
    (["plan", "--fast"], "--target"),
])
def test_options_that_do_not_go_together(arguments, words, config_file, capsys):
    verb, *rest = arguments
    assert cli.main([verb, config_file, *rest]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and words in err
