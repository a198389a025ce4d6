"""RUN_DIR/checkpoints: what a run can go on from. Asynchronous, sharded, atomic, verified.

    120/state/...            the arrays, each process's own part of them (Orbax)
    120/manifest.json        settings, corpora, versions, mesh, validation figures, digests of files; written last
    100.damaged/...          set aside: a file of it was not what had been written

A step's folder without manifest.json is a save that was interrupted. It is never read, and removed by the next run.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxlm.checkpoints.format1 import OLD_FORMAT, Place, old_place, todays_place
from jaxlm.checkpoints.manifest import (
    CHECKPOINTS,
    MANIFEST,
    Damaged,
    all_digests,
    commit,
    find_damage,
    finished_steps,
    read_manifest,
    started_steps,
    write_digests,
)
from jaxlm.checkpoints.orbax import in_context
from jaxlm.console.progress import print_line
from jaxlm.errors import RunError, UserError, shown
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.pipeline import layer_order
from jaxlm.settings import CheckpointSettings, flatten
from jaxlm.storage.files import Location, absolute, delete, exists, make_folder, move, names_in, sizes_below
from jaxlm.storage.remote import is_remote

STATE = "state"
FORMAT = 2
WRITERS = re.compile(r"(?:^|[./])process_(\d+)(?:/|$)")  # ocdbt.process_1/d/..., array_metadatas/process_1
DAMAGED = ".damaged"
PAUSE, REMOTE_PAUSE = 0.05, 1.0  # seconds between looks whether the others are done
MESSAGE = 512  # bytes of what a process can tell the others


class Best(NamedTuple):
    """By what one checkpoint is better than another: a figure of their evaluations; among equals the lower loss, then
    the earlier."""

    figure: str = "val_loss"
    direction: Literal["min", "max"] = "min"

    def rank(self, figures: Mapping[str, float | None]) -> tuple[float, float] | None:
        """What sorts the best first; None: the figure was not measured."""
        figure, loss = figures.get(self.figure), figures.get("val_loss")
        if figure is None:
            return None
        return figure if self.direction == "min" else -figure, math.inf if loss is None else loss


LOWEST_LOSS = Best()


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving waits for the last save.

    Every process of the run calls the same methods in the same order; each writes its own arrays and checks its
    share of files.
    """

    def __init__(self, run_dir: str | os.PathLike, keep: CheckpointSettings | None = None,
                 phase: Callable[[str], AbstractContextManager] = nullcontext, best: Best = LOWEST_LOSS):
        """With `keep` None the folder is only read; raises UserError when it does not exist then. `phase` is told
        what the background is about to do (see `jaxlm.safety.watch`). `best`: which ones keep.keep_best is about."""
        self.directory = absolute(run_dir) / CHECKPOINTS  # Orbax writes in the background: relative paths fail there
        if keep is None and not exists(self.directory):
            raise UserError(f"{run_dir}: no {CHECKPOINTS} folder; expected the run directory of a `jaxlm train`")
        if not is_remote(self.directory) and self.directory.is_file():
            raise UserError(f"{self.directory}: a file; expected the folder of the run's checkpoints, or nothing")
        self._keep, self._phase, self._best = keep, phase, best
        self._background = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: Future | None = None
        self._figures: dict[int, dict[str, float]] = {}  # of the complete ones, where something is to be kept or removed
        self._permanent: set[int] = set()  # those that an earlier start made to stay
        if keep and jax.process_index() == 0:
            self._remove_unfinished()
            for step in self.steps:
                self._remember(step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:  # after an error what is being written still gets its chance, unless it needs processes that may have failed
            self._background.shutdown(wait=kind is None or jax.process_count() == 1)

    @property
    def set_aside(self) -> list[str]:
        """Folders of checkpoints that were found damaged, by this start or an earlier one."""
        return [name for name in names_in(self.directory) if name.endswith(DAMAGED)]

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; an interrupted save is not among them."""
        return finished_steps(self.directory.parent)

    # ---- saving ------------------------------------------------------------------------------------------------------

    @property
    def best(self) -> tuple[int, float] | None:
        """The best of the checkpoints that are kept: its step, and the figure by which it is. Process 0 alone knows."""
        ranked = _ranked(self._figures, self._best)
        return (ranked[0], self._figures[ranked[0]][self._best.figure]) if ranked else None

    def save(self, trees: dict[str, Any], step: int, metadata: dict[str, Any], evaluation: Mapping[str, Any] | None,
             first: Callable[[], object] = lambda: None) -> None:
        """Copies the trees of arrays off the devices and returns; the files are written in the background.

        `metadata` is plain JSON: the run's settings, the tokenizer itself, the corpus digests, the mesh, versions.
        `evaluation`: figures of an evaluation at this step, `val_loss` among them; None: there was none.
        `first`: what has to be done before the checkpoint may count; called in the background.

        Raises:
          RunError: the save before this one has failed.
        """
        self.wait()
        folder = self.directory / str(step)
        # NaN would pass for the best, since nothing compares below it
        figures = {name: float(value) for name, value in (evaluation or {}).items() if value is not None and math.isfinite(value)}
        with self._one_clear_error(folder), in_context(folder):
            make_folder(folder)
            arrays = ocp.save_checkpointables_async(folder / STATE, trees)
        about = {"format": FORMAT, "step": step, "val_loss": figures.get("val_loss"), "figures": figures, "metadata": metadata}
        self._saving = self._background.submit(self._finish, folder, arrays, about, first)

    def wait(self) -> None:
        """Until the last save is on disk. Raises RunError when it has failed."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def check(self) -> None:
        """Raises RunError when the save in the background has failed; does not wait."""
        if self._saving and self._saving.done():
            self.wait()

    def _finish(self, folder: Location, arrays: ocp.AsyncResponse, about: dict[str, Any], first: Callable[[], object]) -> None:
        """Every process vouches for the files it wrote; the first one makes the checkpoint whole and removes what is
        not kept."""
        process, processes = jax.process_index(), jax.process_count()
        with self._phase(f"saving step {about['step']}"), self._one_clear_error(folder):
            arrays.result()
            first()
            write_digests(folder, process, [f"{STATE}/{name}" for name in _share(folder / STATE, process, processes)])
            pause = REMOTE_PAUSE if is_remote(folder) else PAUSE
            while process > 0 and not exists(folder / MANIFEST):  # who ends before that may be the end of the first one, too
                time.sleep(pause)
            if process > 0:
                return
            while (files := all_digests(folder, processes)) is None:
                time.sleep(pause)
            commit(folder, about, files, processes)
            self._figures[about["step"]] = about["figures"]
            for step in set(_not_kept(self._figures, self._keep, self._best)) - self._permanent:
                del self._figures[step]
                self._remove(self.directory / str(step))

    @contextmanager
    def _one_clear_error(self, folder: Location) -> Iterator[None]:
        """Whatever stops a save ends the run with one line; the checkpoints before it stay as they are."""
        try:
            yield
        except Exception as error:
            last = f"; step {self.steps[-1]} is the last that is saved" if self.steps else ""
            raise RunError(f"{folder}: cannot be saved ({_reason(error)}){last}") from error

    def _remember(self, step: int) -> None:
        """What decides, later, whether the checkpoint stays."""
        try:
            manifest = self._read(step)
        except Damaged:  # `choose` tells it, where it matters
            self._figures[step] = {}
            return
        # one of before there were other figures
        self._figures[step] = manifest.get("figures", {"val_loss": manifest["val_loss"]})
        settings = manifest["metadata"].get("settings")
        every = flatten(settings).get("checkpoint.keep_every_steps") if isinstance(settings, dict) else None
        if isinstance(every, int) and every > 0 and step % every == 0:
            self._permanent.add(step)

    def _remove_unfinished(self) -> None:
        for step in set(started_steps(self.directory.parent)) - set(self.steps):
            print_line(f"{self.directory / str(step)}: without {MANIFEST}, so its save was interrupted; removed")
            delete(self.directory / str(step))

    def _remove(self, folder: Location) -> None:
        delete(folder / MANIFEST)  # first: a removal that is interrupted leaves nothing that looks whole
        delete(folder)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def choose(self, step: int | None) -> int:
        """`step`, or the newest, all of its files as they were written.

        A newest one that is damaged is passed over, with a warning, and set aside when this is the run that writes
        here.

        Raises:
          UserError: it is not there, or damaged, or no good one is left.
        """
        steps = self.steps
        if not steps:
            raise UserError(f"{self.directory}: no complete checkpoint yet; train longer, or lower checkpoint.every_steps")
        if step is not None and step not in steps:
            raise UserError(f"checkpoint.step={step}: not in {self.directory}; there are {', '.join(map(str, steps))}")
        found: dict[int, str] = {}
        for candidate in reversed(steps) if step is None else [step]:
            problem = self._damage(candidate)
            if problem is None:
                self._set_aside(found, candidate)
                return candidate
            found[candidate] = problem
        others = "; put it back from a copy, or " + (f"delete {self.directory} to start from the beginning" if step is None else
                                                     "choose another checkpoint.step")
        raise UserError(f"{'; '.join(found.values())}{': no checkpoint is good' if len(found) > 1 else ''}{others}")

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, the same on every process; None: nothing."""
        folder = self.directory / str(step)
        try:
            files, problem = self._read(step)["files"], None
        except Damaged as error:
            files, problem = {}, str(error)
        problem = problem or find_damage(folder, files, jax.process_index(), jax.process_count())
        if jax.process_count() == 1:
            return problem
        text = np.zeros(MESSAGE, np.uint8)
        encoded = (problem or "").encode()[:MESSAGE]
        text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        messages = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(text)]
        return next(filter(None, messages), None)

    def _set_aside(self, damaged: dict[int, str], good: int) -> None:
        if jax.process_index() > 0:
            return
        for step, problem in damaged.items():
            folder = self.directory / str(step)
            if self._keep:
                self._figures.pop(step, None)
                move(folder, self.directory / f"{step}{DAMAGED}")
            print_line(f"WARNING: {problem}; going back to step {good}" + (f", step {step} is set aside" if self._keep else ""))

    def metadata(self, step: int) -> dict[str, Any]:
        """What the checkpoint says of itself. Raises UserError."""
        return self._manifest(step)["metadata"]

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            return self._read(step)
        except Damaged as error:
            raise UserError(str(error)) from None

    def _read(self, step: int) -> dict[str, Any]:
        """The manifest of a step. Raises Damaged, also when it is another step's, or of another format."""
        path = self.directory / str(step) / MANIFEST
        manifest = read_manifest(path.parent)
        if manifest.get("format") not in (OLD_FORMAT, FORMAT) or manifest.get("step") != step:
            raise Damaged(f"{path}: damaged (it says format {shown(manifest.get('format'))}, step {shown(manifest.get('step'))}; "
                          f"expected {FORMAT} or {OLD_FORMAT}, {step})")
        val_loss, figures = manifest.get("val_loss", ""), manifest.get("figures", {})
        numbers = isinstance(figures, dict) and all(isinstance(figure, int | float) for figure in figures.values())
        if not isinstance(manifest.get("metadata"), dict) or not isinstance(val_loss, int | float | None) or not numbers:
            raise Damaged(f"{path}: damaged (metadata, val_loss or figures are not what is written there)")
        return manifest

    def saved_order(self, step: int) -> np.ndarray:
        """int [L]: which layer stands in each slot of the saved stacks."""
        metadata = self.metadata(step)
        return layer_order(metadata["settings"]["model"]["num_layers"], metadata["mesh"].get("stage", 1),
                           metadata["settings"]["train"].get("stage_repeats", 1))

    def shapes(self, step: int) -> dict[Place, tuple[int, ...]]:
        """The shape of every saved parameter. Raises UserError."""
        is_old = self._manifest(step)["format"] == OLD_FORMAT
        with self._of_this_model(step), in_context(self.directory):
            there = _by_place(ocp.checkpointables_metadata(self.directory / str(step) / STATE).metadata["params"])
        return {todays_place(place) if is_old else place: tuple(leaf.shape) for place, leaf in there.items()}

    def read(self, step: int, wanted: dict[Place, jax.ShapeDtypeStruct]) -> dict[Place, jax.Array]:
        """Some of the saved parameters, laid out as they are wanted, layers in the order in which they were saved.
        Raises UserError."""
        is_old = self._manifest(step)["format"] == OLD_FORMAT
        asked = {old_place(place) if is_old else place: leaf for place, leaf in wanted.items()}
        with self._of_this_model(step), in_context(self.directory):
            there = ocp.checkpointables_metadata(self.directory / str(step) / STATE).metadata["params"]
            leaves = [asked.get(place, ocp.PLACEHOLDER) for place in _by_place(there)]
            tree = jax.tree.unflatten(jax.tree.structure(there), leaves)
        found = _by_place(self._load(step, {"params": tree})["params"])
        return {place: found[old_place(place) if is_old else place] for place in wanted}

    def restore(self, step: int, layout: Layout) -> dict[str, Any]:
        """Those of the saved trees that `layout` has (it is of a dict of them), laid out by it, whatever mesh they were
        saved from.

        Raises:
          UserError: the arrays are not those that are wanted.
        """
        wanted = layout.abstract
        loaded = self._load(step, self._as_saved(step, wanted))
        trees = {}
        for name, tree in wanted.items():
            leaves = _by_place(loaded[name])
            in_order = [leaves[place] for place in self._by_saved_place(step, tree)]
            trees[name] = jax.tree.unflatten(jax.tree.structure(tree), in_order)
        return layout.from_order(trees, self.saved_order(step))

    def restore_params(self, step: int, layout: Layout) -> Any:
        """The parameters alone, laid out by `layout`."""
        return self.restore(step, layout.part(lambda tree: {"params": tree}))["params"]

    def _as_saved(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        """The arrays in the trees that they were saved in.

        An optimizer's tree also has nodes without arrays, one more with weight decay than without; Orbax wants every
        one of them again. What counts are the arrays, and where they stand.
        """
        with self._of_this_model(step), in_context(self.directory):
            there, found = ocp.checkpointables_metadata(self.directory / str(step) / STATE).metadata, {}
            for name, tree in wanted.items():
                arrays, saved = self._by_saved_place(step, tree), _by_place(there[name])
                if different := sorted(arrays.keys() ^ saved.keys()):
                    raise ValueError(f"its {name} has {'no ' if different[0] in arrays else ''}{'.'.join(different[0])}")
                found[name] = jax.tree.unflatten(jax.tree.structure(there[name]), [arrays[place] for place in saved])
            return found

    def _by_saved_place(self, step: int, tree: Any) -> dict[Place, Any]:
        """The leaves of `tree` by the paths that they have in this checkpoint, in the order of the tree."""
        is_old = self._manifest(step)["format"] == OLD_FORMAT
        return {old_place(place) if is_old else place: leaf for place, leaf in _by_place(tree).items()}

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        with self._of_this_model(step), in_context(self.directory):
            return ocp.load_checkpointables(self.directory / str(step) / STATE, wanted)

    @contextmanager
    def _of_this_model(self, step: int) -> Iterator[None]:
        try:
            yield
        except (KeyError, ValueError, OSError) as error:
            raise UserError(f"{self.directory / str(step)}: not a checkpoint of this model ({_reason(error)}); "
                            "expected one that was made with the same model and optimizer") from error


def _by_place(tree: Any) -> dict[Place, Any]:
    """Leaves by their path, in the tree's order; a named tuple's fields count as keys, as Orbax saves them."""
    def name(entry: Any) -> str:
        return str(next(getattr(entry, kind) for kind in ("key", "name", "idx") if hasattr(entry, kind)))

    return {tuple(map(name, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _reason(error: Exception) -> str:
    """The system's own words where there are some, else the first line."""
    lines = str(error).strip().splitlines()
    return getattr(error, "strerror", None) or (lines[0][:200] if lines else type(error).__name__)


def _share(folder: Location, process: int, num_processes: int) -> list[str]:
    """The files that a process vouches for: those that it wrote, which it sees also where others do not yet see them
    (NFS).

    Orbax keeps each one's arrays in folders of its own; the rest is the first one's. In a bucket they lie together,
    and all see the same.
    """
    names = list(sizes_below(folder))
    if is_remote(folder):
        return names[process::num_processes]
    writers = [int(found[1]) if (found := WRITERS.search(name)) else 0 for name in names]
    return [name for name, writer in zip(names, writers, strict=True) if (writer if writer < num_processes else 0) == process]


def _not_kept(figures: dict[int, dict[str, float]], keep: CheckpointSettings, best: Best) -> list[int]:
    """Which of the checkpoints (step -> validation figures) are neither among the newest, nor permanent, nor among the
    best."""
    steps = sorted(figures)
    kept = set(steps[-keep.keep_last :])
    kept |= {step for step in steps if keep.keep_every_steps and step % keep.keep_every_steps == 0}
    kept |= set(_ranked(figures, best)[: keep.keep_best])
    return [step for step in steps if step not in kept]


def _ranked(figures: dict[int, dict[str, float]], best: Best) -> list[int]:
    """Steps of the checkpoints that were measured, the best first."""
    ranks = {step: rank for step in sorted(figures) if (rank := best.rank(figures[step])) is not None}
    return sorted(ranks, key=ranks.get)
