"""Files that grow, in a folder that may be in a bucket.

An object cannot be appended to. So a file that grows lies in a local folder, and is copied whole, in the background,
every now and then: what a reader sees is one ordinary file, at most an interval old. (Objects of one part each would
have to be put together by every reader, and listed; a metrics.jsonl of 100,000 rows has 30 MB.)
"""

import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from jaxlm.console.progress import print_line
from jaxlm.errors import RunError, UserError
from jaxlm.storage.files import Location, as_path, read_bytes, sizes_below, write_bytes
from jaxlm.storage.remote import is_remote

INTERVAL = 30.0  # seconds between copies, at least
SHARE = 20  # of the time that a copy took: copying never takes more than a twentieth


class Mirror:
    """`folder` is where to write: the folder itself where that is a local one, and else a local one that is copied
    into it."""

    def __init__(self, target: str | Path):
        self._target: Location | None = as_path(target) if is_remote(target) else None
        if self._target is None:
            self.folder = Path(target)
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="jaxlm-")
        self.folder = Path(self._temporary.name)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._copying: Future | None = None
        self._copied: dict[str, int] = {}  # bytes of each file when it was copied
        self._due = time.monotonic() + INTERVAL

    def fetch(self, name: str) -> Path:
        """A file that may be there from before, to be appended to."""
        if self._target is not None:
            with suppress(FileNotFoundError):  # the first start has none
                content = read_bytes(self._target / name)
                (self.folder / name).write_bytes(content)
                self._copied[name] = len(content)
        return self.folder / name

    def changed(self) -> None:
        """Something was written (and flushed). Copies it in the background, if that is due; a copy that fails is
        done again."""
        if self._target is None or (self._copying and not self._copying.done()):
            return
        if self._copying:
            failure, self._copying = self._copying.exception(), None
            if isinstance(failure, (RunError, UserError)):
                print_line(f"WARNING: {failure}")
            elif failure:
                raise failure
        if time.monotonic() >= self._due:
            self._copying = self._background.submit(self._copy)

    def flush(self) -> None:
        """Until everything that was written is there. Raises RunError."""
        if self._target is not None:
            self._background.submit(self._copy).result()

    def close(self) -> None:
        """The same; nothing can be written afterwards."""
        if self._target is None:
            return
        try:
            self.flush()
        finally:
            self._background.shutdown()
            self._temporary.cleanup()

    def _copy(self) -> None:
        began = time.monotonic()
        try:
            for name, size in sizes_below(self.folder).items():
                if self._copied.get(name) != size:
                    write_bytes(self._target / name, (self.folder / name).read_bytes())
                    self._copied[name] = size
        finally:
            self._due = time.monotonic() + max(INTERVAL, SHARE * (time.monotonic() - began))
