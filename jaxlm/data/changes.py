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
from jaxlm.remote import is_remote
from jaxlm.settings import DataSettings

DIGESTED = 64 * 2**20  # bytes of files of the same size and another time that are read again, to see whether they are the same
NAMED = 3  # files of each kind in the line


def changes(corpus: Corpus, data: DataSettings) -> list[str]:
    """A line about what has been edited, removed or added since the corpus was prepared; none where it is the same text.

    Files are compared by name, size and time, and where just the time differs, by their content if that is little to read. In a
    bucket the store's own version is compared. What came through a pipe is not there any more.
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
    altered = [f"{name}{difference(known[name], now[name])}" for name in changed(known, now)]
    new = [name for name in sorted(now.keys() - known.keys()) if is_read(now[name], data)]
    gone = sorted(known.keys() - now.keys())
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
    """Names of files that are still there, with another size, or another time and not the same content."""
    budget = DIGESTED
    for name in sorted(known.keys() & now.keys()):
        before, file = known[name], now[name]
        if file.bytes != before["bytes"]:
            yield name
        elif before.get("version") not in (None, file.version):
            small = file.bytes <= budget and not is_remote(file.path) and "sha256" in before
            budget -= file.bytes if small else 0
            if not small or not has_digest(file, before["sha256"]):
                yield name


def has_digest(file: SourceFile, digest: str) -> bool:
    try:
        return file_digest(file.path) == digest
    except OSError:
        return False


def difference(before: dict[str, Any], file: SourceFile) -> str:
    if file.bytes != before["bytes"]:
        return f": {before['bytes']:,} to {file.bytes:,} bytes"
    small = file.bytes <= DIGESTED and not is_remote(file.path)
    return ": other content" if small else ": written since, of the same size"


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
