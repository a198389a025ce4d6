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
from typing import Any, TypeVar

import numpy as np

from jaxlm.console.progress import progress_bar
from jaxlm.data import cleaning, pipes, sources, stages
from jaxlm.data.columns import ROLES
from jaxlm.data.corpus import SPLITS, TEXT, TOKENIZER, Corpus, checksum_file, offsets_file, shard_file, stream_name, token_type
from jaxlm.data.documents import read_documents
from jaxlm.data.formats import KINDS, Reading, look_at
from jaxlm.data.labelling import FATES, doubts, label_counts, number_labels, write_column
from jaxlm.data.manifest import FORMAT, MANIFEST, RECORDS_FORMAT, REPORT
from jaxlm.data.records import lay_out, reading_of, reads_records, refuse_keys_of_text, without_validation
from jaxlm.data.report import COUNTS, commonest_unknown, refuse_many_replaced, report, why_dropped
from jaxlm.data.source_file import SourceFile, suffix_of
from jaxlm.data.stages import Cleaned, CleanTask, TokenizeTask
from jaxlm.data.tokenizers import DESCRIPTION, Tokenizer, load_tokenizer
from jaxlm.data.workers import Result, Workers, exclusive, remove_exclusive
from jaxlm.errors import UserError
from jaxlm.settings import TRAINED_TOKENIZERS, DataSettings, TaskSettings, expand_home
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
SHAPING_RECORDS = ("fields", "problem", "labels", "label_separator")
DERIVED = ("model.vocab_size", "data.validation_split", "task.problem", "task.labels")  # null goes with whatever they became
BEFORE_THERE_WAS = {"data.encoding": "utf-8"}  # a key: what corpora were prepared with that know nothing of it
DESCRIPTOR = re.compile(r"/(dev|proc/self)/fd/\d+")  # the shell numbers them anew each time
T = TypeVar("T")


@dataclass(frozen=True)
class Preparation:
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
    task: TaskSettings | None  # of labelled records

    @property
    def streams(self) -> tuple[str, ...]:
        """What a document's texts are called."""
        columns = self.units[0].parts[0].file.columns
        return (TEXT,) if columns is None else ROLES[:len(columns.texts)]


def prepare(data: DataSettings, directory: str | Path, use: Callable[[Corpus], T] = lambda corpus: corpus, *,
            vocab_size: int | None = None, processes: int | None = None, task: TaskSettings | None = None) -> T:
    """What `use` makes of the corpus in `directory`, which is prepared from `data.raw` if it does not exist yet.

    `use` raises UserError for a corpus that the caller cannot use; a new one is shown to it before it gets its place,
    too. `vocab_size`: the size to train a tokenizer to; `processes` overrides data.prepare_processes; `task`: where it
    reads labelled records (see RECORD_TASKS), the corpus is one of them, else of text. UserError when the input is
    wrong, or the corpus of no use (nothing is left behind), or when `directory` was made with other settings.
    """
    directory = absolute(directory)
    task = task if task and reads_records(task) else None
    settings = shaping_settings(data, vocab_size, task)
    if exists(directory / MANIFEST):
        return use(open_prepared(directory, settings if data.raw is not None else {}, data, task))
    check_place(data, directory, vocab_size)
    if task:
        refuse_keys_of_text(data)
        data = dataclasses.replace(data, validation_split="documents")
    partial = workplace(directory)
    created = [folder for folder in partial.parents if not folder.exists()]
    with exclusive(partial):
        begun = [path for path in partial.iterdir() if path.is_dir()]  # by an interrupted preparation
        try:
            if not exists(directory / MANIFEST):  # else another process finished it just now
                plan = make_plan(data, settings, vocab_size, partial, task)
                begun = []
                folder = partial / plan.fingerprint[:16]
                build(plan, folder, processes or data.prepare_processes or os.cpu_count() or 1)
                use(Corpus(folder / "corpus"))
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
    return use(open_prepared(directory, settings, data, task))


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


def refuse_other_kind(corpus: Corpus, task: TaskSettings) -> None:
    """Raises UserError for a corpus of text where labelled records are read, and the other way round."""
    if (corpus.problem is None) == reads_records(task):
        what, wanted = ("plain text", f"task.name={task.name} reads labelled records") if corpus.problem is None else (
            f"labelled records ({corpus.problem})", "it is for task.name=text_classification")
        raise UserError(f"data.corpus: {corpus.directory} is a corpus of {what}, and {wanted}; name another folder")


