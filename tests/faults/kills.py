"""kill -9 and SIGTERM at random moments of real runs."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness import (
    Started,
    arguments_of,
    differences,
    half_written,
    is_running,
    kill,
    last_step,
    newest,
    phase_of,
    wait_until,
)

MOMENTS = ("starting", "restoring", "training", "saving")


class Kill(NamedTuple):
    """One kill, and what it cost."""

    layout: str
    victim: str
    phase: str
    logged: int  # the last step before it
    resumes_from: int

    @property
    def repeated(self) -> int:
        """Steps that are done again."""
        return self.logged - self.resumes_from


class Reference:
    """Undisturbed runs, one for each layout; made when first asked for."""

    def __init__(self, folder: Path, run_file: Path):
        self.folder, self.run_file = folder, run_file
        self.startup: dict[str, float] = {}

    def __getitem__(self, layout: str) -> Path:
        run_dir = self.folder / f"undisturbed_{layout}"
        if not (run_dir / "summary.json").exists():
            began = time.monotonic()
            started = Started(arguments_of(self.run_file, run_dir, layout), self.folder / f"undisturbed_{layout}.log")
            started.wait_for(lambda: last_step(run_dir) > 0)
            self.startup[layout] = time.monotonic() - began
            if code := started.wait():
                raise AssertionError(f"exit code {code}: {started.ending()}")
        return run_dir


def kill_until_done(name: str, layout: str, reference: Reference, folder: Path, draw: random.Random,
                    report: Callable[[str], None], at_most: int) -> list[Kill]:
    """One run, killed again and again at random moments, at most so many times, or until it has ended; the last time it goes on
    undisturbed. Raises AssertionError unless it ends with the bits of the reference."""
    want, run_dir, log = reference[layout], folder / name, folder / f"{name}.log"
    arguments, kills = arguments_of(reference.run_file, run_dir, layout, "--restart", "1000"), []
    started, begun = Started(arguments, log), time.time()
    while len(kills) < at_most and _moment(started, run_dir, layout, reference, draw):
        workers = started.workers()
        launcher = draw.random() < 0.2
        victim = started.process.pid if launcher else draw.choice(workers)
        phase = phase_of(run_dir, run_dir / "corpus", begun)
        kill(victim)
        wait_until(lambda workers=workers: not any(map(is_running, workers)))  # the others follow
        begun = time.time()
        kills.append(Kill(layout, "all" if launcher else f"process {workers.index(victim)}", phase, last_step(run_dir),
                          newest(run_dir)))
        report(f"{name} {kills[-1]}")
        if launcher:
            started.end()
            started = Started(arguments, log)
    code = started.wait()
    started.end()
    assert code == 0, f"exit code {code}: {started.ending()}"
    found = differences(run_dir, want)
    assert not found, f"{run_dir}: {found[:5]}"
    assert not half_written(run_dir)
    return kills


def _moment(started: Started, run_dir: Path, layout: str, reference: Reference, draw: random.Random) -> bool:
    """Waits for a random moment; False when the run has ended before."""
    since, startup = time.monotonic(), reference.startup[layout]
    if not started.wait_for(lambda: started.workers() != [started.process.pid]):
        return False
    before, kind = last_step(run_dir), draw.choice(MOMENTS)
    if kind == "starting":
        seconds = draw.uniform(0, startup)
    elif kind == "restoring":
        seconds = draw.uniform(0.6, 1.1) * startup
    else:
        if not started.wait_for(lambda: last_step(run_dir) > newest(run_dir) and last_step(run_dir) != before):
            return False
        reference.startup[layout] = min(startup, time.monotonic() - since)  # the first start compiled
        seconds = draw.uniform(0, 2)
        if kind == "saving":
            if not started.wait_for(lambda: half_written(run_dir)):
                return False
            seconds = draw.uniform(0, 0.3)
    end = time.monotonic() + seconds
    return started.wait_for(lambda: time.monotonic() > end) and started.process.poll() is None


class Stop(NamedTuple):
    """One SIGTERM, and how the run ended."""

    layout: str
    told: str
    logged: int  # the last step when the signal went out
    saved: int
    exit_code: int
    seconds: float

    @property
    def more(self) -> int:
        """Steps after the one that was under way."""
        return max(0, self.saved - self.logged - 1)


def stop_until_done(name: str, layout: str, reference: Reference, folder: Path, draw: random.Random,
                    report: Callable[[str], None], at_most: int) -> list[Stop]:
    """One run, told to stop at random moments of its training and gone on with. Raises AssertionError unless each time it saves
    what it has done, repeats nothing, and ends with the bits of the reference."""
    want, run_dir, log = reference[layout], folder / name, folder / f"{name}.log"
    arguments, stops = arguments_of(reference.run_file, run_dir, layout), []
    while True:
        resumed = newest(run_dir)
        started = Started(arguments, log)
        if len(stops) == at_most or not started.wait_for(lambda resumed=resumed: last_step(run_dir) > resumed):
            break
        time.sleep(draw.uniform(0, 2))
        if started.process.poll() is not None:
            break
        workers = started.workers()
        everyone = draw.random() < 0.5
        since, logged = time.monotonic(), last_step(run_dir)
        kill(started.process.pid if everyone else draw.choice(workers), signal.SIGTERM)
        code = started.wait()
        if logged == last_step(want):  # it came during the last words, which a start more says again
            started.end()
            continue
        saved = newest(run_dir)
        stops.append(Stop(layout, "all" if everyone else "one", logged, saved, code, time.monotonic() - since))
        report(f"{name} {stops[-1]}")
        assert code == 143, f"exit code {code}: {started.ending()}"
        assert saved == last_step(run_dir), f"saved at {saved}, logged up to {last_step(run_dir)}"
        assert "resume with" in started.text()
        started.end()
    code = started.wait()
    started.end()
    assert code == 0, f"exit code {code}: {started.ending()}"
    found = differences(run_dir, want)
    assert not found, f"{run_dir}: {found[:5]}"
    return stops
