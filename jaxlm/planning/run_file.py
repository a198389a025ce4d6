"""The text of a run file with some keys changed: its comments, its order and its way of writing stay."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from jaxlm.values import parse_yaml

INDENT = 2


def with_keys(text: str, values: Mapping[str, Any]) -> str:
    """The text with keys, by their dotted names, set to `values`; YAML that reads as it did otherwise."""
    for name, value in values.items():
        text = _with_key(text, name.split("."), value)
    return text


def _with_key(text: str, path: list[str], value: Any) -> str:
    _, node = parse_yaml(text)
    for depth, name in enumerate(path):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, below) for key, below in pairs if key.value == name), None)
        if found is None:
            return _inserted(text, node, depth, _nested(path[depth:], value))
        key, node = found
        if depth < len(path) - 1 and not isinstance(node, yaml.MappingNode):  # a section without keys
            return _replaced(text, key, node, _flow(_nested(path[depth + 1 :], value)))
    return _replaced(text, key, node, _flow(value))


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value) if len(path) > 1 else value}


def _flow(value: Any) -> str:
    """In one line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return dumped.removesuffix("\n").removesuffix("\n...")


def _replaced(text: str, key: yaml.Node, value: yaml.Node, new: str) -> str:
    start = key.end_mark.index
    end = max(_end(value), text.index(":", start) + 1)
    return f"{text[:start]}: {new}{text[end:]}"


def _end(node: yaml.Node) -> int:
    """Where a value's own text ends: a block ends with its last value, and not with the comments behind it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return max(map(_end, last)) if isinstance(last, tuple) else _end(last)
    return node.end_mark.index


def _inserted(text: str, mapping: yaml.Node | None, depth: int, new: dict[str, Any]) -> str:
    """Behind the last key of a section, or at the end of the file."""
    if not isinstance(mapping, yaml.MappingNode) or (depth == 0 and not mapping.flow_style):
        return text + ("" if text.endswith("\n") or not text else "\n") + _block(new, 0)
    if mapping.flow_style:
        close = mapping.end_mark.index - 1
        separator = ", " if mapping.value else ""
        return f"{text[:close].rstrip()}{separator}{_flow(new)[1:-1]}{text[close:]}"
    column = mapping.value[0][0].start_mark.column
    end = _end(mapping)
    line = text.find("\n", end - 1 if text[end - 1 : end] == "\n" else end)
    before, after = (text + "\n", "") if line < 0 else (text[: line + 1], text[line + 1 :])
    return before + _block(new, column) + after


def _block(values: dict[str, Any], column: int) -> str:
    [(name, value)] = values.items()
    if isinstance(value, dict) and column == 0:  # a section
        return f"{name}:\n" + "".join(_block({inner: below}, INDENT) for inner, below in value.items())
    return re.sub(r"^", " " * column, f"{name}: {_flow(value)}") + "\n"
