"""What one device holds of a run: parameters, optimizer, gradients, and the activations that wait for the backward
pass.

Counted from shapes and settings; nothing is built or compiled. `jaxlm plan --fast` adds to it what compilers make of
a step; and a run, or a plan that compiles, takes from it how much of a device's memory is left for the logits of the
loss, the same for both.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from jaxlm.models.parameters import Parameter, num_parameters, parameters
from jaxlm.models.sizes import (
    attention_kernel,
    block_flops,
    fits_fused_kernels,
    head_dim,
    intermediate_size,
    is_gated,
    is_recurrent,
    kv_heads,
    query_heads,
)
from jaxlm.parallel.rules import parts
from jaxlm.runtime.chips import find_chip
from jaxlm.settings import ACTIVATIONS, Settings, remat_choices
from jaxlm.tasks.find import find_task

Sizes = Mapping[str, int]  # of the mesh's axes
FLOAT32 = 4  # bytes
LANES = 128  # numbers in a row of a TPU's registers
MOMENTS = {"adamw": 2, "adam": 2, "lamb": 2, "lion": 1, "sgd": 1, "rmsprop": 2}  # float32 copies of a parameter
FACTORED = 128  # Adafactor keeps a row and a column of what is at least this wide
# Of the memory that is left, what the float32 logits may take. With exponentials and gradients compilers make up to
# 2.5 times as much of them; the rest is for what they need beside what is counted here.
FOR_LOGITS = 1 / 6


class Share(NamedTuple):
    """What one device has of one micro-batch, in bytes of the compute type unless said, and how often it runs one."""

    tokens: float
    states: float  # [tokens, D] between the parts of a block, where tensor cuts the tokens
    width: float  # [tokens, D]
    query: float
    key_value: float
    padding: float  # of both in memory, where a kernel wants rows of 128 numbers
    mlp: float  # [tokens, F], once; with experts, the rows that they take
    scores: float  # float32 attention scores; 0 in a fused kernel
    mask: float  # of segments, where the kernel wants it as an array
    kernels: float  # a layer's, whole but for what tensor and expert cut
    layers: int  # that follow each other in one go
    runs: int  # goes in a step

    @property
    def block(self) -> dict[str, float]:
        """Bytes of each of `jaxlm.settings.ACTIVATIONS`, a layer's."""
        sizes = (self.states, self.padding * (self.query + self.key_value), self.padding * self.query, self.states, self.mlp,
                 self.states)
        return dict(zip(ACTIVATIONS, sizes, strict=True))


def logits_memory(settings: Settings, sizes: Sizes, platform: str, device_kind: str) -> float:
    """Bytes of float32 logits for which a device of this kind has room; 0 where its memory is not known, as on a CPU.

    A function of the run and of the kind of device alone: all processes of a run, and a plan made elsewhere, come to
    the same.
    """
    settings = replace(settings, mesh=replace(settings.mesh, **sizes))
    share, state = share_of(settings, sizes, platform), state_sizes(settings, sizes)
    held = sum(state.values()) + activations_kept(settings, sizes, share)
    if settings.train.gradient_accumulation > 1:  # their sum, beside those of a micro-batch
        held += state["gradients"]
    return FOR_LOGITS * max(0.0, (find_chip(device_kind).memory or 0.0) - held)


def kernel_of(settings: Settings, platform: str) -> str:
    """The attention kernel: xla, cudnn, splash or ring."""
    model, data = settings.model, settings.data
    if model.attention == "auto" and settings.mesh.context > 1:
        return "ring"
    if model.attention != "auto":
        return model.attention
    return attention_kernel(platform, settings.train.precision, data.sequence_length, head_dim(model),
                            fused=fits_fused_kernels(model))


def share_of(settings: Settings, sizes: Sizes, platform: str) -> Share:
    model, data, train = settings.model, settings.data, settings.train
    element, tensor, length = element_size(settings), sizes["tensor"], data.sequence_length
    rows = data.global_batch_size / train.gradient_accumulation / math.prod(sizes[axis] for axis in ("data", "fsdp", "expert"))
    tokens = rows * length / sizes["context"]
    routed = tokens * model.experts_per_token * (model.capacity_factor or 1) if model.num_experts else tokens
    kernel = kernel_of(settings, platform)
    scores = {"xla": length**2, "ring": (length / sizes["context"])**2}.get(kernel, 0)
    scores *= FLOAT32 * rows * query_heads(model) / tensor
    masked = kernel == "cudnn" and data.packing == "documents" and not is_recurrent(model)
    mask = element * rows * length**2 if masked else 0.0
    kernels = sum(whole_size(shape, sizes) / model.num_layers * sizes["stage"] for shape in parameters_of(settings).values()
                  if shape.is_stacked and shape.is_matrix)
    ticks = train.gradient_accumulation * train.stage_repeats + sizes["stage"] - 1
    return Share(
        tokens, states=element * tokens * model.hidden_size / tensor, width=element * tokens * model.hidden_size,
        query=element * tokens * query_heads(model) * head_dim(model) / tensor,
        key_value=2 * element * tokens * kv_heads(model) * head_dim(model) / tensor,
        padding=math.ceil(head_dim(model) / LANES) * LANES / head_dim(model) if kernel == "splash" else 1.0,
        mlp=element * routed * intermediate_size(model) / tensor, scores=scores, mask=mask, kernels=element * kernels,
        layers=model.num_layers // (sizes["stage"] * train.stage_repeats),
        runs=ticks if sizes["stage"] > 1 else train.gradient_accumulation)


