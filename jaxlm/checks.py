"""What a run file's values must not say together. Single values are checked by their types (`jaxlm.settings`)."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain

from jaxlm.console.units import counted
from jaxlm.data.decoding import encoding_problems
from jaxlm.errors import UserError
from jaxlm.models.sizes import (
    VOCAB_PADDING,
    attention_dropout_rate,
    head_dim,
    intermediate_size,
    is_recurrent,
    kv_heads,
    pooling,
    recurrent_width,
)
from jaxlm.settings import (
    AXES,
    BUILT_IN_TOKENIZERS,
    LENGTHS,
    RECORD_TASKS,
    TRAINED_TOKENIZERS,
    MeshSettings,
    ModelSettings,
    ScheduleSettings,
    Settings,
    TrainSettings,
    flatten,
    to_dict,
)
from jaxlm.storage.remote import check_url
from jaxlm.tasks.find import find_task

KERNELS = {"cudnn": "gpu", "splash": "tpu"}  # fused attention kernels, and where they run
MOST_DEVICES = 2**16  # along an axis, that a message proposes
SPLASH_BLOCK = 128  # tokens; splash attention takes multiples of it


def check(settings: Settings) -> None:
    """Refuses values that contradict each other, before anything is compiled or written. Raises UserError for the
    first."""
    check_urls(settings)
    problems = chain(
        model_problems(settings.model),
        text_problems(settings),
        find_task(settings).problems(),
        batch_problems(settings),
        precision_problems(settings.train),
        remat_problems(settings.train),
        length_problems(settings),
        mesh_problems(settings.mesh),
        layout_problems(settings, {axis: max(1, getattr(settings.mesh, axis) or 1) for axis in AXES}),
    )
    refuse_first(problems)


def check_held_out(settings: Settings) -> None:
    """Refuses records that are to be learned from and held out, too; to evaluate or to predict them is another matter.
    Raises UserError."""
    data = settings.data
    if settings.task.name in RECORD_TASKS and data.raw is not None and data.raw in (data.validation, [data.validation]):
        raise UserError(f"data.validation={data.validation} is data.raw, too; name another file, or a share of the records (0.1)")


def check_urls(settings: Settings) -> None:
    """Refuses remote paths without a bucket. Raises UserError."""
    for key, value in flatten(to_dict(settings)).items():
        for each in value if isinstance(value, list | dict) else [value]:
            if isinstance(each, str) and key != "generate.prompts":
                check_url(each, key)


def check_layout(settings: Settings, sizes: Mapping[str, int]) -> None:
    """The same for a mesh whose axes have these sizes, now that -1 is known. Raises UserError."""
    refuse_first(layout_problems(settings, sizes))


def check_kernel(settings: Settings, platform: str) -> None:
    """Refuses an attention kernel that these devices (cpu, gpu, tpu) lack, or that knows no float32. Raises
    UserError."""
    kernel = settings.model.attention
    if KERNELS.get(kernel, platform) != platform:
        raise UserError(f"model.attention={kernel} runs on {KERNELS[kernel].upper()}s, and these devices are {platform}; "
                        "use model.attention=auto")
    if kernel == "cudnn" and settings.train.precision == "float32":
        raise UserError("model.attention=cudnn computes in bfloat16 only, and train.precision=float32; use model.attention=auto, "
                        "or train.precision=bfloat16")


def require_vocabulary(settings: Settings) -> None:
    """For what works out a run's sizes without its corpus. Raises UserError: model.vocab_size is null."""
    if settings.model.vocab_size is None:
        raise UserError("model.vocab_size: missing; without a corpus it has to be said, for example model.vocab_size=32000")


def refuse_first(problems: Iterator[str]) -> None:
    for problem in problems:
        raise UserError(problem)


