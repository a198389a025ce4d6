"""The mapping against transformers' own results: a forward pass in plain NumPy, from the mapped parameters, gives
its logits."""

from dataclasses import replace
from math import erf
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.interop.huggingface import from_huggingface
from jaxlm.settings import ModelSettings

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = {"num_layers": 2, "num_heads": 4, "hidden_size": 32}
GPT = ModelSettings(family="gpt", vocab_size=97, max_length=24, **SHAPE)
BERT = ModelSettings(family="bert", vocab_size=101, max_length=20, intermediate_size=64, next_sentence=True, **SHAPE)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return {group: {key.removeprefix(f"{group}/"): value for key, value in arrays.items() if key.startswith(f"{group}/")}
            for group in ("weights", "inputs", "outputs")}


GPT_WEIGHTS, BERT_WEIGHTS = golden("gpt2")["weights"], golden("bert")["weights"]


def normalize(x, parameters, epsilon):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon) * parameters["scale"] + parameters["bias"]


def linear(x, parameters):
    return x @ parameters["kernel"] + parameters["bias"]


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend(x, parameters, allowed):
    """Vaswani et al. 2017, section 3.2; `allowed` [B or 1, T, S]."""
    query, key, value = (np.einsum("btd,dhk->bhtk", x, parameters[name]["kernel"]) + parameters[name]["bias"][:, None]
                         for name in ("query", "key", "value"))
    scores = np.einsum("bhtk,bhsk->bhts", query, key) / np.sqrt(query.shape[-1])
    mixed = softmax(np.where(allowed[:, None], scores, -np.inf)) @ value
    return np.einsum("bhtk,hkd->btd", mixed, parameters["output"]["kernel"]) + parameters["output"]["bias"]


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def layer(blocks, number):
    return {key: layer(value, number) if isinstance(value, dict) else value[number] for key, value in blocks.items()}


def paths(tree, prefix=""):
    for key, value in tree.items():
        yield from paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def gpt_logits(tree, tokens):
    length = tokens.shape[1]
    x = tree["token_embedding"]["embedding"][tokens] + tree["position_embedding"]["embedding"][:length]
    for number in range(2):
        block = layer(tree["blocks"], number)
        x = x + attend(normalize(x, block["attention_norm"], 1e-5), block["attention"], np.tri(length, dtype=bool)[None])
        mlp = linear(gelu_tanh(linear(normalize(x, block["mlp_norm"], 1e-5), block["mlp"]["up"])), block["mlp"]["down"])
        x = x + mlp
    return normalize(x, tree["final_norm"], 1e-5) @ tree["token_embedding"]["embedding"].T


def bert_logits(tree, tokens, mask, types):
    x = tree["token_embedding"]["embedding"][tokens] + tree["position_embedding"]["embedding"][: tokens.shape[1]]
    x = normalize(x + tree["type_embedding"]["embedding"][types], tree["embedding_norm"], 1e-12)
    for number in range(2):
        block = layer(tree["blocks"], number)
        x = normalize(x + attend(x, block["attention"], mask[:, None] > 0), block["attention_norm"], 1e-12)
        mlp = linear(gelu_erf(linear(x, block["mlp"]["up"])), block["mlp"]["down"])
        x = normalize(x + mlp, block["mlp_norm"], 1e-12)
    masked, paired = tree["heads"]["masked_token"], tree["heads"]["next_sentence"]
    transformed = normalize(gelu_erf(linear(x, masked["transform"])), masked["norm"], 1e-12)
    pooled = np.tanh(linear(x[:, 0], paired["pooler"]))
    return transformed @ tree["token_embedding"]["embedding"].T + masked["bias"], linear(pooled, paired["classifier"])


def test_gpt2_logits_by_hand():
    data = golden("gpt2")
    logits = gpt_logits(from_huggingface(data["weights"], GPT), data["inputs"]["input_ids"])
    np.testing.assert_allclose(logits, data["outputs"]["logits"], atol=2e-5)


