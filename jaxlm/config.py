"""The run file: YAML and `a.b=c` overrides in, validated `Settings` out, or one line that says what is wrong."""

import dataclasses
import os
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from jaxlm.errors import UserError, nearest
from jaxlm.settings import TRAINED_TOKENIZERS, Settings

_SETTINGS = pydantic.TypeAdapter(Settings)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a run file, or the `config.yaml` of a run directory, and applies `a.b=c` overrides.

    Raises:
      UserError: the file is missing or no YAML mapping, a key is unknown or ill-typed, or values contradict each other.
    """
    path = Path(path)
    run_dir = path if (path / "config.yaml").is_file() else None
    path = path / "config.yaml" if run_dir else path
    values = _read_yaml(path)
    if run_dir:
        values["run_dir"] = str(run_dir)  # wherever it has been moved or copied to
    unknown = next(_unknown_keys(values), None)
    if unknown:
        raise UserError(f"{path}: {unknown}")
    for override in overrides:
        _apply_override(values, override)
    return validate(values, where=str(path))


def validate(values: dict[str, Any], where: str = "settings") -> Settings:
    """Turns nested plain values into checked `Settings`. Raises UserError."""
    unknown = next(_unknown_keys(values), None)
    if unknown:
        raise UserError(f"{where}: {unknown}")
    try:
        settings = _SETTINGS.validate_python(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None
    check(settings)
    return settings


def dump(settings: Settings) -> str:
    """YAML that `load` turns back into the same settings."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True, width=120)


