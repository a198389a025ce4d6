"""The hang watch: what takes longer than its deadline ends the process, after saying what it was and whom it waited
for.

    RUN_DIR/.alive/00003.json       of each of several processes, every few seconds: what it is doing, and since when
    RUN_DIR/hangs/00003-...txt      the stacks of all of its threads when a deadline had passed

`kill -USR1 PID` writes the stacks of a process to its standard error at any time.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

from jaxlm.console.progress import print_line
from jaxlm.console.units import format_duration
from jaxlm.errors import RunError, UserError
from jaxlm.safety.launcher import HUNG
from jaxlm.storage.files import Location, as_path, delete, make_folder, modified, read_bytes, write_atomically, write_text
from jaxlm.storage.remote import is_remote

TICK = 0.2  # seconds between looks at the clock
BEAT = 5.0  # seconds between signs of life, or a tenth of the shortest deadline
STALE = 3  # beats without one
GRACE = 1.5  # seconds for the other processes, whose deadlines pass at the same time, to write their stacks
Item = TypeVar("Item")


class Phase:
    """Something that is going on, and how long it may take."""

    def __init__(self, name: str, seconds: float | None):
        self.seconds = seconds
        self.renew(name)

    def renew(self, name: str) -> None:
        """The next round of the same: a new name, and all of the time again."""
        self.name, self.since = name, time.monotonic()


class Watch:
    """Watches phases of any thread while it is entered. One of several processes also shows the others that it is
    alive."""

    def __init__(self, run_dir: str | Path, deadlines: Iterable[float | None] = ()):
        """`deadlines`: those that phases will have, in seconds."""
        self.beat = min([BEAT, *(seconds / 10 for seconds in deadlines if seconds is not None)])
        self.run_dir, self.process, self.num_processes = as_path(run_dir), 0, 1
        self._phases: list[Phase] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
        self._start(self._look)
        return self

    def _start(self, function: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=function, daemon=True, name="watch"))
        self._threads[-1].start()

    def one_of(self, process: int, num_processes: int) -> None:
        """Says which of how many processes this is, once that is known."""
        self.process, before, self.num_processes = process, self.num_processes, num_processes
        if before == 1 < num_processes:
            self._start(self._live)  # by itself: a file system that hangs must not stop the watch

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self.num_processes > 1:
            delete(self._sign(self.process))
            for folder in (self._sign(0).parent, self.run_dir):  # a run that was refused leaves nothing behind
                if not is_remote(folder):
                    with suppress(OSError):  # not empty; or another process was faster, there or away
                        folder.rmdir()

    @contextmanager
    def phase(self, name: str, seconds: float | None = None) -> Iterator[Phase]:
        """What this thread is about to do, and the time it may take (None: any)."""
        phase = Phase(name, seconds)
        self._phases.append(phase)
        try:
            yield phase
        finally:
            self._phases.remove(phase)

    def each(self, items: Iterable[Item], name: str, seconds: float | None) -> Iterator[Item]:
        """The items; getting and using each of them is a phase."""
        with self.phase(name, seconds) as phase:
            for number, item in enumerate(items, start=1):
                phase.renew(f"{name} {number}")
                yield item

    def doing(self) -> str:
        """What is going on, the innermost last."""
        return ": ".join(phase.name for phase in self._phases) or "between phases"

    def _look(self) -> None:
        while not self._over.wait(TICK):
            now = time.monotonic()
            for phase in list(self._phases):
                if phase.seconds is not None and now - phase.since > phase.seconds:
                    self._end(phase)

    # ---- signs of life -----------------------------------------------------------------------------------------------

    def _sign(self, process: int) -> Location:
        return self.run_dir / ".alive" / f"{process:05d}.json"

    def _live(self) -> None:
        self._beat()
        while not self._over.wait(self.beat):
            self._beat()

    def _beat(self) -> None:
        sign = {"process": self.process, "host": socket.gethostname(), "pid": os.getpid(), "doing": self.doing()}
        with suppress(FileNotFoundError, FileExistsError):  # another has just removed the folder; the next beat makes it again
            make_folder(self._sign(0).parent)
            write_text(self._sign(self.process), json.dumps(sign))

    def others(self) -> list[str]:
        """What is known of every other process, the one that most likely holds up the rest first."""
        now = modified(self._sign(self.process))
        missing, silent, busy = [], [], []
        for process in set(range(self.num_processes)) - {self.process}:
            try:
                age, sign = now - modified(self._sign(process)), json.loads(read_bytes(self._sign(process)))
            except (OSError, ValueError):
                missing.append(f"process {process} has not come, or has ended")
                continue
            who = f"process {process} ({sign['host']}, pid {sign['pid']})"
            if age > STALE * self.beat:
                silent.append(f"{who} has given no sign of life for {format_duration(age)}; it was at '{sign['doing']}'")
            else:
                busy.append(f"{who} is at '{sign['doing']}'")
        return missing + silent + sorted(busy, key=lambda line: line.endswith(f"'{self.doing()}'"))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _end(self, phase: Phase) -> None:
        self._over.set()
        last = threading.Timer(10 * GRACE, os._exit, [HUNG])  # whatever the files below do
        last.daemon = True
        last.start()
        doing, others = self.doing(), []
        path = self.run_dir / "hangs" / f"{self.process:05d}-{time.strftime('%Y%m%d-%H%M%S')}.txt"

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(f"{doing}: more than {phase.seconds} s\n" + "".join(f"{line}\n" for line in others) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

        try:
            if self.num_processes > 1:
                self._beat()
                others = self.others()
            make_folder(path.parent)
            write_atomically(path, write)
        except (OSError, RunError, UserError) as error:  # a disk that is full or gone, a bucket that does not answer
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            path = f"above ({error})"
        shown = f"; {'; '.join(others[:3])}" + (f"; and {len(others) - 3} more" if len(others) > 3 else "") if others else ""
        print_line(f"jaxlm: HUNG: process {self.process} at '{doing}' for more than {format_duration(phase.seconds)}{shown}; "
                   f"stacks of all threads: {path}")
        time.sleep(GRACE if others else 0)
        os._exit(HUNG)
