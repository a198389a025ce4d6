"""Every key of a run file, with its type, default, unit and meaning.

Plain frozen dataclasses at the bottom of the house: every other module may import them, they import its errors only.
`jaxlm.config` reads and validates them; `jaxlm help` and docs/reference.md are this file, made readable.
`None` means "derive it"; what it becomes is said in the key's help and printed when a run starts.
"""

import dataclasses
import functools
import os
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan, BeforeValidator
from pydantic_core import PydanticCustomError

from jaxlm.errors import UserError
from jaxlm.presets import PRESETS


def _number(value: Any) -> Any:
    """YAML's true is no number, though Python's is."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _column(name: Any) -> Any:
    """A column's number is written like its name."""
    return str(name) if type(name) is int else name


def expand_home(path: str) -> str:
    """`~/text` and `~user/text` with the home folder in its place, as a shell does it. Raises UserError: no such
    home."""
    expanded = os.path.expanduser(path)
    if not expanded.startswith("~") or os.path.lexists(path):
        return expanded
    user = path[1:].partition("/")[0]
    whose = f"there is no user '{user}' here" if user else "no home folder is known (HOME is not set)"
    raise UserError(f"{path}: {whose}; give the whole path, or ./{path} for what is called so")


def _place(path: str) -> str:
    try:
        return expand_home(path)
    except UserError as error:
        raise PydanticCustomError(NO_PLACE, "{why}", {"why": str(error).partition(": ")[2]}) from None


NO_PLACE = "no_place"
Place = Annotated[str, AfterValidator(_place)]  # file or folder; every key that names one is of this type
Column = Annotated[str, BeforeValidator(_column)]  # of a record file: its name, or its number, from 0
Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number), AllowInfNan(False)]
Positive = Annotated[Integer, Gt(0)]
NotNegative = Annotated[Integer, Ge(0)]
PositiveFloat = Annotated[Number, Gt(0)]
NotNegativeFloat = Annotated[Number, Ge(0)]
Fraction = Annotated[Number, Ge(0), Lt(1)]
AxisSize = Annotated[Integer, Ge(-1)]

# The mesh, slowest to fastest varying: neighbours along `tensor` are neighbours in the machine, where its many small
# collectives are cheap. Nested `shard_map`s (copies, then stages, then the rest) must follow this order: XLA of jax
# 0.12 aborts otherwise.
AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")

# The activations of a block that the backward pass asks for: what the block reads; queries, keys and values as
# attention takes them; what attention gives; the same through its output layer; inside the MLP; what the MLP gives.
ACTIVATIONS = ("residual", "query_key_value", "attention", "attention_output", "mlp_hidden", "mlp_output")

# train.remat's names, as choices by name; None: without any recomputation
PRODUCTS = ("query_key_value", "attention_output", "mlp_hidden", "mlp_output")
REMAT = {"none": None, "dots": dict.fromkeys(PRODUCTS, "keep"), "full": {}}

# The keys of `train` that say how long a run is, of which one is set, and how long it is where none is.
LENGTHS = ("steps", "epochs", "tokens", "hours")
DEFAULT_STEPS = 1000

# Keys of `model` that no parameter goes by.
FREE_IN_MODEL = ("dropout", "attention_dropout", "z_loss", "initializer_range", "attention", "capacity_factor", "balance_loss",
                 "router_z_loss")

TRAINED_TOKENIZERS = ("unigram", "bpe", "wordpiece")
BUILT_IN_TOKENIZERS = ("bytes", "characters")
RECORD_TASKS = ("text_classification",)  # which read labelled records; all else reads text


