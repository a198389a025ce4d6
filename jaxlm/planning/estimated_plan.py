"""A plan by arithmetic alone, at once: no compiler, no JAX.

Counted: parameters and optimizer by their shapes, matrix products, what the written-out products send, what
`train.remat` keeps. Fitted to compiled programs (`benchmarks/plans.py`, which also says how far off it is;
docs/planning.md): how many copies of its activations a layer's backward pass holds at once, what share of the
exchanges is hidden, what elementwise work adds to the memory traffic.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from jaxlm.checks import check_kernel, check_layout, require_vocabulary
from jaxlm.models.sizes import (
    attention_flops,
    intermediate_size,
    is_gated,
    is_recurrent,
    kv_heads,
    loss_chunk,
    padded_vocab_size,
    query_heads,
    recurrent_width,
    visible_blocks,
)
from jaxlm.parallel.rules import across, mesh_shape
from jaxlm.planning.plan import Buffer, Collective, Plan, model_flops
from jaxlm.planning.roofline import network_of_sizes, roofline
from jaxlm.planning.targets import GPUS, Target
from jaxlm.reporting.memory import Memory
from jaxlm.runtime.chips import FLOAT32_PASSES, products_peak
from jaxlm.settings import ACTIVATIONS, Settings, remat_choices
from jaxlm.training.footprint import (
    FLOAT32,
    Share,
    Sizes,
    activations_kept,
    count_parameters,
    element_size,
    gradient_element_size,
    head_flops,
    kept_of_a_layer,
    kept_size,
    kernel_of,
    logits_memory,
    moments_size,
    parameters_of,
    predictions,
    share_of,
    state_sizes,
    whole_size,
)

# How far from the compiler's plan the estimate of a shipped config may be (tests/planning/test_estimated_plan.py holds
# it to that), and how many parameters the smallest of them has: of smaller models nothing is claimed.
SMALLEST = 120_000_000
BOUNDS = {"memory": 0.1, "arithmetic": 0.03, "sent": 0.1, "memory traffic": 0.15, "step": 0.05}


class Habits(NamedTuple):
    """What a compiler makes of a step, fitted to its programs."""

    # How many of each the backward pass of a layer holds at once:
    mlp: float  # [tokens, F]
    gated_mlp: float  # the same, of an MLP with a gate
    states: float  # [tokens, D] between the parts
    width: float  # the same inside them
    heads: float  # queries, keys and values
    scores: float  # float32 attention scores, without a fused kernel
    logits: float  # float32 logits of a chunk, which the head holds at once
    # How often goes through memory:
    elementwise: float  # what a pass's matrix products read and write, with the work between them
    score_passes: float  # float32 scores of a layer, without a fused kernel: softmax, dropout, backward
    logits_passes: float  # float32 logits
    kept_passes: float  # what is kept for the backward pass; without recomputation three times that, in many small parts
    routed_passes: float  # beside that, what an expert's MLP reads and writes
    on_chip: float  # bytes of an array that never leave the chip


GPU = Habits(2.5, 6.4, 6.2, 4.3, 2.0, 2.8, 1.9, 3.0, 20.7, 0.7, 2.0, 0.0, 0)
HABITS = {"tpu": Habits(4.6, 10.0, 3.1, 8.0, 3.1, 2.9, 2.9, 2.9, 14.4, 3.3, 2.2, 2.0, 3.8e7), "gpu": GPU, "cpu": GPU}
# Share of an exchange that no product hides, by kind of device and of exchange; all of it where none stands here.
GPU_EXPOSED = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.07)
EXPOSED = {chip.kind: GPU_EXPOSED for chip in GPUS.values()} | {
    "TPU v5 lite": {"all-gather": 0.2}, "TPU7x": {"all-gather": 0.12, "reduce-scatter": 0.08}}


class HeadShare(NamedTuple):
    """What one device has of the output head, in one micro-batch."""

    rows: int  # of the table
    positions: float  # that are predicted
    chunk: int  # of them, whose logits are there at once
    chunks: int


def estimated_plan(settings: Settings, target: Target) -> Plan:
    """The plan of a run on a target.

    Raises:
      UserError: model.vocab_size is not known, or the run cannot be laid out on the devices.
    """
    require_vocabulary(settings)
    sizes = mesh_shape(settings.mesh, target.num_devices)
    settings = replace(settings, mesh=replace(settings.mesh, **sizes))
    outer = across(settings.mesh, sizes, target.islands)
    check_layout(settings, sizes)
    check_kernel(settings, target.platform)
    habits, share = HABITS[target.platform], share_of(settings, sizes, target.platform)
    head = head_of(settings, sizes, target, share.tokens)
    state = state_sizes(settings, sizes)
    found = exchanges(settings, sizes, share, EXPOSED.get(target.device_kind, {}))
    memory, largest = memory_of(settings, sizes, share, head, habits, state)
    wanted, executed = (flops / target.num_devices for flops in (model_flops(settings), executed_flops(settings, sizes, target)))
    traffic = memory_traffic(settings, sizes, share, head, habits, state)
    chip, peak = target.chip, products_peak(target.device_kind, settings.train.precision)
    speed = None
    if chip.bandwidth and peak:
        speed = roofline(executed / peak, traffic, found, chip, network_of_sizes(target, sizes, outer, chip))
    if target.platform == "tpu" and settings.train.precision == "float32":
        executed *= FLOAT32_PASSES
    return Plan(settings, target, sizes, count_parameters(settings), state, memory, found, wanted, executed, traffic, speed,
                largest, None)


def head_of(settings: Settings, sizes: Sizes, target: Target, tokens: float) -> HeadShare:
    """The head of so many tokens; in chunks as `jaxlm.models.loss` takes them."""
    model, length = settings.model, settings.data.sequence_length
    rows, positions = padded_vocab_size(model.vocab_size) // sizes["tensor"], tokens * predictions(settings) / length
    sequences = max(1, round(tokens * sizes["context"] / length))
    each = max(1, round(positions / sequences))
    memory = logits_memory(settings, sizes, target.platform, target.device_kind)
    chunk = loss_chunk(each, sequences, rows, model.hidden_size, settings.train.loss_chunk, memory)
    return HeadShare(rows, positions, sequences * chunk, math.ceil(each / chunk))


# ---- memory ----------------------------------------------------------------------------------------------------------

def memory_of(settings: Settings, sizes: Sizes, share: Share, head: HeadShare, habits: Habits, state: dict[str, float]
              ) -> tuple[Memory, list[Buffer]]:
    """The larger of two moments: the head with all layers' activations kept, and the first layer of the backward
    pass."""
    train = settings.train
    depth = share.layers * (share.runs if sizes["stage"] > 1 else 1)
    moved = (name for name, choice in (remat_choices(train.remat) or {}).items() if choice == "host")
    on_host = depth * sum(share.block[name] for name in moved)
    gradients = state["gradients"] * gradient_element_size(settings) / FLOAT32
    copies = gradients if gradient_element_size(settings) < FLOAT32 else 0.0  # kernels cast for their gradients' sake
    if train.gradient_accumulation > 1 and sizes["stage"] == 1:
        gradients += state["gradients"]
    at_the_head = {"head: table, its gradient, logits": _head_memory(settings, head, habits)}
    layer = {
        "mlp, backward": (habits.gated_mlp if is_gated(settings.model) else habits.mlp) * share.mlp,
        "attention, backward": habits.heads * share.block["query_key_value"] + habits.scores * share.scores + share.mask,
        "states, backward": habits.states * share.states + habits.width * share.width,
        "a layer's kernels": share.kernels,
        "a layer's gradients": share.kernels / element_size(settings) * gradient_element_size(settings),
    }
    always = {"activations kept for the backward pass": activations_kept(settings, sizes, share)}
    if copies:
        always["kernels in bfloat16"] = copies
    backward = {"gradients": gradients, **layer}
    peak = always | max(at_the_head, backward, key=lambda moment: sum(moment.values()))
    arguments = state["parameters"] + state["optimizer"]
    temporaries = sum(peak.values())
    largest = sorted((Buffer(name, size) for name, size in peak.items()), key=lambda one: -one.size)[:5]
    if settings.optimizer.offload:
        on_host += FLOAT32 * sum(moments_size(settings.optimizer.name, one, sizes) for one in parameters_of(settings).values())
    return Memory(round(arguments), round(temporaries), round(on_host), round(arguments + temporaries)), largest


def _head_memory(settings: Settings, head: HeadShare, habits: Habits) -> float:
    element, width = element_size(settings), settings.model.hidden_size
    logits, states = FLOAT32 * head.chunk * head.rows, (2 * element + FLOAT32) * head.positions * width
    return (element + FLOAT32) * head.rows * width + habits.logits * logits + states


# ---- arithmetic ------------------------------------------------------------------------------------------------------

def executed_flops(settings: Settings, sizes: Sizes, target: Target) -> float:
    """With what is computed again, of a whole step on all devices; float32 once."""
    model, train, length = settings.model, settings.train, settings.data.sequence_length
    projections, attention = attention_flops(model, length)
    gates, kernel = (2 if is_gated(model) else 1), kernel_of(settings, target.platform)
    mlp = 2 * length * model.hidden_size * intermediate_size(model) * (gates + 1)
    router = 0.0
    if model.num_experts is not None:
        mlp *= model.experts_per_token * (model.capacity_factor or _dropless(model.num_experts, sizes["expert"], target))
        router = 2 * length * model.hidden_size * model.num_experts
    # products of scores, in forward passes; all but plain XLA leave out what causality hides
    forward, backward = {"xla": (1, 2), "splash": (1, 3.5), "cudnn": (1, 2.5), "ring": (1, 2.5)}[kernel]
    seen = 0.5 if kernel in ("cudnn", "ring") and model.causal else 1.0
    if kernel == "splash":
        seen = visible_blocks(model, length)
    recomputed = recompute(settings)
    heads, all_heads = query_heads(model), 2 * query_heads(model) + 2 * kv_heads(model)
    again = (recomputed["query_key_value"] * projections * (heads + 2 * kv_heads(model))
             + recomputed["attention_output"] * projections * heads) / max(1, all_heads)
    again += recomputed["attention"] * attention * seen * forward
    if model.num_experts is not None:
        again += recomputed["mlp_hidden"] * (mlp + router)  # to the end: the weights' gradients ask for what the experts give
    else:
        again += recomputed["mlp_hidden"] * mlp * gates / (gates + 1)
    block = 3 * (projections + mlp + router) + attention * seen * (forward + backward) + again
    idle = 1.0
    if settings.mesh.stage > 1:
        busy = train.gradient_accumulation * train.stage_repeats
        idle = (busy + settings.mesh.stage - 1) / busy
    head = 3 * head_flops(settings) * padded_vocab_size(model.vocab_size) / model.vocab_size
    return settings.data.global_batch_size * (model.num_layers * block * idle + head)


def _dropless(experts: int, expert_axis: int, target: Target) -> float:
    """What experts that drop nothing compute for every token that they get.

    A device has room for the tokens of all devices of the axis. XLA's compiler for GPUs makes of a product over
    groups of rows a dense one for each expert on the device; libtpu has a kernel for it.
    """
    return expert_axis * (1 if target.platform == "tpu" else experts // expert_axis)


def recompute(settings: Settings) -> dict[str, bool]:
    """Which of a block's activations the backward pass computes again."""
    choices = remat_choices(settings.train.remat) or {}
    return {name: choices.get(name) == "recompute" for name in ACTIVATIONS}


