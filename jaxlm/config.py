"""The run file: YAML and `a.b=c` overrides in, validated `Settings` out, or one line that says what is wrong."""

import dataclasses
import difflib
import functools
import itertools
import json
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import yaml

from jaxlm.checks import check
from jaxlm.console.units import counted
from jaxlm.errors import UserError, clipped, nearest, shown, without_secrets
from jaxlm.near_misses import right_key, right_value
from jaxlm.settings import LENGTHS, NO_PLACE, Settings, expand_home, flat, flatten, nest, sections
from jaxlm.stages import SETTINGS, STAGES, check_stages
from jaxlm.storage.files import Location, as_path, exists, names_in, read_text
from jaxlm.storage.remote import check_url, is_remote
from jaxlm.values import PYTHONS_NULLS, alternatives, from_command_line, how_to_write, parse_yaml, typed

IN_A_STAGE = re.compile(rf"{STAGES}\.(\d{{1,9}})\.(.+)", re.DOTALL)  # as a key on the command line


class Origin(NamedTuple):
    """What trained weights say of a run that begins with them, where its run file says nothing."""

    model: dict[str, Any]  # keys of ModelSettings
    tokenizer: str | None  # its place
    sequence_length: int | None


def load(path: str | Path, overrides: Sequence[str] = (), about: Callable[[str], Origin] | None = None) -> Settings:
    """Reads a run file, or the `config.yaml` of a run directory, and applies `a.b=c` overrides. `about`: what a place
    named by `init` says; `about_run` where only run directories are known.

    Raises:
      UserError: the file is missing or no YAML mapping; a key is unknown, set twice or ill-typed; values contradict
      each other.
    """
    if is_remote(path):
        check_url(str(path), "CONFIG.yaml")
    path = as_path(path)
    run_dir = path if exists(path / "config.yaml") else None
    path = path / "config.yaml" if run_dir else path
    values, lines = _read_yaml(path)
    for key, problem in itertools.chain(_unknown_keys(values), _flatten_stages(values)):
        raise UserError(f"{path}:{lines.get(key, 1)}: {problem}")
    if run_dir:
        values["run_dir"] = str(run_dir)  # wherever it has been moved or copied to
        _forget_compiled(values)
    own_init = run_dir and not any(override.startswith("init=") for override in overrides)  # its config.yaml is complete
    return _settled(values, lines, path, overrides, None if own_init else about or about_run)


def made_of(values: dict[str, Any], overrides: Sequence[str], where: str | Path) -> Settings:
    """Settings that a verb has put together, with `a.b=c` overrides. `where`: from what. Raises UserError."""
    return _settled(values, {}, where, overrides, None)


def _settled(values: dict[str, Any], lines: dict[str, int], path: str | Path, overrides: Sequence[str],
             about: Callable[[str], Origin] | None) -> Settings:
    """Overrides applied, what `init` says filled in (by `about`; None: it is not asked), every value of its type, none
    against another. `lines`: of the file's keys."""
    given = [_apply_override(values, override) for override in overrides]
    for name in [*given, *_other_lengths(values, given)]:
        lines.pop(name, None)
    for key, problem in itertools.chain(_flatten_stages(values), _stages_against(values, given)):
        raise UserError(f"{path}:{lines[key]}: {problem}" if key in lines else problem)
    for key in _keys_with_secrets(values):
        where = f"{path}:{lines[key]}: " if key in lines else ""
        raise UserError(f"{where}{key}: a URL with a password, key or token in it, which config.yaml, logs and checkpoints would "
                        "keep; leave it out, and give it by the storage's own environment variables or credential files")
    values = typed(values)
    if about and isinstance(values.get("init"), str):
        _take_from_origin(values, about(expand_home(values["init"])))
    for key in _doubtful_nulls(values):
        where = f"{path}:{lines[key]}: " if key in lines else ""
        raise UserError(f"{where}{key}={flatten(values)[key]}: nothing is written null, and a folder of that name "
                        f"./{flatten(values)[key]}")
    try:
        settings = SETTINGS.validate_python(values)
    except pydantic.ValidationError as error:
        key, problem = _first_problem(error)
        raise UserError(f"{path}:{lines[key]}: {problem}" if key in lines else problem) from None
    if settings.stages:
        return _with_typed_stages(settings, path, lines)
    check(settings)
    return settings


