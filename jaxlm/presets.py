"""Families of models: what each sets of `ModelSettings`, unless the run file says otherwise.

A family is nothing but this row of settings; no other code asks for it. Sizes are the run file's own. None: the key
follows another (norm_bias and query_key_value_bias: bias; local_rope_theta: rope_theta), or there is nothing of the
kind. Sources: the papers named beside each, and the configuration classes of transformers.
"""

from collections.abc import Mapping
from typing import Any

# Every key that a family decides, as GPT-2 has it (Radford et al. 2019; GPT-3: Brown et al. 2020).
GPT: dict[str, Any] = {
    "causal": True, "norm_position": "pre", "embedding_norm": False, "final_norm": True, "first_norm": True,
    "positions": "learned", "normalization": "layernorm", "norm_epsilon": 1e-5, "norm_bias": None, "bias": True,
    "query_key_value_bias": None, "qk_norm": False, "activation": "gelu_tanh", "tied_embeddings": True, "type_vocab_size": 0,
    "scaled_initialization": True, "pooler": None, "rope_theta": 10000.0, "local_rope_theta": None, "attention_window": None,
    "global_every": None,
}
LLAMA = GPT | {  # Touvron et al. 2023
    "positions": "rope", "normalization": "rmsnorm", "bias": False, "activation": "swiglu", "tied_embeddings": False,
    "scaled_initialization": False,
}
BERT = GPT | {  # Devlin et al. 2019
    "causal": False, "norm_position": "post", "embedding_norm": True, "final_norm": False, "norm_epsilon": 1e-12,
    "norm_bias": True, "activation": "gelu", "type_vocab_size": 2, "scaled_initialization": False, "pooler": "tanh",
}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt": GPT,
    "llama": LLAMA,
    "mistral": LLAMA | {"attention_window": 4096},  # Jiang et al. 2023
    "qwen2": LLAMA | {"query_key_value_bias": True, "norm_epsilon": 1e-6, "rope_theta": 1e6},  # Yang et al. 2024
    "qwen3": LLAMA | {"qk_norm": True, "norm_epsilon": 1e-6, "rope_theta": 1e6},  # Yang et al. 2025
    "lstm": GPT | {"scaled_initialization": False},  # Hochreiter & Schmidhuber 1997; tied: Press & Wolf 2017
    "bert": BERT,
    "roberta": BERT | {"norm_epsilon": 1e-5, "type_vocab_size": 1},  # Liu et al. 2019
    "distilbert": BERT | {"type_vocab_size": 0, "pooler": "relu"},  # Sanh et al. 2019
    "modernbert": BERT | {  # Warner et al. 2024
        "norm_position": "pre", "final_norm": True, "first_norm": False, "positions": "rope", "rope_theta": 160000.0,
        "local_rope_theta": 10000.0, "attention_window": 128, "global_every": 3, "norm_epsilon": 1e-5, "norm_bias": False,
        "bias": False, "activation": "geglu", "type_vocab_size": 0, "pooler": "gelu", "scaled_initialization": True,
    },
}

# The file of models/ that a family's trunk stands in, where it is recurrent (reads token by token) and no transformer.
TRUNKS: dict[str, str] = {"lstm": "lstm"}


def shape_in_words(config: Mapping[str, Any]) -> str:
    """A model for people, from a run's config by dotted keys; what is not said there is a question mark."""
    family = config.get("model.family", "?")
    words = [family, f"{config.get('model.num_layers', '?')} layers", f"width {config.get('model.hidden_size', '?')}"]
    if family not in TRUNKS:  # those have no heads
        words.append(f"{config.get('model.num_heads', '?')} heads")
    if experts := config.get("model.num_experts"):
        words.append(f"{experts} experts of which a token takes {config.get('model.experts_per_token', '?')}")
    return ", ".join(words)
