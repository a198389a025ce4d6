"""Work in several processes that goes on where it was killed, and never tramples another process's work.

A phase is a list of tasks. A task writes files named after its stem and returns a small JSON-able result, which is
put beside them as `stem.json`, last and atomically: where that file is, the task is done, and a later run takes the
result from there.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, Self

from jaxlm.console.progress import print_line, progress_bar
from jaxlm.safety.launcher import is_follower
from jaxlm.storage.files import lock, write_json

Result = dict[str, Any]
LOCK = "lock"
ATTEMPTS = 1000  # to make a folder that others remove: somebody gets in each time


class Workers:
    """A context manager around up to `processes` processes, started when first needed. Results stand in `folder`."""

    def __init__(self, folder: Path, processes: int):
        self.folder = folder
        self.processes = processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if "pool" in self.__dict__:
            self.pool.shutdown(cancel_futures=True)

    @cached_property
    def pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads and locks of JAX
        return ProcessPoolExecutor(self.processes, mp_context=context, initializer=become_worker)

    def run(self, phase: str, function: Callable[[Any, Path], Result], tasks: Sequence[Any], sizes: Sequence[int],
            unit: str) -> list[Result]:
        """`function(task, stem)` for every task that is not done yet; the results of all, in order.

        `sizes` (in `unit`) move the progress bar. The first error in the order of the tasks is raised.
        """
        stems = [self.stem(phase, number) for number in range(len(tasks))]
        pending = [number for number, stem in enumerate(stems) if not done(stem)]
        with progress_bar(phase, total=sum(sizes[number] for number in pending), unit=unit, enabled=bool(pending)) as advance:
            if self.processes == 1 or len(pending) == 1:
                for number in pending:
                    perform(function, tasks[number], stems[number])
                    advance(sizes[number])
            else:
                futures = [self.pool.submit(perform, function, tasks[number], stems[number]) for number in pending]
                for number, future in zip(pending, futures, strict=True):
                    future.result()
                    advance(sizes[number])
        return [json.loads(marker(stem).read_text(encoding="utf-8")) for stem in stems]

    def stem(self, phase: str, number: int) -> Path:
        """Where task `number` of a phase writes: its files are this path and a suffix."""
        return self.folder / f"{phase}-{number:05d}"


def beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def marker(stem: Path) -> Path:
    return beside(stem, ".json")


def done(stem: Path) -> bool:
    return marker(stem).is_file()


def perform(function: Callable[[Any, Path], Result], task: Any, stem: Path) -> None:
    write_json(marker(stem), function(task, stem))


def become_worker() -> None:
    """Ctrl-C ends a worker at once and without a traceback; so does the end of the process that started it, however
    it ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; waits, and says so, while another one does. The end of a
    process frees it.

    The processes of one run all come here: the first prepares, the others find the corpus finished.
    """
    for attempt in itertools.count(1):  # until no owner has just removed it
        try:
            if file := _locked(folder):
                break
        except (FileNotFoundError, FileExistsError):
            if attempt == ATTEMPTS:
                raise
    with file:
        yield


def remove_exclusive(folder: Path) -> None:
    """Removes a folder that is held with `exclusive`; the lock goes last, so that those who wait find all of it or
    nothing."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
    (folder / LOCK).unlink()
    with suppress(OSError):  # not empty, or gone: one who waited has made it its own already
        folder.rmdir()


def _locked(folder: Path) -> IO | None:
    """The lock in the folder, once it is this process's; None when it was removed meanwhile. Raises
    FileNotFoundError and FileExistsError, too, when it was removed at that very moment."""
    path = folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    file = open(path, "w", encoding="ascii")  # noqa: SIM115 (whoever holds it closes it)
    if not lock(file):
        if not is_follower():
            print_line(f"{folder}: waiting for the process that is preparing this corpus")
        lock(file, wait=True)
    with suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
    file.close()
    return None
