"""The long form of the fuzz tests: thousands of random inputs, and a report of what became of them.

    python tests/faults/fuzz.py [--examples 10000] [--seed 0] [--only KIND ...] [--report FILE]

Whatever breaks the promise (a traceback, a hang, half-written output, an answer that is wrong) is printed with the
smallest input that does it, and the exit code is 1.
"""

import argparse
import faulthandler
import os
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# As in the tests' conftest: what is compiled is kept, and compiled quickly.
os.environ |= {"JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/jaxlm/faults"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import hypothesis
import jax
from fuzzed import KINDS, Kind
from fuzzed.world import World

EVERY = 30.0  # seconds between lines of progress
SLOW = 10.0  # seconds after which an example is shown


class Result(NamedTuple):
    """What became of the examples of one kind."""

    codes: Counter[int]
    seconds: float
    slowest: float  # seconds of one example
    failure: BaseException | None


def fuzz(kind: Kind, world: World, examples: int, seed: int, say: Callable[[str], None]) -> Result:
    """Draws and checks until all are done or one fails, then for the smallest that fails."""
    codes: Counter[int] = Counter()
    slowest, began = 0.0, time.monotonic()
    last = began

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=examples, database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
                         suppress_health_check=list(hypothesis.HealthCheck),
                         phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink])
    @hypothesis.given(kind.examples)
    def check(example: Any) -> None:
        nonlocal last, slowest
        since = time.monotonic()
        codes[kind.check(world, example)] += 1
        now = time.monotonic()
        if now - since > slowest:
            slowest = now - since
            if slowest > SLOW:
                say(f"{slowest:.0f} s: {example!r:.2000}")
        if now - last > EVERY:
            last = now
            say(f"{codes.total()} of {examples}")

    failure = None
    try:
        check()
    except Exception as error:  # whatever it is: it is what was looked for
        failure = error
    return Result(codes, time.monotonic() - began, slowest, failure)


def report(results: dict[str, Result], command: str) -> str:
    total = sum((result.codes for result in results.values()), Counter())
    lines = [
        "# Fuzz report", "",
        f"`{command}`: Python {platform.python_version()}, jax {jax.__version__}, hypothesis {hypothesis.__version__}, "
        f"{os.cpu_count()} cores", "",
        "| kind | examples | accepted (exit code 0) | refused (2) | failed with one line (1) | minutes | slowest, s | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    whole = Result(total, sum(result.seconds for result in results.values()),
                   max(result.slowest for result in results.values()), None)
    for name, (codes, seconds, slowest, failure) in (results | {"all": whole}).items():
        figures = [codes.total(), codes[0], codes[2], codes[1]]
        lines.append(f"| {name} | {' | '.join(f'{figure:,}' for figure in figures)} | {seconds / 60:.1f} | {slowest:.1f} | "
                     f"{f'**{type(failure).__name__}**' if failure else ''} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    faulthandler.enable()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    shares, results, began = sum(KINDS[name].share for name in arguments.only), {}, time.monotonic()
    command = f"python tests/faults/fuzz.py --examples {arguments.examples} --seed {arguments.seed}"
    if arguments.only != list(KINDS):
        command += f" --only {' '.join(arguments.only)}"
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name in arguments.only:
            def say(line: str, name: str = name) -> None:
                print(f"{time.monotonic() - began:7.0f} s  {name}: {line}", flush=True)

            result = fuzz(KINDS[name], world, arguments.examples * KINDS[name].share // shares, arguments.seed, say)
            results[name] = result
            say(", ".join(f"{number} ended with {code}" for code, number in sorted(result.codes.items())))
            if result.failure:
                traceback.print_exception(result.failure)
            if arguments.report:
                arguments.report.write_text(report(results, command), encoding="utf-8")
    print(report(results, command))
    return int(any(result.failure for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
