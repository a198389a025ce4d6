"""transformers' families: their config.json and the names of their weights, each stated once, for both directions.

A family is a table. `fields` says which field of config.json is which key of `ModelSettings`; `fixed`, what a field
must be, since nothing here could be otherwise; `names`, where a module's parameters are. What is not in a table is
the same in all families: a kernel is called weight, a scale is, too. Facts: transformers' configuration and modeling
files, versions 4 and 5.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlm.interop.weights import Weight

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_python": "gelu", "relu": "relu"}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


class Field(NamedTuple):
    """A field of config.json that is a key of ModelSettings."""

    key: str
    default: Any  # transformers' where the file has no such field
    values: Mapping[str, str] | None = None  # its words -> ours; of several for one of ours, the first is written


class Part(NamedTuple):
    """Several modules of the same size in one tensor."""

    name: str
    number: int
    of: int


class Family(NamedTuple):
    model_type: str
    preset: str  # of `jaxlm.presets`
    prefix: str  # of the base model's weights, which some files leave away
    fields: Mapping[str, Field]
    fixed: Mapping[str, tuple[Any, ...]]  # what is allowed; the first is what a missing field means, and what is written
    names: Mapping[str, str | Part | None]  # module or parameter -> module or tensor; None: transformers has none, it is zero
    heads: Mapping[str, tuple[str, ...]]  # class of transformers -> our heads
    rope: str | None = None  # flat: one theta; two: of global and of local layers
    window: str | None = None  # how config.json tells of local attention: mistral, qwen, modernbert
    conv: bool = False  # linear layers of blocks are (in, out)
    pads_first: bool = False  # positions begin behind the padding token's number
    twins: Mapping[str, str] = {}  # parameter -> second name that files have for it
    ignored: tuple[str, ...] = ()  # modules of heads that no model here has

    def weight(self, path: str, first_norm: bool = True, pad_token: int = 1) -> Weight | None:
        """Where a parameter is; None: transformers' models have none. Raises KeyError for one that is in no table."""
        module, _, leaf = path.rpartition(".")
        whole = path in self.names
        place = self.names[path if whole else module]
        if place is None:
            return None
        name, part = (place.name, (place.number, place.of)) if isinstance(place, Part) else (place, (0, 1))
        return Weight(
            name if whole else f"{name}.{'bias' if leaf == 'bias' else 'weight'}",
            inputs={"kernel": 2 if module == "blocks.attention.output" else 1, "embedding": 1}.get(leaf, 0),
            transposed=leaf == "kernel" and not (self.conv and path.startswith("blocks.")),
            part=part,
            skipped=pad_token + 1 if self.pads_first and path == "position_embedding.embedding" else 0,
            first_layer=0 if first_norm or module != "blocks.attention_norm" else 1)


def _fields(hidden_size: str, layers: str, heads: str, inner: str, length: str, sizes: tuple[int, ...],
            **others: Field) -> dict[str, Field]:
    """What every family has, under its names, with transformers' default sizes."""
    keys = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length")
    names = ("vocab_size", hidden_size, layers, heads, inner, length)
    return {name: Field(key, size) for name, key, size in zip(names, keys, sizes, strict=True)} | {
        "initializer_range": Field("initializer_range", 0.02), "tie_word_embeddings": Field("tied_embeddings", True)} | others


# ---- decoders --------------------------------------------------------------------------------------------------------

