"""What makes a folder of files a finished whole: a manifest, written last, that names every file with its size and
digest.

    manifest.json       what the writer says of the folder, the files, and the digest of all that
    digests-00000.json  of the files that process 0 wrote, and so on; only while the folder is being written

A folder without manifest.json is one whose writer was interrupted.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxlm.storage.files import (
    Location,
    as_path,
    delete,
    exists,
    file_size,
    is_below,
    is_special,
    names_in,
    open_bytes,
    read_bytes,
    sync,
    write_bytes,
)
from jaxlm.storage.remote import is_remote

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
STEP = re.compile("0|[1-9][0-9]{0,17}")
THREADS = 8  # hashing lets go of the interpreter's lock

Files = dict[str, list]  # path below the folder -> [bytes, SHA-256 in hex]


class Damaged(Exception):
    """A file is not what was written. The message: path, and what is wrong with it."""


def finished_steps(run_dir: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    return [step for step in started_steps(run_dir) if exists(as_path(run_dir) / CHECKPOINTS / str(step) / MANIFEST)]


def newest_step(run_dir: str | os.PathLike) -> int:
    """Step of the newest complete checkpoint of a run; 0: there is none."""
    return max(finished_steps(run_dir), default=0)


def started_steps(run_dir: str | os.PathLike) -> list[int]:
    """The same with those that are being written, or whose writer was interrupted. Neither `007` nor a link is one."""
    folder = as_path(run_dir) / CHECKPOINTS
    names = filter(STEP.fullmatch, names_in(folder))
    if not is_remote(folder):
        names = (name for name in names if (folder / name).is_dir() and not (folder / name).is_symlink())
    return sorted(map(int, names))


def digest_files(folder: Location, names: Iterable[str]) -> Files:
    """Reads files back, as they lie there, and makes sure that they stay (fsync)."""
    def one(name: str) -> list:
        with open_bytes(folder / name) as file:
            if not is_remote(folder):
                sync(file)
            return [file_size(folder / name), hashlib.file_digest(file, "sha256").hexdigest()]

    names = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def write_digests(folder: Location, process: int, names: Iterable[str]) -> None:
    """What one process has written."""
    write_bytes(_digests_file(folder, process), _encode(digest_files(folder, names)), durable=True)


def all_digests(folder: Location, num_processes: int) -> Files | None:
    """What all of them have written; None while one is not done."""
    paths = [_digests_file(folder, process) for process in range(num_processes)]
    if not all(map(exists, paths)):
        return None
    return {name: entry for path in paths for name, entry in json.loads(read_bytes(path)).items()}


def _digests_file(folder: Location, process: int) -> Location:
    return folder / f"digests-{process:05d}.json"


def commit(folder: Location, contents: dict[str, Any], files: Files, num_processes: int) -> None:
    """Finishes the folder."""
    body = contents | {"files": files}
    write_bytes(folder / MANIFEST, _encode(body | {"digest": _digest(body)}), durable=True)
    for process in range(num_processes):
        delete(_digests_file(folder, process))


def read_manifest(folder: Location) -> dict[str, Any]:
    """What a finished folder says of itself. Raises Damaged: not a byte of it may differ from what was written."""
    path = folder / MANIFEST
    try:
        text = read_bytes(path)
        manifest = json.loads(text)
        body = {name: value for name, value in manifest.items() if name != "digest"}
        whole = manifest["digest"] == _digest(body) and text == _encode(manifest)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise Damaged(f"{path}: damaged (not the JSON that was written)") from None
    if not whole:
        raise Damaged(f"{path}: damaged (its digest differs)")
    if not _are_files(manifest.get("files")):
        raise Damaged(f"{path}: damaged (its list of files is none)")
    return manifest


def _are_files(files: Any) -> bool:
    """Whether these look like Files; where the names lead, `find_damage` asks."""
    return isinstance(files, dict) and all(
        "\0" not in name and isinstance(entry, list) and len(entry) == 2 for name, entry in files.items())


def find_damage(folder: Location, files: Files, part: int = 0, parts: int = 1) -> str | None:
    """The first of the files that is not as it was written, and why.

    Looks at every `parts`-th file from `part` on, so that several processes can share the work.
    """
    names = sorted(files)[part::parts]

    def problem(name: str) -> str | None:
        size, digest = files[name]
        if not is_below(folder, name) or is_special(folder / name):
            return f"{folder / MANIFEST}: damaged ('{name}' is no file of this folder)"
        try:
            found = file_size(folder / name)
            if found != size:
                return f"{folder / name}: damaged ({found:,} bytes, expected {size})"
            with open_bytes(folder / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{folder / name}: damaged (its SHA-256 differs)"
        except OSError as error:
            return f"{folder / name}: damaged ({error.strerror or error})"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        return next((found for found in pool.map(problem, names) if found), None)


def _encode(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _digest(value: Any) -> str:
    return hashlib.sha256(_encode(value)).hexdigest()
