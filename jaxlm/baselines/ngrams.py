"""Counts of all n-grams of a stream of tokens that need not fit into memory.

A stream is a row of sequences. The first token of a sequence is only seen, never predicted; every later one ends an
n-gram of each order for which its sequence has enough tokens before it. The n-grams of an order are a level of a
trie: sorted by the place of their context, which is an n-gram of the level below, and by their last token, so that
one int64 key stands for each and nothing is hashed.

Work goes chunk by chunk; whatever grows with the stream lies in files of a scratch folder, mapped into memory, which
the system writes back when it needs the room.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

CHUNK = 2**22  # tokens, or n-grams, that are worked on at a time


class Level(NamedTuple):
    """All n-grams of one order. Level 1 has every token of the vocabulary, counted or not."""

    keys: np.ndarray  # int64 [n], rising: place of the context in the level below * vocabulary + last token
    counts: np.ndarray  # int64 [n]: how often it occurs
    continuations: np.ndarray  # int64 [n]: distinct tokens before it, plus how often it begins a sequence
    suffixes: np.ndarray  # int64 [n]: place of the n-gram without its first token in the level below


class Scratch:
    """Arrays that may be larger than memory, as files of a folder."""

    def __init__(self, folder: Path):
        self.folder, self.numbers = folder, itertools.count()

    def new(self, size: int, dtype: type) -> np.ndarray:
        """Zeros, to be written."""
        return np.memmap(self.folder / str(next(self.numbers)), dtype, "w+", shape=(size,)) if size else np.zeros(0, dtype)

    def columns(self, parts: Iterable[Sequence[np.ndarray]], width: int) -> tuple[np.ndarray, ...]:
        """`width` int64 arrays, given part by part."""
        paths = [self.folder / str(next(self.numbers)) for _ in range(width)]
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in paths]
            for part in parts:
                for file, column in zip(files, part, strict=True):
                    column.astype(np.int64, copy=False).tofile(file)
        return tuple(np.memmap(path, np.int64, "r+") if path.stat().st_size else np.zeros(0, np.int64) for path in paths)

    def drop(self, arrays: Iterable[np.ndarray]) -> None:
        """Takes their files away; their room is free when the last reference to them goes."""
        for array in arrays:
            if isinstance(array, np.memmap):
                Path(array.filename).unlink()


def count_ngrams(stream: Iterable[tuple[np.ndarray, np.ndarray]], length: int, vocab_size: int, order: int,
                 scratch: Scratch) -> list[Level]:
    """The levels 1 to `order` of a stream.

    Args:
      stream: (tokens int [m], begins bool [m]: where a sequence begins), chunk by chunk; at most `length` tokens.
      vocab_size: tokens are below it.
      order: of the longest n-grams.
      scratch: where what is large goes.
    """
    tokens, begins = scratch.new(length, np.int32), scratch.new(length, bool)
    counts, place = np.zeros(vocab_size, np.int64), 0
    for piece, starts in stream:
        here, place = slice(place, place + len(piece)), place + len(piece)
        tokens[here], begins[here] = piece, starts
        counts += np.bincount(piece[~starts], minlength=vocab_size)
    tokens, begins = tokens[:place], begins[:place]
    levels = [Level(np.arange(vocab_size), counts, np.zeros_like(counts), np.zeros_like(counts))]
    places = tokens  # of the n-gram that ends here, in its level; -1: its sequence has not enough tokens
    for n in range(2, order + 1):
        below = levels[-1]
        runs = [scratch.columns([_counted(*chunk)], 3) for chunk in _keys(tokens, begins, places, vocab_size, n)]
        keys, counts, openings = scratch.columns(_merged(runs), 3)
        scratch.drop(itertools.chain(*runs))
        levels.append(level := Level(keys, counts, openings, scratch.new(len(keys), np.int64)))
        for part in chunks(len(keys)):
            contexts, last = np.divmod(keys[part], vocab_size)
            level.suffixes[part] = suffixes = find(below.keys, below.suffixes[contexts] * vocab_size + last)
            np.add.at(below.continuations, suffixes, 1)
        if n < order:
            earlier, places = places, _places(tokens, begins, places, keys, vocab_size, scratch)
            scratch.drop([earlier] if n > 2 else [])  # which were the tokens
    return levels


def chunks(size: int) -> Iterator[slice]:
    """Slices of at most CHUNK that cover `size`."""
    return (slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of `wanted` (int64 [m]) is among rising `keys`; -1: nowhere. Sorted first: a level may not fit into
    memory, and a search that goes through it once reads it once."""
    order = np.argsort(wanted)
    found = np.searchsorted(keys, wanted[order])
    places = np.empty(len(wanted), np.int64)
    places[order] = found
    inside = places < len(keys)
    inside[inside] = keys[places[inside]] == wanted[inside]
    return np.where(inside, places, -1)