GPT2 = Family(
    "gpt2", "gpt", "transformer.",
    _fields("n_embd", "n_layer", "n_head", "n_inner", "n_positions", (50257, 768, 12, 12, None, 1024),
            layer_norm_epsilon=Field("norm_epsilon", 1e-5), activation_function=Field("activation", "gelu_new", ACTIVATIONS),
            resid_pdrop=Field("dropout", 0.1), attn_pdrop=Field("attention_dropout", 0.1)),
    {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    {"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe",
     "blocks.attention_norm": "transformer.h.{}.ln_1", "blocks.mlp_norm": "transformer.h.{}.ln_2",
     **{f"blocks.attention.{name}": Part("transformer.h.{}.attn.c_attn", part, 3)
        for part, name in enumerate(("query", "key", "value"))},
     "blocks.attention.output": "transformer.h.{}.attn.c_proj", "blocks.mlp.up": "transformer.h.{}.mlp.c_fc",
     "blocks.mlp.down": "transformer.h.{}.mlp.c_proj", "final_norm": "transformer.ln_f",
     "heads.next_token": "lm_head", "heads.classification.classifier": "score", "heads.classification.classifier.bias": None,
     "heads.regression.classifier": "score", "heads.regression.classifier.bias": None},
    {"GPT2LMHeadModel": ("next_token",), "GPT2ForSequenceClassification": ("classification",), "GPT2Model": ()},
    conv=True)

LLAMA = Family(
    "llama", "llama", "model.",
    _fields("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
            (32000, 4096, 32, 32, 11008, 2048), num_key_value_heads=Field("num_kv_heads", None), head_dim=Field("head_dim", None),
            rms_norm_eps=Field("norm_epsilon", 1e-6), hidden_act=Field("activation", "silu", GATED),
            tie_word_embeddings=Field("tied_embeddings", False), attention_bias=Field("bias", False),
            mlp_bias=Field("bias", False), attention_dropout=Field("attention_dropout", 0.0)),
    {},
    {"token_embedding": "model.embed_tokens", "blocks.attention_norm": "model.layers.{}.input_layernorm",
     "blocks.attention.query": "model.layers.{}.self_attn.q_proj", "blocks.attention.key": "model.layers.{}.self_attn.k_proj",
     "blocks.attention.value": "model.layers.{}.self_attn.v_proj", "blocks.attention.output": "model.layers.{}.self_attn.o_proj",
     "blocks.mlp_norm": "model.layers.{}.post_attention_layernorm", "blocks.mlp.gate": "model.layers.{}.mlp.gate_proj",
     "blocks.mlp.up": "model.layers.{}.mlp.up_proj", "blocks.mlp.down": "model.layers.{}.mlp.down_proj",
     "final_norm": "model.norm", "heads.next_token": "lm_head", "heads.classification.classifier": "score",
     "heads.classification.classifier.bias": None, "heads.regression.classifier": "score",
     "heads.regression.classifier.bias": None},
    {"LlamaForCausalLM": ("next_token",), "LlamaForSequenceClassification": ("classification",), "LlamaModel": ()},
    rope="flat")


def _like_llama(name: str, sizes: tuple[int, ...], without: tuple[str, ...], window: str, fixed: Mapping[str, tuple] = {},
                names: Mapping[str, str] = {}, **others: Field) -> Family:
    """A family with Llama's names; `sizes` as in `_fields`."""
    fields = {field: about for field, about in LLAMA.fields.items() if field not in without}
    fields |= {field: fields[field]._replace(default=size) for field, size in zip(fields, sizes, strict=False)} | others
    return LLAMA._replace(
        model_type=name.lower(), preset=name.lower(), fields=fields, fixed=fixed, window=window, names={**LLAMA.names, **names},
        heads={f"{name}{known.removeprefix('Llama')}": heads for known, heads in LLAMA.heads.items()})


MISTRAL = _like_llama("Mistral", (32000, 4096, 32, 32, 14336, 131072), ("attention_bias", "mlp_bias"), "mistral",
                      num_key_value_heads=Field("num_kv_heads", 8))
QWEN2 = _like_llama("Qwen2", (151936, 4096, 32, 32, 22016, 32768), ("attention_bias", "mlp_bias"), "qwen",
                    num_key_value_heads=Field("num_kv_heads", 32))
QWEN3 = _like_llama("Qwen3", (151936, 4096, 32, 32, 22016, 32768), ("attention_bias", "mlp_bias"), "qwen",
                    {"attention_bias": (False,)},
                    {"blocks.attention.query_norm": "model.layers.{}.self_attn.q_norm",
                     "blocks.attention.key_norm": "model.layers.{}.self_attn.k_norm"},
                    num_key_value_heads=Field("num_kv_heads", 32), head_dim=Field("head_dim", 128))

# ---- encoders --------------------------------------------------------------------------------------------------------

BERT = Family(
    "bert", "bert", "bert.",
    _fields("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
            (30522, 768, 12, 12, 3072, 512), type_vocab_size=Field("type_vocab_size", 2),
            layer_norm_eps=Field("norm_epsilon", 1e-12), hidden_act=Field("activation", "gelu", ACTIVATIONS),
            hidden_dropout_prob=Field("dropout", 0.1), attention_probs_dropout_prob=Field("attention_dropout", 0.1)),
    {"position_embedding_type": ("absolute",)},
    {"token_embedding": "bert.embeddings.word_embeddings", "position_embedding": "bert.embeddings.position_embeddings",
     "type_embedding": "bert.embeddings.token_type_embeddings", "embedding_norm": "bert.embeddings.LayerNorm",
     **{f"blocks.attention.{name}": f"bert.encoder.layer.{{}}.attention.self.{name}" for name in ("query", "key", "value")},
     "blocks.attention.output": "bert.encoder.layer.{}.attention.output.dense",
     "blocks.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
     "blocks.mlp.up": "bert.encoder.layer.{}.intermediate.dense", "blocks.mlp.down": "bert.encoder.layer.{}.output.dense",
     "blocks.mlp_norm": "bert.encoder.layer.{}.output.LayerNorm",
     "heads.masked_token.transform": "cls.predictions.transform.dense",
     "heads.masked_token.norm": "cls.predictions.transform.LayerNorm",
     "heads.masked_token.bias": "cls.predictions.bias", "heads.masked_token.table.embedding": "cls.predictions.decoder.weight",
     "heads.next_sentence.pooler": "bert.pooler.dense", "heads.next_sentence.classifier": "cls.seq_relationship",
     **{f"heads.{head}.{module}": name for head in ("classification", "regression")
        for module, name in (("pooler", "bert.pooler.dense"), ("classifier", "classifier"))}},
    {"BertForMaskedLM": ("masked_token",), "BertForPreTraining": ("masked_token", "next_sentence"),
     "BertForSequenceClassification": ("classification",), "BertModel": ()},
    twins={"heads.masked_token.bias": "cls.predictions.decoder.bias"})

ROBERTA = BERT._replace(
    model_type="roberta", preset="roberta", prefix="roberta.", pads_first=True,
    fields=BERT.fields | {"vocab_size": Field("vocab_size", 50265)},
    fixed=BERT.fixed | {"hidden_act": ("gelu",)},  # its head for masked tokens always has gelu
    names={path: name.replace("bert.", "roberta.", 1) for path, name in BERT.names.items() if not path.startswith("heads.")} | {
        "heads.masked_token.transform": "lm_head.dense", "heads.masked_token.norm": "lm_head.layer_norm",
        "heads.masked_token.bias": "lm_head.bias", "heads.masked_token.table.embedding": "lm_head.decoder.weight",
        **{f"heads.{head}.{module}": name for head in ("classification", "regression")
           for module, name in (("pooler", "classifier.dense"), ("classifier", "classifier.out_proj"))}},
    heads={"RobertaForMaskedLM": ("masked_token",), "RobertaForSequenceClassification": ("classification",), "RobertaModel": ()},
    twins={"heads.masked_token.bias": "lm_head.decoder.bias"}, ignored=("roberta.pooler.dense",))

XLM_ROBERTA = ROBERTA._replace(
    model_type="xlm-roberta", fields=ROBERTA.fields | {"vocab_size": Field("vocab_size", 30522)},
    heads={name.replace("Roberta", "XLMRoberta"): heads for name, heads in ROBERTA.heads.items()})

DISTILBERT = Family(
    "distilbert", "distilbert", "distilbert.",
    _fields("dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings", (30522, 768, 6, 12, 3072, 512),
            activation=Field("activation", "gelu", ACTIVATIONS), dropout=Field("dropout", 0.1),
            attention_dropout=Field("attention_dropout", 0.1)),
    {"sinusoidal_pos_embds": (False,)},
    {"token_embedding": "distilbert.embeddings.word_embeddings",
     "position_embedding": "distilbert.embeddings.position_embeddings", "embedding_norm": "distilbert.embeddings.LayerNorm",
     **{f"blocks.attention.{module}": f"distilbert.transformer.layer.{{}}.attention.{name}" for module, name in (
         ("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin"), ("output", "out_lin"))},
     "blocks.attention_norm": "distilbert.transformer.layer.{}.sa_layer_norm",
     "blocks.mlp.up": "distilbert.transformer.layer.{}.ffn.lin1", "blocks.mlp.down": "distilbert.transformer.layer.{}.ffn.lin2",
     "blocks.mlp_norm": "distilbert.transformer.layer.{}.output_layer_norm",
     "heads.masked_token.transform": "vocab_transform", "heads.masked_token.norm": "vocab_layer_norm",
     "heads.masked_token.bias": "vocab_projector.bias", "heads.masked_token.table.embedding": "vocab_projector.weight",
     **{f"heads.{head}.{module}": name for head in ("classification", "regression")
        for module, name in (("pooler", "pre_classifier"), ("classifier", "classifier"))}},
    {"DistilBertForMaskedLM": ("masked_token",), "DistilBertForSequenceClassification": ("classification",),
     "DistilBertModel": ()})

MODERNBERT = Family(
    "modernbert", "modernbert", "model.",
    _fields("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
            (50368, 768, 22, 12, 1152, 8192), norm_eps=Field("norm_epsilon", 1e-5), norm_bias=Field("norm_bias", False),
            hidden_activation=Field("activation", "gelu", {"gelu": "geglu"}),
            classifier_pooling=Field("pooling", "cls", {"cls": "first", "mean": "mean"}), mlp_dropout=Field("dropout", 0.0),
            attention_dropout=Field("attention_dropout", 0.0)),
    {"attention_bias": (False,), "mlp_bias": (False,), "classifier_bias": (False,), "decoder_bias": (True,),
     "classifier_activation": ("gelu",)},
    {"token_embedding": "model.embeddings.tok_embeddings", "embedding_norm": "model.embeddings.norm",
     "blocks.attention_norm": "model.layers.{}.attn_norm", "blocks.mlp_norm": "model.layers.{}.mlp_norm",
     **{f"blocks.attention.{name}": Part("model.layers.{}.attn.Wqkv", part, 3)
        for part, name in enumerate(("query", "key", "value"))},
     "blocks.attention.output": "model.layers.{}.attn.Wo", "blocks.mlp.gate": Part("model.layers.{}.mlp.Wi", 0, 2),
     "blocks.mlp.up": Part("model.layers.{}.mlp.Wi", 1, 2), "blocks.mlp.down": "model.layers.{}.mlp.Wo",
     "final_norm": "model.final_norm", "heads.masked_token.transform": "head.dense", "heads.masked_token.norm": "head.norm",
     "heads.masked_token.bias": "decoder.bias", "heads.masked_token.table.embedding": "decoder.weight",
     **{f"heads.{head}.{module}": name for head in ("classification", "regression")
        for module, name in (("pooler", "head.dense"), ("norm", "head.norm"), ("classifier", "classifier"))}},
    {"ModernBertForMaskedLM": ("masked_token",), "ModernBertForSequenceClassification": ("classification",),
     "ModernBertModel": ()},
    rope="two", window="modernbert")

FAMILIES = {family.model_type: family for family in (
    GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, BERT, ROBERTA, XLM_ROBERTA, DISTILBERT, MODERNBERT)}
