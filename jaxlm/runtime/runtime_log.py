"""What C++ writes in one of several processes (XLA, gRPC, Gloo) goes into a file, so that a terminal shows what
jaxlm says.

    RUN_DIR/logs/00003.txt      of process 3; gone again when the process has ended well

Those libraries write to file descriptors 1 and 2: greetings in the middle of JSON, and when another process has
died, a stack of C++ from each that is left. Python's own output keeps its way. Where a launcher (`--processes`) runs
the processes, it says what has ended first, and those that only follow are ended before they speak.
"""

import ctypes
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from jaxlm.console.progress import optional, print_line
from jaxlm.console.streams import write_to
from jaxlm.runtime.processes import is_one_of_several, place
from jaxlm.safety.launcher import let_the_first_speak
from jaxlm.settings import Settings
from jaxlm.storage.remote import is_remote

FOLDER = "logs"
FATAL = "JAX distributed service detected fatal errors"  # XLA's words, when another process has ended or cannot be reached


class _Log(NamedTuple):
    path: Path
    start: int  # bytes that earlier starts, or a run that is at work in the same folder, have left in it
    on_abort: Callable  # kept: C has no other reference to it


_log: _Log | None = None
_leaving = threading.Lock()


def divert(settings: Settings) -> None:
    """Sends file descriptors 1 and 2 into the file, in a process that is one of several. Call before JAX is used;
    once counts.

    Without a local run directory, or one that takes files, the file lies in the folder of temporary files. Raises
    UserError.
    """
    global _log
    if _log or not is_one_of_several(settings.devices):
        return
    for number in (1, 2):
        write_to(number, os.dup(number))
    os.dup2(2, 1)  # Gloo greets on standard output, which is for what was asked for
    with optional("what C++ libraries write is shown"):
        path, descriptor = _open(settings.run_dir)
        start = os.fstat(descriptor).st_size
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.close(descriptor)
        _log = _Log(path, start, _call_on_abort(_aborted))


def _open(run_dir: str) -> tuple[Path, int]:
    number, count = place()
    name = f"{number:05d}.txt" if count > 1 else f"{socket.gethostname()}.txt"  # a TPU pod's host, which has no number yet
    if not is_remote(run_dir) and os.path.isdir(run_dir):
        path = Path(run_dir).absolute() / FOLDER / name
        with suppress(OSError):  # evaluated, say, by somebody who may only read it
            path.parent.mkdir(exist_ok=True)
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    descriptor, path = tempfile.mkstemp(prefix="jaxlm-", suffix=f"-{name}")
    return Path(path), descriptor


def where() -> str:
    """The end of a message: where the libraries' own words stand."""
    return f"; what XLA, gRPC and Gloo said: {_log.path}" if _log else ""


def settle(refused: bool = False) -> None:
    """Removes the file: the process ends well, or has `refused` its input. What stood in it before a refusal stays: a
    run may be at work in the same folder."""
    if _log and not (refused and _log.start):
        _log.path.unlink(missing_ok=True)
        if _log.path.parent.name == FOLDER:
            with suppress(OSError):  # the other processes' files are in it; or one of them was faster
                _log.path.parent.rmdir()
                _log.path.parent.parent.rmdir()  # of a run that was refused, before anything else was written


def leave(message: str, code: int) -> NoReturn:
    """Says the last line of this process and ends it at once: others wait for it, whom an orderly end would wait for
    in turn."""
    _leaving.acquire()  # never given back: who comes second has nothing to add
    print_line(message)
    if sys.stdout:
        sys.stdout.flush()
    os._exit(code)


# ---- when C++ gives up -----------------------------------------------------------------------------------------------

def _call_on_abort(function: Callable[[int], None]) -> Callable:
    """Calls a Python function in the thread that aborts; a handler of Python's own would never be run.

    JAX's coordination client ends the process when another one has ended. It takes a callback instead, which cannot
    be used: its argument has no type in Python (jaxlib 0.10 and 0.12: std::bad_cast).
    """
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(function)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(callback, ctypes.c_void_p))
    return callback


def _aborted(number: int) -> None:
    with open(_log.path, encoding="utf-8", errors="replace") as file:
        file.seek(_log.start)
        said = file.read()
    if FATAL in said:
        let_the_first_speak()
        leave(f"jaxlm: process {place()[0]}: another process has most likely ended, or cannot be reached any more; start all of "
              f"them again to go on{where()}", 1)
    fatal = next((line for line in said.splitlines() if line.startswith("F")), "").partition("] ")[2]
    leave(f"jaxlm: process {place()[0]}: ended by a C++ library{f' ({fatal[:200]})' if fatal else ''}{where()}", 1)
