"""What cannot be read of a prepared corpus: the error that names it, and a record of what was done without."""

import threading
from pathlib import Path

import numpy as np

from jaxlm.console.progress import print_line
from jaxlm.errors import RunError


class DamagedData(RunError):
    """A file of a corpus is gone, or does not hold what was written into it.

    `problem` says what is wrong and at which bytes; `block` is the number of the block of tokens (see
    jaxlm.data.corpus), or None where it is the whole file.
    """

    def __init__(self, path: Path, problem: str, block: int | None = None):
        super().__init__(f"{path}: {problem}; restore the file or prepare the corpus again, or train without what is damaged "
                         "(data.damaged=skip)")
        self.path, self.problem, self.block = path, problem, block

    def __reduce__(self) -> tuple:
        return DamagedData, (self.path, self.problem, self.block)


class Damage:
    """What was skipped (data.damaged=skip). Any thread may add to it, or ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[Path, set[int | None]] = {}
        self._samples: set[int] = set()

    def add(self, error: DamagedData, sample: int) -> None:
        """Counts a sample (its number, see jaxlm.data.batches) once, and says once on stderr what is wrong with its
        text."""
        with self._lock:
            self._samples.add(sample)
            known = self._blocks.setdefault(error.path, set())
            if error.block not in known:
                known.add(error.block)
                print_line(f"{error.path}: {error.problem}; the sequences that need it are skipped")

    def blocks(self) -> dict[Path, int]:
        """Damaged blocks found so far, by file; a file that cannot be read at all counts as one."""
        with self._lock:
            return {path: len(blocks) for path, blocks in self._blocks.items()}

    def samples(self, stop: int) -> np.ndarray:
        """int64, rising: the numbers below `stop` of the samples skipped so far."""
        with self._lock:
            return np.array(sorted(number for number in self._samples if number < stop), np.int64)
