"""The promise that all input is held to, and a small finished run whose copies are broken."""

import contextlib
import hashlib
import io
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import yaml

from jaxlm import cli
from jaxlm.errors import RunError, UserError
from jaxlm.runtime import processes

PATIENCE = 60  # seconds: what takes longer hangs
LONGEST = 2000  # characters of a line that a person would read

RUN = {
    "model": {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "max_length": 32},
    "data": {"document": "line", "tokenizer": "characters", "validation": 0.2, "sequence_length": 16, "global_batch_size": 4,
             "prepare_processes": 1, "shard_tokens": 5000},
    "train": {"steps": 3}, "schedule": {"name": "constant"}, "checkpoint": {"every_steps": 1, "keep_last": 3},
    "eval": {"every_steps": 2}, "logging": {"every_steps": 1, "tensorboard": False}, "generate": {"max_new_tokens": 2},
    "devices": {"platform": "cpu", "count": 1, "compiled": None},
}


class Hang(BaseException):
    """It took too long. Not an Exception: what is tested must not catch it."""


class Ending(NamedTuple):
    """How something ended: well (0), refused as bad input (2), or failed with one line (1)."""

    code: int
    line: str  # the reason; empty when it ended well
    out: str = ""


@contextlib.contextmanager
def in_time(seconds: float = PATIENCE) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Hang as hang:
        raise AssertionError(f"not done after {seconds} s") from hang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def command(*arguments: Any) -> Ending:
    """`jaxlm ARGUMENTS` in this process: it ends well, or with one line that says why. What it raises would have been a
    traceback. Its streams are as strict with text that cannot be encoded as those of a real process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors) for errors in ("strict", "backslashreplace"))
    # A backend starts only once in a process: every command takes the first of its devices.
    here = mock.patch.object(processes, "initialize", lambda settings: jax.devices()[:1])
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), here:
        code = cli.main([str(argument) for argument in arguments])
        out.flush()
        err.flush()
    told, said = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert code in (0, 1, 2), (code, said)
    if code == 0:
        return Ending(0, "", told)
    lines = [line for line in said.split("\n") if line.startswith("jaxlm: ")]
    assert len(lines) == 1 and said.endswith(f"{lines[0]}\n"), (code, said)
    return Ending(code, readable(lines[0].removeprefix("jaxlm: ")), told)


def call(function: Callable[[], Any]) -> Ending:
    """A function, held to the same; it may leave an OSError that names a file to the front door."""
    try:
        with in_time(), contextlib.redirect_stderr(io.StringIO()):
            function()
    except (UserError, RunError) as error:
        return Ending(2 if isinstance(error, UserError) else 1, readable(" ".join(str(error).split())))
    except OSError as error:
        assert error.filename is not None, error
        return Ending(1, str(error))
    return Ending(0, "")


def readable(line: str) -> str:
    assert line.strip() and len(line) <= LONGEST, (len(line), line[:LONGEST])
    return line


def tree(folder: Path) -> dict[str, str]:
    """All that is below a folder, with digests of the files."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in folder.rglob("*")}


class World:
    """A folder with a text, a corpus and a finished run, made when first asked for and then only copied."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text = folder / "text.txt"
        self.text.write_text("".join(f"the line number {number} of a text\n" for number in range(400)), encoding="utf-8")
        self.run_file = folder / "run.yaml"
        settings = RUN | {"data": RUN["data"] | {"raw": str(self.text), "corpus": str(folder / "corpus")},
                          "run_dir": str(folder / "run")}
        self.run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")

    @cached_property
    def corpus(self) -> Path:
        assert command("prepare", self.run_file).code == 0
        return self.folder / "corpus"

    @cached_property
    def run(self) -> Path:
        """With complete checkpoints of the steps 1, 2 and 3."""
        assert self.corpus and command("train", self.run_file).code == 0
        return self.folder / "run"

    @contextlib.contextmanager
    def scratch(self, original: Path | None = None) -> Iterator[Path]:
        """A copy of a folder (None: an empty one) that lies alone in a folder of its own, for one example."""
        place = self.folder / "scratch"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        folder = place / "copy"
        shutil.copytree(original, folder) if original else folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(place)