def model_problems(model: ModelSettings) -> Iterator[str]:
    if is_recurrent(model):
        yield from recurrent_problems(model)
        return
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}; "
               "change one or set model.head_dim")
    if model.num_heads % kv_heads(model):
        yield f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={kv_heads(model)}"
    if model.num_experts is not None and model.experts_per_token > model.num_experts:
        yield f"model.experts_per_token={model.experts_per_token} is more than model.num_experts={model.num_experts}"
    if model.positions == "rope" and head_dim(model) % 2:
        yield "model.positions=rope needs an even head width; change model.hidden_size, model.num_heads or model.head_dim"
    if model.num_experts is not None and not model.causal:
        yield f"model.num_experts={model.num_experts} needs a causal model; set model.causal=true, or leave it null"
    if model.global_every is not None and model.attention_window is None:
        yield f"model.global_every={model.global_every} needs local layers; set model.attention_window, or leave it null"
    if not model.first_norm and model.norm_position != "pre":
        yield "model.first_norm=false needs model.norm_position=pre; after a block every norm counts"
    if pooling(model) == ("first" if model.causal else "last"):
        kind, usual = ("a causal", "last") if model.causal else ("not a causal", "first")
        yield f"model.pooling={model.pooling}: this is {kind} model; expected {usual} or mean"
    yield from rope_scaling_problems(model)
    if model.next_sentence and model.causal:
        yield f"model.next_sentence=true needs a model that is not causal, as model.family=bert is, not {model.family}"
    if model.next_sentence and model.type_vocab_size < 2:
        yield f"model.type_vocab_size={model.type_vocab_size}: model.next_sentence=true needs at least 2"
    if model.attention in KERNELS and attention_dropout_rate(model):
        yield f"model.attention={model.attention} has no attention dropout; set model.attention_dropout=0 or model.attention=xla"
    if model.attention in KERNELS and model.attention_window is not None:
        yield f"model.attention={model.attention} knows no model.attention_window; use model.attention=auto"
    if model.capacity_factor is not None and model.num_experts is None:
        yield f"model.capacity_factor={model.capacity_factor} needs experts; set model.num_experts, or leave it null"


OF_TRANSFORMERS = ("num_kv_heads", "head_dim", "attention_dropout", "rope_scaling", "attention_window", "global_every", "qk_norm",
                   "num_experts", "capacity_factor", "next_sentence")


def recurrent_problems(model: ModelSettings) -> Iterator[str]:
    usual = ModelSettings(family=model.family)
    for name in OF_TRANSFORMERS:
        if getattr(model, name) != getattr(usual, name):
            yield f"model.{name}={getattr(model, name)} is for transformers; leave it away with model.family={model.family}"
    if model.hidden_size % 2 and not model.causal:
        yield f"model.hidden_size={model.hidden_size} has no two halves, one for each direction; use an even one"


ROPE_SCALING = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_length")}


def rope_scaling_problems(model: ModelSettings) -> Iterator[str]:
    scaling = model.rope_scaling
    if scaling is None:
        return
    if model.positions != "rope":
        yield f"model.rope_scaling needs model.positions=rope, not {model.positions}"
    if scaling.get("type") not in ROPE_SCALING:
        yield f"model.rope_scaling: type is {scaling.get('type')}, expected {' or '.join(ROPE_SCALING)}"
        return
    wanted, given = ROPE_SCALING[scaling["type"]], scaling.keys() - {"type"}
    if given != set(wanted) or any(isinstance(scaling[name], str) for name in wanted):
        yield f"model.rope_scaling: type={scaling['type']} takes the numbers {', '.join(wanted)}"
    elif scaling["type"] == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        yield "model.rope_scaling: low_freq_factor is below high_freq_factor"


def text_problems(settings: Settings) -> Iterator[str]:
    model, data = settings.model, settings.data
    if not settings.run_dir.strip():
        yield "run_dir is empty; name a folder"
    yield from encoding_problems(data.encoding)
    if not settings.generate.prompts:
        yield "generate.prompts is empty; expected at least one text, which may be ''"
    if model.attention == "splash" and data.sequence_length % SPLASH_BLOCK:
        yield (f"data.sequence_length={data.sequence_length}: model.attention=splash takes multiples of {SPLASH_BLOCK}; use "
               f"{round_to(data.sequence_length, SPLASH_BLOCK)}, or model.attention=auto")
    if data.sequence_length > model.max_length:
        yield f"data.sequence_length={data.sequence_length} is longer than model.max_length={model.max_length}"
    task = find_task(settings)
    if isinstance(data.corpus, dict) and not data.corpus:
        yield "data.corpus is an empty mixture; name at least one folder"
    if isinstance(data.corpus, dict) and data.raw:
        yield "data.raw cannot be prepared into a mixture; give data.corpus one folder, or drop data.raw"
    if data.end_token is not None and data.tokenizer in TRAINED_TOKENIZERS + BUILT_IN_TOKENIZERS:
        yield (f"data.end_token={data.end_token}: data.tokenizer={data.tokenizer} has an end token of its own; the key is for a "
               "tokenizer that is given as a file or folder")
    if task.special and data.tokenizer == "characters" and data.raw:
        yield (f"data.tokenizer=characters has no cls, sep and mask tokens, which {task} needs; "
               "use wordpiece, unigram, bpe or bytes")


