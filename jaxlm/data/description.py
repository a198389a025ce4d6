"""What people are told of a corpus: what went in, what came out, and some of its text as a model will see it."""

from collections import Counter

import numpy as np

from jaxlm.console.units import counted, format_count
from jaxlm.data.corpus import Corpus, Documents, share
from jaxlm.data.manifest import read_report
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import printable

EXAMPLES = 3
TOKENS = 40  # read for an example, at most
WIDTH = 66  # letters shown of it
BOUND = "|"


def describe(corpus: Corpus) -> list[str]:
    """Lines for people: what went in, what was dropped and why, what came out, and how it looks to a model."""
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
        each = f", {documents.num_bytes / documents.num_tokens:.2f} bytes a token" if documents.num_tokens else ""
        lines.append(f"{documents.split:11} {counted(documents.num_documents, 'document')}, "
                     f"{counted(documents.num_tokens, 'token')}{each}")
    if "shares" in report:
        shares = [f"{split} {100 * part:.3g} %" for split, part in report["shares"].items()]
        lines.append(f"shares      {', '.join(shares)} of the text")
    longest = max((int(np.diff(documents.offsets).max()) for documents in (corpus.train, corpus.validation)
                   if documents.num_documents), default=0)
    lines.append(f"longest     a document of {counted(longest, 'token')}")
    lines.append(f"unknown     {'; '.join(filter(None, map(unknown_tokens, (corpus.train, corpus.validation))))}")
    lines.append(f"tokenizer   {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, digest {tokenizer['digest'][:12]}, "
                 f"{corpus.end_token}")
    lines += [f"lost        {corpus.lost}"] if corpus.loses_text else []
    lines += [f"example     {shown}" for shown in examples(corpus.train, corpus.tokenizer)]
    return [*lines, *(f"note        {note}" for note in corpus.notes), *corpus.warnings()]


def unknown_tokens(documents: Documents) -> str:
    """How much of a split's text has no token, for people; empty for an empty split."""
    unknown = documents.entry.get("unknown_tokens")
    if not documents.num_tokens:
        return ""
    return f"{documents.split} " + ("not counted" if unknown is None else (
        f"{unknown:,} of {documents.num_tokens:,} tokens ({share(unknown, documents.num_tokens)})"))


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