def open_prepared(directory: Location, settings: dict[str, Any], data: DataSettings, task: TaskSettings | None) -> Corpus:
    """The finished corpus; UserError where it was made with another value of one of these settings."""
    corpus = Corpus(directory, whole=data.damaged == "stop")
    refuse_other_kind(corpus, task or TaskSettings())
    for key, value in settings.items():
        made_with = corpus.manifest["settings"].get(key, BEFORE_THERE_WAS.get(key))
        if value != made_with and not (key in DERIVED and value is None):
            raise UserError(f"{key}: {json.dumps(value)}, but {directory} was prepared with {json.dumps(made_with)}; "
                            "delete it to prepare it again, or name another folder (data.corpus)")
    return corpus


# ----------------------------------------------------------------------------------------------------------------- plan

def shaping_settings(data: DataSettings, vocab_size: int | None, task: TaskSettings | None) -> dict[str, Any]:
    """The settings that decide what the corpus holds, by key."""
    trained = data.tokenizer in TRAINED_TOKENIZERS
    values = {f"data.{name}": getattr(data, name) for name in SHAPING + (SHAPING_TRAINED if trained else ())}
    raw = [data.raw] if isinstance(data.raw, str) else data.raw
    values["data.raw"] = raw and [DESCRIPTOR.sub(r"/\1/fd", item) for item in raw]
    values["data.encoding"] = codecs.lookup(data.encoding).name
    values |= {f"data.cleaning.{name}": value for name, value in dataclasses.asdict(data.cleaning).items()}
    values |= {f"task.{name}": getattr(task, name) for name in SHAPING_RECORDS} if task else {}
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


def make_plan(data: DataSettings, settings: dict[str, Any], vocab_size: int | None, partial: Path,
              task: TaskSettings | None) -> Preparation:
    """Finds the files, looks at each, and checks what can be checked before any work. Pipes are copied into
    `partial`."""
    tokenizer = stages.given_tokenizer(data)
    reading = reading_of(data, records=task is not None)
    left_out = sources.PassedOver()
    found = sources.find_sources(data.validation, "data.validation", left_out) if isinstance(data.validation, str) else []
    raw, notes = sources.find_sources(data.raw, "data.raw", left_out), []
    if task and data.raw != data.validation:  # `evaluate` holds out all of a file
        raw, notes = without_validation(raw, found)
    num_held_out = len(found)
    found = pipes.spool(found + raw, partial)
    seen = look_at(found, reading)
    passed_over = [file for file, looked in zip(found, seen, strict=True) if looked is None]
    left_out.update(f"{suffix_of(file.name)} without records" for file in passed_over)
    notes = left_out.note(data.raw) + notes
    if not any(seen[num_held_out:]):
        raise UserError(f"data.raw: no text to read: {notes[0]}")
    if task:
        laid, said = lay_out([file for file in seen if file], reading, task)
        laid = iter(laid)
        seen, notes = [file and next(laid) for file in seen], notes + said
    held_out, files = ([file for file in some if file] for some in (seen[:num_held_out], seen[num_held_out:]))
    validation_units = sources.plan_units(held_out, data.document, sources.UNIT_BYTES)
    units = validation_units + sources.plan_units(files, data.document, sources.UNIT_BYTES)
    if not task:
        refuse_useless_keys(data, held_out + files, units, reading)
    state = [dataclasses.astuple(file) for file in held_out + files]
    identity = [RECORDS_FORMAT if task else FORMAT, settings, state, [unit.bytes for unit in units],
                tokenizer.digest if tokenizer else None]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Preparation(data, vocab_size, settings, units, len(validation_units), reading, passed_over, notes, tokenizer,
                       fingerprint, task)


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