def batch_problems(settings: Settings) -> Iterator[str]:
    data, train = settings.data, settings.train
    if data.global_batch_size % train.gradient_accumulation:
        yield (f"data.global_batch_size={data.global_batch_size} is not a multiple of "
               f"train.gradient_accumulation={train.gradient_accumulation}")


def precision_problems(train: TrainSettings) -> Iterator[str]:
    if train.gradient_precision == "bfloat16" and train.precision != "bfloat16":
        yield f"train.gradient_precision=bfloat16 is coarser than train.precision={train.precision}; set both, or neither"


def remat_problems(train: TrainSettings) -> Iterator[str]:
    if isinstance(train.remat, dict) and train.remat.get("residual") == "recompute":
        yield "train.remat: residual is what a block is recomputed from; keep it, or move it to host"


def length_problems(settings: Settings) -> Iterator[str]:
    """How long the run is, and whether its schedule fits in, where that is known yet."""
    train, schedule = settings.train, settings.schedule
    said = [f"train.{name}={getattr(train, name)}" for name in LENGTHS if getattr(train, name) is not None]
    if len(said) > 1:
        yield f"{' and '.join(said)}: a run has one length; keep one of them, and set the others null"
    if train.hours is not None and schedule.decay_steps is not None:
        yield (f"schedule.decay_steps={schedule.decay_steps}: nobody knows how many steps train.hours={train.hours:g} will be; "
               "set it null: linear and cosine then come down until the end, warmup_stable_decay over the last fifth of the time")
    if train.steps is not None:
        yield from schedule_problems(schedule, train.steps, train.length)


def schedule_problems(schedule: ScheduleSettings, steps: int, said: str) -> Iterator[str]:
    """What of the schedule does not fit in a run of so many steps, which the run file has `said` in its own words."""
    decay_steps = schedule.decay_steps or steps
    length = f"train.steps={steps}" if said.startswith("train.steps=") else f"the {counted(steps, 'step')} of {said}"
    if schedule.warmup_steps >= steps:
        yield f"schedule.warmup_steps={schedule.warmup_steps} leaves nothing of {length}; expected fewer"
    if decay_steps > steps:
        yield f"schedule.decay_steps={decay_steps} is more than {length}"
    if schedule.name in ("linear", "cosine") and decay_steps <= schedule.warmup_steps:
        yield f"schedule.decay_steps={decay_steps} is not more than schedule.warmup_steps={schedule.warmup_steps}"
    if schedule.name == "warmup_stable_decay" and schedule.decay_steps is not None:
        left = steps - schedule.warmup_steps
        if schedule.decay_steps == 1:
            yield ("schedule.decay_steps=1: warmup_stable_decay would lower nothing, for a decay begins at the peak; expected at "
                   "least 2, or null")
        elif schedule.decay_steps > left:
            yield (f"schedule.decay_steps={schedule.decay_steps} is more than the {left} steps that "
                   f"schedule.warmup_steps={schedule.warmup_steps} leaves of {length}; expected at most {left}")


