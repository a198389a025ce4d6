"""What a model's settings say of its size: shapes, axes, numbers of parameters, FLOPs. No JAX: estimates build no
model."""

import math
from typing import NamedTuple

from jaxlm.settings import ModelSettings

GATED = ("swiglu", "geglu")  # activations of MLPs that have a gate beside their way up
VOCAB_PADDING = 128  # the vocabulary's table has a multiple of this many rows
# Positions whose logits are worth their memory. A chunk of P costs 6 P V D FLOPs in products, and 12 V D bytes of
# traffic for the table and its gradient: with so many the products take 15 (v6e) to 50 (v5p) times as long, and more
# would gain nothing.
ENOUGH = 16384


class Shape(NamedTuple):
    """Of a parameter: its dimensions, and the names of their axes (`jaxlm.parallel.rules.RULES`)."""

    sizes: tuple[int, ...]
    axes: tuple[str | None, ...]


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding table: the vocabulary rounded up, so that any usual mesh cuts it evenly.

    The padding is never a target, never sampled, and has no gradient.
    """
    return -(-vocab_size // VOCAB_PADDING) * VOCAB_PADDING


def intermediate_size(model: ModelSettings) -> int:
    return model.intermediate_size or 4 * model.hidden_size


def head_dim(model: ModelSettings) -> int:
    return model.head_dim or model.hidden_size // model.num_heads


def kv_heads(model: ModelSettings) -> int:
    return model.num_kv_heads or model.num_heads


def is_gated(model: ModelSettings) -> bool:
    return model.activation in GATED


def attention_dropout_rate(model: ModelSettings) -> float:
    """What is dropped of the attention probabilities: model.attention_dropout, or model.dropout where that is null."""
    return model.dropout if model.attention_dropout is None else model.attention_dropout


def attention_kernel(platform: str, dtype: str, length: int, head_dim: int, fused: bool) -> str:
    """The fastest of a backend's kernels for sequences of this length: cudnn, splash or xla. `fused`: no dropout, no
    mask but causality and segments."""
    if fused and platform == "gpu" and dtype == "bfloat16" and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    if fused and platform == "tpu" and length % 128 == 0:
        return "splash"
    return "xla"


def splash_block(length: int) -> int:
    """Tokens in one block of splash attention's scores."""
    return next(size for size in (512, 256, 128) if length % size == 0)


def visible_blocks(model: ModelSettings, length: int) -> float:
    """Share of splash attention's blocks that it computes: a causal mask hides almost half of them, and it skips
    those."""
    return (1 + splash_block(length) / length) / 2 if model.family == "gpt" else 1.0


def parameters(model: ModelSettings) -> dict[str, Shape]:
    """Every parameter by its dotted path in the model's tree, as the models (`gpt.py`, `bert.py`) make them."""
    width, rows = model.hidden_size, padded_vocab_size(model.vocab_size)
    found = {"token_embedding.embedding": Shape((rows, width), ("vocab", "embed"))}
    if model.positions == "learned":
        found["position_embedding.embedding"] = Shape((model.max_length, width), ("positions", "embed"))
    stacked = {f"blocks.{name}": Shape((model.num_layers, *sizes), ("layers", *axes))
               for name, (sizes, axes) in _block(model).items()}
    if model.family == "gpt":
        head = {} if model.tied_embeddings else {"head.embedding": found["token_embedding.embedding"]}
        return found | stacked | _norm("final_norm", model) | head
    found["type_embedding.embedding"] = Shape((model.type_vocab_size, width), ("types", "embed"))
    found |= _norm("embedding_norm", model) | stacked | _linear("mlm_transform", {"embed": width}, {"residual": width}, True)
    found |= _norm("mlm_norm", model) | {"mlm_bias": Shape((rows,), ("vocab",))}
    if model.next_sentence:
        found |= _linear("pooler", {"embed": width}, {"residual": width}, True)
        found |= _linear("next_sentence_head", {"residual": width}, {None: 2}, True)
    return found


