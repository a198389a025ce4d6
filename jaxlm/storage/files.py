"""Files, on this machine's file systems and in s3:// and gs:// buckets: read whole or in part, written whole or not
at all."""

import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeAlias

from jaxlm.console.progress import print_once
from jaxlm.errors import UserError, clipped, without_secrets
from jaxlm.storage import remote
from jaxlm.storage.remote import is_remote

Location: TypeAlias = Any  # pathlib.Path, or etils.epath.Path for a remote one: `/`, name, parent and str() are alike
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # what some file systems answer
SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")


def as_path(location: str | os.PathLike) -> Location:
    """What file names can be appended to. (pathlib makes s3:/bucket of s3://bucket.) Raises UserError: another
    store's URL."""
    if not is_remote(location):
        if SCHEME.match(str(location)):
            raise UserError(f"{without_secrets(str(location))}: expected a folder or file of this machine, or s3://... or gs://...")
        return Path(location)
    from etils import epath

    return epath.Path(location)


def absolute(location: str | os.PathLike) -> Location:
    """The same place, whatever the current directory will be."""
    return as_path(location) if is_remote(location) else as_path(location).absolute()


def name_of(folder: str | os.PathLike) -> str:
    """The last part of its path, that of `.` too."""
    return as_path(folder).name if is_remote(folder) else Path(folder).resolve().name


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_bytes(path: str | os.PathLike) -> bytes:
    """FileNotFoundError when it is not there, as in all of these."""
    return remote.read(path) if is_remote(path) else Path(path).read_bytes()


def read_text(path: str | os.PathLike) -> str:
    """UTF-8; UnicodeDecodeError where it is not."""
    return read_bytes(path).decode() if is_remote(path) else Path(path).read_text(encoding="utf-8")


def read_range(path: str | os.PathLike, start: int, stop: int) -> bytes:
    """Bytes start .. stop, fewer where the file ends before. Of a remote file, only these are fetched."""
    if is_remote(path):
        return remote.read(path, start, stop)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(max(stop - start, 0))


def open_bytes(path: str | os.PathLike) -> IO[bytes]:
    """To read from and to seek in; of a remote file, what is read is fetched piece by piece."""
    return remote.open_object(path) if is_remote(path) else open(path, "rb")


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a folder; a remote folder is there while there is something in it."""
    return remote.exists(path) if is_remote(path) else os.path.exists(path)


def is_special(path: str | os.PathLike) -> bool:
    """Whether it is there, and something else than a plain file: a folder, or a pipe, whose reader would wait for
    ever."""
    return not is_remote(path) and os.path.exists(path) and not os.path.isfile(path)


def file_size(path: str | os.PathLike) -> int:
    """Bytes."""
    return remote.size(path) if is_remote(path) else os.path.getsize(path)


def version_of(path: str | os.PathLike) -> int | str:
    """What changes whenever the file is written: its time in nanoseconds, or what the store calls its version."""
    return remote.version(path) if is_remote(path) else os.stat(path).st_mtime_ns


def modified(path: str | os.PathLike) -> float:
    """When the file was written, in seconds, by the clock of the file system or the store, which all hosts share."""
    return remote.modified(path) if is_remote(path) else os.stat(path).st_mtime


def names_in(folder: str | os.PathLike) -> list[str]:
    """Files and folders in a folder, by name; [] when there is no such folder."""
    if is_remote(folder):
        return remote.names(folder)
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def sizes_below(folder: str | os.PathLike) -> dict[str, int]:
    """Bytes of every file below a folder, by its path from there."""
    if is_remote(folder):
        return remote.sizes_below(folder)
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary)` with a local path and moves the result to `path`; a failure leaves nothing behind.

    The temporary name keeps the suffix of `path`, which some writers go by.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            write(temporary := Path(folder) / as_path(path).name)
            remote.upload(temporary, path)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes, *, durable: bool = False) -> None:
    """`durable`: also when the machine loses its power afterwards. What is in a bucket always is."""
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                sync(file)

    if is_remote(path):
        remote.write(path, content)
    else:
        write_atomically(path, write)


def sync(file: IO) -> None:
    """Until what is in a local file stays there when the machine loses its power (fsync), if its file system can say
    so."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print_once(f"WARNING: {Path(file.name).parent}: this file system does not say when files are safe from a loss of power "
                   f"(fsync: {error.strerror})")


def lock(file: IO, wait: bool = False) -> bool:
    """Locks a local file for this process; the end of the process, in any way, frees it. False: another process
    holds it.

    `wait`: until that one frees it. On a file system without locks nothing is held, and a line says so.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print_once(f"WARNING: {file.name}: no locks on this file system ({error.strerror}); make sure that nothing else works "
                   "in this folder")
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Indented JSON with a final newline. NaN and infinities raise ValueError: JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # of file names that are no UTF-8: JSON's own escapes, \\udcff


def json_text(value: Any) -> str:
    """One line of JSON, as every other program reads it: null for NaN and infinities, which JSON has no number for."""
    return json.dumps(plain(value), allow_nan=False)


def plain(value: Any) -> Any:
    """NumPy and JAX scalars as Python numbers, non-finite floats as None; also inside mappings and lists."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def move(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """Gives a folder another name, in place of what has it. In a bucket it is copied, object by object."""
    delete(target)
    if is_remote(folder):
        remote.move(folder, target)
    else:
        os.rename(folder, target)


def is_below(folder: Location, name: str | Path) -> bool:
    """Whether a name that somebody's file gives stays in the folder: not absolute, no way up, no link out or to
    itself."""
    if is_remote(folder):
        return not {"", ".", ".."}.intersection(str(name).split("/"))
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # before Python 3.13: a link that leads to itself
        return False


def make_folder(folder: str | os.PathLike) -> None:
    """With the folders above it; buckets need none."""
    if not is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


def delete(path: str | os.PathLike) -> None:
    """A file, or a folder with all that is in it; it may be gone already."""
    if is_remote(path):
        remote.delete_below(path)
    elif os.path.isdir(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def check_folder(path: str | os.PathLike, key: str) -> None:
    """Raises UserError, naming `key`, unless this is a folder to write in, or can be made one. Makes nothing.

    Nothing in it, or in a folder in it, may be a link that leads out of it: what is written there would be written
    elsewhere. Of a bucket it is only asked whether its files can be listed.
    """
    if is_remote(path):
        remote.check_bucket(path, key)
        return
    path = Path(path)
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:  # a name that is too long, or holds what no name can
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UserError(f"{key}={clipped(str(path))}: {getattr(error, 'strerror', error)}; choose another") from None
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
    if not there.is_dir():
        raise UserError(f"{key}={path}: {there} is a file; expected a folder, or a name that is free")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}={path}: no permission to write in {there}")
    for inside in itertools.chain(path.glob("*"), path.glob("*/*")):
        if inside.is_symlink() and not is_below(path, inside.relative_to(path)):
            raise UserError(f"{key}={path}: {inside} is a link that leads out of it; remove it, or name the place itself")
