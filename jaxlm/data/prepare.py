"""From raw text to a corpus: clean, select, choose a tokenizer, tokenize, write shards.

Everything happens in `<directory>.partial`, whose content becomes `<directory>` in one rename at the very end.
Cleaned text and tokens are kept there unit by unit, so that memory stays small and an interrupted preparation goes
on where it was. The same input gives the same bytes whatever the number of processes and interruptions.
"""

import codecs
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.console.progress import progress_bar
from jaxlm.data import cleaning, pipes, sources, stages
from jaxlm.data.corpus import SPLITS, TOKENIZER, Corpus, checksum_file, offsets_file, shard_file, token_type
from jaxlm.data.documents import read_documents
from jaxlm.data.formats import KINDS, Reading, look_at
from jaxlm.data.manifest import FORMAT, MANIFEST, REPORT
from jaxlm.data.report import COUNTS, commonest_unknown, refuse_many_replaced, report, why_dropped
from jaxlm.data.source_file import SourceFile, suffix_of
from jaxlm.data.stages import Cleaned, CleanTask, TokenizeTask
from jaxlm.data.tokenizers import DESCRIPTION, Tokenizer, load_tokenizer
from jaxlm.data.workers import Result, Workers, exclusive, remove_exclusive
from jaxlm.errors import UserError
from jaxlm.settings import TRAINED_TOKENIZERS, DataSettings, expand_home
from jaxlm.storage import remote
from jaxlm.storage.files import (
    Location,
    absolute,
    check_folder,
    exists,
    names_in,
    sizes_below,
    write_atomically,
    write_json,
)
from jaxlm.storage.remote import is_remote

CACHE = "~/.cache/jaxlm/prepare"  # of corpora that go into a bucket when they are done
SHAPING = ("raw", "text_field", "document", "encoding", "validation", "validation_split", "tokenizer", "end_token",
           "shard_tokens")
SHAPING_TRAINED = ("lowercase", "tokenizer_sample")  # where a tokenizer is trained
DERIVED = ("model.vocab_size", "data.validation_split")  # null goes with whatever they became
BEFORE_THERE_WAS = {"data.encoding": "utf-8"}  # a key: what corpora were prepared with that know nothing of it
DESCRIPTOR = re.compile(r"/(dev|proc/self)/fd/\d+")  # the shell numbers them anew each time


@dataclass(frozen=True)
class Plan:
    """What there is to do. The user's own validation text, if any, is the first `num_validation` units."""

    data: DataSettings
    vocab_size: int | None
    settings: dict[str, Any]
    units: list[sources.Unit]
    num_validation: int
    reading: Reading
    passed_over: list[SourceFile]  # found in folders, and without records
    notes: list[str]
    tokenizer: Tokenizer | None
    fingerprint: str


def prepare(data: DataSettings, directory: str | Path, *, vocab_size: int | None = None, processes: int | None = None,
            accept: Callable[[Corpus], object] = lambda corpus: None) -> Corpus:
    """The corpus in `directory`, prepared from `data.raw` if it does not exist yet.

    `vocab_size`: the size to train a tokenizer to; `processes` overrides data.prepare_processes; `accept` raises
    UserError for a corpus that the caller cannot use. UserError when the input is wrong or not accepted (nothing is
    left behind), or when `directory` was made with other settings.
    """
    directory = absolute(directory)
    settings = shaping_settings(data, vocab_size)
    if exists(directory / MANIFEST):
        corpus = open_prepared(directory, settings if data.raw is not None else {}, data)
        accept(corpus)
        return corpus
    check_place(data, directory, vocab_size)
    partial = workplace(directory)
    created = [folder for folder in partial.parents if not folder.exists()]
    with exclusive(partial):
        begun = [path for path in partial.iterdir() if path.is_dir()]  # by an interrupted preparation
        try:
            if not exists(directory / MANIFEST):  # else another process finished it just now
                plan = make_plan(data, settings, vocab_size, partial)
                begun = []
                folder = partial / plan.fingerprint[:16]
                build(plan, folder, processes or data.prepare_processes or os.cpu_count() or 1)
                accept(Corpus(folder / "corpus"))
                put_in_place(folder / "corpus", directory)
            remove_exclusive(partial)
        except OSError as error:
            error.filename = error.filename or str(partial)  # a full disk under NumPy names no file
            raise
        except UserError:
            if not begun:  # a slip of the pen does not cost what was done before
                remove_exclusive(partial)
            with suppress(OSError):  # not empty: another process of this run is about to prepare the same
                for folder in created:
                    folder.rmdir()
            raise
    return open_prepared(directory, settings, data)


