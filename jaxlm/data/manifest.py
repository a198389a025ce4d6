"""What a corpus says of itself, read without trust: the types of manifest.json and report.json, and that the counts
agree."""

import json
from typing import Annotated, Any, Literal, NotRequired

import pydantic
from annotated_types import Ge, Gt
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from jaxlm.errors import UserError, shown
from jaxlm.storage.files import Location, exists, read_text

FORMAT = 1
RECORDS_FORMAT = 2  # with labels: what knows only the former would take it for plain text
MANIFEST, REPORT = "manifest.json", "report.json"

Count = Annotated[int, Ge(0)]


class File(TypedDict):
    file: str
    sha256: str


class ShardEntry(File):
    tokens: Annotated[int, Gt(0)]
    checksums: NotRequired[File]


class StreamEntry(TypedDict):
    documents: Count
    tokens: Count
    bytes: Count
    unknown_tokens: NotRequired[Count]  # this and the next: older corpora do not say
    lost_characters: NotRequired[Count]  # in which the text differs from what its tokens decode to
    shards: list[ShardEntry]
    offsets: File


class Column(File):
    """Numbers beside the documents."""

    dtype: Literal["<i4", "<f4", "|u1"]
    width: NotRequired[Annotated[int, Gt(0)]]  # of an array for each document


class Split(StreamEntry):
    streams: NotRequired[dict[Literal["pair"], StreamEntry]]  # this and the next: of labelled records
    columns: NotRequired[dict[Literal["label"], Column]]


class LabelsEntry(TypedDict):
    problem: Literal["single_label", "multi_label", "regression"]
    names: list[str] | None


class TokenizerEntry(TypedDict):
    kind: str
    digest: str
    vocab_size: Annotated[int, Gt(0)]


class Splits(TypedDict):
    train: Split
    validation: Split


class SourceEntry(TypedDict):
    """A file of raw text as it was read. Older manifests have no `version` and `kind`."""

    path: str
    bytes: Count
    sha256: NotRequired[str]
    version: NotRequired[int | str]
    kind: NotRequired[str]
    encoding: NotRequired[str]


class Manifest(TypedDict):
    format: int
    tokenizer: TokenizerEntry
    token_dtype: Literal["<u2", "<u4"]
    splits: Splits
    settings: dict[str, Any]
    sources: list[SourceEntry]
    passed_over: NotRequired[list[SourceEntry]]  # found in a folder, and without records
    labels: NotRequired[LabelsEntry]


class ReportedSplit(TypedDict):
    unknown: NotRequired[dict[str, Count]]  # text that became unknown tokens, the commonest first: how often
    labels: NotRequired[dict[str, Count | float | None]]  # of each name how many; of scores least, mean and greatest


class Report(TypedDict):
    documents_in: Count
    documents_out: Count
    repaired: Count
    dropped: dict[str, Count]
    splits: NotRequired[dict[Literal["train", "validation"], ReportedSplit]]
    replaced_characters: NotRequired[Count]  # older reports have none of these
    shares: NotRequired[dict[str, float]]
    notes: NotRequired[list[str]]


def read_manifest(directory: Location) -> dict[str, Any]:
    """The manifest of a finished corpus. Raises UserError: there is none, or it is not what `prepare` writes."""
    path = directory / MANIFEST
    if not exists(path):
        unfinished = exists(directory.parent / f"{directory.name}.partial")
        hint = "its preparation was not finished; start it again" if unfinished else f"expected a folder with {MANIFEST}"
        raise UserError(f"{directory}: not a corpus ({hint})")
    manifest = read_json(path)
    if manifest.get("format") not in (FORMAT, RECORDS_FORMAT):
        raise UserError(f"{path}: corpus format {shown(manifest.get('format'))}, expected {FORMAT} or {RECORDS_FORMAT}; prepare "
                        "it again")
    _check(path, manifest, Manifest)
    _check_shards(path, manifest)
    _check_labels(path, manifest)
    return manifest


def _check_shards(path: Location, manifest: dict[str, Any]) -> None:
    shard_tokens = manifest["settings"].get("data.shard_tokens")
    streams = [(split, entry) for split, entry in manifest["splits"].items()]
    streams += [(f"{split}.{name}", stream) for split, entry in streams for name, stream in entry.get("streams", {}).items()]
    for split, entry in streams:
        full, rest = divmod(entry["tokens"], shard_tokens) if type(shard_tokens) is int and shard_tokens > 0 else (0, 0)
        lengths = [shard["tokens"] for shard in entry["shards"]]
        wanted = [shard_tokens] * min(full, len(lengths)) + [rest] * (rest > 0)
        if lengths != wanted or sum(lengths) != entry["tokens"]:
            raise UserError(f"{path}: damaged (the shards of {split} do not make its {entry['tokens']:,} tokens); "
                            "prepare the corpus again")


def _check_labels(path: Location, manifest: dict[str, Any]) -> None:
    """Of labelled records: every split has its column of the right kind, and streams of the same length."""
    splits, labels = manifest["splits"].values(), manifest.get("labels")
    if (manifest["format"] == RECORDS_FORMAT) != (labels is not None):
        raise UserError(f"{path}: damaged (labels and format {manifest['format']}); prepare the corpus again")
    kinds = [split.get("columns", {}).get("label") for split in splits]
    if labels is None:
        whole = not any(split.get("columns") or split.get("streams") for split in splits)
    else:
        names = labels["names"]
        dtype, width = {"single_label": ("<i4", None), "regression": ("<f4", None)}.get(
            labels["problem"], ("|u1", len(names or ())))
        whole = (names is None) == (labels["problem"] == "regression") and all(
            kind and (kind["dtype"], kind.get("width")) == (dtype, width) for kind in kinds)
        whole &= len({tuple(split.get("streams", ())) for split in splits}) == 1
        whole &= all(stream["documents"] == split["documents"]
                     for split in splits for stream in split.get("streams", {}).values())
    if not whole:
        raise UserError(f"{path}: damaged (labels, columns and streams do not fit each other); prepare the corpus again")


def read_report(directory: Location) -> dict[str, Any]:
    """What became of the documents. Raises UserError as `read_manifest` does."""
    report = read_json(directory / REPORT)
    _check(directory / REPORT, report, Report)
    return report


def read_json(path: Location) -> dict[str, Any]:
    try:
        return dict(json.loads(read_text(path)))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); prepare the corpus again") from error


def _check(path: Location, value: dict[str, Any], kind: type) -> None:
    try:
        pydantic.TypeAdapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        what = f"no {name}" if problem["type"] == "missing" else f"{name} is {shown(problem['input'])}: {problem['msg']}"
        raise UserError(f"{path}: damaged ({what}); prepare the corpus again") from None
