"""The map of the code (docs/architecture.md) is what the code is: every room is on it, and imports point down it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (`jaxlm/[^|]*) \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
FLOOR = {name: floor for floor, row in enumerate(ROWS) for name in re.findall(r"`jaxlm/(\w+)", row)}
FILES = sorted(path for path in (ROOT / "jaxlm").rglob("*.py") if path != ROOT / "jaxlm" / "__init__.py")
WITHOUT_JAX = ("baselines", "data", "storage", "console", "reporting")


def room(path: Path) -> str:
    return path.relative_to(ROOT / "jaxlm").parts[0].removesuffix(".py")


def imported(path: Path, nodes: list[ast.AST]) -> Iterator[str]:
    """Dotted names of what these statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_every_room_is_on_the_map():
    assert {room(path) for path in FILES} == FLOOR.keys()


@pytest.mark.parametrize("name", sorted({room(path) for path in FILES}))
def test_imports_point_down(name):
    """Those within functions, too. Rooms in one row may know each other."""
    upward = [f"{path.relative_to(ROOT)}: {module}" for path in FILES if room(path) == name
              for module in imported(path, list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
              if module.startswith("jaxlm.") and FLOOR.get(module.split(".")[1], len(ROWS)) < FLOOR[name]]
    assert not upward


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_rooms_that_need_no_jax_do_not_import_it(name):
    """Not at the top of a file: worker processes that read text would wait for it."""
    needed = [f"{path.relative_to(ROOT)}: {module}" for path in FILES if room(path) == name
              for module in imported(path, ast.parse(path.read_text(encoding="utf-8")).body)
              if module.split(".")[0] in ("jax", "flax", "optax", "orbax")]
    assert not needed