def key(default: Any, help: str, unit: str = "") -> Any:
    """A dataclass field that carries its help text and unit."""
    metadata = {"help": help, "unit": unit}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Architecture. A family sets every key that is null here (`jaxlm.presets`); sizes are GPT-2 small's."""

    family: Literal[tuple(PRESETS)] = key("gpt", "what the keys are that are null: gpt (GPT-2, GPT-3), bert, llama, ...")
    num_layers: Positive = key(12, "blocks")
    num_heads: Positive = key(12, "query heads")
    num_kv_heads: Positive | None = key(None, "key/value heads (grouped-query attention); null: num_heads")
    head_dim: Positive | None = key(None, "width of one head; null: hidden_size / num_heads")
    hidden_size: Positive = key(768, "width of the residual stream")
    intermediate_size: Positive | None = key(None, "width inside the MLP; null: 4 * hidden_size")
    vocab_size: Positive | None = key(None, "tokens; the size to train a tokenizer to; null: the tokenizer's", "tokens")
    max_length: Positive = key(1024, "longest sequence the model can take", "tokens")
    dropout: Fraction = key(0.0, "dropout on embeddings and residual branches")
    attention_dropout: Fraction | None = key(None, "dropout on attention probabilities; null: the same as dropout")
    causal: bool | None = key(None, "a token sees those before it (true), or all of its sequence; null: the family's")
    norm_position: Literal["pre", "post"] | None = key(
        None, "pre: x + f(norm(x)), as in GPT-2; post: norm(x + f(x)), as in BERT; null: the family's")
    embedding_norm: bool | None = key(None, "norm over the sum of the embeddings; null: the family's")
    final_norm: bool | None = key(None, "norm after the last block; null: the family's")
    first_norm: bool | None = key(
        None, "norm before the first block's attention; false where embedding_norm stands there; null: the family's")
    positions: Literal["learned", "rope"] | None = key(None, "position information; null: the family's")
    rope_theta: PositiveFloat | None = key(None, "base of the rotary frequencies; null: the family's")
    local_rope_theta: PositiveFloat | None = key(None, "the same in local layers; null: the family's, or rope_theta")
    rope_scaling: dict[str, str | PositiveFloat] | None = key(
        None, "longer contexts: {type: linear, factor: 4}, or {type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4, "
              "original_max_length: 8192}; null: none")
    attention_window: Positive | None = key(
        None, "what a token sees in a local layer: causal: the last so many tokens with its own; else those at most half as many "
              "away; null: the family's, or everything", "tokens")
    global_every: Positive | None = key(
        None, "with attention_window: the first of every so many layers sees everything; null: the family's, or none", "layers")
    normalization: Literal["layernorm", "rmsnorm"] | None = key(None, "kind of normalization; null: the family's")
    norm_epsilon: PositiveFloat | None = key(None, "added to the variance; null: the family's: 1e-5 for gpt, 1e-12 for bert")
    norm_bias: bool | None = key(None, "offsets in layernorms; null: the family's, or bias")
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"] | None = key(
        None, "MLP activation; null: the family's: gelu_tanh for gpt, gelu (erf) for bert")
    num_experts: Positive | None = key(None, "causal models: experts in place of each MLP; null: one MLP for all tokens")
    experts_per_token: Positive = key(2, "experts that each token goes to")
    capacity_factor: PositiveFloat | None = key(
        None, "most tokens of an expert while training, as a multiple of its even share on each device; null: dropless, as "
              "evaluation and generation always are")
    balance_loss: NotNegativeFloat = key(0.01, "weight of the loss that spreads tokens over experts")
    router_z_loss: NotNegativeFloat = key(0.001, "weight of the squared log-partition penalty on the router's logits")
    bias: bool | None = key(None, "biases in linear layers; null: the family's")
    query_key_value_bias: bool | None = key(None, "biases of queries, keys and values; null: the family's, or bias")
    tied_embeddings: bool | None = key(None, "output head shares the embedding table; null: the family's")
    qk_norm: bool | None = key(None, "RMS-normalize queries and keys per head; null: the family's")
    logit_soft_cap: PositiveFloat | None = key(None, "cap * tanh(logits / cap) on the output logits; null: off")
    z_loss: NotNegativeFloat = key(0.0, "weight of the squared log-partition penalty on the output logits")
    type_vocab_size: NotNegative | None = key(None, "token types; null: the family's (always 0 in families without)")
    next_sentence: bool = key(False, "train the next-sentence head on sentence pairs, as BERT (false: RoBERTa)")
    pooler: Literal["tanh", "relu", "gelu"] | None = key(
        None, "what is between a sequence's state and a classifier: a dense layer with this activation (gelu: and a norm); null: "
              "the family's, or nothing")
    pooling: Literal["first", "last", "mean"] | None = key(
        None, "which state a classifier reads: of the first token, of the last, or the mean of all; null: the first, in causal "
              "models the last")
    initializer_range: PositiveFloat = key(0.02, "standard deviation of the initial weights")
    scaled_initialization: bool | None = key(
        None, "layers that write into the residual stream begin smaller by the root of their number; null: the family's")
    attention: Literal["auto", "xla", "cudnn", "splash"] = key(
        "auto", "attention kernel; auto: cudnn on GPUs, splash on TPUs, xla elsewhere or where those cannot serve, and a ring "
        "where mesh.context splits sequences (any other value then exchanges heads for whole sequences: all-to-all)")

    def __str__(self) -> str:
        return self.family  # for people; nothing else is to ask for it

    def __hash__(self) -> int:  # rope_scaling is a dict
        return hash(repr(self))

    def __post_init__(self) -> None:
        """Nulls become what the family says, so that nobody else has to ask for the family."""
        family = PRESETS[self.family]
        filled = {name: value for name, value in family.items() if getattr(self, name) is None}
        if family["type_vocab_size"] == 0:  # run files of older versions name one also for those
            filled["type_vocab_size"] = 0
        for name, value in filled.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class CleaningSettings:
    """Optional steps before tokenizing; what each one dropped stands in the corpus's report.json."""

    repair_unicode: bool = key(False, "mend mis-decoded text and normalize to NFC (ftfy)")
    min_characters: NotNegative = key(1, "drop shorter documents", "characters")
    max_bytes: Positive = key(64 * 2**20, "drop longer documents", "bytes")
    max_repetition: Annotated[Number, Gt(0), Le(1)] = key(
        1.0, "drop documents in which a larger share of the lines, or of the 5-word runs, is repeated; 1: off")
    scripts: list[str] = key([], "keep documents whose letters are mostly of these Unicode scripts, e.g. [latin]; []: all")
    min_script_fraction: Annotated[Number, Gt(0), Le(1)] = key(0.8, "smallest share of letters in those scripts")
    exact_duplicates: bool = key(False, "drop documents whose text was seen before")
    near_duplicates: Annotated[Number, Gt(0), Le(1)] | None = key(
        None, "drop documents whose MinHash Jaccard similarity to an earlier one is at least this; null: off")


