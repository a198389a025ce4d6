"""Raw text that comes through a pipe (`<(zcat x.gz)`, /dev/stdin, a FIFO): it can be read once, and is needed more
often.

It is copied into the unfinished corpus's folder first, by the process that holds it; everything else reads the copy.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from jaxlm.console.progress import print_line, progress_bar
from jaxlm.data.source_file import CHUNK, SourceFile
from jaxlm.errors import UserError

PIPE = "pipe:"  # begins the version of what came through one: the digest of its bytes


def spool(files: list[SourceFile], folder: Path, first: int = 0) -> list[SourceFile]:
    """The files, with a copy in `folder` in place of every pipe. `first`: the number of the first of them."""
    return [file if file.version is not None else copy(file, folder / f"pipe-{number}")
            for number, file in enumerate(files, first)]


def copy(file: SourceFile, target: Path) -> SourceFile:
    """Reads the pipe to its end.

    One that gives nothing has been read by a preparation that was then killed: its copy is used. One that was being
    read when that was killed has lost what came first, and is refused.
    """
    digest, size = hashlib.sha256(), 0
    with open(file.path, "rb", buffering=0) as pipe:
        begun = target.with_name(f"{target.name}.begun-{os.fstat(pipe.fileno()).st_ino}")
        if begun.exists():
            raise UserError(f"{file.name}: a preparation was killed while it read this pipe, and the beginning is lost; start "
                            "the command again with a new one")
        with progress_bar(f"read {file.name}", total=None, unit="bytes") as advance, open(begun, "wb") as written:
            while chunk := pipe.read(CHUNK):
                written.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                advance(len(chunk))
    if size:
        os.replace(begun, target)
    else:
        begun.unlink()
        if not target.exists():
            raise UserError(f"{file.name}: nothing came through this pipe; expected text")
        with open(target, "rb") as written:
            digest, size = hashlib.file_digest(written, "sha256"), target.stat().st_size
        print_line(f"{file.name}: nothing more comes through this pipe; going on with the {size:,} bytes that were read before")
    return replace(file, path=str(target), bytes=size, version=PIPE + digest.hexdigest())
