"""Several processes of one run on this machine, joined over localhost. No JAX: whoever starts processes has no
devices."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Self

# JAX's own names, so that any launcher that sets them for JAX serves jaxlm.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LAUNCHER = "JAXLM_LAUNCHER"  # id of the process that started this one, which must not outlive it
HUNG = 75  # exit code of a process that its own watch has ended: it may be started again (EX_TEMPFAIL of sysexits.h)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # ask a run to save and end; SIGHUP: its terminal has been closed
STOPPED = tuple(128 + number for number in STOPS)  # exit codes of processes that were told to stop, and have saved
OPEN_FILE = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")  # what a shell makes of data.raw=<(zcat x.gz)
PATIENCE = 2.0  # seconds that processes which fail together get to say so


def stops() -> list[signal.Signals]:
    """Those of STOPS that whoever started this process has not told it to ignore, as nohup does with SIGHUP."""
    return [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]


def is_follower() -> bool:
    """Whether a launcher has started this process as one of several, and not as the first: what is true of all, that
    one says."""
    return LAUNCHER in os.environ and os.environ.get(PROCESS_ID, "0") != "0"


def let_the_first_speak() -> None:
    """Waits, in one of several processes of a launcher, until that has ended it, because another had failed before."""
    if LAUNCHER in os.environ and PROCESS_ID in os.environ:
        time.sleep(2 * PATIENCE)


class Launcher:
    """Starts groups of processes, one group at a time, and hands SIGTERM, SIGHUP and Ctrl-C on to them. A context
    manager.

    The first signal is passed on, so that the processes save and end; the second ends them at once.
    """

    def __init__(self) -> None:
        self.stopped: int | None = None  # the signal that came
        self.ending = ""  # how the last group ended, where its own processes have not said it
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hand_on) for number in stops()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._end()

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if self.stopped is not None and number == signal.SIGHUP:  # which a terminal's end sends more than once
            return
        again, self.stopped = self.stopped is not None, number
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def run(self, arguments: Sequence[str], num_processes: int) -> int:
        """Runs `jaxlm ARGUMENTS` in so many processes.

        Returns the exit code: 0 when all ended well, else that of the first that failed; the others are then ended.
        """
        self.ending = ""
        address = f"127.0.0.1:{_free_port()}"
        for number in range(num_processes):
            several = {COORDINATOR: address, NUM_PROCESSES: str(num_processes), PROCESS_ID: str(number)}
            environment = os.environ | {LAUNCHER: str(os.getpid())} | (several if num_processes > 1 else {})
            self._processes.append(subprocess.Popen(  # in a group of its own: a terminal's Ctrl-C comes through us, once
                [sys.executable, "-m", "jaxlm", *arguments], env=environment, start_new_session=True,
                pass_fds=[int(found) for found in OPEN_FILE.findall(" ".join(arguments)) if os.path.exists(f"/dev/fd/{found}")]))
        try:
            while any(process.poll() is None for process in self._processes) and not any(
                    process.poll() for process in self._processes):
                time.sleep(0.05)
            return self._first_failure()
        finally:
            self._end()

    def _first_failure(self) -> int:
        """The exit code to report, once the others had their chance to end by themselves."""
        failed = [process for process in self._processes if process.poll()]
        if not failed:
            return 0
        code, deadline = failed[0].returncode, time.monotonic() + PATIENCE
        if code == HUNG:
            for process in self._processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGUSR1)  # writes the stacks of its threads
        said = code == 2 or (code < 0 and code != -signal.SIGTERM)  # the others have nothing to add
        while any(process.poll() is None for process in self._processes) and (
                code in STOPPED or (not said and time.monotonic() < deadline)):  # who has been stopped saves, with the others
            time.sleep(0.05)
        codes = [process.poll() for process in self._processes]
        code = next((told for told in (2, HUNG) if told in codes), code)  # what hits all alike, each of them may say
        if self.stopped is not None and code in (-signal.SIGKILL, -signal.SIGTERM, *STOPPED):
            return 128 + self.stopped  # whatever the processes were told; told twice, they were killed from here
        if code < 0:
            number = f" {self._processes.index(failed[0])}" if len(self._processes) > 1 else ""
            self.ending = f"process{number} (pid {failed[0].pid}) was killed by {signal.Signals(-code).name}"
        return code if code > 0 else 128 + signal.SIGTERM if code == -signal.SIGTERM else 1

    def _end(self) -> None:
        for process in self._processes:
            process.kill()  # what is being written is whole or not there
            process.wait()
        self._processes = []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
