"""Weights of Hugging Face's GPT-2 and BERT as jaxlm parameters.

One table per family says which weight a parameter comes from, what shape that weight has, and how it is laid out
anew: PyTorch's linear layers are (out, in) and are transposed; GPT-2's Conv1D layers are (in, out) and are not;
GPT-2 keeps query, key and value in one matrix.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import UserError, nearest
from jaxlm.models.sizes import intermediate_size
from jaxlm.settings import ModelSettings

Array = np.ndarray


class Weight(NamedTuple):
    """Where a parameter comes from. A `{}` in the name stands for the layer; those parameters are stacked."""

    name: str
    shape: tuple[int, ...]
    convert: Callable[[Array], Array] = lambda weight: weight


def from_huggingface(weights: dict[str, Array], model: ModelSettings) -> dict[str, Any]:
    """The parameters of a jaxlm model as a nested dict of float32 arrays, blocks stacked on a leading layer axis.

    `weights` are those of GPT2LMHeadModel or BertForPreTraining (or BertForMaskedLM without `model.next_sentence`),
    with or without the prefix `transformer.` or `bert.`, and with `gamma`/`beta` for norms as in TensorFlow's files.
    Copies of tied weights may be there; buffers are ignored. Raises UserError for weights that are missing,
    unexpected or of another shape, and for settings that the family has no weights for.
    """
    if model.vocab_size is None:
        raise UserError("model.vocab_size: expected a number before weights can be read")
    weights = {plain_name(name): weight for name, weight in weights.items() if not BUFFERS.search(name)}
    check_settings(model)
    table = gpt2_table(model) if model.causal else bert_table(model)
    drop_copies(weights, model)
    check_names(weights, table, model.num_layers)
    tree: dict[str, Any] = {}
    for path, source in table.items():
        stacked = "{}" in source.name
        layers = [take(weights, source, layer) for layer in range(model.num_layers if stacked else 1)]
        insert(tree, path, np.stack(layers) if stacked else layers[0])
    return tree


def gpt2_table(model: ModelSettings) -> dict[str, Weight]:
    """Parameters of `a GPT-2` from GPT2LMHeadModel."""
    width, heads, vocab = model.hidden_size, model.num_heads, model.vocab_size or 0
    inner, head_dim = intermediate_size(model), width // heads
    table = {
        "token_embedding.embedding": Weight("wte.weight", (vocab, width)),
        "position_embedding.embedding": Weight("wpe.weight", (model.max_length, width)),
        **norm("blocks.attention_norm", "h.{}.ln_1", width),
        "blocks.attention.output.kernel": Weight(
            "h.{}.attn.c_proj.weight", (width, width), lambda weight: weight.reshape(heads, head_dim, width)),
        "blocks.attention.output.bias": Weight("h.{}.attn.c_proj.bias", (width,)),
        **norm("blocks.mlp_norm", "h.{}.ln_2", width),
        "blocks.mlp.up.kernel": Weight("h.{}.mlp.c_fc.weight", (width, inner)),
        "blocks.mlp.up.bias": Weight("h.{}.mlp.c_fc.bias", (inner,)),
        "blocks.mlp.down.kernel": Weight("h.{}.mlp.c_proj.weight", (inner, width)),
        "blocks.mlp.down.bias": Weight("h.{}.mlp.c_proj.bias", (width,)),
        **norm("final_norm", "ln_f", width),
    }
    for part, name in enumerate(("query", "key", "value")):
        table[f"blocks.attention.{name}.kernel"] = Weight(
            "h.{}.attn.c_attn.weight", (width, 3 * width),
            lambda weight, part=part: weight.reshape(width, 3, heads, head_dim)[:, part])
        table[f"blocks.attention.{name}.bias"] = Weight(
            "h.{}.attn.c_attn.bias", (3 * width,), lambda bias, part=part: bias.reshape(3, heads, head_dim)[part])
    if not model.tied_embeddings:
        table["heads.next_token.embedding"] = Weight("lm_head.weight", (vocab, width))
    return table


def bert_table(model: ModelSettings) -> dict[str, Weight]:
    """Parameters of `a BERT` from BertForPreTraining."""
    width, heads, vocab = model.hidden_size, model.num_heads, model.vocab_size or 0
    inner, head_dim = intermediate_size(model), width // heads
    layer = "encoder.layer.{}"
    table = {
        "token_embedding.embedding": Weight("embeddings.word_embeddings.weight", (vocab, width)),
        "position_embedding.embedding": Weight("embeddings.position_embeddings.weight", (model.max_length, width)),
        "type_embedding.embedding": Weight("embeddings.token_type_embeddings.weight", (model.type_vocab_size, width)),
        **norm("embedding_norm", "embeddings.LayerNorm", width),
        "blocks.attention.output.kernel": Weight(
            f"{layer}.attention.output.dense.weight", (width, width), lambda weight: weight.T.reshape(heads, head_dim, width)),
        "blocks.attention.output.bias": Weight(f"{layer}.attention.output.dense.bias", (width,)),
        **norm("blocks.attention_norm", f"{layer}.attention.output.LayerNorm", width),
        **linear("blocks.mlp.up", f"{layer}.intermediate.dense", width, inner),
        **linear("blocks.mlp.down", f"{layer}.output.dense", inner, width),
        **norm("blocks.mlp_norm", f"{layer}.output.LayerNorm", width),
        **linear("heads.masked_token.transform", "cls.predictions.transform.dense", width, width),
        **norm("heads.masked_token.norm", "cls.predictions.transform.LayerNorm", width),
        "heads.masked_token.bias": Weight("cls.predictions.bias", (vocab,)),
    }
    for name in ("query", "key", "value"):
        table[f"blocks.attention.{name}.kernel"] = Weight(
            f"{layer}.attention.self.{name}.weight", (width, width), lambda weight: weight.T.reshape(width, heads, head_dim))
        table[f"blocks.attention.{name}.bias"] = Weight(
            f"{layer}.attention.self.{name}.bias", (width,), lambda bias: bias.reshape(heads, head_dim))
    if model.next_sentence:
        table |= linear("heads.next_sentence.pooler", "pooler.dense", width, width)
        table |= linear("heads.next_sentence.classifier", "cls.seq_relationship", width, 2)
    return table


def norm(path: str, name: str, size: int) -> dict[str, Weight]:
    return {f"{path}.scale": Weight(f"{name}.weight", (size,)), f"{path}.bias": Weight(f"{name}.bias", (size,))}


def linear(path: str, name: str, inputs: int, outputs: int) -> dict[str, Weight]:
    return {f"{path}.kernel": Weight(f"{name}.weight", (outputs, inputs), np.transpose),
            f"{path}.bias": Weight(f"{name}.bias", (outputs,))}


# Causal masks and position numbers, which old files keep among the weights.
BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|embeddings\.(position_ids|token_type_ids))$")


def plain_name(name: str) -> str:
    """The name without the prefix of the base model, and with PyTorch's words for the scale and offset of a norm."""
    name = name.removeprefix("transformer.").removeprefix("bert.")
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def check_settings(model: ModelSettings) -> None:
    """Refuses settings that neither GPT-2 nor BERT has weights for."""
    needed = {"positions": ("learned",), "normalization": ("layernorm",), "bias": (True,), "qk_norm": (False,),
              "num_kv_heads": (None, model.num_heads), "head_dim": (None, model.hidden_size // model.num_heads),
              "activation": ("gelu", "gelu_tanh", "relu")}
    if not model.causal:
        needed["tied_embeddings"] = (True,)
    for key, allowed in needed.items():
        if getattr(model, key) not in allowed:
            choices = " or ".join("null" if value is None else str(value).lower() for value in allowed)
            family = "GPT-2" if model.causal else "BERT"
            raise UserError(f"model.{key}={getattr(model, key)}: {family} weights from Hugging Face need {choices}")


def drop_copies(weights: dict[str, Array], model: ModelSettings) -> None:
    """Removes copies of tied weights (after a look whether they are copies) and the heads that the model does not
    have."""
    if model.causal:
        copies = {"lm_head.weight": "wte.weight"} if model.tied_embeddings else {}
    else:
        copies = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
                  "cls.predictions.decoder.bias": "cls.predictions.bias"}
        if not model.next_sentence:
            for name in ("pooler.dense", "cls.seq_relationship"):
                weights.pop(f"{name}.weight", None)
                weights.pop(f"{name}.bias", None)
    for copy, original in copies.items():
        found = weights.pop(copy, None)
        if found is not None and not np.array_equal(found, weights.setdefault(original, found)):
            raise UserError(f"weight '{copy}' differs from '{original}': expected tied embeddings"
                            + ("; set model.tied_embeddings=false" if model.causal else ""))


def check_names(weights: dict[str, Array], table: dict[str, Weight], num_layers: int) -> None:
    layers = [str(layer) for layer in range(num_layers)]
    expected = {source.name.format(layer) for source in table.values() for layer in layers}
    missing, unexpected = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing:
        raise UserError(f"weight '{missing[0]}' is missing{more(missing)}{nearest(missing[0], unexpected)}")
    if unexpected:
        raise UserError(f"weight '{unexpected[0]}' has no place in a model of {num_layers} layers with these settings"
                        + more(unexpected))


def more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def take(weights: dict[str, Array], source: Weight, layer: int) -> Array:
    name = source.name.format(layer)
    weight = weights[name]
    if weight.shape != source.shape:
        raise UserError(f"weight '{name}' has shape {tuple(weight.shape)}, expected {source.shape} by the model settings")
    return np.array(source.convert(weight), dtype=np.float32)


def insert(tree: dict[str, Any], path: str, value: Array) -> None:
    *folders, last = path.split(".")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = value
