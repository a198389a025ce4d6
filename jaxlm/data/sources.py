"""Raw text: which files `data.raw` means, and how they are cut into units of work, in one fixed order.

A unit is what one worker process reads at a time: some small files, a byte range of a big file of lines, or row
groups of a Parquet file. Reading unit after unit gives the same documents in the same order however the files were
cut.
"""

import glob
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jaxlm.console.units import counted
from jaxlm.data.decoding import has_plain_lines
from jaxlm.data.formats import KNOWN
from jaxlm.data.source_file import COMPRESSIONS, SourceFile, open_parquet, suffix_of
from jaxlm.errors import UserError, nearest
from jaxlm.storage import remote

STDLIB = "python://stdlib"
STDLIB_SKIPPED = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"))
UNIT_BYTES = 4 * 2**20  # long enough to make a process worth while, short enough to share the work and to lose little of it
MOST_UNITS = 4096  # a large corpus gets larger units instead of more of them
OPEN_DESCRIPTORS = ("/dev/", "/proc/")  # /dev/stdin is another file in another process


class PassedOver(Counter):
    """How many files of the folders that were searched are not read, by their suffix."""

    def note(self, raw: str | list[str]) -> list[str]:
        """One line; none where nothing was passed over."""
        if not self:
            return []
        where = raw if isinstance(raw, str) else f"{', '.join(raw[:3])}{', ...' if len(raw) > 3 else ''}"
        several = self.total() > 1
        kinds = sorted(self.items(), key=lambda entry: (-entry[1], entry[0]))
        return [f"{counted(self.total(), 'file')} in {where} {'were' if several else 'was'} passed over: "
                f"{', '.join(f'{kind} {count:,}' for kind, count in kinds)}"]


