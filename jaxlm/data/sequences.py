"""From spans of a token stream to rows of a batch: the ways to cut text that language models learn from."""

from collections.abc import Sequence

import numpy as np

from jaxlm.data.corpus import Documents
from jaxlm.data.packing import cut_documents, joined_ranges, pack_documents, training_windows, validation_windows
from jaxlm.data.randomness import below, random_words
from jaxlm.data.rows import Rows, Spans, empty_rows, row_spec
from jaxlm.data.tokenizers import SpecialTokens


class ShiftedWindows:
    """tokens are a window of the stream, targets the same one token later."""

    ARRAYS = ("tokens", "targets", "loss_mask")

    def __init__(self, documents: Documents, special: SpecialTokens, sequence_length: int, training: bool):
        cut = training_windows if training else validation_windows
        self.windows = cut(documents.num_tokens, stride=sequence_length, overlap=1)
        self.documents, self.sequence_length = documents, sequence_length
        self.count = self.windows.count
        self.padding_share = share_padded(max(0, documents.num_tokens - 1), self.count * sequence_length, training)
        self.spec = row_spec(sequence_length, self.ARRAYS, special.pad or 0)

    def spans(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> list[Spans]:
        offsets = epoch_offsets(epoch_keys, self.windows.num_offsets)
        return [[span] for span in self.windows.spans(indices, offsets)]

    def rows(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> Rows:
        batch = empty_rows(self.spec, len(indices))
        for row, [(start, stop)] in enumerate(self.spans(indices, epoch_keys, sample_keys)):
            window = self.documents.read(start, stop)
            batch["tokens"][row, :len(window) - 1] = window[:-1]
            batch["targets"][row, :len(window) - 1] = window[1:]
            batch["loss_mask"][row, :len(window) - 1] = True
        return batch


def start_token(special: SpecialTokens, packing: str) -> int | None:
    """What a document of a causal model begins after, for batches and for prompts: stated only here. None: nothing.

    documents: the tokenizer's start token, which opens every document; its end token where it has none, as GPT-2 does.
    concatenate: the end token, since in the stream it closes the document before.
    """
    order = (special.bos, special.eos) if packing == "documents" else (special.eos, special.bos)
    return next((token for token in order if token is not None), None)


class ShiftedDocuments:
    """Whole documents packed together; every token is predicted once, from those before it in its document.

    The targets of a piece are its tokens. What predicts them stands one place earlier: the start token before the
    first of a document, and where a document goes on in another sequence, the last token of the piece before. With
    `start` None the first token of a document is no target, and its last one has none.
    """

    ARRAYS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")

    def __init__(self, documents: Documents, special: SpecialTokens, sequence_length: int, start: int | None):
        self.plan, self.start = pack_documents(documents.offsets, sequence_length), start
        self.documents, self.sequence_length = documents, sequence_length
        self.count = len(self.plan)
        self.padding_share = share_padded(int(self.plan.pieces.lengths.sum()), self.count * sequence_length)
        self.spec = row_spec(sequence_length, self.ARRAYS, special.pad or 0)

    def spans(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> list[Spans]:
        return [self.plan.spans(index) for index in indices.tolist()]

    def rows(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> Rows:
        batch = empty_rows(self.spec, len(indices))
        row_of_piece, pieces = self.plan.pieces_of(indices)
        continued = pieces.starts > self.documents.offsets[pieces.documents]
        before, after = (continued, 0) if self.start is not None else (0, pieces.continues)  # what else of the stream is needed
        text = read_spans(self.documents, pieces.starts - before, pieces.starts + pieces.lengths + after)

        # One more token than there are targets, for each piece: the first has nothing before it, the last nothing
        # after it.
        ends = np.cumsum(pieces.lengths + 1)
        begins = ends - pieces.lengths - 1
        chain = np.full(ends[-1] if len(ends) else 0, self.start or 0, np.int32)
        skipped = ~continued if self.start is not None else 0  # the place of the start token
        chain[joined_ranges(begins + skipped, pieces.lengths + before + after)] = text
        has_target = np.ones(int(pieces.lengths.sum()), bool)
        if self.start is None:
            has_target[np.cumsum(pieces.lengths)[~pieces.continues] - 1] = False

        filled = place_pieces(batch, row_of_piece, pieces.lengths)
        batch["tokens"][filled] = np.delete(chain, ends - 1)
        batch["targets"][filled] = np.delete(chain, begins)
        batch["loss_mask"][filled] = has_target
        return batch


class MarkedWindows:
    """[CLS] window [SEP]. Windows of the stream that do not overlap."""

    ARRAYS = ("tokens",)

    def __init__(self, documents: Documents, special: SpecialTokens, sequence_length: int, training: bool):
        cut = training_windows if training else validation_windows
        self.windows = cut(documents.num_tokens, stride=sequence_length - 2, overlap=0)
        self.documents, self.special, self.sequence_length = documents, special, sequence_length
        self.count = self.windows.count
        self.padding_share = share_padded(documents.num_tokens + 2 * self.count, self.count * sequence_length, training)
        padding = () if training else ("segment_ids", "positions")
        self.spec = row_spec(sequence_length, (*self.ARRAYS, *padding), special.pad or 0)

    def spans(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> list[Spans]:
        offsets = epoch_offsets(epoch_keys, self.windows.num_offsets)
        return [[span] for span in self.windows.spans(indices, offsets)]

    def rows(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> Rows:
        batch = empty_rows(self.spec, len(indices))
        lengths = np.empty(len(indices), np.int64)
        for row, [(start, stop)] in enumerate(self.spans(indices, epoch_keys, sample_keys)):
            lengths[row] = fill(batch["tokens"][row], [self.special.cls], self.documents.read(start, stop), [self.special.sep])
        if "segment_ids" in batch:
            place_pieces(batch, np.arange(len(indices)), lengths)
        return batch


class MarkedDocuments:
    """[CLS] document [SEP], several packed together. The end mark of a document, which [SEP] replaces, is left out."""

    ARRAYS = ("tokens", "segment_ids", "positions")

    def __init__(self, documents: Documents, special: SpecialTokens, sequence_length: int):
        self.plan = pack_documents(documents.offsets, sequence_length, overhead=2, dropped_at_end=int(special.eos is not None))
        self.documents, self.special, self.sequence_length = documents, special, sequence_length
        self.count = len(self.plan)
        self.padding_share = share_padded(int((self.plan.pieces.lengths + 2).sum()), self.count * sequence_length)
        self.spec = row_spec(sequence_length, self.ARRAYS, special.pad or 0)

    def spans(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> list[Spans]:
        return [self.plan.spans(index) for index in indices.tolist()]

    def rows(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> Rows:
        batch = empty_rows(self.spec, len(indices))
        row_of_piece, pieces = self.plan.pieces_of(indices)
        lengths = pieces.lengths + 2
        begins = np.cumsum(lengths) - lengths
        stream = np.empty(lengths.sum(), np.int32)
        stream[begins] = self.special.cls
        stream[begins + lengths - 1] = self.special.sep
        stream[joined_ranges(begins + 1, pieces.lengths)] = read_spans(
            self.documents, pieces.starts, pieces.starts + pieces.lengths)
        batch["tokens"][place_pieces(batch, row_of_piece, lengths)] = stream
        return batch


class SentencePairs:
    """[CLS] A [SEP] B [SEP], one pair in a sequence (Devlin et al. 2019, section 3.1, task 2).

    Documents are cut into pieces that fill a sequence (what is left at the end is shorter; a single token makes no
    pair). A is the first part of a piece, up to a random point. Half of the time B is the rest of it (next_sentence
    0); else B is a span from a random place of another document (1), as long as the rest would be, so that length
    does not tell them apart.
    """

    ARRAYS = ("tokens", "token_types", "segment_ids", "positions", "next_sentence", "next_sentence_mask")

    def __init__(self, documents: Documents, special: SpecialTokens, sequence_length: int):
        end_marks = int(special.eos is not None)
        pieces = cut_documents(documents.offsets, sequence_length - 3, end_marks)
        self.pieces = pieces[pieces.lengths >= 2]
        self.documents, self.special, self.sequence_length = documents, special, sequence_length
        self.end_marks = end_marks
        self.count = len(self.pieces.starts)
        self.padding_share = share_padded(int((self.pieces.lengths + 3).sum()), self.count * sequence_length)
        self.spec = row_spec(sequence_length, self.ARRAYS, special.pad or 0)

    @property
    def num_documents(self) -> int:
        """Documents that pairs come from: with fewer than two there are no spans of another document."""
        return len(np.unique(self.pieces.documents))

    def rows(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> Rows:
        batch = empty_rows(self.spec, len(indices))
        spans, is_other = self.pairs(indices, sample_keys)
        cls, sep, read = [self.special.cls], [self.special.sep], self.documents.read
        for row, (start_a, stop_a, start_b, stop_b) in enumerate(spans.tolist()):
            fill(batch["tokens"][row], cls, read(start_a, stop_a), sep, read(start_b, stop_b), sep)
        lengths_a, lengths_b = spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]
        lengths = lengths_a + lengths_b + 3
        place_pieces(batch, np.arange(len(indices)), lengths)
        column = np.arange(self.sequence_length)
        batch["token_types"][:] = (column >= lengths_a[:, None] + 2) & (column < lengths[:, None])
        batch["next_sentence"][:] = is_other
        batch["next_sentence_mask"][:] = True
        return batch

    def spans(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> list[Spans]:
        return [[(start_a, stop_a), (start_b, stop_b)] for start_a, stop_a, start_b, stop_b in
                self.pairs(indices, sample_keys)[0].tolist()]

    def pairs(self, indices: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n, 4]: start and end of A, start and end of B; bool [n]: whether B is from another document."""
        words = random_words(keys, 4)
        starts, lengths = self.pieces.starts[indices], self.pieces.lengths[indices]
        lengths_a = 1 + below(words[:, 0], lengths - 1)
        starts_b, lengths_b = starts + lengths_a, lengths - lengths_a
        is_other = below(words[:, 1], 2) == 1
        other_starts, other_lengths = self.other_spans(indices, lengths_b, words[:, 2:])
        starts_b = np.where(is_other, other_starts, starts_b)
        lengths_b = np.where(is_other, other_lengths, lengths_b)
        return np.stack([starts, starts + lengths_a, starts_b, starts_b + lengths_b], axis=1), is_other

    def other_spans(self, indices: np.ndarray, longest: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths), int64 [n]: for each piece a span of at most `longest` tokens from another document.

        That document is drawn in proportion to its pieces, so that every text is as likely to be a wrong B as to be
        an A.
        """
        document = self.pieces.documents[indices]
        own = np.searchsorted(self.pieces.documents, document, side="left")
        num_own = np.searchsorted(self.pieces.documents, document, side="right") - own
        drawn = below(words[:, 0], self.count - num_own)
        drawn += np.where(drawn >= own, num_own, 0)
        other = self.pieces.documents[drawn]
        begins, ends = self.documents.offsets[other], self.documents.offsets[other + 1] - self.end_marks
        lengths = np.minimum(longest, ends - begins)
        return begins + below(words[:, 1], ends - begins - lengths + 1), lengths


def epoch_offsets(epoch_keys: np.ndarray, num_offsets: int) -> np.ndarray:
    return below(random_words(epoch_keys, 1)[:, 0], num_offsets)


def share_padded(num_tokens: int, num_slots: int, full: bool = False) -> float:
    """Share of `num_slots` that `num_tokens` leave empty."""
    return 0.0 if full or not num_slots else 1 - num_tokens / num_slots


def read_spans(documents: Documents, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """int32: the tokens of several spans of the stream, one after the other."""
    spans = [documents.read(*span) for span in zip(starts.tolist(), stops.tolist(), strict=True)]
    return np.concatenate([np.empty(0, np.int32), *spans])


def fill(row: np.ndarray, *parts: Sequence[int] | np.ndarray) -> int:
    """Write the parts one after the other from the beginning of the row; their length together."""
    end = 0
    for part in parts:
        begin, end = end, end + len(part)
        row[begin:end] = part
    return end


def place_pieces(batch: Rows, row_of_piece: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Lay pieces side by side in their rows and fill segment_ids (1, 2, ...) and positions (from 0 in each piece)
    accordingly.

    row_of_piece: int64 [pieces], rising. Returns bool [B, T]: where there are tokens, in the order of the pieces.
    """
    num_rows, sequence_length = batch["segment_ids"].shape
    first_piece = np.searchsorted(row_of_piece, np.arange(num_rows))[row_of_piece]  # of the same row
    filled = np.arange(sequence_length) < np.bincount(row_of_piece, weights=lengths, minlength=num_rows)[:, None]
    batch["segment_ids"][filled] = np.repeat(np.arange(len(lengths)) - first_piece + 1, lengths)
    batch["positions"][filled] = joined_ranges(np.zeros_like(lengths), lengths)
    return filled