def mesh_problems(mesh: MeshSettings) -> Iterator[str]:
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size == 0:
            yield f"mesh.{axis}=0; expected a positive number, or -1 for the rest"
    rest = [f"mesh.{axis}=-1" for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        yield f"{' and '.join(rest)}: only one axis can take the rest of the devices"


def layout_problems(settings: Settings, sizes: Mapping[str, int]) -> Iterator[str]:
    """What does not divide over axes of these sizes."""
    model, data = settings.model, settings.data
    recurrent = is_recurrent(model)
    whole = ("context", "stage", "expert") if recurrent else ()
    for axis in whole:
        if sizes[axis] > 1:
            yield f"mesh.{axis}={sizes[axis]} is for transformers; model.family={model.family} runs over data, fsdp and tensor"
    units = "model.hidden_size" if not recurrent or model.causal else "model.hidden_size / 2"
    width = recurrent_width(model) if recurrent else model.hidden_size
    split = [("tensor", units, width)] if recurrent else [
        ("tensor", "model.num_heads", model.num_heads),
        ("tensor", "model.num_kv_heads", kv_heads(model)),
        ("tensor", "model.intermediate_size", intermediate_size(model)),
    ]
    split.append(("fsdp", units, width))
    for axis, name, size in split:
        if size % sizes[axis]:
            fitting = max(part for part in range(1, min(sizes[axis], size + 1, MOST_DEVICES)) if size % part == 0)
            yield f"mesh.{axis}={sizes[axis]} does not divide {name}={size}; {fitting} does"
    if VOCAB_PADDING % sizes["tensor"]:
        yield f"mesh.tensor={sizes['tensor']} does not divide the vocabulary, which is padded to a multiple of {VOCAB_PADDING}"
    yield from context_problems(settings, sizes)
    yield from stage_problems(settings, sizes["stage"])
    if sizes["expert"] > 1 and model.num_experts is None:
        yield f"mesh.expert={sizes['expert']} needs experts; set model.num_experts, or leave it at 1"
    elif sizes["expert"] > 1 and model.num_experts % sizes["expert"]:
        yield f"mesh.expert={sizes['expert']} does not divide model.num_experts={model.num_experts}; change one of them"
    ways = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert"))
    micro_batch = data.global_batch_size // settings.train.gradient_accumulation
    if micro_batch % ways:
        yield (f"data.global_batch_size / train.gradient_accumulation = {micro_batch} sequences do not divide over "
               f"mesh.data * mesh.fsdp * mesh.expert = {ways} devices; use a multiple of {ways}, or more of mesh.tensor")
    ways *= sizes["stage"]
    if settings.eval.batch_size and settings.eval.batch_size % ways:
        yield (f"eval.batch_size = {settings.eval.batch_size} sequences do not divide over "
               f"mesh.stage * mesh.data * mesh.fsdp * mesh.expert = {ways} devices; use a multiple of {ways}")


def context_problems(settings: Settings, sizes: Mapping[str, int]) -> Iterator[str]:
    """What does not divide where the sequence is cut."""
    model, length, context = settings.model, settings.data.sequence_length, sizes["context"]
    if context == 1:
        return
    if model.attention == "auto":
        pieces = 2 * context if model.causal else context  # zigzag order: two pieces for each device
        if length % pieces:
            yield (f"mesh.context={context} cuts data.sequence_length={length} into {pieces} pieces, which are not equal; "
                   f"use {round_to(length, pieces, model.max_length)}")
    elif length % context:
        yield (f"mesh.context={context} does not divide data.sequence_length={length}; "
               f"use {round_to(length, context, model.max_length)}")
    elif model.num_heads % (context * sizes["tensor"]):
        yield (f"model.attention={model.attention} needs whole sequences, and mesh.context * mesh.tensor = "
               f"{context * sizes['tensor']} does not divide model.num_heads={model.num_heads}; use model.attention=auto")


def stage_problems(settings: Settings, stages: int) -> Iterator[str]:
    """What does not divide over the stages of a pipeline."""
    pieces, repeats = settings.train.gradient_accumulation, settings.train.stage_repeats
    if stages > 1 and pieces % stages:
        yield (f"train.gradient_accumulation={pieces}: a pipeline of mesh.stage={stages} stages takes a multiple of as many "
               f"micro-batches; use {-(-pieces // stages) * stages}, or more to let it idle less")
    if stages == 1 and repeats > 1:
        yield f"train.stage_repeats={repeats} needs a pipeline; set mesh.stage, or leave it at 1"
    if settings.model.num_layers % (stages * repeats):
        yield (f"model.num_layers={settings.model.num_layers} does not divide into mesh.stage * train.stage_repeats = "
               f"{stages * repeats} groups")


def round_to(number: int, unit: int, limit: int | None = None) -> int:
    """The multiple of `unit` nearest to `number`, and at least one; below `limit` if that leaves one."""
    nearest = max(1, round(number / unit)) * unit
    return limit // unit * unit if limit is not None and unit <= limit < nearest else nearest
