"""What the fuzz tests share: the one promise that all input is held to, a small finished run to break, and ways to break files.

`fuzzed_inputs.py` draws the examples and checks them; `test_fuzz.py` is the short form, `fuzz.py` the long one.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import yaml
from hypothesis import strategies as st

from jaxlm import cli
from jaxlm.errors import RunError, UserError
from jaxlm.parallel import distributed

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


class Told(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def in_time(seconds: float = PATIENCE) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def told(*arguments: Any) -> Told:
    """`jaxlm ARGUMENTS` in this process, as its streams would be: it ends well, or with one line that says why. What it raises
    would have been a traceback."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors) for errors in ("strict", "backslashreplace"))
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), one_device():
        code = cli.main([str(argument) for argument in arguments])
        out.flush()
        err.flush()
    result = Told(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))
    assert result.code in (0, 1, 2), result
    if result.code:
        reasons = [line for line in result.err.split("\n") if line.startswith("jaxlm: ")]
        assert len(reasons) == 1 and result.err.endswith(f"{reasons[0]}\n"), result
        check_line(reasons[0].removeprefix("jaxlm: "))
    return result


def check_line(line: str) -> None:
    """One line, that says something and can be read."""
    assert line.strip() and len(line) <= LONGEST, (len(line), line[:LONGEST])


def refused(function: Callable[[], Any]) -> str | None:
    """The line with which it is refused; None: it went well. Anything else that it raises goes on."""
    try:
        with in_time(), contextlib.redirect_stderr(io.StringIO()):
            function()
    except (UserError, RunError) as error:
        check_line(" ".join(str(error).split()))
        return str(error)
    return None


def one_device() -> contextlib.AbstractContextManager:
    """A backend starts only once in a process; commands take the first of its devices."""
    return mock.patch.object(distributed, "initialize", lambda settings: jax.devices()[:1])


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
        assert told("prepare", self.run_file).code == 0
        return self.folder / "corpus"

    @cached_property
    def run(self) -> Path:
        """With complete checkpoints of the steps 1, 2 and 3."""
        assert self.corpus and told("train", self.run_file).code == 0
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


# -------------------------------------------------------------------------------------------------------------- damage

SCALARS = (st.none() | st.booleans() | st.integers() | st.integers(-3, 100) | st.floats() | st.text(max_size=20)
           | st.sampled_from([10**30, -10**30, 2**63, 2**31, 1e308, 5e-324, "", ".", "..", "../../x", "/etc/passwd", "~", "nan",
                              "1e3", "null", "\0", "\ud800", "a\nb", "x" * 5000, "{}", "[]", "2001-99-99"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
ODD_NAMES = ("12x", "-3", "007", "3 ", " 3", "٣", "²", "1e3", "0", "99999999999999999999", "4.damaged", ".hidden", "a\nb", "x" * 200)


class Damage(NamedTuple):
    """One thing done to one of the files of a folder; `where`, `value`: of any range, taken as it fits."""

    kind: str
    file: int
    where: int
    value: Any


def damages(kinds: tuple[str, ...]) -> st.SearchStrategy[list[Damage]]:
    number = st.integers(0, 2**16)
    return st.lists(st.builds(Damage, st.sampled_from(kinds), number, number, VALUES), min_size=1, max_size=3)


FILE_DAMAGES = ("flip", "cut", "empty", "remove", "grow", "swap", "folder", "loop", "overwrite", "json", "signed json", "rename",
                "junk")


def apply(damage: Damage, folder: Path) -> None:
    """Does it. Nothing happens where it does not fit."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if files:
        path, other = files[damage.file % len(files)], files[damage.where % len(files)]
        HOW[damage.kind](path, other, damage.where, damage.value)


def flip(path: Path, other: Path, where: int, value: Any) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[where % len(content)] ^= 1 << where % 8
        path.write_bytes(content)


def cut(path: Path, other: Path, where: int, value: Any) -> None:
    os.truncate(path, where % (path.stat().st_size + 1))


def grow(path: Path, other: Path, where: int, value: Any) -> None:
    with open(path, "ab") as file:
        file.write(os.fsencode(str(value)[:50]) if "\0" not in str(value) else b"\0")


def swap(path: Path, other: Path, where: int, value: Any) -> None:
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def as_folder(path: Path, other: Path, where: int, value: Any) -> None:
    path.unlink()
    path.mkdir()


def as_loop(path: Path, other: Path, where: int, value: Any) -> None:
    path.unlink()
    path.symlink_to(path.name)


def overwrite(path: Path, other: Path, where: int, value: Any) -> None:
    path.write_text(json.dumps(value))


def rename(path: Path, other: Path, where: int, value: Any) -> None:
    """Sometimes the folder that it is in."""
    victim = path if where % 3 else path.parent
    name = ODD_NAMES[where % len(ODD_NAMES)]
    if not (victim.parent / name).exists() and victim.name != "copy":
        victim.rename(victim.parent / name)


def junk(path: Path, other: Path, where: int, value: Any) -> None:
    """Something more beside it: a copy, an empty folder, a link to itself or to a folder above."""
    new = path.parent / ODD_NAMES[where % len(ODD_NAMES)]
    if not new.exists() and not new.is_symlink():
        kind = where // len(ODD_NAMES) % 4
        [lambda: shutil.copy(path, new), new.mkdir, lambda: new.symlink_to(new.name), lambda: new.symlink_to("..")][kind]()


def change_json(path: Path, other: Path, where: int, value: Any, sign: bool = False) -> None:
    """One value somewhere in a JSON file becomes another, or goes; `sign`: and the digest says that this was written."""
    jsons = sorted(path.parent.glob("*.json"))
    if not jsons:
        return
    path = jsons[where % len(jsons)]
    with contextlib.suppress(ValueError, OSError, RecursionError):
        content = json.loads(path.read_bytes())
        places = list(containers(content))
        if places:
            container, key = places[where % len(places)]
            if where % 7:
                container[key] = value
            else:
                del container[key]
        if sign and isinstance(content, dict) and "digest" in content:
            body = {name: value for name, value in content.items() if name != "digest"}
            content["digest"] = hashlib.sha256(encoded(body)).hexdigest()
        path.write_bytes(encoded(content))


def encoded(value: Any) -> bytes:
    """As jaxlm.training.manifest writes it."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def containers(value: Any) -> Iterator[tuple[Any, Any]]:
    """(list or dict, key) of every value inside."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from containers(value[key])


HOW: dict[str, Callable[[Path, Path, int, Any], None]] = {
    "flip": flip, "cut": cut, "empty": lambda path, *_: path.write_bytes(b""), "remove": lambda path, *_: path.unlink(),
    "grow": grow, "swap": swap, "folder": as_folder, "loop": as_loop, "overwrite": overwrite, "json": change_json,
    "signed json": lambda *how: change_json(*how, sign=True), "rename": rename, "junk": junk,
}
