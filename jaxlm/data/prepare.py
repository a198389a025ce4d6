"""From raw text to a corpus: clean, select, choose a tokenizer, tokenize, write shards.

Everything happens in `<directory>.partial`, whose content becomes `<directory>` in one rename at the very end. Cleaned text and
tokens are kept there unit by unit, so that memory stays small and an interrupted preparation goes on where it was. The same input
gives the same bytes whatever the number of processes and interruptions.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm import remote
from jaxlm.data import cleaning, sources, stages
from jaxlm.data.corpus import SPLITS, TOKENIZER, Corpus, checksum_file, offsets_file, shard_file, token_type
from jaxlm.data.manifest import FORMAT, MANIFEST, REPORT
from jaxlm.data.stages import Cleaned, CleanTask, TokenizeTask
from jaxlm.data.tokenizers import DESCRIPTION, Tokenizer, load_tokenizer
from jaxlm.data.work import Result, Workers, exclusive, remove_exclusive
from jaxlm.errors import UserError
from jaxlm.remote import is_remote
from jaxlm.reporting.files import (
    Location,
    absolute,
    check_folder,
    exists,
    names_in,
    sizes_below,
    version_of,
    write_atomically,
    write_json,
)
from jaxlm.reporting.progress import progress_bar
from jaxlm.settings import TRAINED_TOKENIZERS, DataSettings, expand_home

CACHE = "~/.cache/jaxlm/prepare"  # of corpora that go into a bucket when they are done
SHAPING = ("raw", "text_field", "document", "validation", "validation_split", "tokenizer", "shard_tokens")
SHAPING_TRAINED = ("lowercase", "tokenizer_sample")  # where a tokenizer is trained


@dataclass(frozen=True)
class Plan:
    """What there is to do. The user's own validation text, if any, is the first `num_validation` units."""

    data: DataSettings
    vocab_size: int | None
    settings: dict[str, Any]
    units: list[sources.Unit]
    num_validation: int
    tokenizer: Tokenizer | None
    fingerprint: str


def prepare(data: DataSettings, directory: str | Path, *, vocab_size: int | None = None, processes: int | None = None,
            accept: Callable[[Corpus], object] = lambda corpus: None) -> Corpus:
    """The corpus in `directory`, prepared from `data.raw` if it does not exist yet.

    `vocab_size`: the size to train a tokenizer to; `processes` overrides data.prepare_processes; `accept` raises UserError for
    a corpus that the caller cannot use. UserError when the input is wrong or not accepted (nothing is left behind), or when
    `directory` was made with other settings.
    """
    directory = absolute(directory)
    settings = shaping_settings(data, vocab_size)
    if exists(directory / MANIFEST):
        corpus = open_prepared(directory, settings if data.raw is not None else {}, data)
        accept(corpus)
        return corpus
    plan = make_plan(data, directory, settings, vocab_size)
    partial = workplace(directory)
    created = [folder for folder in partial.parents if not folder.exists()]
    with exclusive(partial):
        try:
            if not exists(directory / MANIFEST):  # else another process finished it just now
                folder = partial / plan.fingerprint[:16]
                build(plan, folder, processes or data.prepare_processes or os.cpu_count() or 1)
                accept(Corpus(folder / "corpus"))
                put_in_place(folder / "corpus", directory)
            remove_exclusive(partial)
        except UserError:
            remove_exclusive(partial)
            with suppress(OSError):  # not empty: another process of this run is about to prepare the same
                for folder in created:
                    folder.rmdir()
            raise
    return open_prepared(directory, settings, data)


def workplace(directory: Location) -> Path:
    """Where a corpus is prepared, and what is done already outlives an interruption: beside its place, or in the user's cache."""
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
        made_with = corpus.manifest["settings"].get(key)
        if value != made_with and not (key == "model.vocab_size" and value is None):
            raise UserError(f"{key}: {json.dumps(value)}, but {directory} was prepared with {json.dumps(made_with)}; "
                            "delete it to prepare it again, or name another folder (data.corpus)")
    return corpus


# ----------------------------------------------------------------------------------------------------------------- plan

def shaping_settings(data: DataSettings, vocab_size: int | None) -> dict[str, Any]:
    """The settings that decide what the corpus holds, by key."""
    trained = data.tokenizer in TRAINED_TOKENIZERS
    values = {f"data.{name}": getattr(data, name) for name in SHAPING + (SHAPING_TRAINED if trained else ())}
    values["data.raw"] = [data.raw] if isinstance(data.raw, str) else data.raw
    values |= {f"data.cleaning.{name}": value for name, value in dataclasses.asdict(data.cleaning).items()}
    return values | ({"model.vocab_size": vocab_size} if trained else {})


