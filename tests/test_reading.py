"""docs/a-step.md is the way of a step: its links lead to definitions, one leads to the next, nothing that runs is left
out, and the way is short."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.data.batches import training_batches
from jaxlm.data.sequences import ShiftedWindows
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.models.model import Model
from jaxlm.settings import Settings, TrainSettings
from jaxlm.training.step import make_trainer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "a-step.md").read_text(encoding="utf-8")
STOPS = [(path, name) for name, path in re.findall(r"\[`([^`]+)`\]\(\.\./(jaxlm/[^)]+\.py)\)", PAGE)]
TOOLS = set(re.findall(r"\[[a-z_]+\.py\]\(\.\./(jaxlm/[^)]+\.py)\)", PAGE))
ENTRY = ("jaxlm/cli.py", "main")
WITHOUT_TOOLS, WITH_TOOLS = (90, 16), (115, 27)  # definitions, files


@cache
def definitions(path: str) -> dict[str, ast.AST]:
    """Functions, classes, methods (as Class.method) and constants of a file."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}": inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
    return found


def words(path: str, name: str) -> Iterator[str]:
    """Every name that a definition mentions, and those that constants among them mention, as a table of verbs does."""
    for node in ast.walk(definitions(path)[name]):
        word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else (
            node.name if isinstance(node, ast.alias) else None)
        if word and word != name:
            yield word
            if word.isupper() and word in definitions(path):
                yield from words(path, word)


def test_every_link_leads_to_a_definition():
    assert len(STOPS) > 30
    for path, name in STOPS:
        assert name in definitions(path), f"{path}: {name}"


def test_each_stop_is_used_by_one_before_it():
    """So none is left out between two: a reader finds the next name in a text that is open already."""
    assert STOPS[0] == ENTRY
    for number, (path, name) in enumerate(STOPS[1:], start=1):
        before = {word for stop in STOPS[:number] for word in words(*stop)}
        assert name.rpartition(".")[2] in before or name.partition(".")[0] in before, f"{path}: {name}"


@pytest.fixture(scope="module")
def ran(models, meshes) -> set[tuple[str, str]]:
    """(file, definition) of all that runs when a batch is made and the step of a plain run is traced."""
    settings = Settings(model=models["gpt"], train=TrainSettings())
    batches = training_batches([(Corpus(), 1.0)], lambda corpus, training: ShiftedWindows(
        corpus.train, SpecialTokens(), 16, training), batch_size=4, seed=0)
    codes, before = set(), sys.gettrace()
    with jax.set_mesh(meshes["one"]):
        trainer = make_trainer(Model(settings.model, settings.train), settings, meshes["one"])
        sys.settrace(lambda frame, event, _: codes.add(frame.f_code))
        try:
            trainer.step.trace(trainer.layout.shapes, batches.batch(0))
        finally:
            sys.settrace(before)
    found = {(Path(code.co_filename), code.co_qualname.partition(".<locals>")[0]) for code in codes}
    return {(path.relative_to(ROOT).as_posix(), name) for path, name in found
            if path.is_relative_to(ROOT / "jaxlm") and "<" not in name}


class Corpus:
    """Numbers in place of text."""

    directory = "numbers"

    def __init__(self) -> None:
        self.train = self
        self.num_tokens = 1000

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop, dtype=np.int32) % 300


def test_what_runs_is_on_the_page(ran):
    assert {path for path, _ in ran} <= {path for path, _ in STOPS} | TOOLS


def test_the_way_is_short(ran):
    """Functions and methods on the way: those linked and, in their files, those that run. Of a class, its methods that
    run. And with the tools: all that run, wherever they are."""
    way = {(path, name) for path, name in {*STOPS, *ran} if isinstance(definitions(path)[name], ast.FunctionDef)}
    files = {path for path, _ in STOPS}
    for most, counted in ((WITHOUT_TOOLS, {(path, name) for path, name in way if path in files}), (WITH_TOOLS, way)):
        assert len({path for path, _ in counted}) <= most[1], sorted({path for path, _ in counted})
        assert len(counted) <= most[0], sorted(counted)
