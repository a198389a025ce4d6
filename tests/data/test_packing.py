from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.packing import (
    best_fit_decreasing,
    cut_documents,
    joined_ranges,
    pack_documents,
    training_windows,
    validation_windows,
)


def one_at_a_time(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing by its definition: the room left in each bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=80))))
def test_best_fit_decreasing_is_that_of_the_definition(case):
    capacity, lengths = case
    order, first = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    bins = [[lengths[item] for item in order[start:stop]] for start, stop in pairwise(first)]
    assert all(bins)
    assert Counter(capacity - sum(items) for items in bins) == Counter(one_at_a_time(lengths, capacity))
    assert all(items == sorted(items, reverse=True) for items in bins)


def test_best_fit_decreasing_wastes_almost_nothing_on_many_items():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64), 1, 512)
    order, first = best_fit_decreasing(lengths, 512)
    filled = np.add.reduceat(lengths[order], first[:-1])
    assert filled.max() <= 512
    assert filled.mean() > 0.999 * 512


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(3, 20), st.sampled_from([0, 2]), st.sampled_from([0, 1]))
def test_every_token_stands_in_one_sequence(lengths, sequence_length, overhead, dropped):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    plan = pack_documents(offsets, sequence_length, overhead=overhead, dropped_at_end=dropped)
    spans = [plan.spans(sequence) for sequence in range(len(plan))]
    assert all(sum(stop - start + overhead for start, stop in row) <= sequence_length for row in spans)

    found = sorted(token for row in spans for start, stop in row for token in range(start, stop))
    expected = [token for start, stop in pairwise(offsets) for token in range(start, stop - dropped)]
    assert found == expected

    for start, stop in (span for row in spans for span in row):
        document = int(np.searchsorted(offsets, start, side="right")) - 1
        whole = start == offsets[document] and stop == offsets[document + 1] - dropped
        assert stop <= offsets[document + 1] - dropped
        assert whole or lengths[document] - dropped > sequence_length - overhead  # only what is too long is cut


def test_pieces_of_several_sequences():
    plan = pack_documents(np.array([0, 5, 12, 14, 30]), 8)
    rows, pieces = plan.pieces_of(np.array([2, 0, 2]))
    for row, sequence in enumerate([2, 0, 2]):
        chosen = pieces[rows == row]
        assert list(zip(chosen.starts, chosen.starts + chosen.lengths, strict=True)) == plan.spans(sequence)


def test_pieces_know_their_document_and_whether_it_goes_on():
    pieces = cut_documents(np.array([0, 5, 5, 17]), 6, 0)
    assert list(zip(pieces.starts, pieces.lengths, pieces.documents, pieces.continues, strict=True)) == [
        (0, 5, 0, False), (5, 6, 2, True), (11, 6, 2, False)]


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 23, 24, 25])
@pytest.mark.parametrize("overlap", [0, 1])
def test_windows(num_tokens, overlap):
    stride = 5
    windows = validation_windows(num_tokens, stride, overlap)
    spans = windows.spans(np.arange(windows.count), np.zeros(windows.count, int))
    assert [token for start, stop in spans for token in range(start + overlap, stop)] == list(range(overlap, num_tokens))

    windows = training_windows(num_tokens, stride, overlap)
    assert (windows.count == 0) == (num_tokens < stride + overlap)
    seen = set()
    for offset in range(windows.num_offsets if windows.count else 0):
        spans = windows.spans(np.arange(windows.count), np.full(windows.count, offset))
        assert all(start >= 0 and stop <= num_tokens and stop - start == stride + overlap for start, stop in spans)
        seen |= {token for start, stop in spans for token in range(start, stop)}
    assert seen == set(range(num_tokens if windows.count else 0)) or num_tokens >= 2 * stride  # short streams: all of it in time
    if num_tokens >= 2 * stride:
        assert windows.num_offsets == stride and (windows.count + 2) * stride > num_tokens - overlap


def test_joined_ranges():
    assert joined_ranges(np.array([3, 0, 7]), np.array([2, 0, 3])).tolist() == [3, 4, 7, 8, 9]
    assert joined_ranges(np.array([], int), np.array([], int)).tolist() == []