def make_plan(data: DataSettings, directory: Location, settings: dict[str, Any], vocab_size: int | None) -> Plan:
    """Finds the files and checks what can be checked before any work."""
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
    tokenizer = stages.given_tokenizer(data)
    held_out = sources.find_sources(data.validation, "data.validation") if isinstance(data.validation, str) else []
    files = sources.find_sources(data.raw)
    validation_units = sources.plan_units(held_out, data.document, sources.UNIT_BYTES)
    units = validation_units + sources.plan_units(files, data.document, sources.UNIT_BYTES)
    state = [[file.path, file.bytes, version_of(file.path)] for file in held_out + files]
    identity = [FORMAT, settings, state, [unit.bytes for unit in units], tokenizer.digest if tokenizer else None]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Plan(data, vocab_size, settings, units, len(validation_units), tokenizer, fingerprint)


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
            fate = select(plan, cleaned, work / "fate.npy")
            tokenizer = choose_tokenizer(plan, cleaned, fate, corpus / TOKENIZER)
            dtype = token_type(tokenizer.vocab_size)
            counts = tokenize(plan, workers, cleaned, fate, corpus / TOKENIZER, dtype)
            splits = {split: write_split(split, workers, counts, corpus, plan.data.shard_tokens, dtype) for split in SPLITS}
        write_json(corpus / REPORT, report(clean_results, fate, splits))
        write_json(corpus / MANIFEST, {
            "format": FORMAT,
            "tokenizer": {"kind": tokenizer.kind, "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
            "token_dtype": dtype.str,
            "splits": splits,
            "settings": plan.settings,
            "sources": [source for result in clean_results for source in result["sources"]],
        })
    shutil.rmtree(work, ignore_errors=True)


def clean(plan: Plan, workers: Workers) -> tuple[Cleaned, list[Result]]:
    data = plan.data
    reading = sources.Reading(data.text_field, data.document, data.cleaning.max_bytes)
    tasks = [CleanTask(unit, reading, data.cleaning) for unit in plan.units]
    results = workers.run("read", stages.clean_unit, tasks, [unit.bytes for unit in plan.units], "bytes")
    first = np.cumsum([0] + [result["kept"] for result in results]).tolist()
    return Cleaned([workers.stem("read", number) for number in range(len(tasks))], first), results


def select(plan: Plan, cleaned: Cleaned, path: Path) -> np.ndarray:
    if not path.exists():
        fate = stages.select(cleaned, cleaned.first[plan.num_validation], plan.data)
        write_atomically(path, lambda temporary: np.save(temporary, fate))
    return np.load(path)


def choose_tokenizer(plan: Plan, cleaned: Cleaned, fate: np.ndarray, folder: Path) -> Tokenizer:
    if not (folder / DESCRIPTION).exists():
        tokenizer = plan.tokenizer or stages.make_tokenizer(cleaned, fate, plan.data, plan.vocab_size)
        tokenizer.save(folder)
    return load_tokenizer(folder)


def tokenize(plan: Plan, workers: Workers, cleaned: Cleaned, fate: np.ndarray, tokenizer: Path, dtype: np.dtype) -> list[Result]:
    tail = stages.tail_share(plan.data)
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
    totals = {key: sum(count[split][key] for count in counts) for key in ("documents", "tokens", "bytes")}
    return totals | {"shards": shards, "offsets": {"file": path.name, "sha256": stages.file_digest(path)}}


def report(clean_results: list[Result], fate: np.ndarray, splits: dict[str, Result]) -> Result:
    """What became of every document: documents_in = the sum of dropped + documents_out."""
    dropped = Counter(dict.fromkeys(cleaning.REASONS, 0))
    for result in clean_results:
        dropped.update(result["dropped"])
    dropped["exact_duplicate"] = int(np.count_nonzero(fate == stages.EXACT_DUPLICATE))
    dropped["near_duplicate"] = int(np.count_nonzero(fate == stages.NEAR_DUPLICATE))
    return {
        "documents_in": sum(result["documents"] for result in clean_results),
        "dropped": dict(dropped),
        "repaired": sum(result["repaired"] for result in clean_results),
        "documents_out": int(np.count_nonzero(fate <= stages.VALIDATION)),
        "splits": {split: {key: splits[split][key] for key in ("documents", "tokens", "bytes")} for split in SPLITS},
    }
