"""The folders of runs: checkpoints, and what is written beside them."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from fuzzed.damage import FILE_DAMAGES, HOW, VALUES, Damage, apply, damages
from fuzzed.run_files import KEYS, SECTIONS
from fuzzed.world import World, call, command, tree
from jaxlm import config
from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.checkpoints.manifest import finished_steps
from jaxlm.reporting.goodput import goodput

# ---------------------------------------------------------------------------------------------------------- checkpoints

def written(files: dict[str, str], step: int) -> dict[str, str]:
    """The part of a run's files that belongs to one checkpoint."""
    return {name: digest for name, digest in files.items() if name.startswith(f"checkpoints/{step}/")}


CHECKPOINTS = st.tuples(damages(FILE_DAMAGES), st.sampled_from([None, None, None, 1, 2, 3, 7]),
                        st.sampled_from([*["choose"] * 76, *["write"] * 20, *["evaluate"] * 3, "train"]))


def check_checkpoints(world: World, example: tuple[list[Damage], int | None, str]) -> int:
    """The newest checkpoint that is as it was written, under its own name, or one line; nothing is written by who
    only reads."""
    damage, step, how = example
    original, signed = tree(world.run), any(one.kind == "signed json" for one in damage)
    with world.scratch(world.run) as run:
        for one in damage:
            apply(one, run / "checkpoints")
        before = tree(run)
        found: list[int] = []

        def choose() -> None:
            with Checkpoints(run) as checkpoints:
                found.append(checkpoints.choose(step))
                assert signed or checkpoints.metadata(found[0])["settings"]["seed"] == 0

        ending = call(choose)
        assert tree(run) == before
        if not signed:  # who signs what he changes is believed
            whole = [step for step in (1, 2, 3) if written(original, step).items() <= before.items()]
            good = max(whole, default=None) if step is None else step if step in whole else None
            assert found == ([] if good is None else [good]), (found, whole, ending)
            if how == "evaluate":
                again = command("evaluate", run, *([f"checkpoint.step={step}"] if step else []))
                assert (again.code == 0) == (ending.code == 0), (again, ending)
            if how == "train":
                check_training(run)
        if how == "write":
            check_writing(run, before)
    return ending.code


def check_training(run: Path) -> None:
    """It goes on from the best that is left and ends with a whole checkpoint, or says why not and leaves the good
    ones."""
    good = {step: written(tree(run), step) for step in finished_steps(run)}
    ending = command("train", run, "train.steps=4")
    if ending.code == 0:
        with Checkpoints(run) as checkpoints:
            assert checkpoints.choose(None) == 4
        assert json.loads((run / "summary.json").read_bytes())["steps"] == 4
    else:
        after = tree(run)
        assert all(files.items() <= after.items() or (run / "checkpoints" / f"{step}.damaged").exists()
                   for step, files in good.items()), ending


def check_writing(run: Path, before: dict[str, str]) -> None:
    """Who goes on with a run removes unfinished saves and sets damaged ones aside, in the run's folder only."""
    settings = config.load(run)
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("theirs")
    for name in ("7", "9"):
        if not (run / "checkpoints" / name).exists():
            (run / "checkpoints" / name).symlink_to(outside)

    def go_on() -> None:
        with Checkpoints(run, settings.checkpoint) as checkpoints:
            checkpoints.choose(None)

    call(go_on)
    assert tree(outside).keys() == {"file"}
    assert all((run / name).exists() for name in before if not name.startswith("checkpoints"))
    shutil.rmtree(outside)


# ------------------------------------------------------------------------------------------------------ run directories

FILES = ("config.yaml", "metrics.jsonl", "goodput.jsonl", "summary.json", "samples.txt")
FIGURES = ("step", "loss", "val_loss", "val_bits_per_byte", "tokens_per_second", "step_seconds", "data_wait_seconds", "mfu",
           "began", "seconds", "from", "to", "skipped", "startup", "evaluation", "checkpoint",
           "steps", "wall_seconds", "tokens", "parameters", "devices", "mesh", "compile_seconds")
IN_PLACE = tuple(kind for kind in FILE_DAMAGES if kind not in ("rename", "junk", "json", "signed json"))
ODD = VALUES | st.sampled_from(["[/b]", "\ud800", {"\ud800": "b"}, {"data": "x"}])


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, Any]:
    """(file, what to do with it): damage, (key, value, line) to be replaced, or a line to be added."""
    name = draw(st.sampled_from(FILES))
    how = draw(st.sampled_from(["damage", "value", "value", "value", "line"]))
    if how == "damage":
        return name, draw(damages(IN_PLACE))[0]
    if how == "line":
        return name, draw(VALUES.map(json.dumps) | st.text(max_size=30) | st.just("[" * 100_000))
    keys = [*KEYS, *SECTIONS] if name == "config.yaml" else FIGURES
    return name, (draw(st.sampled_from(keys)), draw(ODD), draw(st.integers(0, 9)))


def change(path: Path, what: Damage | tuple[str, Any, int] | str) -> None:
    if isinstance(what, Damage):
        HOW[what.kind](path, path.with_name(FILES[what.where % len(FILES)]), what.where, what.value)
    elif isinstance(what, str):
        with open(path, "a", encoding="utf-8", errors="surrogatepass") as file:
            file.write(f"{what}\n")
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(replaced(yaml.safe_load(path.read_bytes()), *what[:2])), encoding="utf-8")
    else:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        place = what[2] % max(1, len(lines))
        lines[place] = json.dumps(replaced(json.loads(lines[place]), *what[:2]))
        path.write_text("\n".join(lines) + "\n")


def replaced(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """With another value for `a.b`."""
    first, _, rest = name.partition(".")
    return values | {first: replaced(values[first], rest, value) if rest else value}


RUN_DIRECTORIES = st.tuples(st.lists(changes(), min_size=1, max_size=3), st.sampled_from([False, False, True]))


def check_run_directory(world: World, example: tuple[list[tuple[str, Any]], bool]) -> int:
    """A report, or one line; of several runs, a table, or one line."""
    several = example[1]
    with world.scratch() as folder:
        run = folder / "run"
        shutil.copytree(world.run, run, ignore=shutil.ignore_patterns("checkpoints", "*.png", "report.md", "corpus"))
        for name, what in example[0]:
            # a second change may find nothing left that it can change
            with contextlib.suppress(ValueError, OSError, TypeError, LookupError, yaml.YAMLError, RecursionError):
                change(run / name, what)
        before = tree(run)
        ending = command("report", run, *([world.run] if several else []))
        written = {"comparison.png"} if several else {"report.md"}
        after = tree(run)
        assert {name for name in after if after[name] != before.get(name)} <= (written if ending.code == 0 else set()), ending
        call(lambda: goodput(run))
    return ending.code
