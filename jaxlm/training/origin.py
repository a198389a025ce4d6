"""Where a run's weights come from, said in one line at each start: its own newest good checkpoint, those of `init`
(`jaxlm.training.transfer`), or none."""

import difflib
from pathlib import Path

from jaxlm.checkpoints.manifest import CHECKPOINTS, finished_steps
from jaxlm.console.progress import optional, print_line
from jaxlm.reporting.metrics import read_metrics
from jaxlm.reporting.runs import best_told, read_summary
from jaxlm.runtime.processes import is_main
from jaxlm.settings import Settings
from jaxlm.storage.files import Location, as_path, names_in
from jaxlm.storage.remote import is_remote

ALIKE = 0.88  # of two names, by difflib: one letter of eight and more


def origin_of(settings: Settings, first: int, last: int | None, set_aside: list[str], taken: list[str]) -> list[str]:
    """The line, before metrics.jsonl is cut to what the checkpoint has seen, and those below it.

    Arguments:
      first: the checkpoint's step, 0 where there is none.
      last: the run's, None where nobody knows it yet.
      set_aside: folders of checkpoints that were damaged.
      taken: what was said of `init`.
    """
    run_dir = as_path(settings.run_dir)
    done = max((row["step"] for row in read_metrics(run_dir)), default=0)
    again = "" if done <= first else f"; steps {first + 1} to {done}, which no checkpoint holds, are done again"
    if first:
        total = f" of {last}" if last else ""
        return [f"resuming from step {first}{total} ({run_dir / CHECKPOINTS}){again}"]
    line, *rest = taken or [f"new weights (seed {settings.seed})"]
    if set_aside:
        return [f"{line}; {run_dir / CHECKPOINTS} has no good checkpoint, only {', '.join(set_aside)}", *rest]
    if again or taken:
        return [line + again, *rest]
    other = None if is_remote(run_dir) else _namesake(run_dir)
    return [line + (f"; {other} has checkpoints: to go on from them, run_dir={other}" if other else "")]


def _namesake(run_dir: Path) -> Path | None:
    """A run beside this one that has checkpoints, and a name that this one may have been meant to be; names that
    differ in numbers only are meant to differ."""
    def letters(name: str) -> str:
        return "".join(letter for letter in name if not letter.isdigit())

    others = [name for name in names_in(run_dir.parent) if name != run_dir.name and letters(name) != letters(run_dir.name)]
    close = difflib.get_close_matches(run_dir.name, others, n=3, cutoff=ALIKE)
    return next((run_dir.parent / name for name in close if finished_steps(run_dir.parent / name)), None)


def say_which(checkpoints: Location, step: int) -> None:
    """One line on stderr, of the first process: which checkpoint is evaluated, or generates."""
    if not is_main():
        return
    best = None
    with optional("the best checkpoint is not named"):
        best = (read_summary(checkpoints.parent / "summary.json") or {}).get("best")
    better = f"; the best: {best_told(best)} (checkpoint.step={best['step']})" if best_told(best) and best["step"] != step else ""
    print_line(f"weights: step {step} ({checkpoints / str(step)}){better}")
