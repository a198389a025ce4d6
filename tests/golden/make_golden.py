"""Writes the folders of tests/golden/huggingface: tiny models with random weights, and what transformers computes for
them.

    pip install -e '.[torch]'
    python tests/golden/make_golden.py            # writes the folders beside this script
    python tests/golden/make_golden.py --check    # makes them again, compares, exits 1 where they differ

The tests compare jaxlm with these files, so that they need no torch. A folder is what `save_pretrained` writes, and
expected.npz, all of it float32 and int32 and made on the CPU:
    inputs/NAME       what the model was called with: rows are padded at their ends
    outputs/NAME      logits, and the loss as a scalar
    gradients/NAME    of the loss, for every parameter, under its Hugging Face name; tied ones once
No weight, bias or norm scale is 0 or 1 by chance, so that a mix-up of any two shows in the logits.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "huggingface"
TOLERANCE = 1e-5  # of the largest value of an array, or of FLOOR for arrays that are zero but for rounding:
FLOOR = 0.01  # the gradient of a key's bias, which softmax cancels
IGNORED = -100  # label of a position that is not predicted
TOKENS, LENGTH, ROWS, PAD = 61, 20, 4, 1
LENGTHS = np.array([[LENGTH], [13], [17], [6]])

SIZES = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
         "max_position_embeddings": LENGTH + 4, "pad_token_id": PAD, "attn_implementation": "eager"}
BERT = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": LENGTH + 4, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 0,
        "attn_implementation": "eager"}
DISTILBERT = {"vocab_size": TOKENS, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "pad_token_id": PAD, "dropout": 0.0,
              "max_position_embeddings": LENGTH, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
              "attn_implementation": "eager"}
GROUPED = SIZES | {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
MODERNBERT = SIZES | {"num_hidden_layers": 4, "local_attention": 8, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0,
                      "sep_token_id": 2}


class Case(NamedTuple):
    """A class of transformers, its configuration, and which inputs it is called with."""

    name: str
    inputs: Callable[[np.random.Generator, "Case"], dict[str, np.ndarray]]
    config: dict[str, Any]


def next_tokens(random: np.random.Generator, case: Case) -> dict[str, np.ndarray]:
    inputs = padded(random)
    return inputs | {"labels": np.where(inputs["attention_mask"], inputs["input_ids"], IGNORED)}


def masked_tokens(random: np.random.Generator, case: Case) -> dict[str, np.ndarray]:
    inputs = padded(random)
    predicted = (random.random((ROWS, LENGTH)) < 0.3) & inputs["attention_mask"]
    inputs["labels"] = np.where(predicted, random.integers(2, TOKENS, size=(ROWS, LENGTH)), IGNORED)
    return inputs | pairs(inputs, case)


def sentences(random: np.random.Generator, case: Case) -> dict[str, np.ndarray]:
    return masked_tokens(random, case) | {"next_sentence_label": np.array([0, 1, 1, 0])}


def classes(random: np.random.Generator, case: Case) -> dict[str, np.ndarray]:
    inputs = padded(random)
    labels = {"regression": np.array([0.5, -1.0, 2.0, 0.0], np.float32),
              "multi_label_classification": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 0]], np.float32)}
    return inputs | pairs(inputs, case) | {"labels": labels.get(case.config.get("problem_type"), np.array([2, 0, 1, 1]))}


def padded(random: np.random.Generator) -> dict[str, np.ndarray]:
    mask = np.arange(LENGTH) < LENGTHS
    return {"input_ids": np.where(mask, random.integers(2, TOKENS, size=(ROWS, LENGTH)), PAD), "attention_mask": mask}


def pairs(inputs: dict[str, np.ndarray], case: Case) -> dict[str, np.ndarray]:
    if case.config.get("type_vocab_size", 2 if case.name.startswith("Bert") else 1) < 2:
        return {}
    return {"token_type_ids": (np.arange(LENGTH) >= LENGTHS // 2) & inputs["attention_mask"]}


CASES = {
    "gpt2": Case("GPT2LMHeadModel", next_tokens, GPT2),
    "gpt2_untied": Case("GPT2LMHeadModel", next_tokens, GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt2_classes": Case("GPT2ForSequenceClassification", classes, GPT2 | {"num_labels": 3, "n_inner": 24}),
    "llama": Case("LlamaForCausalLM", next_tokens, GROUPED | {"rope_parameters": LLAMA3}),
    "llama_tied": Case("LlamaForCausalLM", next_tokens, GROUPED | {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    "llama_classes": Case("LlamaForSequenceClassification", classes, GROUPED | {"num_labels": 3}),
    "mistral": Case("MistralForCausalLM", next_tokens, GROUPED | {"sliding_window": 5}),
    "mistral_classes": Case("MistralForSequenceClassification", classes, GROUPED | {"sliding_window": None, "num_labels": 3}),
    "qwen2": Case("Qwen2ForCausalLM", next_tokens, GROUPED | {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}),
    "qwen2_tied": Case("Qwen2ForCausalLM", next_tokens, GROUPED | {
        "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "qwen2_classes": Case("Qwen2ForSequenceClassification", classes, GROUPED | {"num_labels": 3}),
    "qwen3": Case("Qwen3ForCausalLM", next_tokens, GROUPED | {"head_dim": 8}),
    "qwen3_tied": Case("Qwen3ForCausalLM", next_tokens, GROUPED | {"head_dim": 4, "tie_word_embeddings": True}),
    "qwen3_classes": Case("Qwen3ForSequenceClassification", classes, GROUPED | {"head_dim": 4, "num_labels": 3}),
    "bert": Case("BertForPreTraining", sentences, BERT),
    "bert_masked": Case("BertForMaskedLM", masked_tokens, BERT | {"hidden_act": "relu"}),
    "bert_untied": Case("BertForMaskedLM", masked_tokens, BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "bert_classes": Case("BertForSequenceClassification", classes, BERT | {"num_labels": 3}),
    "bert_regression": Case("BertForSequenceClassification", classes, BERT | {"num_labels": 1, "problem_type": "regression"}),
    "bert_bare": Case("BertModel", masked_tokens, BERT),
    "roberta": Case("RobertaForMaskedLM", masked_tokens, BERT | {"type_vocab_size": 1}),
    "roberta_untied": Case("RobertaForMaskedLM", masked_tokens, BERT | {"type_vocab_size": 1, "tie_word_embeddings": False}),
    "roberta_classes": Case("RobertaForSequenceClassification", classes, BERT | {
        "type_vocab_size": 1, "num_labels": 3, "problem_type": "multi_label_classification"}),
    "xlm_roberta": Case("XLMRobertaForMaskedLM", masked_tokens, BERT | {"type_vocab_size": 1}),
    "distilbert": Case("DistilBertForMaskedLM", masked_tokens, DISTILBERT),
    "distilbert_untied": Case("DistilBertForMaskedLM", masked_tokens, DISTILBERT | {"tie_word_embeddings": False}),
    "distilbert_classes": Case("DistilBertForSequenceClassification", classes, DISTILBERT | {"num_labels": 3}),
    "modernbert": Case("ModernBertForMaskedLM", masked_tokens, MODERNBERT),
    "modernbert_untied": Case("ModernBertForMaskedLM", masked_tokens, MODERNBERT | {"tie_word_embeddings": False}),
    "modernbert_classes": Case("ModernBertForSequenceClassification", classes, MODERNBERT | {"num_labels": 3}),
    "modernbert_mean": Case("ModernBertForSequenceClassification", classes, MODERNBERT | {
        "num_labels": 3, "classifier_pooling": "mean"}),
}


def make(case: Case, seed: int) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """Draws the weights, then one forward and backward pass without dropout."""
    kind = getattr(transformers, case.name)
    model = kind(kind.config_class(**case.config)).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_norm_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(torch.from_numpy(random.normal(float(is_norm_scale), 0.2, parameter.shape)))
    inputs = case.inputs(random, case)
    if case.name == "BertModel":
        del inputs["labels"]
    arrays = {f"inputs/{name}": value if value.dtype == np.float32 else value.astype(np.int32) for name, value in inputs.items()}
    result = model(**{name: torch.from_numpy(value if value.dtype == np.float32 else value.astype(np.int64))
                      for name, value in inputs.items()})
    arrays |= {f"outputs/{name}": value.detach().numpy() for name, value in result.items() if isinstance(value, torch.Tensor)}
    if "loss" in result:
        result.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        arrays |= {f"gradients/{name}": value.numpy() for name, value in gradients.items()}
    return model, arrays


def differences(made: dict[str, np.ndarray], path: Path) -> list[str]:
    """One line for every array of the file at `path` that is missing, new, or not what was made."""
    with np.load(path, allow_pickle=False) as file:
        kept = dict(file)
    lines = [f"{path}: {name} is only in the file" for name in kept.keys() - made.keys()]
    lines += [f"{path}: {name} is not in the file" for name in made.keys() - kept.keys()]
    for name in kept.keys() & made.keys():
        if kept[name].shape != made[name].shape or kept[name].dtype != made[name].dtype:
            lines.append(f"{path}: {name} has another shape or type")
            continue
        difference, largest = np.abs(made[name] - kept[name]).max(), np.abs(kept[name]).max()
        if not difference <= TOLERANCE * max(largest, FLOOR):
            lines.append(f"{path}: {name} differs by {difference:.3g}, its largest value is {largest:.3g}")
    return sorted(lines)


def check(model: torch.nn.Module, arrays: dict[str, np.ndarray], folder: Path) -> list[str]:
    lines = differences(arrays, folder / "expected.npz")
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        for name in ("config.json", "model.safetensors"):
            if (Path(again) / name).read_bytes() != (folder / name).read_bytes():
                lines.append(f"{folder / name}: differs")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation
    transformers.logging.set_verbosity_error()
    status = 0
    for seed, (name, case) in enumerate(CASES.items()):
        (model, arrays), folder = make(case, seed), FOLDER / name
        if arguments.check:
            lines = check(model, arrays, folder)
            print("\n".join(lines) if lines else f"{folder}: the same")
            status |= bool(lines)
            continue
        model.save_pretrained(folder)
        np.savez_compressed(folder / "expected.npz", **arrays)
        (folder / "generation_config.json").unlink(missing_ok=True)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"wrote {folder}: {len(arrays)} arrays, {size:,} bytes, loss {arrays.get('outputs/loss', np.nan):.4f}")
    return status


if __name__ == "__main__":
    sys.exit(main())
