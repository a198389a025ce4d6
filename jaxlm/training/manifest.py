"""What makes a folder of files a finished whole: a manifest, written last, that names every file with its size and digest.

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
from pathlib import Path
from typing import Any

from jaxlm.reporting.files import is_below, write_atomically

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
STEP = re.compile("0|[1-9][0-9]{0,17}")
THREADS = 8  # hashing lets go of the interpreter's lock

Files = dict[str, list]  # path below the folder -> [bytes, SHA-256 in hex]


class Damaged(Exception):
    """A file is not what was written. The message: path, and what is wrong with it."""


def finished_steps(run_dir: str | Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    folders = (path.parent for path in (Path(run_dir) / CHECKPOINTS).glob(f"*/{MANIFEST}"))
    return sorted(int(folder.name) for folder in folders if is_step(folder))


def is_step(folder: Path) -> bool:
    """Whether a folder has the name that a step's has, and lies here: neither `007` nor a link is one."""
    return STEP.fullmatch(folder.name) is not None and folder.is_dir() and not folder.is_symlink()


def digest_files(folder: Path, names: Iterable[str]) -> Files:
    """Reads files back, as they lie on disk, and makes sure that they stay there (fsync)."""
    def one(name: str) -> list:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
            return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    names = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def files_below(folder: Path) -> list[str]:
    """Every file below a folder, by its path from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_digests(folder: Path, process: int, names: Iterable[str]) -> None:
    """What one process has written."""
    _write(_digests_file(folder, process), digest_files(folder, names))


def all_digests(folder: Path, num_processes: int) -> Files | None:
    """What all of them have written; None while one is not done."""
    paths = [_digests_file(folder, process) for process in range(num_processes)]
    if not all(path.exists() for path in paths):
        return None
    return {name: entry for path in paths for name, entry in json.loads(path.read_bytes()).items()}


def _digests_file(folder: Path, process: int) -> Path:
    return folder / f"digests-{process:05d}.json"


def commit(folder: Path, contents: dict[str, Any], files: Files, num_processes: int) -> None:
    """Finishes the folder."""
    body = contents | {"files": files}
    _write(folder / MANIFEST, body | {"digest": _digest(body)})
    for process in range(num_processes):
        _digests_file(folder, process).unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished folder says of itself. Raises Damaged: not a byte of it may differ from what was written."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
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


def find_damage(folder: Path, files: Files, part: int = 0, parts: int = 1) -> str | None:
    """The first of the files that is not as it was written, and why.

    Looks at every `parts`-th file from `part` on, so that several processes can share the work.
    """
    names = sorted(files)[part::parts]

    def problem(name: str) -> str | None:
        size, digest = files[name]
        if not is_below(folder, name) or ((folder / name).exists() and not (folder / name).is_file()):
            return f"{folder / MANIFEST}: damaged ('{name}' is no file of this folder)"
        try:
            with open(folder / name, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return f"{folder / name}: damaged ({found:,} bytes, expected {size})"
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


def _write(path: Path, value: Any) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(_encode(value))
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)
