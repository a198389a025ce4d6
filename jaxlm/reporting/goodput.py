"""What a run's wall time went into, over all of its starts: RUN_DIR/goodput.jsonl and its sums.

A line is what one start has spent so far, in seconds; the last line of a start counts. Lines are only ever appended:
a run that was killed leaves the truth up to a few seconds before.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm.reporting.metrics import is_number
from jaxlm.storage.files import as_path, read_bytes
from jaxlm.storage.mirror import Mirror

FILE_NAME = "goodput.jsonl"
INTERVAL = 10.0  # seconds between lines, at least, but at checkpoints and ends; less in the first minutes of a start:
SHARE = 0.01  # of its time
PARTS = ("startup", "compile", "steps", "data_wait", "evaluation", "checkpoint")


class Account:
    """Of one start. Every process may keep one; only one writes it."""

    def __init__(self, began: float | None = None):
        """`began`: when the start began, by `time.time()`; None: now."""
        self.began = time.time() if began is None else began
        self._since = time.monotonic() - (time.time() - self.began)  # the same moment by a clock that nobody sets
        self.earlier = 0.0  # seconds that the steps before this start took
        self.skipped = 0  # steps that this start has skipped
        self._of_others = 0.0  # seconds that the starts before this one took
        self.parts: Counter[str] = Counter()
        self._mirror: Mirror | None = None
        self._written = 0.0

    @property
    def seconds(self) -> float:
        """Of this start so far."""
        return time.monotonic() - self._since

    @property
    def wall_seconds(self) -> float:
        """Of the run so far, without what was lost or lay between its starts."""
        return self.earlier + self.seconds

    @property
    def has_begun(self) -> bool:
        """Whether it is written."""
        return self._mirror is not None

    @property
    def spent(self) -> float:
        """Seconds of all starts of the run, with what was lost; not what lay between them."""
        return self._of_others + self.seconds

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Adds the time inside to one of PARTS. Not to be nested."""
        since = time.monotonic()
        try:
            yield
        finally:
            self.parts[part] += time.monotonic() - since

    def begin(self, run_dir: str | Path, step: int) -> None:
        """All up to now was the start-up of a run that goes on from `step`; from now on it is written."""
        self.first = self.step = step
        self._mirror = Mirror(run_dir)
        self._path = self._mirror.fetch(FILE_NAME)
        self.parts["startup"] += self.seconds
        self._of_others = sum(start["seconds"] for start in _starts(run_dir))
        self.write()

    def reached(self, step: int, skipped: int) -> None:
        """`step` steps of the run are done, of which this start has skipped so many. Writes a line if one is due."""
        self.step, self.skipped = step, skipped
        if time.monotonic() - self._written > min(INTERVAL, SHARE * self.seconds):
            self.write()

    def write(self) -> None:
        """Writes a line; in a bucket it can be seen half a minute late, and earlier only after `flush`."""
        if self._mirror is None:
            return
        self._written = time.monotonic()
        line = {"began": self.began, "seconds": self.seconds, "from": self.first, "to": self.step,
                "skipped": self.skipped}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {part: round(self.parts[part], 3) for part in PARTS}) + "\n")
        self._mirror.changed()

    def flush(self) -> None:
        """Until all lines can be read by everybody."""
        if self._mirror:
            self._mirror.flush()

    def close(self) -> None:
        """Writes the last line."""
        if self._mirror:
            self.write()
            self._mirror.close()


def goodput(run_dir: str | Path) -> dict[str, Any] | None:
    """Seconds of wall time by what they went into, from the first start to the last line; None: nothing was written.

    `productive`: steps that were neither skipped nor done again later; `restarts`: between the last sign of one
    start and the next; `goodput`: the productive share.
    """
    starts = list(_starts(run_dir))
    if not starts:
        return None
    seconds: Counter[str] = Counter(dict.fromkeys((*PARTS, "repeated", "skipped", "restarts"), 0.0))
    repeated = skipped = 0
    for number, start in enumerate(starts):
        following = starts[number + 1] if number + 1 < len(starts) else None
        done = max(1, start["to"] - start["from"])
        again = max(0, start["to"] - max(start["from"], following["from"])) if following else 0
        repeated, skipped = repeated + again, skipped + start["skipped"]
        seconds["repeated"] += start["steps"] * again / done
        seconds["skipped"] += start["steps"] * min(start["skipped"], done - again) / done
        seconds.update({part: start[part] for part in PARTS})
        if following:
            seconds["restarts"] += max(0.0, following["began"] - start["began"] - start["seconds"])
    wall = sum(start["seconds"] for start in starts) + seconds["restarts"]  # the host's clock may have been set back meanwhile
    productive = seconds.pop("steps") - seconds["repeated"] - seconds["skipped"]
    other = max(0.0, wall - productive - seconds.total())
    return {"goodput": productive / wall if wall else 0.0, "wall_seconds": wall, "productive_seconds": productive,
            **{f"{part}_seconds": value for part, value in sorted(seconds.items())}, "other_seconds": other,
            "starts": len(starts), "repeated_steps": repeated, "skipped_steps": skipped}


def _starts(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The last line of each start. One that a kill has torn, or that nobody has written so, is passed over."""
    try:
        content = read_bytes(as_path(run_dir) / FILE_NAME)
    except FileNotFoundError:
        content = b""
    last: dict[float, dict[str, Any]] = {}
    for text in content.splitlines():
        try:
            line = json.loads(text)
            if all(is_number(line[name]) for name in ("began", "seconds", "from", "to", "skipped", *PARTS)):
                last[line["began"]] = line
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return iter(last.values())
