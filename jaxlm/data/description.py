"""What people are told of a corpus: what went in, what came out, and some of its text as a model will see it."""

from collections import Counter
from typing import Any

import numpy as np

from jaxlm.console.units import counted, format_count
from jaxlm.data.corpus import Corpus, Documents, share
from jaxlm.data.documents import named
from jaxlm.data.labelled import LabelledRows
from jaxlm.data.labels import MULTI, SINGLE
from jaxlm.data.manifest import read_report
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import printable
from jaxlm.settings import Settings

EXAMPLES = 3
TOKENS = 40  # read for an example, at most
WIDTH = 66  # letters shown of it
BOUND = "|"


def describe(corpus: Corpus, settings: Settings | None = None) -> list[str]:
    """Lines for people: what went in, what was dropped and why, what came out, and how it looks to a model.

    settings: of the run, which decide how much of a labelled record fits into a row; None: that is not said.
    """
    report, sources, tokenizer = read_report(corpus.directory), corpus.manifest["sources"], corpus.manifest["tokenizer"]
    dropped = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in report["dropped"].items() if count]
    kinds = Counter(f"{source['kind']} ({source['encoding']})" for source in sources if "kind" in source)
    lines = [
        f"corpus      {corpus.directory}",
        f"sources     {counted(len(sources), 'file')}, {format_count(sum(source['bytes'] for source in sources))}B",
        *([f"read as     {', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())}"] if kinds else []),
        f"documents   {report['documents_in']:,} read, {report['documents_out']:,} kept "
        f"({report['repaired']:,} of them mended or with replaced characters)",
        f"dropped     {', '.join(dropped) or 'none'}",
    ]
    if "replaced_characters" in report:
        lines.append(f"replaced    {counted(report['replaced_characters'], 'character')} that could not be decoded")
    for documents in (corpus.train, corpus.validation):
        num_tokens, num_bytes = documents.total("tokens"), documents.total("bytes")
        each = f", {num_bytes / num_tokens:.2f} bytes a token" if num_tokens else ""
        lines.append(f"{documents.split:11} {counted(documents.num_documents, 'document')}, {counted(num_tokens, 'token')}{each}")
    if "shares" in report:
        shares = [f"{split} {100 * part:.3g} %" for split, part in report["shares"].items()]
        lines.append(f"shares      {', '.join(shares)} of the text")
    longest = max((int(np.diff(documents.offsets).max()) for documents in (corpus.train, corpus.validation)
                   if documents.num_documents), default=0)
    lines.append(f"longest     a document of {counted(longest, 'token')}")
    lines.append(f"unknown     {'; '.join(filter(None, map(unknown_tokens, (corpus.train, corpus.validation))))}")
    lines.append(f"tokenizer   {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, digest {tokenizer['digest'][:12]}, "
                 f"{corpus.end_token}")
    if corpus.problem is None:
        lines += [f"lost        {corpus.lost}"] if corpus.loses_text else []
        lines += [f"example     {shown}" for shown in examples(corpus.train, corpus.tokenizer)]
    else:
        lines += record_lines(corpus, report, settings)
    return [*lines, *(f"note        {note}" for note in corpus.notes), *corpus.warnings()]


def record_lines(corpus: Corpus, report: dict[str, Any], settings: Settings | None) -> list[str]:
    """Labels, how much of the records fits into rows, and some records with their labels."""
    lines = [f"labels      {corpus.problem}{f', {len(corpus.labels):,} names' if corpus.labels else ''}"]
    for split, found in report["splits"].items():
        if getattr(corpus, split).num_documents:
            shown = [f"{name} {count:,.6g}" if corpus.labels is None else f"{name} ({count:,})"
                     for name, count in found["labels"].items()]
            lines.append(f"{'':11} {split}: {named(shown)}")
    if settings is not None:
        rows = LabelledRows(corpus.train, corpus.tokenizer.special, settings.data.sequence_length, causal=settings.model.causal)
        lines.append(f"truncated   {''.join(rows.truncation_note()) or f'none at data.sequence_length={rows.sequence_length}'}")
    places = sorted({corpus.train.num_documents * place // EXAMPLES for place in range(EXAMPLES)})
    return lines + [f"example     {labelled_example(corpus, corpus.train, place)}" for place in places]


def labelled_example(corpus: Corpus, documents: Documents, number: int) -> str:
    """A record as a model sees it, with its label, `a| stir|ring|... = positive`; // is between the texts of a pair."""
    shown = []
    for stream in documents.streams.values():
        start, stop = stream.offsets[number:number + 2].tolist()
        shown.append(example(corpus.tokenizer, stream.read(start, min(start + TOKENS, stop)).tolist()))
    label = documents.column("label")[number]
    if corpus.problem == SINGLE:
        label = corpus.labels[label]
    elif corpus.problem == MULTI:
        label = ", ".join(name for name, chosen in zip(corpus.labels, label, strict=True) if chosen) or "no label"
    return f"{' // '.join(shown)} = {printable(str(label))}"


def unknown_tokens(documents: Documents) -> str:
    """How much of a split's text has no token, for people; empty for an empty split."""
    tokens = documents.total("tokens")
    if not tokens:
        return ""
    if "unknown_tokens" not in documents.entry:
        return f"{documents.split} not counted"
    unknown = documents.total("unknown_tokens")
    return f"{documents.split} {unknown:,} of {tokens:,} tokens ({share(unknown, tokens)})"


def examples(documents: Documents, tokenizer: Tokenizer) -> list[str]:
    """The first tokens of three documents, or of three places in a single one, decoded, with a mark between any two.

    Control characters are escaped (\\n); special tokens stand as [eos]. A character that takes several tokens is
    followed by as many marks.
    """
    number, tokens = documents.num_documents, documents.num_tokens
    if number >= EXAMPLES:
        starts = [int(documents.offsets[number * place // EXAMPLES]) for place in range(EXAMPLES)]
    else:
        starts = sorted({tokens * place // EXAMPLES for place in range(EXAMPLES)})
    return [example(tokenizer, documents.read(start, min(start + TOKENS, tokens)).tolist()) for start in starts if start < tokens]


def example(tokenizer: Tokenizer, ids: list[int]) -> str:
    while len(ids) > 1 and tokenizer.decode(ids).startswith("\ufffd"):  # it begins inside a character
        ids = ids[1:]
    line = ""
    for piece in pieces(tokenizer, ids):
        longer = f"{line}{BOUND if line else ''}{piece}"
        if len(longer) > WIDTH and line:
            return f"{line}{BOUND}..."
        line = longer
    return line


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text, as it is shown; '' where a character is not complete yet.

    Tokens are decoded together with those before: alone, some would lose their blank, or be no character.
    """
    special: dict[int | None, str] = {}
    for role, token in vars(tokenizer.special).items():
        special.setdefault(token, f"[{role}]")  # one that ends documents may also be their separator
    shown, begin, before = [], 0, ""
    for place, token in enumerate(ids):
        if token in special:
            shown.append(special[token])
            begin, before = place + 1, ""
            continue
        text = tokenizer.decode(ids[begin:place + 1])
        whole = text.startswith(before) and not (text.endswith("\ufffd") and len(text) - len(before) <= 1)
        shown.append(printable(text[len(before):]) if whole else "")
        before = text if whole else before
    return shown
