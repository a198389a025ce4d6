"""`jaxlm train --restart N`: whatever ends a run before its end, it is started again, from its newest checkpoint. No
JAX here."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from jaxlm.console.progress import print_line
from jaxlm.console.units import counted, format_duration
from jaxlm.errors import UserError
from jaxlm.reporting.runs import read_summary
from jaxlm.safety.launcher import HUNG, STOPPED, Launcher
from jaxlm.settings import Settings, length_of
from jaxlm.storage.files import as_path

LONGEST_PAUSE = 60.0  # seconds
SHRINK_AFTER = 2  # restarts without progress


def supervise(arguments: Sequence[str], settings: Settings, num_processes: int, restarts: int,
              newest: Callable[[str], int]) -> int:
    """Runs `jaxlm ARGUMENTS` to its end, in `num_processes` processes; returns the exit code. `newest`: the step of
    the newest checkpoint in a run directory, 0 where there is none.

    It is started again after a crash, a kill or a hang, but not after bad input, an error that would only come
    again, or when it was told to stop; with pauses that grow, and at most `restarts` times in a row without a new
    checkpoint. With mesh.elastic, after two of those half the processes go on, and all of them are tried again once
    there is progress.
    """
    fruitless, processes, finished = 0, num_processes, _is_finished(settings, newest)
    with Launcher() as launcher:
        while True:
            before = newest(settings.run_dir)
            code = launcher.run(arguments, processes)
            if code in (0, 2, 3, *STOPPED) or launcher.stopped is not None:
                return code
            after = newest(settings.run_dir)
            fruitless = 0 if after > before else fruitless + 1
            word = "hung" if code == HUNG else "failed"
            what = launcher.ending or word
            if _is_finished(settings, newest) and not finished:
                print_line(f"jaxlm: {what}, when all {after} steps were done and saved; `jaxlm report {settings.run_dir}` and "
                           f"`jaxlm generate {settings.run_dir}` make what is missing")
                return 0
            if not restarts:
                if launcher.ending:
                    print_line(f"jaxlm: {what}; {_how_to_go_on(arguments[0], after)}")
                return code
            if fruitless > restarts:
                print_line(f"{word} {fruitless} times in a row without a new checkpoint; giving up")
                return code
            if after > before:
                processes = num_processes
            elif settings.mesh.elastic and fruitless % SHRINK_AFTER == 0 and processes > 1:
                processes //= 2
            pause = min(LONGEST_PAUSE, 2.0**fruitless - 1)
            print_line(f"{what}; starting again from {f'step {after}' if after else 'the beginning'} in {format_duration(pause)}"
                       + (f", with {counted(processes, 'process')}" if processes < num_processes else "")
                       + (f" (restart {fruitless} of {restarts} without a new checkpoint)" if fruitless else ""))
            _sleep(pause, launcher)


def _how_to_go_on(verb: str, step: int) -> str:
    if verb != "train":
        return "the same command starts again"
    return f"the same command goes on from {f'step {step}' if step else 'the beginning'}, and with --restart 10 by itself"


def _is_finished(settings: Settings, newest: Callable[[str], int]) -> bool:
    """Whether all steps are saved and added up; what comes after that (samples, report) is no part of the run."""
    with suppress(UserError):  # a summary that cannot be read is none
        summary = read_summary(as_path(settings.run_dir) / "summary.json")
        if summary is None or summary["steps"] != newest(settings.run_dir):
            return False
        said = None if settings.stages else settings.train.steps
        return summary["steps"] == said or summary.get("length") == length_of(settings)
    return False


def _sleep(seconds: float, launcher: Launcher) -> None:
    end = time.monotonic() + seconds
    while launcher.stopped is None and time.monotonic() < end:
        time.sleep(0.05)
