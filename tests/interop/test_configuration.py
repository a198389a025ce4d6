"""config.json of transformers 4 and 5: what it becomes, what is refused, and that what is written says the same."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.interop.configuration import decisive, find_family, read_configuration, write_fields
from jaxlm.interop.families import FAMILIES
from jaxlm.presets import PRESETS
from jaxlm.settings import ModelSettings

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "huggingface").iterdir())


def read(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    return read_configuration(folder)


# As they are on the hub, fields without effect left away: written by transformers 2 to 4.
GPT2 = {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256,
        "embd_pdrop": 0.1, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True}}}
BERT = {"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
        "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522}
ROBERTA = BERT | {"architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "layer_norm_eps": 1e-05, "pad_token_id": 1,
                  "max_position_embeddings": 514, "type_vocab_size": 1, "vocab_size": 50265}
DISTILBERT = {"activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
              "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512,
              "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
              "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522}
MODERNBERT = {"architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "classifier_pooling": "mean",
              "decoder_bias": True, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "hidden_activation": "gelu",
              "hidden_size": 768, "intermediate_size": 1152, "local_attention": 128, "local_rope_theta": 10000.0,
              "max_position_embeddings": 8192, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05,
              "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute",
              "vocab_size": 50368}
LLAMA = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64, "hidden_act": "silu",
         "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
         "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
         "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                          "original_max_position_embeddings": 8192}}
MISTRAL = {"architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
           "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
           "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
           "tie_word_embeddings": False, "vocab_size": 32000}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
         "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
         "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
         "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "head_dim": 128,
                 "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 28, "max_window_layers": 28,
                 "sliding_window": None, "attention_bias": False, "rope_scaling": None, "intermediate_size": 3072}


@pytest.mark.parametrize(("content", "heads", "model"), [
    (GPT2, ("next_token",), ModelSettings(vocab_size=50257)),
    (BERT, ("masked_token",), ModelSettings(family="bert", vocab_size=30522, max_length=512)),
    (ROBERTA, ("masked_token",), ModelSettings(family="roberta", vocab_size=50265, max_length=512)),
    (DISTILBERT, ("masked_token",), ModelSettings(family="distilbert", num_layers=6, vocab_size=30522, max_length=512)),
    (MODERNBERT, ("masked_token",), ModelSettings(
        family="modernbert", num_layers=22, intermediate_size=1152, vocab_size=50368, max_length=8192, pooling="mean")),
    (LLAMA, ("next_token",), ModelSettings(
        family="llama", num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, intermediate_size=8192, vocab_size=128256,
        max_length=131072, rope_theta=5e5, tied_embeddings=True, rope_scaling={
            "type": "llama3", "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_length": 8192})),
    (MISTRAL, ("next_token",), ModelSettings(
        family="mistral", num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, intermediate_size=14336,
        vocab_size=32000, max_length=32768)),
    (MISTRAL | {"sliding_window": None}, ("next_token",), ModelSettings(
        family="mistral", num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, intermediate_size=14336,
        vocab_size=32000, max_length=32768, global_every=1)),
    (QWEN2, ("next_token",), ModelSettings(
        family="qwen2", num_layers=24, hidden_size=896, num_heads=14, num_kv_heads=2, intermediate_size=4864, vocab_size=151936,
        max_length=32768, tied_embeddings=True)),
    (QWEN3, ("next_token",), ModelSettings(
        family="qwen3", num_layers=28, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=3072,
        vocab_size=151936, max_length=32768, tied_embeddings=True)),
], ids=lambda value: value.get("model_type") if isinstance(value, dict) else "")
def test_files_of_the_hub(tmp_path, content, heads, model):
    foreign = read(tmp_path, content)
    assert foreign.heads == heads and decisive(foreign.model) == decisive(model)
    assert foreign.model.family == model.family


def test_transformers_5_writes_rope_in_one_field(tmp_path):
    old = read(tmp_path, LLAMA).model
    new = {name: value for name, value in LLAMA.items() if not name.startswith("rope_")}
    new["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
    assert read(tmp_path, new).model == old
    two = {name: value for name, value in MODERNBERT.items() if "theta" not in name and "every" not in name}
    two |= {"rope_parameters": {"full_attention": {"rope_theta": 80000.0, "rope_type": "default"},
                                "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"}},
            "layer_types": ["sliding_attention" if layer % 3 else "full_attention" for layer in range(22)]}
    model = read(tmp_path, two).model
    assert (model.rope_theta, model.local_rope_theta, model.global_every) == (80000.0, 5000.0, 3)


def test_missing_fields_mean_what_they_mean_in_transformers(tmp_path):
    model = read(tmp_path, {"model_type": "mistral"}).model
    assert (model.num_kv_heads, model.intermediate_size, model.attention_window, model.tied_embeddings) == (8, 14336, 4096, False)
    assert read(tmp_path, {"model_type": "llama"}).model.norm_epsilon == 1e-6
    assert read(tmp_path, {"model_type": "bert"}).model.tied_embeddings
    assert read(tmp_path, {"architectures": ["BertForMaskedLM"], "vocab_size": 99}).model.family == "bert"  # before model_type


def test_labels(tmp_path):
    kind = {"architectures": ["BertForSequenceClassification"]}
    foreign = read(tmp_path, BERT | kind | {"id2label": {"1": "good", "0": "bad"}})
    assert (foreign.heads, foreign.labels, foreign.problem) == (("classification",), ("bad", "good"), None)
    assert read(tmp_path, BERT | kind).labels == ("LABEL_0", "LABEL_1")
    foreign = read(tmp_path, BERT | kind | {"id2label": {"0": "LABEL_0"}})
    assert (foreign.heads, foreign.problem) == (("regression",), "regression")
    foreign = read(tmp_path, BERT | kind | {"problem_type": "multi_label_classification"})
    assert (foreign.heads, foreign.problem) == (("classification",), "multi_label")


def test_what_is_not_taken_over_is_said(tmp_path):
    assert read(tmp_path, GPT2 | {"embd_pdrop": 0.3}).notes == (
        "embd_pdrop=0.3 is not taken over: model.dropout=0.1 is for every place",)
    assert read(tmp_path, GPT2).notes == ()


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_what_is_written_says_the_same(folder, tmp_path):
    foreign = read_configuration(folder)
    family = find_family(foreign.model, foreign.heads)
    content = write_fields(foreign.family, foreign.model, foreign.pad_token)
    again = read(tmp_path, content).model
    assert family.preset == foreign.family.preset
    assert decisive(again) == decisive(foreign.model)
    for key in ("dropout", "attention_dropout", "initializer_range"):
        assert getattr(again, key) == getattr(foreign.model, key)
    scaling = content.get("rope_scaling") or {}
    assert isinstance(scaling.get("original_max_position_embeddings", 0), int)  # transformers 4 complains of 16.0


def test_a_family_is_found_by_what_the_model_is_not_by_its_name():
    """Llama was spelled out with family=gpt before there were presets."""
    model = ModelSettings(family="gpt", vocab_size=99, positions="rope", normalization="rmsnorm", bias=False, activation="swiglu",
                          tied_embeddings=False)
    assert find_family(model, ("next_token",)).model_type == "llama"
    assert find_family(dataclasses.replace(model, qk_norm=True), ("next_token",)).model_type == "qwen3"
    assert find_family(dataclasses.replace(model, query_key_value_bias=True), ("next_token",)).model_type == "qwen2"
    assert find_family(dataclasses.replace(model, attention_window=16), ("next_token",)).model_type == "mistral"


@pytest.mark.parametrize(("changes", "message"), [
    ({"logit_soft_cap": 30.0}, "model.logit_soft_cap=30.0"), ({"num_experts": 4}, "model.num_experts=4"),
    ({"qk_norm": True}, "model.qk_norm=True"), ({"norm_position": "post"}, "model.norm_position='post'"),
    ({"family": "lstm"}, "model.family=lstm"),
])
def test_a_model_that_transformers_has_not(changes, message):
    with pytest.raises(UserError) as error:
        find_family(ModelSettings(vocab_size=99, **changes), ("next_token",))
    assert message in str(error.value) and "no family of transformers" in str(error.value)


def test_every_preset_goes_out():
    for name, preset in PRESETS.items():
        if name in {family.preset for family in FAMILIES.values()}:
            heads = ("next_token",) if preset["causal"] else ("masked_token",)
            model = ModelSettings(family=name, vocab_size=99, hidden_size=32, num_heads=4, num_layers=4, max_length=64)
            assert find_family(model, heads).preset == name


@pytest.mark.parametrize(("content", "message"), [
    ({"model_type": "t5"}, "model_type='t5': not supported; expected one of gpt2, llama,"),
    ({"model_type": "bertt"}, "did you mean 'bert'?"),
    ({"model_type": ["bert"]}, "model_type=['bert']"), ({}, "model_type is missing"),
    ({"model_type": "modernbert-decoder"}, "model_type='modernbert-decoder'"),
    (BERT | {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    (BERT | {"hidden_act": "silu"}, "hidden_act='silu': not supported for bert; expected one of gelu,"),
    (BERT | {"hidden_act": ["gelu"]}, "hidden_act=['gelu']"),
    (ROBERTA | {"hidden_act": "relu"}, "hidden_act='relu': not supported for roberta; expected 'gelu'"),
    (BERT | {"is_decoder": True}, "is_decoder=True"), (BERT | {"add_cross_attention": True}, "add_cross_attention=True"),
    (BERT | {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    (BERT | {"auto_map": {"AutoModel": "modeling.Mine"}}, "auto_map={'AutoModel': 'modeling.Mine'}: a model with code"),
    (BERT | {"architectures": ["BertForQuestionAnswering"]}, "architectures=['BertForQuestionAnswering']: not supported"),
    (BERT | {"architectures": "BertModel"}, "architectures='BertModel': expected a list"),
    (BERT | {"hidden_size": "768"}, "hidden_size='768': expected a whole number"),
    (BERT | {"hidden_size": True}, "hidden_size=True"), (BERT | {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    (BERT | {"vocab_size": 2**40}, "vocab_size=109951162777"), (BERT | {"num_attention_heads": 7}, "num_attention_heads=7: does"),
    (BERT | {"layer_norm_eps": "small"}, "layer_norm_eps='small'"), (BERT | {"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
    (BERT | {"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]}"),
    (ROBERTA | {"max_position_embeddings": 2}, "max_position_embeddings=2: expected more than the 2"),
    (DISTILBERT | {"sinusoidal_pos_embds": True}, "sinusoidal_pos_embds=True"),
    (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights=False"), (GPT2 | {"activation_function": "mish"}, "'mish'"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn': not supported"),
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type='dynamic'"),
    (LLAMA | {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type='longrope'"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor=None: expected a number"),
    (LLAMA | {"rope_scaling": "linear"}, "rope_scaling='linear': expected a mapping"),
    (LLAMA | {"rope_theta": -1}, "rope_theta=-1: expected a number above 0"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (LLAMA | {"attention_bias": True}, "biases in some linear layers of a block and not in others"),
    (LLAMA | {"mlp_bias": True}, "mlp_bias=True"), (LLAMA | {"hidden_act": "relu"}, "hidden_act='relu': not supported for llama"),
    (LLAMA | {"num_key_value_heads": 5}, "num_key_value_heads=5: does not divide num_attention_heads=32"),
    (QWEN3 | {"attention_bias": True}, "attention_bias=True: not supported for qwen3"),
    (QWEN2 | {"use_sliding_window": True, "sliding_window": 1024}, "max_window_layers: global layers at [0, 1, 2"),
    (QWEN2 | {"layer_types": ["linear_attention"] * 24}, "layer_types="),
    (MODERNBERT | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=['full_attention', "),
    (MODERNBERT | {"layer_types": (["sliding_attention"] * 21) + ["full_attention"]}, "layer_types: global layers at [21]"),
    (MODERNBERT | {"classifier_pooling": "max"}, "classifier_pooling='max': not supported for modernbert"),
    (MODERNBERT | {"decoder_bias": False}, "decoder_bias=False"), (MODERNBERT | {"attention_bias": True}, "attention_bias=True"),
    (BERT | {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "2": "b"}}, "id2label="),
    (BERT | {"architectures": ["BertForSequenceClassification"], "problem_type": "ranking"}, "problem_type='ranking'"),
])
def test_what_is_not_supported_is_named_by_its_field(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert message in str(error.value) and str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not JSON"), ("[]", "expected a JSON object"), ('{"model_type": "bert", "model_type": "gpt2"}', "is there twice"),
    ("[" * 100_000, "not JSON"), ('{"vocab_size": ' + "9" * 5000 + "}", "not JSON")])
def test_a_file_that_is_no_json(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_configuration(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