def memory_traffic(settings: Settings, sizes: Sizes, share: Share, head: HeadShare, habits: Habits, state: dict[str, float]
                   ) -> float:
    """Bytes: products' operands and results, elementwise work as a multiple of them, the head's chunks, the
    optimizer."""
    model, element = settings.model, element_size(settings)
    gates, again = (2 if is_gated(model) else 1), recompute(settings)
    arrays = [(2, share.width), (2, share.states), (3, share.query), (2, share.key_value), (gates + 1, share.mlp)]
    forward = sum(times * max(0.0, size - habits.on_chip) for times, size in arrays)
    routed = (gates + 1) * share.mlp if model.num_experts else 0.0
    passes = 3 + sum(again[name] for name in ("query_key_value", "attention_output", "mlp_hidden")) / 3
    kernels = share.kernels * (3 + 3 * gradient_element_size(settings) / element)
    if is_recurrent(model):  # half or a third of the kernels, for every token anew, forward and backward; and its gradient
        again_read = recurrent_width(model) / (model.hidden_size + recurrent_width(model)) * share.kernels
        kernels += settings.data.sequence_length * max(0.0, again_read - habits.on_chip) * (2 + 2 * FLOAT32 / element)
    kept = (1 if any(again.values()) else 3) * habits.kept_passes * kept_of_a_layer(settings, share)
    layers = share.runs * share.layers * (
        habits.elementwise * passes * forward + habits.score_passes * max(0.0, share.scores - habits.on_chip)
        + habits.routed_passes * passes * routed + kernels + kept)
    rows, positions, _, chunks = head
    heads = share.runs * (chunks * rows * model.hidden_size * (2 * element + 2 * FLOAT32)
                          + habits.logits_passes * FLOAT32 * positions * rows)
    micro_batches = settings.train.gradient_accumulation if sizes["stage"] == 1 else 1
    added_up = 3 * state["gradients"] * micro_batches if micro_batches > 1 else 0.0
    return layers + heads + added_up + 7 * state["parameters"]