# ---- stages ----------------------------------------------------------------------------------------------------------

def _flatten_stages(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Gives the keys of each stage their dotted names. (key, problem) of every key that is none, and what is no
    mapping."""
    stages = values.get(STAGES)
    if not stages:
        values.pop(STAGES, None)  # null: none
        return
    if not isinstance(stages, list):
        yield STAGES, (f"{STAGES}={shown(stages)}: expected a list of mappings, one for each stage, as in "
                       "- {train.steps: 900, data.sequence_length: 128}")
        return
    known = [full for full, *_ in key_table()]
    for number, stage in enumerate(stages, 1):
        if not isinstance(stage, dict):
            yield STAGES, f"{STAGES}.{number}={shown(stage)}: expected a mapping of keys, as in {{train.steps: 900}}"
            return
        stages[number - 1] = stage = flat({str(name): value for name, value in stage.items()})
        for name in stage:
            if name not in known:
                yield f"{STAGES}.{number}.{name}", f"{STAGES}.{number}: unknown key '{clipped(name)}'{advice(name, known)}"


def _stages_against(values: dict[str, Any], given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, problem) of what is said for the whole run, and otherwise by a stage."""
    stages, said = values.get(STAGES) or [], flatten(values)
    for name in [f"train.{length}" for length in LENGTHS] if stages else []:
        if said.get(name) is not None:
            yield name, f"{name}={said[name]}: each of the {STAGES} says for itself how long it is"
    for name in (name for name in given if name != STAGES):
        for number, stage in enumerate(stages, 1):
            if name in stage and said[name] is not None:
                yield name, (f"{name}={said[name]}: stage {number} has it {clipped(str(stage[name]))}; set it there, "
                             f"{STAGES}.{number}.{name}={said[name]}")


def _with_typed_stages(settings: Settings, path: Location, lines: dict[str, int]) -> Settings:
    """The stages' values read as their keys take them, and checked."""
    read = []
    try:
        for stage in settings.stages:
            read.append(flat(typed(nest(stage))))
            SETTINGS.validate_python(nest(read[-1]))
        settings = dataclasses.replace(settings, stages=read)
    except pydantic.ValidationError as error:
        key, problem = _first_problem(error)
        key, problem = f"{STAGES}.{len(read)}.{key}", f"{STAGES}.{len(read)}: {problem}"
        raise UserError(f"{path}:{lines[key]}: {problem}" if key in lines else problem) from None
    check_stages(settings)
    return settings


def _other_lengths(values: dict[str, Any], given: Sequence[str]) -> list[str]:
    """The file's word on how long the run is gives way to the command line's: train.epochs=3 there puts an end to
    train.steps here. Returns the keys that are null now."""
    lengths = [f"train.{name}" for name in LENGTHS]
    said = [name for name in lengths if name in given and values["train"][name.removeprefix("train.")] is not None]
    others = [name for name in lengths if name not in given] if said else []
    values |= {"train": values["train"] | {name.removeprefix("train."): None for name in others}} if others else {}
    return others


def about_run(place: str) -> Origin:
    """Of a run directory. Raises UserError."""
    path = as_path(place) / "config.yaml"
    if not exists(path):
        inside = next((str(parent) for parent in as_path(place).parents[:2] if exists(parent / "config.yaml")), None)
        raise UserError(f"init={place}: neither a run directory (config.yaml) nor a Hugging Face folder (config.json)"
                        + (f"; did you mean '{inside}'?" if inside else ""))
    values = typed(_read_yaml(path)[0])
    data = values.get("data") or {}
    return Origin(values.get("model") or {}, place, data.get("sequence_length"))


def _take_from_origin(values: dict[str, Any], origin: Origin) -> None:
    """Fills in what the run file does not say. A family that it says anew brings its own keys."""
    own = values.get("model") or {}
    same_family = own.get("family") in (None, origin.model.get("family", "gpt"))
    values["model"] = {**(origin.model if same_family else {}), **own}
    data = values["data"] = dict(values.get("data") or {})
    if data.get("tokenizer") not in (None, origin.tokenizer) and "vocab_size" not in own:
        values["model"].pop("vocab_size", None)  # another tokenizer has a size of its own
    if origin.tokenizer is not None and data.get("tokenizer") is None:
        data["tokenizer"] = origin.tokenizer
    if origin.sequence_length is not None and data.get("sequence_length") is None:
        data["sequence_length"] = min(origin.sequence_length, values["model"].get("max_length") or origin.sequence_length)


def _forget_compiled(values: dict[str, Any]) -> None:
    """Compiled programs are code, and a run directory may be somebody else's: where they are, its config.yaml does
    not say."""
    devices = values.get("devices")
    if isinstance(devices, dict) and devices.get("compiled") is not None:
        del devices["compiled"]


def _keys_with_secrets(values: dict[str, Any]) -> Iterator[str]:
    """Keys whose value is, or holds, a URL that says how to be let in. Prompts are text, not places."""
    for name, value in flatten(values).items():
        text = str(value)
        if not name.startswith("generate.") and "://" in text and without_secrets(text) != text:
            yield name


def _doubtful_nulls(values: dict[str, Any]) -> Iterator[str]:
    """Keys that take a text or null, and have Python's word for null, which may be the one or the other."""
    for name, value in flatten(values).items():
        if isinstance(value, str) and value in PYTHONS_NULLS and {str, types.NoneType} <= set(alternatives(_hints()[name])):
            yield name


@functools.cache
def _hints() -> dict[str, Any]:
    """The annotation of every key, by its dotted name."""
    return {f"{prefix}.{name}".lstrip("."): hint for prefix, section in [("", Settings), *sections()]
            for name, hint in typing.get_type_hints(section, include_extras=True).items() if not dataclasses.is_dataclass(hint)}


class Key(NamedTuple):
    """A key of a run file, as help shows it."""

    name: str  # dotted
    type: str
    default: Any
    unit: str
    help: str


@functools.cache
def key_table() -> tuple[Key, ...]:
    """Every key, in the order of `jaxlm.settings`."""
    keys = []
    for prefix, section in [("", Settings), *sections()]:
        for item in dataclasses.fields(section):
            name = f"{prefix}.{item.name}".lstrip(".")
            if name in _hints():
                default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
                keys.append(Key(name, _type_name(_hints()[name]), default, item.metadata["unit"], item.metadata["help"]))
    return tuple(keys)


def _read_yaml(path: Location) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's values, and the line of each key by its dotted name."""
    try:
        text = read_text(path)
        values, tree = parse_yaml(text)
    except FileNotFoundError:
        beside = [str(path.parent / name) for name in names_in(path.parent) if name.endswith(".yaml") or "." not in name]
        raise UserError(f"{path}: no such run file or run directory{nearest(str(path), beside)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder without config.yaml; expected a run file or a run directory") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a YAML run file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    lines: dict[str, int] = {}
    for key, line in _key_lines(tree):
        if key in lines:
            raise UserError(f"{path}:{line}: {key} is already set in line {lines[key]}")
        lines[key] = line
    return values or {}, lines


def _key_lines(tree: yaml.Node | None, prefix: str = "", stage: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every key of every section, in the order of the file, those of a stage as
    stages.1.train.steps; a name that occurs twice comes twice."""
    known = {name for name, _ in sections()}
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        yield f"{stage}{name}", key.start_mark.line + 1
        if name in known:
            yield from _key_lines(value, f"{name}.", stage)
        if name == STAGES and not stage and isinstance(value, yaml.SequenceNode):
            for number, item in enumerate(value.value, 1):
                yield from _key_lines(item, "", f"{STAGES}.{number}.")


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Sets the key that the override names, and returns its name."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UserError(f"'{clipped(override)}': expected key=value, for example train.steps=100")
    if in_a_stage := IN_A_STAGE.fullmatch(name):
        return _apply_to_stage(values, int(in_a_stage[1]), f"{in_a_stage[2]}={text}")
    known = [full for full, *_ in key_table()]
    if name not in known:
        if any(full.startswith(f"{name}.") for full in known):
            raise UserError(f"'{clipped(override)}': {name} is a section; set one of its keys, for example "
                            f"{next(full for full in known if full.startswith(f'{name}.'))}=...")
        raise UserError(f"unknown key '{clipped(name)}'{advice(name, known)}")
    try:
        text.encode()
        value = from_command_line(text, _hints()[name])
    except UnicodeEncodeError:
        raise UserError(f"{name}={clipped(ascii(text))}: not UTF-8 text") from None
    except ValueError as error:
        written = shlex.quote(json.dumps([text], ensure_ascii=False))
        raise UserError(f"'{clipped(override)}': brackets are for a list or a mapping, and this is none ({error}); a text with "
                        f"brackets around it is written {name}={clipped(written)}") from None
    *path, last = name.split(".")
    for section in path:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
    values[last] = value
    return name


def _apply_to_stage(values: dict[str, Any], number: int, override: str) -> str:
    stages = values.get(STAGES) or []
    if not isinstance(stages, list) or not 1 <= number <= len(stages):
        has = f"the run file has {counted(len(stages), 'stage')}" if stages else "the run file has no stages"
        raise UserError(f"'{STAGES}.{number}.{clipped(override)}': {has}")
    nested: dict[str, Any] = {}
    name = _apply_override(nested, override)
    if name.removeprefix("train.") in LENGTHS:
        others = [f"train.{length}" for length in LENGTHS]
        stages[number - 1] = {key: value for key, value in stages[number - 1].items() if key not in others}
    stages[number - 1] |= flat(nested)
    return f"{STAGES}.{number}.{name}"


def _unknown_keys(values: dict[str, Any], section: type = Settings, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, problem) of every key that is none of the section's, or has a value where keys are expected."""
    hints = typing.get_type_hints(section)
    for name, value in values.items():
        full = f"{prefix}{name}"
        if name not in hints:
            known = [known_name for known_name, *_ in (*key_table(), *sections())]
            yield full, f"unknown key '{full}'{advice(full, known)}"
        elif dataclasses.is_dataclass(hints[name]):
            if value is None:
                values[name] = {}  # `model:` with nothing under it: all defaults
            elif isinstance(value, dict):
                yield from _unknown_keys(value, hints[name], f"{full}.")
            else:
                yield full, f"{full} is a section: expected keys under it, found {shown(value)}"


def advice(name: str, known: Sequence[str]) -> str:
    """What to write instead of a key that is none: `; did you mean '...'?` and a note, or why there is nothing, or
    nothing.

    A key of the same section that begins so or is much alike; what other tools' name stands for; a key of that last
    name in another section; the nearest.
    """
    section, _, last = name.rpartition(".")
    siblings = {full.rpartition(".")[2]: full for full in known if full.rpartition(".")[0] == section}
    alike = [full for sibling, full in siblings.items() if sibling.startswith(f"{last}_")]
    alike += [siblings[match] for match in difflib.get_close_matches(last, siblings, n=1, cutoff=0.75)]
    key, note = right_key(name, known)
    if not alike and note and key is None:
        return f"; {note}"
    namesakes = [full for full in known if full.rpartition(".")[2] == last]
    found = [*alike, *([key] if key else []), *namesakes]
    beside = f" {note}" if found and found[0] == key and note else ""
    return f"; did you mean '{found[0]}'?{beside}" if found else nearest(name, known)


def _first_problem(error: pydantic.ValidationError) -> tuple[str, str]:
    """The key whose value has not the right type, and what to say of it."""
    problems = error.errors()
    problem = next((each for each in problems if each["type"] == NO_PLACE), problems[0])
    known = {full: kind for full, kind, *_ in key_table()}
    units = {full: unit for full, _, _, unit, _ in key_table()}
    location = [str(part) for part in problem["loc"]]
    # pydantic appends the branch of a union or the index in a list to the key's own path
    name = next(name for name in (".".join(location[:n]) for n in range(len(location), 0, -1)) if name in known)
    if problem["type"] == NO_PLACE:
        return name, f"{name}={problem['input']}: {problem['msg']}"
    kind = known[name] + (" in UTF-8" if problem["type"] == "string_unicode" else "")
    hint = _how_to_write(name, problem["input"], kind, units[name]) if isinstance(problem["input"], str) else ""
    return name, f"{name}={shown(problem['input'])}: expected {kind}{hint}"


def _how_to_write(name: str, value: str, kind: str, unit: str) -> str:
    if right := right_value(name, value):
        return f"; did you mean '{right}'?"
    if kind.startswith(("integer", "number")):
        return how_to_write(value, unit)
    return nearest(value, kind.split(" | ")) if " | " in kind else ""


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
        return f"{'list' if origin is list else 'mapping'} of {' to '.join(_type_name(arg) for arg in args)}"
    return {Any: "value", type(None): "null", str: "text", bool: "true | false", int: "integer", float: "number"}[hint]