def _block(model: ModelSettings) -> dict[str, Shape]:
    embed, heads = {"embed": model.hidden_size}, {"heads": model.num_heads, "head_dim": head_dim(model)}
    keys, inner = {"kv_heads": kv_heads(model), "head_dim": head_dim(model)}, {"mlp": intermediate_size(model)}
    bias, found = model.bias, _norm("attention_norm", model) | _norm("mlp_norm", model)
    for name, outputs in (("query", heads), ("key", keys), ("value", keys)):
        found |= _linear(f"attention.{name}", embed, outputs, bias)
    found |= _linear("attention.output", heads, embed, bias)
    if model.qk_norm:
        found |= {f"attention.{name}_norm.scale": Shape((head_dim(model),), (None,)) for name in ("query", "key")}
    experts = {}
    if model.num_experts is not None:
        experts, bias = {"experts": model.num_experts}, False
        found |= _linear("mlp.router", embed, {None: model.num_experts}, False)
    for name, inputs, outputs in (("up", embed, inner), ("gate", embed, inner), ("down", inner, embed)):
        if name != "gate" or is_gated(model):
            found |= _linear(f"mlp.{name}", experts | inputs, outputs, bias)
    return found


def _linear(name: str, inputs: dict[str | None, int], outputs: dict[str | None, int], bias: bool) -> dict[str, Shape]:
    found = {f"{name}.kernel": Shape((*inputs.values(), *outputs.values()), (*inputs, *outputs))}
    return found | ({f"{name}.bias": Shape(tuple(outputs.values()), tuple(outputs))} if bias else {})


def _norm(name: str, model: ModelSettings) -> dict[str, Shape]:
    bias = model.normalization == "layernorm" and (model.bias or model.family == "bert")
    return {f"{name}.{part}": Shape((model.hidden_size,), ("residual",)) for part in ("scale", *(("bias",) if bias else ()))}


def num_parameters(model: ModelSettings) -> int:
    """Parameters, without the padding of the vocabulary."""
    padding = padded_vocab_size(model.vocab_size) - model.vocab_size
    shapes = parameters(model).values()
    return (sum(math.prod(sizes) for sizes, _ in shapes)
            - padding * sum(math.prod(sizes) // padded_vocab_size(model.vocab_size) for sizes, axes in shapes if "vocab" in axes))


def training_flops(model: ModelSettings, sequence_length: int, predictions: int) -> float:
    """FLOPs of one sequence's forward and backward pass, as PaLM counts them (Chowdhery et al. 2022, appendix B).

    Matrix products only, a backward pass is two forward passes, attention counts every pair of positions, and
    recomputation does not count. `predictions`: positions that reach the output head.
    """
    forward = model.num_layers * block_flops(model, sequence_length) + head_flops(model, predictions)
    return 3 * forward


def block_flops(model: ModelSettings, sequence_length: int) -> float:
    """FLOPs of one sequence's way through one block."""
    projections, attention = attention_flops(model, sequence_length)
    mlp = model.hidden_size * intermediate_size(model) * (3 if is_gated(model) else 2)
    if model.num_experts is not None:
        mlp = mlp * model.experts_per_token + model.hidden_size * model.num_experts
    return projections + attention + 2 * sequence_length * mlp


def attention_flops(model: ModelSettings, sequence_length: int) -> tuple[float, float]:
    """Of one block and sequence: those of the projections, and those of scores and sums over every pair of
    positions."""
    width = model.num_heads * head_dim(model)
    projections = model.hidden_size * head_dim(model) * (2 * model.num_heads + 2 * kv_heads(model))
    return 2 * sequence_length * projections, 2 * sequence_length * 2 * sequence_length * width


def loss_chunk(length: int, rows: int, vocab_size: int, width: int, most: int | None = None, memory: float = 0.0) -> int:
    """Positions of each of `rows` sequences whose logits the loss forms at a time, for a table of this size on one
    device.

    At most `most`. None: as many as `memory` bytes hold the float32 logits of, for the table's gradient goes through
    memory with every chunk, but no more than ENOUGH positions of all sequences together. With less memory they take
    64 MiB, or a quarter of that gradient where that is more. Chunks are equal: they divide `length`, or where no
    number near `most` does, the last one is filled up.
    """
    if most is None:
        least, held = (int(size) // (4 * rows * vocab_size) for size in (max(2**26, vocab_size * width), memory))
        most = max(least, min(held, ENOUGH // rows))
    most = max(1, min(most, length))
    size = next(size for size in range(most, 0, -1) if length % size == 0)
    if 2 * size < most:  # a prime length, say: its largest divisor would be 1
        size = -(-length // -(-length // most))
    return size


def head_flops(model: ModelSettings, predictions: int) -> float:
    """FLOPs of one sequence's predictions."""
    width = model.hidden_size
    return 2 * predictions * width * (model.vocab_size + (width if model.family == "bert" else 0))