@dataclass(frozen=True)
class Part:
    """A stretch of a file: bytes of a file of lines, row groups of a Parquet file; the whole file where `stop` is
    None."""

    file: SourceFile
    start: int = 0
    stop: int | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time."""

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


# ---------------------------------------------------------------------------------------------------------------- files

def find_sources(raw: str | list[str], key: str = "data.raw", passed_over: PassedOver | None = None) -> list[SourceFile]:
    """The files of a path, folder, glob, `python://stdlib` or a list of these: items in the given order, sorted
    inside each.

    Paths, folders and globs may be in a bucket (s3://, gs://). Folders are searched for known suffixes, below hidden
    folders not at all; what is left out is counted in `passed_over`. A file named outright is read whatever its
    suffix, and so is a pipe (its `version` is None). A file that is met twice is read once. UserError (naming `key`)
    when an item matches nothing.
    """
    found: dict[str, SourceFile] = {}
    passed_over = PassedOver() if passed_over is None else passed_over
    for item in [raw] if isinstance(raw, str) else raw:
        left_out = PassedOver()
        files = list(stdlib_files(item, key) if item.startswith("python://") else matching_files(item, key, left_out))
        if not files:
            raise UserError(f"{key}: no text file in '{item}'{''.join(f' ({note})' for note in left_out.note(item))}; known "
                            f"suffixes, each also with {' '.join(COMPRESSIONS)}: {' '.join(KNOWN)}")
        passed_over.update(left_out)
        for file in files:
            found.setdefault(os.path.realpath(file.path), file)
    return list(found.values())


def stdlib_files(item: str, key: str) -> Iterator[SourceFile]:
    """The interpreter's own library without its tests and without installed packages."""
    if item != STDLIB:
        raise UserError(f"{key}: '{item}' is unknown, expected {STDLIB}{nearest(item, [STDLIB])}")
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not STDLIB_SKIPPED.intersection(inside.parts[:-1]):
            yield replace(local_file(str(path), path, key), name=f"{STDLIB}/{inside.as_posix()}")


def matching_files(item: str, key: str, passed_over: PassedOver) -> Iterator[SourceFile]:
    if remote.is_remote(item):
        yield from remote_files(item, key, passed_over)
        return
    paths = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
    if not paths:
        folder = Path(item).parent
        beside = [str(folder / name) for name in os.listdir(folder)] if folder.is_dir() else []
        raise UserError(f"{key}: '{item}' matches no file{nearest(item, beside)}")
    searched = len(paths) > 1 and not Path(item).suffix  # `folder/*` is like the folder, `folder/*.log` means just those
    for path in paths:
        if os.path.isdir(path):
            yield from (local_file(name, name, key, searched=True) for name in folder_files(path, passed_over))
        elif not searched or is_known(os.path.basename(path), passed_over):
            yield local_file(path, path, key, searched)


def local_file(name: str, path: str | Path, key: str, searched: bool = False) -> SourceFile:
    """UserError for what can neither be read again nor be read to its end: a device, a socket, a terminal."""
    path = os.path.realpath(path) if str(path).startswith(OPEN_DESCRIPTORS) else os.path.abspath(path)
    try:
        status = os.stat(path if os.path.exists(path) else name)  # an open file may have lost its name
    except OSError as error:
        raise UserError(f"{key}: {name}: unreadable ({error.strerror})") from None
    if stat.S_ISREG(status.st_mode) and os.path.exists(path):
        return SourceFile(Path(name).as_posix(), path, status.st_size, status.st_mtime_ns, searched)
    if not stat.S_ISFIFO(status.st_mode) and not stat.S_ISREG(status.st_mode):
        kind = "a socket" if stat.S_ISSOCK(status.st_mode) else "a device" if not is_terminal(name) else "a terminal"
        raise UserError(f"{key}: {name} is {kind}; expected a file, a folder or a pipe")
    return SourceFile(str(name), str(name), 0)


def is_terminal(name: str | Path) -> bool:
    return os.path.realpath(name).startswith(("/dev/pts/", "/dev/tty", "/dev/console"))


def remote_files(item: str, key: str, passed_over: PassedOver) -> Iterator[SourceFile]:
    """The same in a bucket."""
    item = item.rstrip("/")
    if set("*?[").intersection(item):
        found, searched = remote.objects_matching(item), not Path(item).suffix
    else:
        found, searched = {f"{item}/{name}": entry for name, entry in remote.objects_below(item).items()}, True
        if not found and remote.exists(item):
            found, searched = {item: (remote.size(item), remote.version(item))}, False
    if not found:
        raise UserError(f"{key}: '{item}' matches no file")
    for url, (size, version) in found.items():
        if not searched or is_known(url.removeprefix(item), passed_over):
            yield SourceFile(url, url, size, version, searched)


def folder_files(folder: str, passed_over: PassedOver) -> list[str]:
    """Files with a known suffix below a folder, sorted by path. Linked folders are followed, each real one once."""
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            regular = [name for name in names if os.path.isfile(os.path.join(root, name))]
            found += [os.path.join(root, name) for name in regular if is_known(name, passed_over)]
        visited.add(real)
    return sorted(found)


def is_known(name: str, passed_over: PassedOver) -> bool:
    """Whether a file that a search has met is read, by its name; counted if not."""
    suffix = suffix_of(name)
    if "/." in f"/{name}":
        passed_over["hidden"] += 1
    elif suffix not in KNOWN:
        passed_over[suffix or Path(name).suffix.lower() or "without suffix"] += 1
    else:
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------- units

def plan_units(files: list[SourceFile], document: str, unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes` of input, in the order of the files."""
    unit_bytes = max(unit_bytes, sum(file.bytes for file in files) // MOST_UNITS)
    units: list[Unit] = []
    parts: list[Part] = []
    size = 0
    for file in files:
        for part in file_parts(file, document, unit_bytes):
            parts.append(part)
            size += part.bytes
            if size >= unit_bytes:
                units.append(Unit(tuple(parts)))
                parts, size = [], 0
    return units + [Unit(tuple(parts))] if parts else units


def file_parts(file: SourceFile, document: str, unit_bytes: int) -> Iterator[Part]:
    """A file whole, or cut where that is possible without reading it."""
    if file.bytes <= unit_bytes or file.compression:
        yield Part(file, bytes=file.bytes)
    elif file.kind == "parquet":
        yield from row_group_parts(file, unit_bytes)
    elif (file.kind == "jsonl" or (file.kind == "text" and document == "line")) and has_plain_lines(file.encoding):
        for start in range(0, file.bytes, unit_bytes):
            stop = min(start + unit_bytes, file.bytes)
            yield Part(file, start, stop, stop - start)
    else:
        yield Part(file, bytes=file.bytes)


def row_group_parts(file: SourceFile, unit_bytes: int) -> Iterator[Part]:
    with open_parquet(file) as parquet:
        groups = parquet.metadata.num_row_groups
    each = max(1, round(groups * unit_bytes / file.bytes))
    for start in range(0, groups, each):
        stop = min(start + each, groups)
        yield Part(file, start, stop, file.bytes * (stop - start) // groups)
