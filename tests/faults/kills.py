"""kill -9 and SIGTERM at random moments of real runs."""

import itertools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness import (
    Started,
    arguments_of,
    contents,
    differences,
    half_written,
    is_running,
    kill,
    last_step,
    newest,
    wait_until,
)

# Seconds, at most, between the moment at which a process begins with something and the kill.
DELAYS = {"starting": 2.0, "restoring": 0.5, "compiling": 1.0, "training": 3.0, "saving": 0.8}


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

    def __getitem__(self, layout: str) -> Path:
        run_dir = self.folder / f"undisturbed_{layout}"
        if not (run_dir / "summary.json").exists():
            started = Started(arguments_of(self.run_file, run_dir, layout), self.folder / f"undisturbed_{layout}.log")
            if code := started.wait():
                raise AssertionError(f"exit code {code}: {started.ending()}")
        return run_dir


def phase_of(worker: int, phases: Path, run_dir: Path) -> str:
    """What a process is doing; `phases`: see injected/sitecustomize.py."""
    path = phases / str(worker)
    name = path.read_text() if path.exists() else ""
    if not name or name.startswith(("joining", "opening")):
        return "starting"
    if name.startswith("reading"):
        return "restoring" if newest(run_dir) else "starting"
    if name.startswith("compiling"):
        return "compiling"
    return "saving" if half_written(run_dir) else "training"


def kill_until_done(name: str, layout: str, reference: Reference, folder: Path, draw: random.Random,
                    report: Callable[[str], None], at_most: int) -> list[Kill]:
    """One run, killed again and again at random moments, at most so many times, or until it has ended; the last time
    it goes on undisturbed. Raises AssertionError unless it ends with the bits of the reference."""
    want, run_dir, log, phases = reference[layout], folder / name, folder / f"{name}.log", folder / f"{name}.phases"
    phases.mkdir()
    arguments, kills = arguments_of(reference.run_file, run_dir, layout, "--restart", "1000"), []
    faults = {"phases": str(phases), "longest_pause": 1.0}
    started = Started(arguments, log, faults)
    while len(kills) < at_most and _moment(started, phases, run_dir, draw):
        workers = started.workers()
        launcher = draw.random() < 0.2
        victim = started.process.pid if launcher else draw.choice(workers)
        phase = phase_of(workers[0] if launcher else victim, phases, run_dir)
        kill(victim)
        wait_until(lambda workers=workers: not any(map(is_running, workers)))  # the others follow
        kills.append(Kill(layout, "all" if launcher else f"process {workers.index(victim)}", phase, last_step(run_dir),
                          newest(run_dir)))
        report(f"{name} {kills[-1]}")
        if launcher:
            started.end()
            started = Started(arguments, log, faults)
    code = started.wait()
    started.end()
    assert code == 0, f"exit code {code}: {started.ending()}"
    found = differences(run_dir, want)
    assert not found, f"{run_dir}: {found[:5]}"
    assert not half_written(run_dir)
    return kills


def kill_preparations(reference: Reference, folder: Path, draw: random.Random, at_most: int) -> str:
    """`jaxlm prepare`, killed at random moments and started again, until so many kills have hit it. Raises
    AssertionError unless the corpus is the undisturbed one, byte for byte."""
    text = folder / "long.txt"
    text.write_text((folder / "text.txt").read_text() * 500)
    arguments, kills, seconds = ["prepare", str(reference.run_file), f"data.raw={text}"], 0, 0.0
    for number in itertools.count():
        corpus, log = folder / "prepared" / str(number), folder / f"prepared_{number}.log"
        partial = corpus.with_name(f"{number}.partial")
        while True:
            began, started = time.monotonic(), Started([*arguments, f"run_dir={folder / 'unused'}", f"data.corpus={corpus}"], log)
            if number and kills < at_most and started.wait_for(partial.exists):
                end = time.monotonic() + draw.uniform(0, seconds)
                if started.wait_for(lambda end=end: time.monotonic() > end):
                    started.end()
                    kills += 1
                    continue
            assert started.wait() == 0, started.ending()
            started.end()
            break
        seconds = seconds or time.monotonic() - began - 1.0  # imports apart
        assert contents(corpus) == contents(folder / "prepared" / "0")
        assert not partial.exists()
        if kills == at_most:
            return (f"{kills} kills of {number} preparations ({text.stat().st_size / 2**20:.0f} MiB of text): each corpus is the "
                    "undisturbed one, byte for byte, and nothing else is left")


def _moment(started: Started, phases: Path, run_dir: Path, draw: random.Random) -> bool:
    """Waits for a process to do something that was drawn, and then a random time; False when the run has ended
    before."""
    if not started.wait_for(lambda: started.workers() != [started.process.pid]):
        return False
    wanted = draw.choice(list(DELAYS))
    if wanted == "restoring" and not newest(run_dir):  # the next time, then
        wanted = "training"
        started.wait_for(lambda: newest(run_dir))
    if not started.wait_for(lambda: wanted in (phase_of(worker, phases, run_dir) for worker in started.workers())):
        return False
    end = time.monotonic() + draw.uniform(0, DELAYS[wanted])
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
    """One run, told to stop at random moments of its training and gone on with. Raises AssertionError unless each
    time it saves what it has done, repeats nothing, and ends with the bits of the reference."""
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