def kept_of_a_layer(settings: Settings, share: Share) -> float:
    """Bytes of a layer's activations that stay on the device until the backward pass, by train.remat."""
    gates = 2 if is_gated(settings.model) else 1
    block = share.block | {"mlp_hidden": share.mlp * gates}
    if settings.model.norm_position == "pre":
        block["mlp_output"] = 0.0  # nothing asks for it
    choices = remat_choices(settings.train.remat)
    if choices is None:  # what every function of the block asks for, too: norms and rotations in float32, the activation
        wide = FLOAT32 / element_size(settings)
        rotated = wide * (share.query + share.key_value / 2) if settings.model.positions == "rope" else 0.0
        return sum(block.values()) + 2 * (2 * wide + 1) * share.states + rotated + 4 * share.mlp + 2 * share.scores
    return sum(size for name, size in block.items() if choices[name] == "keep")


def activations_kept(settings: Settings, sizes: Sizes, share: Share) -> float:
    """Bytes of all layers' activations that are there when the backward pass begins."""
    return kept_of_a_layer(settings, share) * share.layers * (share.runs if sizes["stage"] > 1 else 1)


def parameters_of(settings: Settings) -> dict[str, Parameter]:
    """Of the run's model and the heads of its task, by dotted path."""
    return parameters(settings.model, find_task(settings).objectives())


def count_parameters(settings: Settings) -> int:
    """Numbers in them, without the padding of the vocabulary."""
    return num_parameters(settings.model, find_task(settings).objectives())


def predictions(settings: Settings) -> int:
    """Positions of a sequence that reach the output head."""
    return sum(objective.predictions(settings.data) for objective in find_task(settings).objectives())


def head_flops(settings: Settings) -> float:
    """FLOPs of one sequence's forward pass through the heads."""
    return sum(objective.flops(settings.model, objective.predictions(settings.data))
               for objective in find_task(settings).objectives())


def training_flops(settings: Settings) -> float:
    """FLOPs of one sequence's forward and backward pass, as PaLM counts them (Chowdhery et al. 2022, appendix B).

    Matrix products only, a backward pass is two forward passes, attention counts every pair of positions, and
    recomputation does not count.
    """
    return 3 * (settings.model.num_layers * block_flops(settings.model, settings.data.sequence_length) + head_flops(settings))


def element_size(settings: Settings) -> int:
    """Bytes of the compute type."""
    return 2 if settings.train.precision == "bfloat16" else FLOAT32


def gradient_element_size(settings: Settings) -> int:
    return 2 if settings.train.gradient_precision == "bfloat16" else FLOAT32


def whole_size(shape: Parameter, sizes: Sizes) -> float:
    """Numbers of a parameter that a device works with: cut by all axes but fsdp, over which it is fetched."""
    return math.prod(shape.sizes) / parts(shape.axes, {**sizes, "fsdp": 1})


def kept_size(shape: Parameter, sizes: Sizes) -> float:
    """Numbers of a parameter that a device keeps."""
    return math.prod(shape.sizes) / parts(shape.axes, sizes)


def state_sizes(settings: Settings, sizes: Sizes) -> dict[str, float]:
    """Bytes of parameters, optimizer on the device, gradients."""
    shapes, name = parameters_of(settings), settings.optimizer.name
    numbers = sum(kept_size(shape, sizes) for shape in shapes.values())
    moments = sum(moments_size(name, shape, sizes) for shape in shapes.values())
    return {"parameters": FLOAT32 * numbers, "optimizer": 0.0 if settings.optimizer.offload else FLOAT32 * moments,
            "gradients": FLOAT32 * numbers}


def moments_size(optimizer: str, shape: Parameter, sizes: Sizes) -> float:
    """Numbers that an update rule keeps of a parameter on each device."""
    if optimizer == "muon":  # for the hidden matrices; Adam for the others
        return (1 if shape.is_stacked and shape.is_matrix else 2) * kept_size(shape, sizes)
    if optimizer != "adafactor":
        return MOMENTS[optimizer] * kept_size(shape, sizes)
    stacked = shape.is_stacked
    *rest, second, first = sorted((1, 1, *shape.sizes[stacked:]))
    if second < FACTORED:
        return kept_size(shape, sizes)
    # Shazeer & Stern 2018: the two largest dimensions one by one, whole on every device
    return math.prod(rest) * (first + second) * (shape.sizes[0] / parts(shape.axes[:1], sizes) if stacked else 1)
