"""What a model's settings say of its sizes and its FLOPs. No JAX."""

from jaxlm.presets import TRUNKS
from jaxlm.settings import ModelSettings

GATED = ("swiglu", "geglu")  # activations of MLPs that have a gate beside their way up
VOCAB_PADDING = 128  # the vocabulary's table has a multiple of this many rows
# Positions whose logits are worth their memory. A chunk of P costs 6 P V D FLOPs in products, and 12 V D bytes of
# traffic for the table and its gradient: with so many the products take 15 (v6e) to 50 (v5p) times as long, and more
# would gain nothing.
ENOUGH = 16384


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding table: the vocabulary rounded up, so that any usual mesh cuts it evenly.

    The padding is never a target, never sampled, and has no gradient.
    """
    return -(-vocab_size // VOCAB_PADDING) * VOCAB_PADDING


def is_recurrent(model: ModelSettings) -> bool:
    """Whether the trunk reads token by token, and has no attention."""
    return model.family in TRUNKS


def recurrent_width(model: ModelSettings) -> int:
    """Units of one direction of a recurrent layer: the whole width, or half of it where both directions are read."""
    return model.hidden_size // (1 if model.causal else 2)


def intermediate_size(model: ModelSettings) -> int:
    """Width inside the MLP. A recurrent layer's four gates, 4 (D + H) D products for each token, count as those of
    an MLP with as many: its width is 4 D one way, 3 D both ways."""
    if is_recurrent(model):
        return 2 * (model.hidden_size + recurrent_width(model))
    return model.intermediate_size or 4 * model.hidden_size


def query_heads(model: ModelSettings) -> int:
    return 0 if is_recurrent(model) else model.num_heads


def head_dim(model: ModelSettings) -> int:
    return model.hidden_size if is_recurrent(model) else model.head_dim or model.hidden_size // model.num_heads


def kv_heads(model: ModelSettings) -> int:
    return 0 if is_recurrent(model) else model.num_kv_heads or model.num_heads


def pooling(model: ModelSettings) -> str:
    """Which state stands for a whole row: `first`, `last` or `mean`. In a causal model only the last has seen all."""
    return model.pooling or ("last" if model.causal else "first")


def norm_bias(model: ModelSettings) -> bool:
    """Whether layernorms have an offset."""
    return bool(model.bias) if model.norm_bias is None else model.norm_bias


def query_key_value_bias(model: ModelSettings) -> bool:
    return bool(model.bias) if model.query_key_value_bias is None else model.query_key_value_bias


def local_rope_theta(model: ModelSettings) -> float:
    return model.local_rope_theta or model.rope_theta


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


def fits_fused_kernels(model: ModelSettings) -> bool:
    """Whether fused attention kernels know all that is asked for: neither dropout on probabilities nor windows."""
    return not attention_dropout_rate(model) and model.attention_window is None


def splash_block(length: int) -> int:
    """Tokens in one block of splash attention's scores."""
    return next(size for size in (512, 256, 128) if length % size == 0)


def visible_blocks(model: ModelSettings, length: int) -> float:
    """Share of splash attention's blocks that it computes: a causal mask hides almost half of them, and it skips
    those."""
    return (1 + splash_block(length) / length) / 2 if model.causal else 1.0


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
    width = query_heads(model) * head_dim(model)
    projections = model.hidden_size * head_dim(model) * (2 * query_heads(model) + 2 * kv_heads(model))
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
