"""What became of the raw text: the counts of report.json, and notes about what a user would not expect."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.console.units import counted
from jaxlm.data import cleaning
from jaxlm.data.corpus import SPLITS
from jaxlm.data.decoding import MOST_REPLACED, foreign
from jaxlm.data.stages import EXACT_DUPLICATE, NEAR_DUPLICATE, VALIDATION, tail_share
from jaxlm.data.workers import Result
from jaxlm.errors import printable
from jaxlm.settings import DataSettings

COUNTS = ("documents", "tokens", "bytes", "unknown_tokens", "lost_characters")  # of a split
FAR_OFF = 2  # times more, or less, of the text held out than was asked for
FEW_TOKENS = 1000  # a loss over fewer says little
WHY_DROPPED = {  # by the reason: what such documents are, and the key that drops them
    "empty": "empty", "too_short": "shorter than data.cleaning.min_characters={min_characters}",
    "too_long": "longer than data.cleaning.max_bytes={max_bytes}", "repetitive": "more repetitive than "
    "data.cleaning.max_repetition={max_repetition}", "other_script": "not in data.cleaning.scripts={scripts}",
}


def report(data: DataSettings, clean_results: list[Result], fate: np.ndarray, splits: dict[str, Result],
           unknown: dict[str, dict[str, int]], found: list[str], labelled: bool = False) -> dict[str, Any]:
    """What became of every document: documents_in = the sum of dropped + documents_out; and what of the text has no
    token.

    `unknown`: see `commonest_unknown`; `found`: notes about the files; `labelled`: the documents are records.
    """
    dropped = dropped_documents(clean_results)
    dropped["exact_duplicate"] = int(np.count_nonzero(fate == EXACT_DUPLICATE))
    dropped["near_duplicate"] = int(np.count_nonzero(fate == NEAR_DUPLICATE))
    total = sum(splits[split]["bytes"] for split in SPLITS)
    return {
        "documents_in": sum(result["documents"] for result in clean_results),
        "dropped": dropped,
        "repaired": sum(result["repaired"] for result in clean_results),
        "replaced_characters": sum(damage["replaced"] for damage in damages(clean_results)),
        "documents_out": int(np.count_nonzero(fate <= VALIDATION)),
        "splits": {split: {key: splits[split][key] for key in COUNTS} | {"unknown": unknown[split]} for split in SPLITS},
        "shares": {split: splits[split]["bytes"] / total if total else 0.0 for split in SPLITS},
        "notes": [printable(note) for note in (*found, *too_long_notes(data, clean_results), *replaced_notes(clean_results),
                                               *split_notes(data, fate, splits, labelled))],
    }


def commonest_unknown(counts: list[Result]) -> dict[str, dict[str, int]]:
    """For each split, what its unknown tokens stand for most often, and how often."""
    found = {split: Counter() for split in SPLITS}
    for count in counts:
        for split in SPLITS:
            found[split].update(count[split]["unknown"])
    return {split: dict(sorted(unknown.items(), key=lambda item: (-item[1], item[0]))[:20]) for split, unknown in found.items()}


def dropped_documents(clean_results: list[Result]) -> Counter[str]:
    dropped = Counter(dict.fromkeys(cleaning.REASONS, 0))
    for result in clean_results:
        dropped.update(result["dropped"])
    return dropped


def why_dropped(data: DataSettings, clean_results: list[Result]) -> str:
    """For a text of which nothing is left: how many documents each reason took, with its key."""
    dropped = dropped_documents(clean_results)
    told = []
    for reason, words in WHY_DROPPED.items():
        if dropped[reason]:
            said = words.format(min_characters=data.cleaning.min_characters, max_bytes=data.cleaning.max_bytes,
                                max_repetition=data.cleaning.max_repetition, scripts=data.cleaning.scripts)
            told.append(f"{counted(dropped[reason], 'document')} {'was' if dropped[reason] == 1 else 'were'} {said}")
            if reason == "too_long":
                told[-1] += (f" (the largest has {longest_dropped(clean_results)} bytes: raise it, or make every line a document "
                             "with data.document=line)")
    return ", ".join(told) or "the files are empty"


# ---------------------------------------------------------------------------------------------------------------- notes

def too_long_notes(data: DataSettings, clean_results: list[Result]) -> Iterator[str]:
    count = dropped_documents(clean_results)["too_long"]
    if count:
        yield (f"{counted(count, 'document')} longer than data.cleaning.max_bytes={data.cleaning.max_bytes} "
               f"{'was' if count == 1 else 'were'} dropped; the largest has {longest_dropped(clean_results)} bytes")


def longest_dropped(clean_results: list[Result]) -> int:
    """Bytes of the longest document that was too long."""
    return max(result["longest_dropped"] for result in clean_results)


def damages(clean_results: list[Result]) -> list[Result]:
    return [damage for result in clean_results for damage in result["damaged"]]


def replaced_notes(clean_results: list[Result]) -> Iterator[str]:
    by_file: Counter[str] = Counter()
    for damage in damages(clean_results):
        by_file[damage["path"]] += damage["replaced"]
    if by_file:
        (worst, most), = by_file.most_common(1)
        several = f" in {len(by_file):,} files, {most:,} of them in {worst}" if len(by_file) > 1 else f" in {worst}"
        yield f"{counted(by_file.total(), 'character')}{several} could not be decoded and became U+FFFD (data.encoding)"


def refuse_many_replaced(clean_results: list[Result]) -> None:
    """Many small files, each with FEW characters in another encoding at most, are a text in another encoding, too.
    UserError, naming the worst of them."""
    found = damages(clean_results)
    replaced, characters = (sum(figures) for figures in (
        [damage["replaced"] for damage in found], [result["characters"] for result in clean_results]))
    if replaced > MOST_REPLACED * characters:
        worst = max(found, key=lambda damage: damage["replaced"] / max(1, damage["characters"]))
        raise foreign(worst["path"], worst["encoding"], worst["replaced"], worst["characters"], worst["likely"])


def split_notes(data: DataSettings, fate: np.ndarray, splits: dict[str, Result], labelled: bool) -> Iterator[str]:
    """What the validation split became, where that is not what was asked for."""
    validation, train = splits["validation"], splits["train"]
    if isinstance(data.validation, str) or data.validation == 0:
        return
    tail = tail_share(data, fate) is not None
    if tail and data.validation_split is None:
        yield (f"the text is a single document, so its end ({data.validation:.6g} of it) is the validation split, as with "
               "data.validation_split=tail")
    share = validation["bytes"] / max(1, validation["bytes"] + train["bytes"])
    if not data.validation / FAR_OFF <= share <= data.validation * FAR_OFF:
        both = validation["documents"] + train["documents"]
        way_out = "it is cut between characters" if tail else "records are held out whole" if labelled else (
            "documents are held out whole; data.validation_split=tail cuts the end of each instead")
        yield (f"data.validation={data.validation:.6g}, but the validation split has {percent(share)} of the text "
               f"({validation['documents']:,} of {counted(both, 'document')}): {way_out}")
    if validation["tokens"] < FEW_TOKENS and not labelled:  # of those, records are counted
        yield (f"the validation split has only {counted(validation['tokens'], 'token')}: its loss will say little; raise "
               "data.validation, or name a text for it")


def percent(share: float) -> str:
    """0.98 %, 55 %, 0.0012 %."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.4g} %"
