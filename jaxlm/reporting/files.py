"""Small files written whole or not at all."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary)` with a path in the same folder and moves the result to `path`; a failure leaves nothing behind.

    The temporary name keeps the suffix of `path`, which some writers go by.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON with a final newline. NaN and infinities raise ValueError: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def is_below(folder: Path, name: str | Path) -> bool:
    """Whether a name that somebody's file gives stays in the folder: not absolute, no way up, no link out or to itself."""
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # before Python 3.13: a link that leads to itself
        return False


def check_folder(path: str | Path, key: str) -> None:
    """Raises UserError, naming `key`, unless this is a folder to write in, or can be made one. Makes nothing.

    Nothing in it, or in a folder in it, may be a link that leads out of it: what is written there would be written elsewhere.
    """
    path = Path(path)
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
    if not there.is_dir():
        raise UserError(f"{key}={path}: {there} is a file; expected a folder, or a name that is free")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}={path}: no permission to write in {there}")
    for inside in itertools.chain(path.glob("*"), path.glob("*/*")):
        if inside.is_symlink() and not is_below(path, inside.relative_to(path)):
            raise UserError(f"{key}={path}: {inside} is a link that leads out of it; remove it, or name the place itself")
