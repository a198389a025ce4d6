"""Several processes of one run on this machine, joined over localhost. No JAX: whoever starts processes has no devices."""

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

from jaxlm.reporting.progress import print_line

# JAX's own names, so that any launcher that sets them for JAX serves jaxlm.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LAUNCHER = "JAXLM_LAUNCHER"  # id of the process that started this one, which must not outlive it
HUNG = 75  # exit code of a process that its own watch has ended: it may be started again (EX_TEMPFAIL of sysexits.h)
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes of processes that were told to stop, and have saved
OPEN_FILE = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")  # what a shell makes of data.raw=<(zcat x.gz)
PATIENCE = 2.0  # seconds that processes which fail together get to say so


class Launcher:
    """Starts groups of processes, one group at a time, and hands SIGTERM and Ctrl-C on to them. A context manager.

    The first signal is passed on, so that the processes save and end; the second ends them at once.
    """

    def __init__(self) -> None:
        self.stopped: int | None = None  # the signal that came
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._end()

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        again, self.stopped = self.stopped is not None, number
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def run(self, arguments: Sequence[str], num_processes: int) -> int:
        """Runs `jaxlm ARGUMENTS` in so many processes.

        Returns the exit code: 0 when all ended well, else that of the first that failed; the others are then ended.
        """
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
        while any(process.poll() is None for process in self._processes) and (
                time.monotonic() < deadline or code in STOPPED):  # who has been stopped saves, together with the others
            time.sleep(0.05)
        codes = [process.poll() for process in self._processes]
        code = next((told for told in (2, HUNG) if told in codes), code)  # what hits all alike, each of them may say
        if code == -signal.SIGKILL and self.stopped is not None:
            return 128 + self.stopped  # told twice: it was killed from here
        several = len(self._processes) > 1
        if (several or code < 0) and code != 2 and code not in STOPPED:
            number, pid = self._processes.index(failed[0]), failed[0].pid
            print_line(f"process {number} (pid {pid}) ended{' first' * several}: {_told(code)}")
        return code if code > 0 else 128 + signal.SIGTERM if code == -signal.SIGTERM else 1

    def _end(self) -> None:
        for process in self._processes:
            process.kill()  # what is being written is whole or not there
            process.wait()
        self._processes = []


def _told(code: int) -> str:
    """What an exit code means."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return {2: "bad input", HUNG: "hung"}.get(code, f"exit code {code}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