def _keys(tokens: np.ndarray, begins: np.ndarray, places: np.ndarray, vocab_size: int, n: int
          ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each chunk the keys (int64) of the n-grams that end in it, -1 where there is none, and which of them begin
    their sequence (bool). `places`: of the (n-1)-grams."""
    for part in chunks(len(tokens)):
        before = slice(max(part.start - 1, 0), part.stop - 1)
        missing = part.stop - part.start - (before.stop - before.start)  # the very first token has none before it
        context = np.concatenate([np.full(missing, -1), places[before]])
        keys = np.where(begins[part] | (context < 0), -1, context.astype(np.int64) * vocab_size + tokens[part])
        first = slice(max(part.start - n + 1, 0), max(part.stop - n + 1, 0))
        opens = np.concatenate([np.zeros(part.stop - part.start - (first.stop - first.start), bool), begins[first]])
        yield keys, opens


def _counted(keys: np.ndarray, opens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rising distinct keys, how often each stands there, and how often it begins a sequence."""
    there = keys >= 0
    distinct, place, counts = np.unique(keys[there], return_inverse=True, return_counts=True)
    return distinct, counts, np.bincount(place[opens[there]], minlength=len(distinct))


def _merged(runs: list[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """Runs of (rising keys, numbers, numbers) as one, in parts of about CHUNK: equal keys become one, their numbers
    are added up.

    Every run is sampled at the same distance, so between two of the bounds that are taken from all samples no more
    than CHUNK keys can lie.
    """
    step = max(1, CHUNK // (2 * max(1, len(runs))))
    samples = np.sort(np.concatenate([run[0][::step] for run in runs] or [np.zeros(0, np.int64)]))
    bounds = np.unique(samples[::max(1, len(runs))][1:])
    cuts = [np.concatenate([[0], np.searchsorted(run[0], bounds), [len(run[0])]]) for run in runs]
    for number in range(len(bounds) + 1):
        parts = [[column[cut[number]:cut[number + 1]] for column in run] for run, cut in zip(runs, cuts, strict=True)]
        keys, *numbers = (np.concatenate(columns) for columns in zip(*parts, strict=True)) if parts else [np.zeros(0, int)] * 3
        distinct, place = np.unique(keys, return_inverse=True)
        yield distinct, *(_added_up(values, place, len(distinct)) for values in numbers)


def _added_up(values: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    sums = np.zeros(size, np.int64)
    np.add.at(sums, places, values)
    return sums


def _places(tokens: np.ndarray, begins: np.ndarray, contexts: np.ndarray, keys: np.ndarray, vocab_size: int,
            scratch: Scratch) -> np.ndarray:
    """For every token of the stream the place of the n-gram that ends with it."""
    places = scratch.new(len(tokens), np.int64)
    for part, (wanted, _) in zip(chunks(len(tokens)), _keys(tokens, begins, contexts, vocab_size, 1), strict=True):
        places[part] = find(keys, wanted)
    return places
