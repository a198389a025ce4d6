"""Values as people write them, in a run file and behind `key=` on the command line, read by what their key takes.

YAML by itself guesses a type from how a word looks: `1e-3` is text to it, `0100` is 64, `1:30` is 90, `no` is false,
2026-11-25 is a day. Here every plain word stays as it was written, and its key says what it is: text, or a number as
people write it.
"""

import dataclasses
import itertools
import json
import re
import types
import typing
from fractions import Fraction
from typing import Any, ClassVar

import yaml

from jaxlm.settings import Settings

LARGEST_YAML = 10_000_000  # characters
LONGEST_NUMBER = 400  # characters; float64 ends at 309 digits
NULLS = ("null", "Null", "NULL", "~")  # YAML's
PYTHONS_NULLS = ("none", "None", "NONE")  # of keys that take no text: a folder may have that name
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

NUMBER = re.compile(r"([+-]?(?:\d+(?:_\d+)*\.?(?:\d+(?:_\d+)*)?|\.\d+(?:_\d+)*)(?:[eE][+-]?\d{1,3})?) ?([A-Za-z%]*)", re.ASCII)
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)  # 8,192, as jaxlm prints it
OTHER_BASES = re.compile(r"[+-]?(0x[\da-fA-F]+|0o[0-7]+|0b[01]+)", re.ASCII)
NOT_FINITE = re.compile(r"([+-]?)\.?(inf|nan)", re.IGNORECASE)
SCALES: dict[str, int | Fraction] = {
    "": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12, "%": Fraction(1, 100)}
BYTES = {f"{letter}{unit}": base**power for letter, power in (("k", 1), ("K", 1), ("M", 2), ("G", 3), ("T", 4))
         for unit, base in (("B", 1000), ("iB", 1024), ("i", 1024))}


# ---- YAML ------------------------------------------------------------------------------------------------------------

class _Loader(yaml.SafeLoader):
    """YAML in which every plain word but null is text, for its key to say what it is.

    PyYAML raises whatever it met for tagged scalars that are not what they say (!!int x), and takes the square of
    the depth in time for deep nesting: neither here.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level == 100:
            raise RecursionError
        super().fetch_flow_collection_start(token)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"not a valid {kind} ({error})", node.start_mark) from None


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """What YAML says, its words as they are written (`typed` reads them), and its tree, which knows the lines.

    Raises yaml.YAMLError.
    """
    try:
        tree = yaml.compose(text, _Loader)
        if tree and _size(tree, {}) > LARGEST_YAML:
            raise yaml.YAMLError("too long once its aliases are written out")
        return yaml.load(text, _Loader), tree  # noqa: S506
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters and nodes with every alias written out: ten lines of aliases to aliases are small only until they
    are shown."""
    if id(node) not in known:
        known[id(node)] = 1  # what a node is to itself, where an alias stands in what it names
        if isinstance(node, yaml.ScalarNode):
            known[id(node)] = 1 + len(node.value)
        else:
            children = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
            known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


# ---- by what the key takes -------------------------------------------------------------------------------------------

def typed(values: dict[str, Any], section: type = Settings) -> dict[str, Any]:
    """Values of a section (and of those in it) as its keys take them; what no key can take, and unknown keys, as
    they are."""
    hints = typing.get_type_hints(section, include_extras=True)
    units = {item.name: item.metadata.get("unit", "") for item in dataclasses.fields(section)}
    read = {}
    for name, value in values.items():
        if name in hints and not dataclasses.is_dataclass(hints[name]):
            read[name] = as_taken(value, hints[name], units[name])
        else:
            inside = name in hints and isinstance(value, dict)
            read[name] = typed(value, hints[name]) if inside else value
    return read


