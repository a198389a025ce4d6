"""Whether raw text is still what a corpus was prepared from. Never an error: the corpus is what a run is trained on."""

from collections.abc import Iterator
from typing import Any

from jaxlm.data.corpus import Corpus
from jaxlm.data.formats import Reading, look
from jaxlm.data.pipes import PIPE
from jaxlm.data.source_file import SourceFile
from jaxlm.data.sources import OPEN_DESCRIPTORS, find_sources
from jaxlm.data.stages import file_digest
from jaxlm.errors import RunError, UserError
from jaxlm.settings import DataSettings
from jaxlm.storage.remote import is_remote

DIGESTED = 64 * 2**20  # bytes of files of the same size and another time that are read again, to see whether they are the same
NAMED = 3  # files of each kind in the line


def changes(corpus: Corpus, data: DataSettings) -> list[str]:
    """A line about what has been edited, removed or added since the corpus was prepared; none where it is the same
    text.

    Files are compared by name, size and time, and where just the time differs, by their content if that is little to
    read. In a bucket the store's own version is compared. What came through a pipe is not there any more.
    """
    manifest = corpus.manifest
    known = {entry["path"]: entry for entry in [*manifest["sources"], *manifest.get("passed_over", [])]
             if not str(entry.get("version", "")).startswith(PIPE)}
    now: dict[str, SourceFile] = {}
    if data.raw is None:
        return []
    problems = []
    for item in raw_items(data):
        try:
            now |= {file.name: file for file in find_sources(item)}
        except (UserError, RunError, OSError) as error:
            problems.append(f"'{item}' cannot be found now ({error})" if is_remote(item) else f"'{item}' is not there any more")
    if problems:
        return [f"data.raw: {', '.join(problems)}, so it cannot be compared with {corpus.directory}, which is used as it is"]
    altered, gone = list(changed(known, now)), sorted(known.keys() - now.keys())
    new = [name for name in sorted(now.keys() - known.keys()) if is_read(now[name], data)]
    told = [words for words in (told_of("file changed", "files changed", altered), told_of("file gone", "files gone", gone),
                                told_of("new file", "new files", new)) if words]
    if not told:
        return []
    return [f"data.raw is not what {corpus.directory} was prepared from: {'; '.join(told)}. The corpus is used as it is; "
            "delete it, or name another folder (data.corpus), to prepare anew"]


def raw_items(data: DataSettings) -> list[str]:
    """What the settings name, but for pipes and the like."""
    raw = [data.raw] if isinstance(data.raw, str) else data.raw
    held_out = [data.validation] if isinstance(data.validation, str) else []
    return [item for item in (*held_out, *raw) if not item.startswith(OPEN_DESCRIPTORS)]


def changed(known: dict[str, dict[str, Any]], now: dict[str, SourceFile]) -> Iterator[str]:
    """`a.txt: 10 to 12 bytes`: the files that are still there, with another size, or another time and not the same
    content."""
    budget = DIGESTED
    for name in sorted(known.keys() & now.keys()):
        before, file = known[name], now[name]
        if file.bytes != before["bytes"]:
            yield f"{name}: {before['bytes']:,} to {file.bytes:,} bytes"
        elif before.get("version") not in (None, file.version):
            if file.bytes > budget or is_remote(file.path) or "sha256" not in before:
                yield f"{name}: written since, of the same size"
                continue
            budget -= file.bytes
            if not has_digest(file, before["sha256"]):
                yield f"{name}: other content"


def has_digest(file: SourceFile, digest: str) -> bool:
    try:
        return file_digest(file.path) == digest
    except OSError:
        return False


def is_read(file: SourceFile, data: DataSettings) -> bool:
    """Whether preparing would read a new file, and not pass it over."""
    try:
        return not file.searched or look(file, Reading(data.text_field, data.document, encoding=data.encoding)) is not None
    except UserError:
        return True


def told_of(one: str, several: str, names: list[str]) -> str:
    """`2 files changed (a.txt, b.txt)`; '' for none."""
    shown = ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])
    return f"{len(names):,} {one if len(names) == 1 else several} ({shown})" if names else ""
