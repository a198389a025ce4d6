"""Rows of labelled records: one record in a row, its texts framed as the model knows them, its label beside them.

`LabelledRows` is one of the ways to cut rows from a corpus (see `jaxlm.data.sequences`): every record is a row, what is
too long loses its end, what is short is padding. `HeldRecords` are records in memory, for what needs no corpus.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from jaxlm.data.columns import ROLES
from jaxlm.data.corpus import share
from jaxlm.data.records import Record
from jaxlm.data.rows import Field, Rows, Spans, Spec, empty_rows, row_spec
from jaxlm.data.sequences import place_pieces, share_padded, start_token
from jaxlm.data.tokenizers import SpecialTokens, Tokenizer
from jaxlm.errors import UserError


class Stream(Protocol):
    """Tokens of texts, one after the other."""

    offsets: np.ndarray  # int64 [records + 1]

    def read(self, start: int, stop: int) -> np.ndarray: ...


class Records(Protocol):
    """What rows are cut from: a split of a corpus, or `HeldRecords`."""

    num_documents: int
    streams: Mapping[str, Stream]
    columns: tuple[str, ...]

    def column(self, name: str) -> np.ndarray: ...


class LabelledRows:
    """A record in a row, in the order of the corpus.

    Encoders: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP]. Causal models: the start token, text, and behind each
    text the separator, of which the last is the end token: what stands at `last_position` has seen all of the record.
    A token that the tokenizer lacks is left out.

    Of a pair that is too long the longer text is cut first (`longest_first` of the tokenizers library); `truncated`
    counts the records that lose something.

    Arrays of a row, T = sequence_length: tokens, segment_ids (1; 0: padding), positions int32 [T]; with token_types
    also those (1: pair); causal: last_position int32 []; with a column of labels label_mask bool [] (False where the
    row is padding) and label int32 [] or float32 [] (a score), or labels bool [names of labels].
    """

    def __init__(self, records: Records, special: SpecialTokens, sequence_length: int, *, causal: bool,
                 token_types: bool = False, separators: int = 1):
        """separators: between text and pair; RoBERTa has two. UserError: no text fits into sequence_length."""
        self.streams, self.special, self.sequence_length = list(records.streams.values()), special, sequence_length
        self.frame = causal_frame(special) if causal else (present(special.cls), present(special.sep))
        self.causal, self.separators = causal, separators
        self.count = records.num_documents
        if sequence_length < self.overhead + len(self.streams):
            raise UserError(f"data.sequence_length={sequence_length}: a record needs {self.overhead} tokens beside its text; "
                            f"expected {self.overhead + len(self.streams)} or more")
        whole = [np.diff(stream.offsets) - int(special.eos is not None) for stream in self.streams]
        self.lengths = truncated(np.stack(whole, axis=1), sequence_length - self.overhead)
        self.truncated = int(np.count_nonzero((self.lengths < np.stack(whole, axis=1)).any(axis=1)))
        used = int(self.lengths.sum()) + self.count * self.overhead
        self.padding_share = share_padded(used, self.count * sequence_length)
        self.label = records.column("label") if "label" in records.columns else None
        self.spec = self.row_spec(token_types)

    @property
    def overhead(self) -> int:
        """Tokens of a row that are not the text's."""
        start, end = self.frame
        return len(start) + len(end) * (1 if len(self.streams) == 1 else 1 + self.separators)

    @property
    def label_name(self) -> str:
        return "label" if self.label.ndim == 1 else "labels"

    def row_spec(self, token_types: bool) -> Spec:
        names = ("tokens", "segment_ids", "positions", *(("token_types",) if token_types else ()))
        spec = row_spec(self.sequence_length, names, self.special.pad or 0)
        if self.causal:
            spec["last_position"] = Field((), np.dtype(np.int32), "position", bound=self.sequence_length)
        if self.label is not None:
            values = {"b": "mask", "i": "class", "f": "number"}[self.label.dtype.kind]
            spec[self.label_name] = Field(self.label.shape[1:], self.label.dtype, values)
            spec["label_mask"] = Field((), np.dtype(bool), "mask")
        return spec

    def spans(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> list[Spans]:
        """What of the text's stream, and then of the pair's, is in each row."""
        begins = np.stack([stream.offsets[indices] for stream in self.streams], axis=1)
        return [list(zip(start.tolist(), stop.tolist(), strict=True))
                for start, stop in zip(begins, begins + self.lengths[indices], strict=True)]

    def rows(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> Rows:
        batch = empty_rows(self.spec, len(indices))
        (start, end), lengths = self.frame, np.empty(len(indices), np.int64)
        for row, spans in enumerate(self.spans(indices, epoch_keys, sample_keys)):
            texts = [stream.read(*span) for stream, span in zip(self.streams, spans, strict=True)]
            first = [*start, *texts[0], *end]
            second = [*end * (self.separators - 1), *texts[1], *end] if len(texts) > 1 else []
            lengths[row] = len(first) + len(second)
            batch["tokens"][row, :lengths[row]] = first + second
            if "token_types" in batch:
                batch["token_types"][row, len(first):lengths[row]] = 1
        place_pieces(batch, np.arange(len(indices)), lengths)
        if self.causal:
            batch["last_position"][:] = np.maximum(lengths - 1, 0)
        if self.label is not None:
            batch[self.label_name][:] = self.label[indices]
            batch["label_mask"][:] = True
        return batch

    def truncation_note(self) -> list[str]:
        """A line about records that do not fit; none where all do."""
        if not self.truncated:
            return []
        longest = int(sum(np.diff(stream.offsets) for stream in self.streams).max())
        return [f"{self.truncated:,} of {self.count:,} records ({share(self.truncated, self.count)}) are longer than "
                f"data.sequence_length={self.sequence_length} and lose their end; the longest has about {longest:,} tokens"]


def present(*tokens: int | None) -> list[int]:
    return [token for token in tokens if token is not None]


def causal_frame(special: SpecialTokens) -> tuple[list[int], list[int]]:
    """What stands before the first text, and behind each one."""
    return present(start_token(special, "documents")), present(special.eos)


def truncated(lengths: np.ndarray, room: int) -> np.ndarray:
    """int64 [n, texts]: how many tokens of each text fit into `room` together.

    The longer of two is cut to the length of the other; if that is not enough, both to half of the room, of which the
    longer one (of equals the second) has the odd token: `longest_first` as the tokenizers library has it.
    """
    if lengths.shape[1] == 1:
        return np.minimum(lengths, room)
    order = np.argsort(lengths, axis=1, kind="stable")
    short, long = np.take_along_axis(lengths, order, axis=1).T
    cut_long = np.where(short > room, short, np.maximum(short, np.minimum(long, room - short)))
    both = short + cut_long > room
    short, long = np.where(both, room // 2, short), np.where(both, room // 2 + room % 2, cut_long)
    return np.take_along_axis(np.stack([short, long], axis=1), np.argsort(order, axis=1), axis=1)


class HeldRecords:
    """Records in memory, without labels; the same protocol as a split of a corpus."""

    columns: tuple[str, ...] = ()

    def __init__(self, streams: Mapping[str, "HeldStream"]):
        self.streams = streams
        self.num_documents = len(next(iter(streams.values())).offsets) - 1

    @classmethod
    def of(cls, records: Iterable[Record | tuple[str, ...]], tokenizer: Tokenizer) -> "HeldRecords":
        """Of records as they are read, or of plain tuples of texts."""
        texts = [record.texts if isinstance(record, Record) else record for record in records]
        return cls({name: HeldStream(each, tokenizer) for name, each in zip(ROLES, zip(*texts, strict=True), strict=False)})

    def column(self, name: str) -> np.ndarray:
        raise KeyError(name)


class HeldStream:
    """Texts as tokens, each with the end token that they have in a corpus, too."""

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer):
        end = present(tokenizer.special.eos)
        encoded = [[*tokenizer.encode(text), *end] for text in texts]
        self.offsets = np.cumsum([0, *map(len, encoded)])
        self.tokens = np.fromiter((token for ids in encoded for token in ids), np.int32)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]