@dataclass(frozen=True, kw_only=True)
class MaskingSettings:
    """Masked-language modelling (bert): Devlin et al. 2019, section 3.1."""

    probability: Annotated[Number, Gt(0), Lt(1)] = key(0.15, "share of tokens to predict; 80 % masked, 10 % random, 10 % kept")
    whole_word: bool = key(False, "choose whole words instead of single tokens")
    max_predictions: Positive | None = key(None, "predictions in one sequence; null: probability * sequence_length, rounded up",
                                           "tokens")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Text, tokenizer, corpus and how a batch is cut from it."""

    raw: Place | list[Place] | None = key(
        None, "text to prepare: file, folder, glob, pipe or a list of them (text, source code, JSON Lines, JSON, CSV, TSV, "
              "Parquet, Arrow; each also compressed); python://stdlib is the running interpreter's own library")
    text_field: str = key("text", "field or column that holds the text (JSON, CSV, TSV, Parquet, Arrow)")
    document: Literal["file", "line"] = key("file", "what one document is in a text file")
    encoding: str = key(
        "utf-8", "encoding of the text, for example latin-1, gb18030, shift-jis; byte order marks win. Where more than 0.1 % of "
                 "a file's characters are none of it, `prepare` stops and names the likely one")
    corpus: Place | dict[Place, PositiveFloat] | None = key(
        None, "folder of the prepared corpus (also in s3:// or gs://), or {folder: weight} for a mixture; null: RUN_DIR/corpus")
    validation: Annotated[Number, Ge(0), Lt(1)] | Place = key(
        0.01, "share of the text held out, or raw text (path or glob) to use instead")
    validation_split: Literal["documents", "tail"] | None = key(
        None, "hold out whole documents by their hash, or the last part of every document; null: documents, or the tail of a "
              "single one")
    tokenizer: Place = key(
        "bpe", "train one (unigram, bpe: SentencePiece; wordpiece), use bytes or characters, or the path of a "
               "SentencePiece .model, a tokenizer.json or a saved tokenizer folder")
    end_token: str | None = key(
        None, "the token after each document, e.g. <|im_end|>, where a given tokenizer has several, or an unusual one; null: "
              "found by what lies beside the tokenizer, or by its spelling")
    lowercase: bool = key(False, "lowercase and strip accents (when training wordpiece, unigram or bpe)")
    tokenizer_sample: Positive = key(64 * 2**20, "text a tokenizer is trained on, at most", "bytes")
    cleaning: CleaningSettings = key(CleaningSettings(), "")
    shard_tokens: Positive = key(2**26, "tokens in one shard file of the corpus", "tokens")
    prepare_processes: Positive | None = key(None, "processes that read, clean and tokenize; null: one per core")
    sequence_length: Positive = key(1024, "tokens in one training sequence", "tokens")
    global_batch_size: Positive = key(8, "sequences in one optimizer step, over all devices and accumulation steps", "sequences")
    packing: Literal["concatenate", "documents"] = key(
        "concatenate", "concatenate: one stream of text cut into sequences (GPT-2); "
                       "documents: whole documents packed together, attention never crosses from one to the next")
    start_token: bool = key(
        True, "packing=documents, gpt: each document begins with the tokenizer's start token (its end token where it has none), "
              "so that its first token is learnt, too; false: as runs were trained before this key was there")
    masking: MaskingSettings = key(MaskingSettings(), "")
    prefetch: Positive = key(4, "batches made ahead of the step", "batches")
    damaged: Literal["stop", "skip"] = key(
        "stop", "text of the corpus that cannot be read or differs from its checksum: stop the run, or skip the sequences that "
                "need it (their rows become padding; they are named on stderr and counted as skipped_rows)")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The training step, and how many of them: one of steps, epochs, tokens and hours."""

    steps: Positive | None = key(None, "optimizer steps of the whole run; null: what epochs, tokens or hours come to, or 1000",
                                 "steps")
    epochs: PositiveFloat | None = key(
        None, "in place of steps: passes over the training text of all corpora together, of which the last may be a part")
    tokens: Positive | None = key(
        None, "in place of steps: tokens to train on; padding is none, a token that is seen again is one more", "tokens")
    hours: PositiveFloat | None = key(
        None, "in place of steps: hours of all starts of the run together; the schedule goes by the share of them that is over",
        "hours")
    precision: Literal["float32", "bfloat16"] = key("float32", "compute type; parameters and optimizer stay float32")
    gradient_precision: Literal["float32", "bfloat16"] = key(
        "float32", "type in which kernels' gradients travel and wait for the update; bfloat16: three quarters of fsdp's bytes")
    gradient_accumulation: Positive = key(1, "micro-batches that one step is cut into; in a pipeline they follow each other")
    stage_repeats: Positive = key(
        1, "groups of layers in each stage of a pipeline: with more of them it idles less and moves more")
    remat: Literal["none", "dots", "full"] | dict[Literal[ACTIVATIONS], Literal["keep", "recompute", "host"]] = key(
        "none", "what the backward pass recomputes: nothing, all but the matrix products, each whole block, or by name, e.g. "
                "{query_key_value: keep, mlp_hidden: host}, where the host's memory keeps what goes there; what is not named is "
                "recomputed, except for residual, which is kept")
    loss_chunk: Positive | None = key(
        None, "positions of a sequence whose logits exist at a time; null: as many as a GPU or TPU has room for beside state and "
              "activations; elsewhere as 64 MiB or a quarter of the table's gradient hold", "tokens")

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in LENGTHS):
            object.__setattr__(self, "steps", DEFAULT_STEPS)

    @property
    def length(self) -> str:
        """What the run file says of the run's length: train.epochs=3."""
        name = next(name for name in reversed(LENGTHS) if getattr(self, name) is not None)  # steps may be worked out by now
        return f"train.{name}={getattr(self, name):g}" if name in ("epochs", "hours") else f"train.{name}={getattr(self, name)}"


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Biases, norms and other vectors never decay."""

    name: Literal["adamw", "adam", "sgd", "rmsprop", "lion", "adafactor", "lamb", "muon"] = key("adamw", "update rule")
    learning_rate: PositiveFloat = key(3e-4, "peak learning rate")
    weight_decay: NotNegativeFloat = key(0.1, "decoupled weight decay; for adam, sgd and rmsprop L2 in the gradient")
    b1: Fraction = key(0.9, "decay of the first moment, or momentum")
    b2: Fraction = key(0.95, "decay of the second moment")
    epsilon: PositiveFloat = key(1e-8, "added to the denominator")
    clip_norm: PositiveFloat | None = key(1.0, "largest global gradient norm; null: no clipping")
    offload: bool = key(False, "keep the optimizer's state in the host's memory; it comes to the device for each update")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Learning rate over the run, as a share of optimizer.learning_rate."""

    name: Literal["linear", "cosine", "constant", "inverse_square_root", "warmup_stable_decay"] = key(
        "cosine", "shape after the warmup")
    warmup_steps: NotNegative = key(0, "linear rise to the peak", "steps")
    decay_steps: Positive | None = key(
        None, "linear, cosine: length of warmup and decay together, null: train.steps; "
              "warmup_stable_decay: length of the final decay, null: train.steps / 5, or what the warmup leaves", "steps")
    final_ratio: Annotated[Number, Ge(0), Le(1)] = key(0.0, "last learning rate / peak (linear, cosine, warmup_stable_decay)")


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Devices along each axis. One axis may be -1: all devices that are left."""

    data: AxisSize | None = key(None, "copies of the model, each with its share of the batch; null: -1 unless another axis is")
    fsdp: AxisSize = key(1, "batch and parameters, gradients, optimizer state sharded together")
    tensor: AxisSize = key(1, "heads, MLP and vocabulary split")
    context: AxisSize = key(1, "sequence split: each device holds a part of every sequence")
    stage: AxisSize = key(1, "layers split into the stages of a pipeline, which takes the micro-batches in turn")
    expert: AxisSize = key(1, "experts split, and the batch; tokens travel to their experts")
    across: dict[Literal[AXES], Positive] | None = key(
        None, "TPU slices or GPU nodes: into how many parts an axis is cut by the slow network between them, e.g. {data: 4}; "
              "null: data as far as it goes, then stage, fsdp, expert, context, tensor")
    elastic: bool = key(False, "with fewer devices than these sizes make, shrink data, then fsdp, and cut the batch into as many "
                               "more micro-batches, instead of refusing")


@dataclass(frozen=True, kw_only=True)
class DevicesSettings:
    """Where to run."""

    platform: Literal["auto", "cpu", "gpu", "tpu"] = key("auto", "backend; auto: the best one JAX finds")
    count: Annotated[Positive, Le(1024)] | None = key(
        None, "devices per process; on cpu they are emulated; null: all (cpu: 1)", "devices")
    overlap: bool = key(True, "set XLA's flags that let communication run beside computation (jaxlm/runtime/compiler.py); "
                              "on GPUs; your own XLA_FLAGS win")
    compiled: str | None = key("~/.cache/jaxlm/compiled", "folder of compiled programs, for the next start; null: none")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """RUN_DIR/checkpoints. The last step is always saved."""

    every_steps: Positive = key(1000, "save interval", "steps")
    keep_last: Positive = key(2, "newest checkpoints kept")
    keep_every_steps: Positive | None = key(None, "also save at multiples of this, and keep those for ever; null: none", "steps")
    keep_best: NotNegative = key(1, "also keep those that are best by the task's figure (task.best)")
    step: Positive | None = key(None, "evaluate, predict, generate: the checkpoint to use; null: the newest", "steps")
    allow: list[str] = key([], "keys that may differ from what the checkpoints were made with, though the run is then "
                               "another one, e.g. [seed, data.corpus]; schedule: a learning rate that has come down may rise")


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What is watched while a run goes on. A step whose loss or gradient is not finite never reaches the parameters."""

    spike_sigma: PositiveFloat | None = key(
        None, "also skip a step whose loss or gradient norm lies so many standard deviations above its mean over the last 128 "
              "good steps; null: off")
    most_skipped: Positive = key(10, "steps skipped in a row after which the run ends with a diagnosis", "steps")
    compare_every_steps: Positive | None = key(
        None, "compare the copies of the parameters on different devices, to find one that computes wrongly; null: off", "steps")
    start_seconds: PositiveFloat | None = key(
        300.0, "deadline for all processes to join; what takes longer than its deadline ends the run, with the stacks of all "
               "threads in RUN_DIR/hangs; null: none, as for all deadlines", "seconds")
    compile_seconds: PositiveFloat | None = key(3600.0, "deadline for compiling the step", "seconds")
    step_seconds: PositiveFloat | None = key(900.0, "deadline for a step with its batch, or a batch of an evaluation", "seconds")
    save_seconds: PositiveFloat | None = key(3600.0, "deadline for a checkpoint to be on disk", "seconds")
    restore_seconds: PositiveFloat | None = key(3600.0, "deadline for a checkpoint to be checked and read", "seconds")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Validation during training. The end of the run is always evaluated."""

    every_steps: Positive = key(500, "interval", "steps")
    steps: Positive | None = key(None, "batches of an evaluation during training; null: the whole validation set", "batches")
    batch_size: Positive | None = key(
        None, "sequences in one batch; null: data.global_batch_size / train.gradient_accumulation", "sequences")


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """metrics.jsonl, the progress line and TensorBoard."""

    every_steps: Positive = key(10, "interval of metrics rows", "steps")
    tensorboard: bool = key(True, "write TensorBoard events")
    samples_every_steps: NotNegative | None = key(
        None, "interval of samples: generate.prompts continued (gpt), or masks of the validation text filled (bert); "
              "printed, and kept in RUN_DIR/samples; null or 0: none", "steps")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """`jaxlm generate`, and the lines printed when a gpt run ends."""

    prompts: list[str] = key([""], "texts to continue")
    num_samples: Positive = key(1, "continuations of each prompt")
    max_new_tokens: Positive = key(64, "length of a continuation, at most", "tokens")
    temperature: NotNegativeFloat = key(0.8, "0: greedy")
    top_k: Positive | None = key(None, "sample among the k most likely tokens; null: all")
    top_p: Annotated[Number, Gt(0), Le(1)] = key(1.0, "sample among the most likely tokens that hold this probability")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """`jaxlm bench`."""

    steps: Positive = key(10, "timed steps", "steps")
    warmup_steps: Positive = key(2, "steps before the clock starts", "steps")


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What is learned from what."""

    name: Literal["causal_lm", "masked_lm", "bert", "text_classification"] | None = key(
        None, "causal_lm: the next token; masked_lm: hidden tokens; bert: hidden tokens and whether one text follows the other; "
              "text_classification: labels or a score of a text or a pair; null: causal_lm for causal models, bert with "
              "model.next_sentence, else masked_lm")
    fields: dict[str, Column | list[Column]] = key(
        {}, "columns of the file that hold what the task reads, by name or number (from 0): {text: sentence, label: label}, "
            "{text: 0, pair: 1, label: 2}, or a 0/1 column for each label: {text: comment, label: [toxic, threat]}; {}: found by "
            "their names, or by what they hold")
    problem: Literal["single_label", "multi_label", "regression"] | None = key(
        None, "what a label is: one name, several, or a number; null: numbers with a fraction are regression, lists are "
              "multi_label, all else is single_label")
    labels: list[Column] | None = key(
        None, "names of the labels, in the order of their numbers, which a file may have in their place; null: those in the "
              "training file, sorted")
    best: str | None = key(
        None, "figure of the evaluations by which the best checkpoints are chosen (checkpoint.keep_best): accuracy, macro_f1, "
              "matthews, spearman, ...; null: accuracy, for several labels micro_f1, for scores pearson; without labels loss")
    label_separator: str | None = key(
        None, "what stands between the labels of a text in one column of a table: a, b with `,`; null: one label a column")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run."""

    run_dir: Place = key("runs/default", "folder of everything the run writes; also in s3:// or gs://")
    init: Place | None = key(
        None, "where weights come from while the run has no checkpoint of its own: another run directory, or a Hugging Face "
              "folder; what the run file does not say of the model, the tokenizer and data.sequence_length is that one's; "
              "null: random")
    init_positions: Literal["fresh", "interpolate"] = key(
        "fresh", "with init, where model.max_length is more than that of init: further rows of learned positions are fresh, or "
                 "the rows are stretched")
    out: Place | None = key(
        None, "predict: the file to write; null: RUN_DIR/predictions.jsonl. export: the folder to make")
    max_shard: Positive = key(
        5 * 10**9, "export: weights in one safetensors file, at most; a larger tensor has a file of its own", "bytes")
    seed: NotNegative = key(0, "initial weights, data order, masks and dropout all derive from it")
    stages: list[dict[str, Any]] = key(
        [], "parts of the run that follow each other, each a mapping of keys that it sets anew, with a length of its own: "
            "- {train.steps: 900, data.sequence_length: 128}; weights, the optimizer's state and the count of steps go on. "
            "schedule goes over all of them, but for those that set optimizer.learning_rate or a key of schedule: there it "
            "begins anew. On the command line: stages.2.train.steps=50; []: all of the run is as it is said here")
    model: ModelSettings = key(ModelSettings(), "")
    task: TaskSettings = key(TaskSettings(), "")
    data: DataSettings = key(DataSettings(), "")
    train: TrainSettings = key(TrainSettings(), "")
    optimizer: OptimizerSettings = key(OptimizerSettings(), "")
    schedule: ScheduleSettings = key(ScheduleSettings(), "")
    mesh: MeshSettings = key(MeshSettings(), "")
    devices: DevicesSettings = key(DevicesSettings(), "")
    checkpoint: CheckpointSettings = key(CheckpointSettings(), "")
    guards: GuardSettings = key(GuardSettings(), "")
    eval: EvalSettings = key(EvalSettings(), "")
    logging: LoggingSettings = key(LoggingSettings(), "")
    generate: GenerateSettings = key(GenerateSettings(), "")
    bench: BenchSettings = key(BenchSettings(), "")


def remat_choices(remat: str | dict[str, str]) -> dict[str, str] | None:
    """What train.remat says of each of ACTIVATIONS: keep, recompute or host; None: nothing is recomputed."""
    choices = REMAT[remat] if isinstance(remat, str) else remat
    return None if choices is None else dict.fromkeys(ACTIVATIONS, "recompute") | {"residual": "keep"} | choices


@functools.cache
def sections(section: type = Settings, prefix: str = "") -> tuple[tuple[str, type], ...]:
    """Every section below `section` as (dotted name, dataclass)."""
    found = []
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            found += [(f"{prefix}{name}", hint), *sections(hint, f"{prefix}{name}.")]
    return tuple(found)


def to_dict(settings: Settings) -> dict[str, Any]:
    """Nested plain values, JSON-able."""
    return dataclasses.asdict(settings)


def dump(settings: Settings) -> str:
    """YAML that `jaxlm.config.load` turns back into the same settings. What the model's family says is null, so that
    another family can be said beside it."""
    values, family = to_dict(settings), PRESETS[settings.model.family]
    if settings.stages:  # they say how long the run is
        values["train"] |= dict.fromkeys(LENGTHS)
    values["model"] = {name: None if name in family and value == family[name] else value
                       for name, value in values["model"].items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def changed(settings: Any, default: Any = None) -> dict[str, Any]:
    """Nested plain values of those keys that are not their defaults; of a model's, those of its family."""
    default, found = default or type(settings)(), {}
    usual_of = ModelSettings(family=settings.family) if isinstance(settings, ModelSettings) else default
    for field_ in dataclasses.fields(settings):
        value, usual = getattr(settings, field_.name), getattr(usual_of, field_.name)
        if dataclasses.is_dataclass(value):
            value, usual = changed(value, usual), {}
        if value != usual or (field_.name == "family" and value != default.family):
            found[field_.name] = value
    return found


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}, along sections only (a mapping that is a value, as a data mixture, stays)."""
    names = {name for name, _ in sections()}
    flat = {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        flat |= flatten(value, f"{full}.") if full in names and isinstance(value, dict) else {full: value}
    return flat


def flat(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's keys by their dotted names, nested or dotted as they were written."""
    nested = {name: value for name, value in stage.items() if "." not in name}
    return flatten(nested) | {name: value for name, value in stage.items() if "." in name}


def nest(stage: dict[str, Any]) -> dict[str, Any]:
    """The inverse, all of it nested."""
    values: dict[str, Any] = {}
    for name, value in stage.items():
        *path, last = name.split(".")
        inside = values
        for section in path:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return values


def length_of(settings: Settings) -> str:
    """What the run file says of the run's length: train.epochs=3; of stages: stages of train.steps=900,
    train.steps=100."""
    if not settings.stages:
        return settings.train.length
    said = (f"{name}={value}" for stage in settings.stages for name, value in stage.items()
            if name.removeprefix("train.") in LENGTHS and value is not None)
    return f"stages of {', '.join(said)}"