def as_taken(value: Any, hint: Any, unit: str = "") -> Any:
    """A value as a key of this type takes it: numbers read, one text where a list is expected as a list of it."""
    kinds = alternatives(hint)
    if isinstance(value, dict):
        inner = next((typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict), str)
        return {name: as_taken(each, inner) for name, each in value.items()}
    if not isinstance(value, str):
        return value
    found = number(value, int in kinds, unit) if int in kinds or float in kinds else None
    if bool in kinds:
        found = BOOLEANS.get(value.lower())
    if found is not None:
        return found
    if str in kinds:
        return value
    if types.NoneType in kinds and value in NULLS + PYTHONS_NULLS:
        return None
    return [value] if any(typing.get_origin(kind) is list for kind in kinds) else value


def from_command_line(text: str, hint: Any) -> Any:
    """What stands behind `key=`, byte for byte; but [a, b] where the key takes a list, {a: 1} where it takes a
    mapping, and null where it takes that. Raises ValueError for brackets around something else."""
    kinds = alternatives(hint)
    if types.NoneType in kinds and text in NULLS:
        return None
    for collection, brackets in ((list, "[]"), (dict, "{}")):
        if any(typing.get_origin(kind) is collection for kind in kinds) and text[:1] + text[-1:] == brackets:
            return _collection(text, collection)
    return text


def _texts_in_json(text: str) -> list[str] | None:
    """A JSON list of texts, some of whose escapes YAML does not know; None: something else, such as YAML's [a, b]."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else None


def _collection(text: str, kind: type) -> Any:
    if (texts := _texts_in_json(text)) is not None:
        return texts
    try:
        found = parse_yaml(text)[0]
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "problem", None) or str(error)) from None
    if not isinstance(found, kind):
        raise ValueError(f"expected a {'list' if kind is list else 'mapping'}")
    return found


def alternatives(hint: Any) -> list[Any]:
    """The types of a union, or the one type; without their bounds."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return alternatives(args[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for arg in args for kind in alternatives(arg)]
    return [hint]


# ---- numbers ---------------------------------------------------------------------------------------------------------

def number(text: str, whole: bool, unit: str = "") -> int | float | None:
    """A number as people write it: 1e-3, .5, +3, 0100, 1_000, 10k, 2.5M, 5%, 0x10; 1,000 where it is `whole`; 64MiB
    in bytes.

    None: it is none. Exact: a whole number comes as an int of any size, however it was written.
    """
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    if OTHER_BASES.fullmatch(text):
        return int(text, 0)
    if odd := NOT_FINITE.fullmatch(text):
        return float("".join(odd.groups()))
    if THOUSANDS.fullmatch(text):
        return int(text.replace(",", "")) if whole else None
    parts = NUMBER.fullmatch(text)
    if not parts:
        return None
    digits, suffix = parts.groups()
    in_bytes = unit == "bytes"
    scale = BYTES.get(suffix) if in_bytes else None
    scale = scale or (None if in_bytes and suffix == "B" else SCALES.get(suffix))
    if scale is None:
        return None
    exact = Fraction(digits.replace("_", "")) * scale
    if exact.denominator == 1 and whole:
        return int(exact)
    rounded = _rounded(exact)
    return None if whole and rounded.is_integer() else rounded


def _rounded(exact: Fraction) -> float:
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def how_to_write(text: str, unit: str = "") -> str:
    """What to write instead of what looks like a number and is read as none: `; ...`, or nothing."""
    if not re.match(r"\s*[+-]?\.?\d", text, re.ASCII):
        return ""
    if "," in text or re.search(r"\d\s+\d", text):
        return "; a number is written 1000, 1_000 or 1e3, with a point before its decimals"
    if re.fullmatch(r"\s*[+-]?[\d._]+\s*[A-Za-z]+\s*", text, re.ASCII):
        more = ", KB, MB, GB (1000) or KiB, MiB, GiB (1024)" if unit == "bytes" else ""
        return f"; a number may end with k, M, G or T{more}, as in 10k"
    return "; a number is written 1000, 1_000, 1e3 or 10k"