def to_dict(settings: Settings) -> dict[str, Any]:
    """Nested plain values, JSON-able."""
    return _SETTINGS.dump_python(settings, mode="json")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}, along sections only (a mapping that is a value, as a data mixture, stays)."""
    sections = {name for name, _ in _sections()}
    flat = {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        flat |= flatten(value, f"{full}.") if full in sections and isinstance(value, dict) else {full: value}
    return flat


def keys() -> Iterator[tuple[str, str, Any, str, str]]:
    """Every key as (dotted name, type, default, unit, help), in the order of `jaxlm.settings`."""
    for prefix, section in [("", Settings), *_sections()]:
        hints = typing.get_type_hints(section, include_extras=True)
        for item in dataclasses.fields(section):
            if not dataclasses.is_dataclass(hints[item.name]):
                default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
                name = f"{prefix}.{item.name}" if prefix else item.name
                yield name, _type_name(hints[item.name]), default, item.metadata["unit"], item.metadata["help"]


def check(settings: Settings) -> None:
    """Refuses values that contradict each other, before anything is compiled or written. Raises UserError."""
    model, data, train = settings.model, settings.data, settings.train
    kv_heads = model.num_kv_heads or model.num_heads
    micro_batch = data.global_batch_size / train.gradient_accumulation
    bert = model.family == "bert"
    contradictions = [
        (model.head_dim is None and model.hidden_size % model.num_heads,
         f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}; "
         "change one or set model.head_dim"),
        (model.num_heads % kv_heads,
         f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={kv_heads}"),
        (model.positions == "rope" and (model.head_dim or model.hidden_size // model.num_heads) % 2,
         "model.positions=rope needs an even head width; change model.hidden_size, model.num_heads or model.head_dim"),
        (bert and (model.positions == "rope" or model.normalization == "rmsnorm" or model.qk_norm or not model.tied_embeddings),
         "model.family=bert is BERT exactly: learned positions, layernorm, tied embeddings, no qk_norm; "
         "model.positions, normalization, qk_norm and tied_embeddings belong to gpt"),
        (not bert and model.next_sentence, "model.next_sentence=true needs model.family=bert"),
        (model.next_sentence and model.type_vocab_size < 2, "model.next_sentence=true needs model.type_vocab_size of at least 2"),
        (data.sequence_length > model.max_length,
         f"data.sequence_length={data.sequence_length} is longer than model.max_length={model.max_length}"),
        (data.sequence_length < (5 if bert else 2),
         f"data.sequence_length={data.sequence_length} is too short; at least {5 if bert else 2}"),
        (data.global_batch_size % train.gradient_accumulation,
         f"data.global_batch_size={data.global_batch_size} is not a multiple of "
         f"train.gradient_accumulation={train.gradient_accumulation}"),
        (train.loss_chunk and data.sequence_length % train.loss_chunk and not bert,
         f"train.loss_chunk={train.loss_chunk} does not divide data.sequence_length={data.sequence_length}"),
        (data.tokenizer in TRAINED_TOKENIZERS and data.raw and model.vocab_size is None,
         f"data.tokenizer={data.tokenizer} is trained to model.vocab_size tokens; set model.vocab_size"),
        (settings.schedule.warmup_steps >= train.steps,
         f"schedule.warmup_steps={settings.schedule.warmup_steps} leaves nothing of train.steps={train.steps}"),
        ((settings.schedule.decay_steps or train.steps) > train.steps,
         f"schedule.decay_steps={settings.schedule.decay_steps} is more than train.steps={train.steps}"),
        (settings.schedule.name in ("linear", "cosine")
         and (settings.schedule.decay_steps or train.steps) <= settings.schedule.warmup_steps,
         f"schedule.decay_steps={settings.schedule.decay_steps} is not more than "
         f"schedule.warmup_steps={settings.schedule.warmup_steps}"),
        (model.attention == "cudnn" and (model.attention_dropout if model.attention_dropout is not None else model.dropout),
         "model.attention=cudnn has no attention dropout; set model.attention_dropout=0 or model.attention=xla"),
        (settings.run_dir.strip() == "", "run_dir is empty; name a folder"),
        (isinstance(data.corpus, dict) and not data.corpus, "data.corpus is an empty mixture; name at least one folder"),
        (isinstance(data.corpus, dict) and data.raw,
         "data.raw cannot be prepared into a mixture; give data.corpus one folder, or drop data.raw"),
    ]
    contradictions += [(getattr(settings.mesh, axis) != 1, f"mesh.{axis}={getattr(settings.mesh, axis)} is not available yet; "
                        "leave it at 1 and use mesh.data, mesh.fsdp, mesh.tensor") for axis in ("context", "stage", "expert")]
    sizes = {axis: getattr(settings.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    contradictions += [(size == 0, f"mesh.{axis}=0; expected a positive number, or -1 for the rest") for axis, size in sizes.items()]
    contradictions.append((list(sizes.values()).count(-1) > 1, "only one axis of the mesh may be -1"))
    tensor = settings.mesh.tensor
    if tensor > 1:
        intermediate = model.intermediate_size or 4 * model.hidden_size
        contradictions += [
            (size % tensor, f"mesh.tensor={tensor} does not divide {name}={size}")
            for name, size in (("model.num_heads", model.num_heads), ("model.num_kv_heads", kv_heads),
                               ("model.intermediate_size", intermediate),
                               ("the vocabulary's padding to multiples of 128", 128))]
    if settings.mesh.fsdp > 1:
        contradictions.append((model.hidden_size % settings.mesh.fsdp,
                               f"mesh.fsdp={settings.mesh.fsdp} does not divide model.hidden_size={model.hidden_size}"))
    batch_ways = max(settings.mesh.data or 1, 1) * max(settings.mesh.fsdp, 1)
    contradictions.append((micro_batch % batch_ways,
                           f"a micro-batch of {micro_batch:g} sequences (data.global_batch_size / train.gradient_accumulation) "
                           f"does not divide over mesh.data * mesh.fsdp = {batch_ways} devices"))
    for wrong, message in contradictions:
        if wrong:
            raise UserError(message)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such run file or run directory{nearest(str(path), siblings)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder without config.yaml; expected a run file or a run directory") from None
    except (UnicodeDecodeError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error.__class__.__name__})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"'{override}': expected key=value, for example train.steps=100")
    known = [full for full, *_ in keys()]
    if name not in known:
        if any(full.startswith(f"{name}.") for full in known):
            raise UserError(f"'{override}': {name} is a section; set one of its keys, for example "
                            f"{next(full for full in known if full.startswith(f'{name}.'))}=...")
        raise UserError(f"unknown key '{name}'{_suggestion(name, known)}")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise UserError(f"'{override}': the value is not valid YAML; quote it") from None
    *sections, last = name.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
    values[last] = value


def _sections(section: type = Settings, prefix: str = "") -> Iterator[tuple[str, type]]:
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            full = f"{prefix}{name}"
            yield full, hint
            yield from _sections(hint, f"{full}.")


def _unknown_keys(values: dict[str, Any], section: type = Settings, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(section)
    for name, value in values.items():
        full = f"{prefix}{name}"
        if name not in hints:
            yield f"unknown key '{full}'{_suggestion(full, [known for known, *_ in keys()] + [known for known, _ in _sections()])}"
        elif dataclasses.is_dataclass(hints[name]):
            if value is None:
                values[name] = {}  # `model:` with nothing under it: all defaults
            elif isinstance(value, dict):
                yield from _unknown_keys(value, hints[name], f"{full}.")
            else:
                yield f"{full} is a section: expected keys under it, found '{value}'"


def _suggestion(name: str, known: Sequence[str]) -> str:
    """The nearest full key, or the key of the same last name in another section."""
    same_name = [full for full in known if full.split(".")[-1] == name.split(".")[-1]]
    return f"; did you mean '{same_name[0]}'?" if same_name else nearest(name, known)


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    known = {full: (kind, default) for full, kind, default, *_ in keys()}
    location = [str(part) for part in problem["loc"]]
    # pydantic appends the branch of a union or the index in a list to the key's own path
    name = next((".".join(location[:n]) for n in range(len(location), 0, -1) if ".".join(location[:n]) in known), ".".join(location))
    kind = known.get(name, ("",))[0]
    hint = nearest(str(problem["input"]), kind.split(" | ")) if " | " in kind else ""
    return f"{name}={problem['input']!r}: expected {kind}{hint}"


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [f"{sign} {getattr(bound, attribute)}" for bound in args[1:]
                  for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")) if hasattr(bound, attribute)]
        return " ".join([_type_name(args[0]), *([", ".join(bounds)] if bounds else [])])
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(arg) for arg in args)
    if origin in (list, dict):
        return f"{origin.__name__} of {' to '.join(_type_name(arg) for arg in args)}"
    return {type(None): "null", str: "text", bool: "true | false"}.get(hint, getattr(hint, "__name__", str(hint)))


def resolve_corpus(settings: Settings) -> dict[str, float]:
    """The corpus folders and their weights; the default is RUN_DIR/corpus."""
    corpus = settings.data.corpus or os.path.join(settings.run_dir, "corpus")
    return corpus if isinstance(corpus, dict) else {corpus: 1.0}
