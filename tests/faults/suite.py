"""The long form of the fault suite: breaks real runs hundreds of times and writes what happened.

    python tests/faults/suite.py [--seed 0] [--kills 200] [--stops 50] [--flips 100] [--only PART ...] [--report FILE]

Linux, as root for the small disks; on 2 cores some two hours. Anything that is not as promised ends it with an
AssertionError.
"""

import argparse
import itertools
import os
import platform
import random
import shutil
import statistics
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from breaking import (
    a_full_disk_is_one_line,
    a_lost_permission_is_one_line,
    a_run_in_a_bucket_is_the_run_in_a_folder,
    a_slow_process_is_only_slow,
    a_spike_is_skipped,
    a_stuck_process_is_named,
    a_wrong_copy_is_named,
    bad_steps_are_skipped,
    damaged_checkpoints_are_noticed,
    every_mesh_sees_the_same_examples,
    repeatable_faults_are_told_from_transient_ones,
    told_twice_it_ends_at_once,
)
from harness import INTERVAL, LAYOUTS, write_workload
from kills import Kill, Reference, Stop, kill_preparations, kill_until_done, stop_until_done

PARTS = ("kills", "preparations", "stops", "elastic", "flips", "numbers", "processes", "disks", "storage")
PER_RUN = 10  # kills of one run, at most


def again_and_again(name: str, until_done: Callable, about: Callable[[list, int], list[str]], count: int, reference: Reference,
                    folder: Path, draw: random.Random, say: Callable[[str], None]) -> Iterator[list[str]]:
    """Run after run, on one layout after the other, until so many were broken; what is found so far, after each run."""
    found: list[Any] = []
    for run, layout in enumerate(itertools.cycle(LAYOUTS)):
        found += until_done(f"{name}_{run}", layout, reference, folder, draw, say, min(PER_RUN, count - len(found)))
        say(f"{len(found)} of {count}")
        yield about(found, run + 1)
        if len(found) == count:
            return


def about_kills(found: list[Kill], runs: int) -> list[str]:
    phases, victims = Counter(kill.phase for kill in found), Counter("all" if kill.victim == "all" else "one" for kill in found)
    layouts = Counter(kill.layout for kill in found)
    more = max(kill.repeated for kill in found)
    return [
        f"{len(found)} kills of {runs} runs (processes x devices: {_counts(layouts)}); every run ended, and every parameter, "
        "moment, loss, gradient norm and validation loss was bitwise that of the undisturbed run",
        f"while: {_counts(phases)}; one of the processes {victims['one']} times, all {victims['all']} times",
        f"steps done again: median {statistics.median(kill.repeated for kill in found):.0f}, at most {more} (checkpoints every "
        f"{INTERVAL} steps; a kill during a save goes back to the one before)",
    ]


def about_stops(found: list[Stop], runs: int) -> list[str]:
    more = Counter(stop.more for stop in found)
    seconds = sorted(stop.seconds for stop in found)
    return [
        f"{len(found)} SIGTERMs to {runs} runs ({_counts(Counter(stop.layout for stop in found))}), to all processes or one: "
        "each run saved what it had done and ended with exit code 143; nothing was repeated; every run ended with the bits of "
        "the undisturbed one",
        f"steps after the one that was under way (number of times): {_counts(more)}",
        f"from the signal to the end of all processes: median {statistics.median(seconds):.1f} s, at most {seconds[-1]:.1f} s",
    ]


def flips(reference: Reference, folder: Path, draw: random.Random, count: int) -> list[str]:
    told = [damaged_checkpoints_are_noticed(reference[layout], folder, draw, count) for layout in ("1x4", "2x2")]
    return [f"{len(told[0])} turned bits and cut ends over all files of a checkpoint of 1 process, {len(told[1])} of one of 2: "
            "each found before anything was loaded, its file named, and the checkpoint before it taken"]


def one_by_one(lines: Iterable[str]) -> Iterator[list[str]]:
    found: list[str] = []
    for line in lines:
        found.append(line)
        yield found


def _counts(counter: Counter) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counter.items()))


def sections(reference: Reference, folder: Path, arguments: argparse.Namespace, draw: random.Random, say: Callable[[str], None]
             ) -> dict[str, Callable[[], Iterable[list[str]]]]:
    """What each part finds, as far as it has come."""
    run_file = reference.run_file
    return {
        "kills": lambda: again_and_again("killed", kill_until_done, about_kills, arguments.kills, reference, folder, draw, say),
        "preparations": lambda: [[kill_preparations(reference, folder, draw, arguments.kills // 10)]],
        "stops": lambda: again_and_again("stopped", stop_until_done, about_stops, arguments.stops, reference, folder, draw, say),
        "elastic": lambda: one_by_one(every_mesh_sees_the_same_examples(run_file, folder, parts) for parts in (
            [(1, 8), (1, 4), (1, 2), (1, 8)], [(1, 8), (4, 2), (2, 4)])),
        "flips": lambda: [flips(reference, folder, draw, arguments.flips)],
        "numbers": lambda: [[
            *(bad_steps_are_skipped(run_file, folder, kind, layout) for kind, layout in (
                ("loss", "1x2"), ("gradient", "1x4"), ("row", "2x2"))),
            a_spike_is_skipped(run_file, folder),
            *(repeatable_faults_are_told_from_transient_ones(run_file, folder, transient) for transient in (False, True)),
            a_wrong_copy_is_named(run_file, folder)]],
        "processes": lambda: [[
            *(a_stuck_process_is_named(run_file, folder, phase) for phase in ("step", "save", "start-up")),
            a_slow_process_is_only_slow(run_file, folder), told_twice_it_ends_at_once(run_file, folder)]],
        "disks": lambda: [[a_full_disk_is_one_line(run_file, folder), a_lost_permission_is_one_line(run_file, folder)]],
        "storage": lambda: one_by_one(a_run_in_a_bucket_is_the_run_in_a_folder(run_file, folder, scheme, seed)
                                      for scheme in ("s3", "gs") for seed in range(2)),
    }


def item(text: str) -> str:
    """A line of the report, as wide as the docs are."""
    return textwrap.fill(f"- {text}", 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    draw, began = random.Random(arguments.seed), time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.0f} s  {line}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="jaxlm-faults-"))  # stays where something was not as promised
    say(f"everything is below {folder}")
    reference = Reference(folder, write_workload(folder))
    command = " ".join(["python tests/faults/suite.py", *(f"--{name} {getattr(arguments, name)}" for name in (
        "seed", "kills", "stops", "flips")), "--only", *arguments.only])
    lines = [f"`{command}`, jax {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores", ""]
    for part, run in sections(reference, folder, arguments, draw, say).items():
        if part not in arguments.only:
            continue
        since = time.monotonic()
        for found in run():
            about = [f"**{part}** ({(time.monotonic() - since) / 60:.0f} min)", "",
                     *(item(line.replace(str(folder), "...")) for line in found), ""]
            if arguments.report:
                arguments.report.write_text("\n".join(lines + about), encoding="utf-8")
        say("\n".join(found))
        lines += about
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
