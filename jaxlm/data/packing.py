"""Which tokens stand in which sequence: arithmetic on lengths and offsets alone, with random access to every sequence.

concatenate: `Windows` of equal length over the whole stream of a split.
documents: `pack_documents` fills sequences with whole documents, and cuts only those that are longer than a sequence.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """`count` windows of at most `stride + overlap` tokens; window i begins at offset + i * stride of the stream.

    Any offset in [0, num_offsets) keeps every window inside the stream of `num_tokens`.
    """

    num_tokens: int
    stride: int
    overlap: int
    count: int
    num_offsets: int

    def spans(self, indices: np.ndarray, offsets: np.ndarray) -> list[tuple[int, int]]:
        """(start, stop) of the windows `indices` (int64 [n]) in epochs that begin at `offsets` (int64 [n])."""
        starts = offsets + indices * self.stride
        stops = np.minimum(starts + self.stride + self.overlap, self.num_tokens)
        return list(zip(starts.tolist(), stops.tolist(), strict=True))


def training_windows(num_tokens: int, stride: int, overlap: int) -> Windows:
    """Full windows only. One is given up so that an epoch can begin at any of `stride` offsets; where the stream is
    shorter than two windows, the choice of offsets is. count is 0 when not one window fits."""
    usable = num_tokens - overlap
    count = max(1, (usable + 1) // stride - 1) if usable >= stride else 0
    return Windows(num_tokens, stride, overlap, count, min(stride, usable - count * stride + 1))


def validation_windows(num_tokens: int, stride: int, overlap: int) -> Windows:
    """From the first token to the last: the last window may be shorter. count is 0 when there is nothing to predict."""
    return Windows(num_tokens, stride, overlap, max(0, -(-(num_tokens - overlap) // stride)), 1)


@dataclass(frozen=True)
class Pieces:
    """Documents, each cut into pieces that fit a sequence, in the order of the stream."""

    starts: np.ndarray  # int64 [pieces]: first token
    lengths: np.ndarray  # int64 [pieces]: tokens
    documents: np.ndarray  # int64 [pieces]: document it is from
    continues: np.ndarray  # bool [pieces]: the document goes on after it

    def __getitem__(self, chosen: np.ndarray) -> "Pieces":
        """Those at an index array, or where a boolean array is True."""
        return Pieces(self.starts[chosen], self.lengths[chosen], self.documents[chosen], self.continues[chosen])


def cut_documents(offsets: np.ndarray, longest: int, dropped_at_end: int) -> Pieces:
    """Pieces of `longest` tokens and, at the end of a document, of what is left.

    offsets: int64 [documents + 1]. dropped_at_end: tokens at the end of each document that belong to no piece.
    """
    begins, ends = offsets[:-1], offsets[1:] - dropped_at_end
    counts = -(-np.maximum(ends - begins, 0) // longest)
    documents = np.repeat(np.arange(len(counts)), counts)
    starts = begins[documents] + joined_ranges(np.zeros_like(counts), counts) * longest
    stops = np.minimum(starts + longest, ends[documents])
    return Pieces(starts, stops - starts, documents, stops < ends[documents])


@dataclass(frozen=True)
class PackingPlan:
    """Sequence i holds the pieces first[i] .. first[i + 1]."""

    pieces: Pieces
    first: np.ndarray  # int64 [sequences + 1]

    def __len__(self) -> int:
        return len(self.first) - 1

    def spans(self, sequence: int) -> list[tuple[int, int]]:
        """(start, stop) in the stream of each piece of a sequence, in order."""
        pieces = self.pieces[np.arange(self.first[sequence], self.first[sequence + 1])]
        return list(zip(pieces.starts.tolist(), (pieces.starts + pieces.lengths).tolist(), strict=True))

    def pieces_of(self, sequences: np.ndarray) -> tuple[np.ndarray, Pieces]:
        """The pieces of several sequences (int64 [n]) one after the other, and for each (int64) which of the n holds
        it."""
        counts = self.first[sequences + 1] - self.first[sequences]
        return np.repeat(np.arange(len(sequences)), counts), self.pieces[joined_ranges(self.first[sequences], counts)]


def pack_documents(offsets: np.ndarray, sequence_length: int, *, overhead: int = 0, dropped_at_end: int = 0) -> PackingPlan:
    """Every token of every document in exactly one sequence; a pure function of its arguments.

    overhead: room that each piece needs beside its own tokens ([CLS] and [SEP]). Cutting only what is too long and
    packing the pieces whole is Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    pieces = cut_documents(offsets, sequence_length - overhead, dropped_at_end)
    order, first = best_fit_decreasing(pieces.lengths + overhead, sequence_length)
    return PackingPlan(pieces[order], first)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items of `lengths` (int64 [n], 1 .. capacity) into bins: longest first, each where it leaves the least room.

    Bins with the same room are alike, so all items of one length are placed with one array operation for each
    different room (the histogram of Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination"):
    ten million take seconds. Returns (order, first): bin b holds the items order[first[b]:first[b + 1]], longest
    first.
    """
    order = np.argsort((capacity - lengths).astype(np.uint16 if capacity < 2**16 else np.int64), kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    bin_of = np.empty(len(lengths), np.int64)  # of the items in `order`
    with_room: dict[int, list[np.ndarray]] = {}  # room -> bins
    exists = np.zeros(capacity + 1, bool)  # room -> whether there are such bins
    num_bins = placed = 0

    def put(bins: np.ndarray, room: int) -> None:
        if len(bins) and room:
            with_room.setdefault(room, []).append(bins)
            exists[room] = True

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room = length + int(exists[length:].argmax())  # the least room that is enough, if there is any
            if exists[room]:
                bins = np.concatenate(with_room.pop(room))
                exists[room] = False
            else:
                room = capacity
                bins = np.arange(num_bins, num_bins - (-left // (capacity // length)))
                num_bins += len(bins)
            each = room // length
            fits = min(left, each * len(bins))
            bin_of[placed:placed + fits] = np.repeat(bins[:-(-fits // each)], each)[:fits]
            full, more = divmod(fits, each)
            put(bins[:full], room - each * length)
            put(bins[full:full + (more > 0)], room - more * length)
            put(bins[full + (more > 0):], room)
            placed += fits
            left -= fits
    first = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=num_bins))])
    return order[np.argsort(bin_of, kind="stable")], first


def joined_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: range(start, start + count) for each pair, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