def workplace(directory: Location) -> Path:
    """Where a corpus is prepared, and what is done already outlives an interruption: beside its place, or in the
    user's cache."""
    if not is_remote(directory):
        return directory.with_name(directory.name + ".partial")
    return Path(expand_home(CACHE)) / f"{hashlib.sha256(str(directory).encode()).hexdigest()[:16]}.partial"


def put_in_place(corpus: Path, directory: Location) -> None:
    """What makes it a corpus, the manifest, comes last."""
    if not is_remote(directory):
        corpus.rename(directory)
        return
    sizes = sizes_below(corpus)
    names = sorted(sizes, key=MANIFEST.__eq__)
    with progress_bar(f"upload to {directory}", total=sum(sizes.values()), unit="bytes", enabled=True) as advance:
        for name in names:
            remote.upload(corpus / name, directory / name)
            advance(sizes[name])
    shutil.rmtree(corpus)


def open_prepared(directory: Location, settings: dict[str, Any], data: DataSettings) -> Corpus:
    """The finished corpus; UserError where it was made with another value of one of these settings."""
    corpus = Corpus(directory, whole=data.damaged == "stop")
    for key, value in settings.items():
        made_with = corpus.manifest["settings"].get(key, BEFORE_THERE_WAS.get(key))
        if value != made_with and not (key in DERIVED and value is None):
            raise UserError(f"{key}: {json.dumps(value)}, but {directory} was prepared with {json.dumps(made_with)}; "
                            "delete it to prepare it again, or name another folder (data.corpus)")
    return corpus


# ----------------------------------------------------------------------------------------------------------------- plan

def shaping_settings(data: DataSettings, vocab_size: int | None) -> dict[str, Any]:
    """The settings that decide what the corpus holds, by key."""
    trained = data.tokenizer in TRAINED_TOKENIZERS
    values = {f"data.{name}": getattr(data, name) for name in SHAPING + (SHAPING_TRAINED if trained else ())}
    raw = [data.raw] if isinstance(data.raw, str) else data.raw
    values["data.raw"] = raw and [DESCRIPTOR.sub(r"/\1/fd", item) for item in raw]
    values["data.encoding"] = codecs.lookup(data.encoding).name
    values |= {f"data.cleaning.{name}": value for name, value in dataclasses.asdict(data.cleaning).items()}
    return values | ({"model.vocab_size": vocab_size} if trained else {})


def check_place(data: DataSettings, directory: Location, vocab_size: int | None) -> None:
    """Raises UserError for what is wrong before a file is looked at."""
    if data.raw is None:
        raise UserError(f"data.raw: missing, and there is no prepared corpus in {directory}; name the text to prepare")
    check_folder(directory, "data.corpus")
    partial = workplace(directory)
    if partial.is_symlink():  # what is in there is removed
        raise UserError(f"data.corpus={directory}: {partial} is a link; remove it, or name another folder")
    own = (*SPLITS, TOKENIZER, REPORT) if is_remote(directory) else ()  # an upload was interrupted; folders are renamed at once
    if any(not name.startswith(own) for name in names_in(directory)):
        raise UserError(f"{directory}: exists and is not a corpus; delete it, or name another folder (data.corpus)")
    if data.tokenizer in TRAINED_TOKENIZERS and vocab_size is None:
        raise UserError(f"model.vocab_size: missing; say to how many tokens the {data.tokenizer} tokenizer is to be trained")
    cleaning.check_scripts(data.cleaning.scripts)