# ---- exchanges -------------------------------------------------------------------------------------------------------

def exchanges(settings: Settings, sizes: Sizes, share: Share, exposed: dict[str, float]) -> list[Collective]:
    """What a device sends in a step, the largest first."""
    sent, counts = Counter(), Counter()
    for kind, axis, size, count in (*_of_parameters(settings, sizes, share), *_of_activations(settings, sizes, share)):
        if sizes[axis] > 1 and size:
            sent[kind, axis] += count * size
            counts[kind, axis] += count
    found = (Collective(kind, (axis,), size, counts[kind, axis], size * exposed.get(kind, 1.0))
             for (kind, axis), size in sent.items())
    return sorted(found, key=lambda one: -one.bytes_per_device)


def _left(size: int) -> float:
    """Share of an array that a device of a ring does not have."""
    return (size - 1) / size


def _of_parameters(settings: Settings, sizes: Sizes, share: Share) -> Iterator[tuple[str, str, float, int]]:
    """Kernels are fetched for each pass, and their gradients go home."""
    element, sent = element_size(settings), gradient_element_size(settings)
    fsdp = _left(sizes["fsdp"])
    for name, shape in parameters_of(settings).items():
        layers = share.layers * settings.train.stage_repeats if shape.is_stacked else 1
        whole, kept = whole_size(shape, sizes) / layers, kept_size(shape, sizes) / layers
        blocks, experts = shape.is_stacked, "experts" in shape.axes
        if shape.is_matrix and "embed" in shape.axes:
            runs = layers * (share.runs if blocks else settings.train.gradient_accumulation)
            reduced = element if experts else sent
            tied = name == "token_embedding.embedding" and settings.model.tied_embeddings
            fetches = 1 if not blocks else 3 if experts and recompute(settings)["mlp_hidden"] else 2
            yield "all-gather", "fsdp", fsdp * element * whole, runs * fetches
            yield "reduce-scatter", "fsdp", fsdp * reduced * whole, runs * (2 if tied else 1)
            for axis in ("context", "expert"):
                if not (axis == "expert" and experts):
                    yield "all-reduce", axis, 2 * _left(sizes[axis]) * reduced * kept, runs
        yield "all-reduce", "data", 2 * _left(sizes["data"]) * FLOAT32 * kept * layers, 1


