"""Rows of a batch as text, for people."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from jaxlm.data.rows import Rows
from jaxlm.data.tokenizers import Tokenizer


def pieces(tokenizer: Tokenizer, row: Rows) -> Iterator[tuple[str | None, str]]:
    """The special tokens of a row by name, and what stands between them: (None, text). Without padding."""
    tokens = row["tokens"][row["segment_ids"] > 0] if "segment_ids" in row else row["tokens"]
    names = {number: f"[{role.upper()}]" for role, number in asdict(tokenizer.special).items() if number is not None}
    names |= {number: name for name, number in tokenizer.vocabulary.items() if number in names}
    for special, run in itertools.groupby(np.asarray(tokens).tolist(), lambda token: token if token in names else None):
        run = list(run)
        yield from ((names[token], names[token]) for token in run) if special is not None else [(None, tokenizer.decode(run))]


def with_marks(tokenizer: Tokenizer, row: Rows) -> str:
    """[CLS] a text [SEP] and another [SEP]"""
    return " ".join(text.strip() for _, text in pieces(tokenizer, row))


def without_marks(tokenizer: Tokenizer, row: Rows) -> str:
    """a text / and another"""
    return " / ".join(text.strip() for special, text in pieces(tokenizer, row) if special is None)