def test_bert_logits_by_hand():
    data = golden("bert")
    inputs = data["inputs"]
    tree = from_huggingface(data["weights"], BERT)
    masked, next_sentence = bert_logits(tree, inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    np.testing.assert_allclose(masked, data["outputs"]["prediction_logits"], atol=2e-5)
    np.testing.assert_allclose(next_sentence, data["outputs"]["seq_relationship_logits"], atol=2e-5)


@pytest.mark.parametrize(("weights", "model"), [(GPT_WEIGHTS, GPT), (BERT_WEIGHTS, BERT)], ids=["gpt2", "bert"])
def test_every_number_is_carried_over_once(weights, model):
    parameters = dict(paths(from_huggingface(weights, model)))
    assert all(value.dtype == np.float32 for value in parameters.values())
    before, after = (np.sort(np.concatenate([value.ravel() for value in group.values()])) for group in (weights, parameters))
    np.testing.assert_array_equal(before, after)


def test_shapes():
    blocks = {"attention_norm.scale": (32,), "attention_norm.bias": (32,), "mlp_norm.scale": (32,), "mlp_norm.bias": (32,),
              "attention.output.kernel": (4, 8, 32), "attention.output.bias": (32,), "mlp.down.bias": (32,)}
    for name in ("query", "key", "value"):
        blocks |= {f"attention.{name}.kernel": (32, 4, 8), f"attention.{name}.bias": (4, 8)}

    def all_blocks(inner):
        mlp = {"mlp.up.kernel": (32, inner), "mlp.up.bias": (inner,), "mlp.down.kernel": (inner, 32)}
        return {f"blocks.{path}": (2, *shape) for path, shape in (blocks | mlp).items()}

    def shapes(weights, model):
        return {path: value.shape for path, value in paths(from_huggingface(weights, model))}

    gpt = {"token_embedding.embedding": (97, 32), "position_embedding.embedding": (24, 32),
           "final_norm.scale": (32,), "final_norm.bias": (32,)} | all_blocks(128)
    assert shapes(GPT_WEIGHTS, GPT) == gpt
    untied = {**GPT_WEIGHTS, "lm_head.weight": np.ones((97, 32))}
    assert shapes(untied, replace(GPT, tied_embeddings=False)) == gpt | {"heads.next_token.embedding": (97, 32)}
    bert = {"token_embedding.embedding": (101, 32), "position_embedding.embedding": (20, 32), "type_embedding.embedding": (2, 32),
            "embedding_norm.scale": (32,), "embedding_norm.bias": (32,), **{
                f"heads.masked_token.{name}": shape for name, shape in {
                    "transform.kernel": (32, 32), "transform.bias": (32,), "norm.scale": (32,), "norm.bias": (32,),
                    "bias": (101,)}.items()}} | all_blocks(64)
    pair = {f"heads.next_sentence.{name}": shape for name, shape in {
        "pooler.kernel": (32, 32), "pooler.bias": (32,), "classifier.kernel": (32, 2), "classifier.bias": (2,)}.items()}
    assert shapes(BERT_WEIGHTS, BERT) == bert | pair
    assert shapes(BERT_WEIGHTS, replace(BERT, next_sentence=False)) == bert


def same(first, second):
    first, second = dict(paths(first)), dict(paths(second))
    return first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


def test_other_spellings_of_the_same_file():
    def old_name(name):
        return name.removeprefix("bert.").replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")

    old_bert = {old_name(name): value for name, value in BERT_WEIGHTS.items()}
    old_bert |= {"embeddings.position_ids": np.arange(20), "cls.predictions.decoder.bias": old_bert["cls.predictions.bias"],
                 "cls.predictions.decoder.weight": old_bert["embeddings.word_embeddings.weight"]}
    assert same(from_huggingface(old_bert, BERT), from_huggingface(BERT_WEIGHTS, BERT))
    del old_bert["cls.predictions.bias"]  # some files hold it under the decoder only
    assert same(from_huggingface(old_bert, BERT), from_huggingface(BERT_WEIGHTS, BERT))
    old_gpt = {name.removeprefix("transformer."): value for name, value in GPT_WEIGHTS.items()}
    old_gpt |= {"h.0.attn.bias": np.tri(24), "h.0.attn.masked_bias": np.array(-1e4), "lm_head.weight": old_gpt["wte.weight"]}
    assert same(from_huggingface(old_gpt, GPT), from_huggingface(GPT_WEIGHTS, GPT))


def without(weights, *names):
    return {name: value for name, value in weights.items() if name not in names}


@pytest.mark.parametrize(("weights", "model", "message"), [
    (without(GPT_WEIGHTS, "transformer.h.1.ln_2.bias"), GPT, "weight 'h.1.ln_2.bias' is missing"),
    (without(GPT_WEIGHTS, "transformer.wpe.weight", "transformer.wte.weight"), GPT, "'wpe.weight' is missing (and 1 more)"),
    (GPT_WEIGHTS, replace(GPT, num_layers=3), "is missing (and 11 more)"),
    (GPT_WEIGHTS, replace(GPT, num_layers=1), "has no place in a model of 1 layers"),
    (GPT_WEIGHTS, replace(GPT, vocab_size=96), "'wte.weight' has shape (97, 32), expected (96, 32)"),
    (GPT_WEIGHTS, replace(GPT, vocab_size=None), "model.vocab_size"),
    (GPT_WEIGHTS, replace(GPT, positions="rope"), "model.positions=rope: GPT-2 weights from Hugging Face need learned"),
    (GPT_WEIGHTS, replace(GPT, num_kv_heads=2), "model.num_kv_heads=2"),
    (GPT_WEIGHTS, replace(GPT, tied_embeddings=False), "'lm_head.weight' is missing"),
    (GPT_WEIGHTS | {"lm_head.weight": np.zeros((97, 32))}, GPT, "set model.tied_embeddings=false"),
    (GPT_WEIGHTS | {"extra": np.zeros(1)}, GPT, "weight 'extra' has no place"),
    (without(BERT_WEIGHTS, "bert.pooler.dense.bias"), BERT, "'pooler.dense.bias' is missing"),
    (BERT_WEIGHTS, replace(BERT, intermediate_size=128), "'encoder.layer.0.intermediate.dense.weight' has shape (64, 32)"),
    (BERT_WEIGHTS | {"cls.predictions.decoder.bias": np.zeros(101)}, BERT, "'cls.predictions.decoder.bias' differs"),
])
def test_what_does_not_fit_is_named(weights, model, message):
    with pytest.raises(UserError) as error:
        from_huggingface(weights, model)
    assert message in str(error.value) and "\n" not in str(error.value)