def _of_activations(settings: Settings, sizes: Sizes, share: Share) -> Iterator[tuple[str, str, float, int]]:
    model, again = settings.model, recompute(settings)
    layers = share.layers * share.runs
    part = _left(sizes["tensor"]) * share.width
    if is_recurrent(model):  # the states before are fetched for every token, and what comes out goes to the tokens' devices
        yield "all-gather", "tensor", part, 4 * layers
        yield "reduce-scatter", "tensor", part, 3 * layers
        yield "all-to-all", "tensor", part / sizes["tensor"], 2 * layers
        return
    yield "all-gather", "tensor", part, 6 * layers  # into each part, and for its gradients twice
    yield "reduce-scatter", "tensor", part, (4 + again["attention_output"]) * layers
    if model.attention == "auto":
        hop = share.key_value * (sizes["context"] - 1) / 2
        yield "collective-permute", "context", 2 * hop, layers * (4 + again["attention"])
    else:
        whole = _left(sizes["context"]) * (2 * share.query + share.key_value)
        yield "all-to-all", "context", whole, layers * (2 + again["attention"])
    if model.num_experts is not None:
        rows = share.tokens * model.experts_per_token * (model.capacity_factor or sizes["expert"])
        there = _left(sizes["expert"]) * element_size(settings) * rows * model.hidden_size
        yield "all-to-all", "expert", there, 2 * layers * (2 + again["mlp_hidden"])
    yield "collective-permute", "stage", share.states, 2 * share.runs