def make_plan(data: DataSettings, settings: dict[str, Any], vocab_size: int | None, partial: Path) -> Plan:
    """Finds the files, looks at each, and checks what can be checked before any work. Pipes are copied into
    `partial`."""
    tokenizer = stages.given_tokenizer(data)
    reading = Reading(data.text_field, data.document, data.cleaning.max_bytes, data.encoding)
    left_out = sources.PassedOver()
    found = sources.find_sources(data.validation, "data.validation", left_out) if isinstance(data.validation, str) else []
    num_held_out = len(found)
    found = pipes.spool(found + sources.find_sources(data.raw, "data.raw", left_out), partial)
    seen = look_at(found, reading)
    passed_over = [file for file, looked in zip(found, seen, strict=True) if looked is None]
    left_out.update(f"{suffix_of(file.name)} without records" for file in passed_over)
    held_out, files = ([file for file in some if file] for some in (seen[:num_held_out], seen[num_held_out:]))
    notes = left_out.note(data.raw)
    if not files:
        raise UserError(f"data.raw: no text to read: {notes[0]}")
    validation_units = sources.plan_units(held_out, data.document, sources.UNIT_BYTES)
    units = validation_units + sources.plan_units(files, data.document, sources.UNIT_BYTES)
    refuse_useless_keys(data, held_out + files, units, reading)
    state = [dataclasses.astuple(file) for file in held_out + files]
    identity = [FORMAT, settings, state, [unit.bytes for unit in units], tokenizer.digest if tokenizer else None]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Plan(data, vocab_size, settings, units, len(validation_units), reading, passed_over, notes, tokenizer, fingerprint)


def refuse_useless_keys(data: DataSettings, files: list[SourceFile], units: list[sources.Unit], reading: Reading) -> None:
    """Raises UserError for a key that none of the files can use: it was meant for something."""
    kinds = {file.kind for file in files}
    what = ", ".join(sorted(KINDS[kind] for kind in kinds))
    which = files[0].name if len(files) == 1 else f"the {len(files):,} files of data.raw"
    if data.text_field != Reading.text_field and kinds == {"text"}:
        raise UserError(f"data.text_field={data.text_field}: {which} {'is' if len(files) == 1 else 'are'} plain text, without "
                        "fields; leave the key away, or name JSON, a table with a line of column names, Parquet or Arrow")
    if data.document == "line" and "text" not in kinds:
        for _ in read_documents(units[0], reading):  # if they cannot be read at all, that is what to say
            pass
        raise UserError(f"data.document=line: {which} {'is' if len(files) == 1 else 'are'} {what}, where every record is a "
                        "document; leave the key away")


# ---------------------------------------------------------------------------------------------------------------- build