def build(plan: Preparation, folder: Path, processes: int) -> None:
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
            labels, column, notes = number_labels(plan.task, plan.units, cleaned, cleaned.first[plan.num_validation],
                                                  fate) if plan.task else (None, None, [])
            if labels and plan.data.raw != plan.data.validation:
                notes += doubts(labels, column, cleaned.digests(), cleaned.first[plan.num_validation], fate)
            tail = stages.tail_share(plan.data, fate)
            tokenizer = choose_tokenizer(plan, cleaned, fate, corpus / TOKENIZER)
            dtype = token_type(tokenizer.vocab_size)
            counts = tokenize(plan, workers, cleaned, fate, corpus / TOKENIZER, tail, dtype)
            splits = {split: write_split(plan, split, workers, counts, corpus, dtype) for split in SPLITS}
        told = report(plan.data, clean_results, fate, splits, commonest_unknown(counts), plan.notes + notes,
                      labelled=labels is not None)
        for split in SPLITS if labels else ():
            chosen = column[fate == FATES[split]]
            splits[split]["columns"] = {"label": write_column(split, chosen, corpus)}
            told["splits"][split]["labels"] = label_counts(labels, chosen)
        write_json(corpus / REPORT, told)
        write_json(corpus / MANIFEST, {
            "format": RECORDS_FORMAT if labels else FORMAT,
            **({"labels": {"problem": labels.problem, "names": labels.names and list(labels.names)}} if labels else {}),
            "tokenizer": {"kind": tokenizer.kind, "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
            "token_dtype": dtype.str,
            "splits": splits,
            "settings": plan.settings | {"data.validation_split": "documents" if tail is None else "tail"} | (
                {"task.problem": labels.problem, "task.labels": labels.names and list(labels.names)} if labels else {}),
            "sources": [source for result in clean_results for source in result["sources"]],
            "passed_over": [{"path": file.name, "bytes": file.bytes, "version": file.version} for file in plan.passed_over],
        })
    shutil.rmtree(work, ignore_errors=True)


def clean(plan: Preparation, workers: Workers) -> tuple[Cleaned, list[Result]]:
    tasks = [CleanTask(unit, plan.reading, plan.data.cleaning) for unit in plan.units]
    results = workers.run("read", stages.clean_unit, tasks, [unit.bytes for unit in plan.units], "bytes")
    refuse_many_replaced(results)
    first = np.cumsum([0] + [result["kept"] for result in results]).tolist()
    return Cleaned([workers.stem("read", number) for number in range(len(tasks))], first), results


def select(plan: Preparation, cleaned: Cleaned, results: list[Result], path: Path) -> np.ndarray:
    def why(held_out: bool) -> str:
        return why_dropped(plan.data, results[:plan.num_validation] if held_out else results[plan.num_validation:])

    if not path.exists():
        fate = stages.select(cleaned, cleaned.first[plan.num_validation], plan.data, why)
        write_atomically(path, lambda temporary: np.save(temporary, fate))
    return np.load(path)


def choose_tokenizer(plan: Preparation, cleaned: Cleaned, fate: np.ndarray, folder: Path) -> Tokenizer:
    if not (folder / DESCRIPTION).exists():
        tokenizer = plan.tokenizer or stages.make_tokenizer(cleaned, fate, plan.data, plan.vocab_size)
        tokenizer.save(folder)
    return load_tokenizer(folder)


def tokenize(plan: Preparation, workers: Workers, cleaned: Cleaned, fate: np.ndarray, tokenizer: Path, tail: Fraction | None,
             dtype: np.dtype) -> list[Result]:
    bounds = list(zip(cleaned.first, cleaned.first[1:], strict=False))
    tasks = [TokenizeTask(stem, fate[start:stop], tokenizer, tail, dtype, plan.streams)
             for stem, (start, stop) in zip(cleaned.stems, bounds, strict=True)]
    return workers.run("tokenize", stages.tokenize_unit, tasks, [stop - start for start, stop in bounds], "documents")


def write_split(plan: Preparation, split: str, workers: Workers, counts: list[Result], corpus: Path, dtype: np.dtype) -> Result:
    """The streams of one split, and their entry in the manifest: the first one's, with the others in it."""
    entry, *others = [write_stream(stream_name(split, stream), workers, counts, corpus, plan.data.shard_tokens, dtype)
                      for stream in plan.streams]
    return entry | ({"streams": dict(zip(plan.streams[1:], others, strict=True))} if others else {})


def write_stream(name: str, workers: Workers, counts: list[Result], corpus: Path, shard_tokens: int, dtype: np.dtype) -> Result:
    """Shards and offsets of one stream, and its entry in the manifest."""
    stems = [workers.stem("tokenize", number) for number in range(len(counts))]
    spans = stages.shard_spans(stems, [count[name]["tokens"] for count in counts], name, shard_tokens)
    tasks = [stages.ShardTask(shard, corpus / shard_file(name, number), corpus / checksum_file(name, number), dtype)
             for number, shard in enumerate(spans)]
    shards = workers.run(f"write {name}", stages.write_shard, tasks, [task.tokens for task in tasks], "tokens")
    path = corpus / offsets_file(name)
    write_atomically(path, lambda temporary: np.save(temporary, stages.document_offsets(stems, name)))
    totals = {key: sum(count[name][key] for count in counts) for key in COUNTS}
    return totals | {"shards": shards, "offsets": {"file": path.name, "sha256": stages.file_digest(path)}}
