"""Values that nobody expects, and ways to break the files of a folder."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

SCALARS = (st.none() | st.booleans() | st.integers() | st.integers(-3, 100) | st.floats() | st.text(max_size=20)
           | st.sampled_from([10**30, -10**30, 2**63, 2**31, 1e308, 5e-324, "", ".", "..", "../../x", "/etc/passwd", "~", "nan",
                              "1e3", "null", "\0", "\ud800", "a\nb", "x" * 5000, "{}", "[]", "2001-99-99"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
ODD_NAMES = ("12x", "-3", "007", "3 ", " 3", "٣", "²", "1e3", "0", "99999999999999999999", "4.damaged", ".hidden", "a\nb",
             "x" * 200)


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
    """One value somewhere in a JSON file becomes another, or goes; `sign`: and the digest says that this was
    written."""
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
    """As jaxlm.checkpoints.manifest writes it."""
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