def build(plan: Plan, folder: Path, processes: int) -> None:
    """Runs the stages; `folder/corpus` is complete when its manifest is there, and then the only thing left."""
    for other in folder.parent.iterdir():  # of an interrupted preparation with other settings or files
        if other.is_dir() and other != folder:
            shutil.rmtree(other)
    work, corpus = folder / "work", folder / "corpus"
    if not (corpus / MANIFEST).exists():
        work.mkdir(parents=True, exist_ok=True)
        corpus.mkdir(exist_ok=True)
        small = sum(unit.bytes for unit in plan.units) <= sources.UNIT_BYTES
        with Workers(work, 1 if small else processes) as workers:
            cleaned, clean_results = clean(plan, workers)
            fate = select(plan, cleaned, clean_results, work / "fate.npy")
            tail = stages.tail_share(plan.data, fate)
            tokenizer = choose_tokenizer(plan, cleaned, fate, corpus / TOKENIZER)
            dtype = token_type(tokenizer.vocab_size)
            counts = tokenize(workers, cleaned, fate, corpus / TOKENIZER, tail, dtype)
            splits = {split: write_split(split, workers, counts, corpus, plan.data.shard_tokens, dtype) for split in SPLITS}
        write_json(corpus / REPORT, report(plan.data, clean_results, fate, splits, commonest_unknown(counts), plan.notes))
        write_json(corpus / MANIFEST, {
            "format": FORMAT,
            "tokenizer": {"kind": tokenizer.kind, "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
            "token_dtype": dtype.str,
            "splits": splits,
            "settings": plan.settings | {"data.validation_split": "documents" if tail is None else "tail"},
            "sources": [source for result in clean_results for source in result["sources"]],
            "passed_over": [{"path": file.name, "bytes": file.bytes, "version": file.version} for file in plan.passed_over],
        })
    shutil.rmtree(work, ignore_errors=True)


def clean(plan: Plan, workers: Workers) -> tuple[Cleaned, list[Result]]:
    tasks = [CleanTask(unit, plan.reading, plan.data.cleaning) for unit in plan.units]
    results = workers.run("read", stages.clean_unit, tasks, [unit.bytes for unit in plan.units], "bytes")
    refuse_many_replaced(results)
    first = np.cumsum([0] + [result["kept"] for result in results]).tolist()
    return Cleaned([workers.stem("read", number) for number in range(len(tasks))], first), results


def select(plan: Plan, cleaned: Cleaned, results: list[Result], path: Path) -> np.ndarray:
    def why(held_out: bool) -> str:
        return why_dropped(plan.data, results[:plan.num_validation] if held_out else results[plan.num_validation:])

    if not path.exists():
        fate = stages.select(cleaned, cleaned.first[plan.num_validation], plan.data, why)
        write_atomically(path, lambda temporary: np.save(temporary, fate))
    return np.load(path)


def choose_tokenizer(plan: Plan, cleaned: Cleaned, fate: np.ndarray, folder: Path) -> Tokenizer:
    if not (folder / DESCRIPTION).exists():
        tokenizer = plan.tokenizer or stages.make_tokenizer(cleaned, fate, plan.data, plan.vocab_size)
        tokenizer.save(folder)
    return load_tokenizer(folder)


def tokenize(workers: Workers, cleaned: Cleaned, fate: np.ndarray, tokenizer: Path, tail: Fraction | None,
             dtype: np.dtype) -> list[Result]:
    bounds = list(zip(cleaned.first, cleaned.first[1:], strict=False))
    tasks = [TokenizeTask(stem, fate[start:stop], tokenizer, tail, dtype)
             for stem, (start, stop) in zip(cleaned.stems, bounds, strict=True)]
    return workers.run("tokenize", stages.tokenize_unit, tasks, [stop - start for start, stop in bounds], "documents")


def write_split(split: str, workers: Workers, counts: list[Result], corpus: Path, shard_tokens: int, dtype: np.dtype) -> Result:
    """Shards and offsets of one split, and its entry in the manifest."""
    stems = [workers.stem("tokenize", number) for number in range(len(counts))]
    spans = stages.shard_spans(stems, [count[split]["tokens"] for count in counts], split, shard_tokens)
    tasks = [stages.ShardTask(shard, corpus / shard_file(split, number), corpus / checksum_file(split, number), dtype)
             for number, shard in enumerate(spans)]
    shards = workers.run(f"write {split}", stages.write_shard, tasks, [task.tokens for task in tasks], "tokens")
    path = corpus / offsets_file(split)
    write_atomically(path, lambda temporary: np.save(temporary, stages.document_offsets(stems, split)))
    totals = {key: sum(count[split][key] for count in counts) for key in COUNTS}
    return totals | {"shards": shards, "offsets": {"file": path.name, "sha256": stages.file_digest(path)}}
