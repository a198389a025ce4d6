"""Writes gpt2.npz and bert.npz: what transformers computes for two tiny models with random weights.

    pip install -e '.[torch]'
    python tests/golden/make_golden.py            # writes the files beside this script
    python tests/golden/make_golden.py --check    # makes them again, compares, exits 1 where they differ

The tests compare jaxlm with these files, so that they need no torch. All float32 and int32, on the CPU:
    weights/NAME      every parameter, under its Hugging Face name; tied ones once
    inputs/NAME       what the model was called with
    outputs/NAME      logits, and the loss as a scalar
    gradients/NAME    of the loss, for every parameter
No weight, bias or norm scale is 0 or 1 by chance, so that a mix-up of any two shows in the logits.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForPreTraining, GPT2Config, GPT2LMHeadModel, logging

FOLDER = Path(__file__).parent
TOLERANCE = 1e-5  # of the largest value of an array, or of FLOOR for arrays that are zero but for rounding:
FLOOR = 0.01  # the gradient of a key's bias, which softmax cancels
IGNORED = -100  # label of a position that is not predicted


def make_gpt2() -> dict[str, np.ndarray]:
    """GPT-2: 2 layers, width 32, 4 heads, 97 tokens, 3 sequences of 24. The loss is over the next token of all but
    the last."""
    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    random = np.random.default_rng(0)
    tokens = random.integers(0, 97, size=(3, 24))
    return run(GPT2LMHeadModel(config), random, {"input_ids": tokens, "labels": tokens}, ["logits", "loss"])


def make_bert() -> dict[str, np.ndarray]:
    """BERT: 2 layers, width 32, 4 heads, MLP 64, 101 tokens, 3 sequence pairs of up to 20 tokens, padded; MLM plus
    NSP loss."""
    config = BertConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                        max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                        attn_implementation="eager")
    random = np.random.default_rng(1)
    position = np.arange(20)
    lengths, second_starts = np.array([[20], [13], [17]]), np.array([[11], [5], [9]])
    attention_mask = position < lengths
    tokens = random.integers(1, 101, size=(3, 20)) * attention_mask
    predicted = (random.random((3, 20)) < 0.3) & attention_mask
    inputs = {
        "input_ids": tokens,
        "attention_mask": attention_mask,
        "token_type_ids": (position >= second_starts) & attention_mask,
        "labels": np.where(predicted, random.integers(1, 101, size=(3, 20)), IGNORED),
        "next_sentence_label": np.array([0, 1, 1]),
    }
    return run(BertForPreTraining(config), random, inputs, ["prediction_logits", "seq_relationship_logits", "loss"])


def run(model: torch.nn.Module, random: np.random.Generator, inputs: dict[str, np.ndarray],
        outputs: list[str]) -> dict[str, np.ndarray]:
    """Draws the weights, then one forward and backward pass without dropout."""
    model.eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_norm_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(torch.from_numpy(random.normal(float(is_norm_scale), 0.2, parameter.shape)))
    result = model(**{name: torch.from_numpy(value.astype(np.int64)) for name, value in inputs.items()})
    result.loss.backward()
    arrays = {f"inputs/{name}": value.astype(np.int32) for name, value in inputs.items()}
    arrays |= {f"outputs/{name}": getattr(result, name).detach().numpy() for name in outputs}
    for name, parameter in model.named_parameters():
        arrays |= {f"weights/{name}": parameter.detach().numpy(), f"gradients/{name}": parameter.grad.numpy()}
    return arrays


def differences(made: dict[str, np.ndarray], path: Path) -> list[str]:
    """One line for every array of the file at `path` that is missing, new, or not what was made."""
    with np.load(path, allow_pickle=False) as file:
        kept = dict(file)
    lines = [f"{path.name}: {name} is only in the file" for name in kept.keys() - made.keys()]
    lines += [f"{path.name}: {name} is not in the file" for name in made.keys() - kept.keys()]
    for name in kept.keys() & made.keys():
        if kept[name].shape != made[name].shape or kept[name].dtype != made[name].dtype:
            lines.append(f"{path.name}: {name} has another shape or type")
            continue
        difference, largest = np.abs(made[name] - kept[name]).max(), np.abs(kept[name]).max()
        if not difference <= TOLERANCE * max(largest, FLOOR):
            lines.append(f"{path.name}: {name} differs by {difference:.3g}, its largest value is {largest:.3g}")
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    torch.set_num_threads(1)  # one order of summation
    logging.set_verbosity_error()
    status = 0
    for name, make in (("gpt2", make_gpt2), ("bert", make_bert)):
        made, path = make(), FOLDER / f"{name}.npz"
        if not check:
            np.savez_compressed(path, **made)
            print(f"wrote {path}: {len(made)} arrays, {path.stat().st_size} bytes, loss {made['outputs/loss']:.4f}")
            continue
        lines = differences(made, path)
        print("\n".join(lines) if lines else f"{path.name}: the same")
        status |= bool(lines)
    return status


if __name__ == "__main__":
    sys.exit(main())
