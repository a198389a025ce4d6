"""Interpolated Kneser-Ney n-gram models, the yardstick before neural ones.

    p_k(w | h) = max(c(h w) - D(c(h w)), 0) / c(h)  +  backoff(h) p_{k-1}(w | h without its first token)

Kneser & Ney 1995; interpolated, with three discounts for each order ("modified"): Chen & Goodman 1999, section 3.
c counts how often an n-gram occurs in the highest order; below it, which tokens stand before it (its
continuations). An n-gram that begins a sequence has nothing before it, and counts as often as it does so (Heafield
et al. 2013, section 3.1). Below order 1 all tokens of the vocabulary are alike.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxlm.baselines.ngrams import Level, Scratch, chunks, count_ngrams, find


class Discounts(NamedTuple):
    """What is taken from a count of 0, 1, 2, and 3 or more."""

    values: np.ndarray  # float64 [4]
    kind: str  # modified, or what stands in where there are too few n-grams to estimate from


class Shares(NamedTuple):
    """The two parts of a probability, for one order and one way of counting."""

    own: np.ndarray  # float64 [n], of each n-gram: its discounted share of its context
    backoff: np.ndarray  # float64 [contexts]: the share of the lower order; 1 after a context that was never seen


class KneserNey:
    """Models of all orders up to one, over tokens 0 .. vocab_size - 1."""

    def __init__(self, stream: Iterable[tuple[np.ndarray, np.ndarray]], length: int, vocab_size: int, order: int,
                 scratch: Scratch):
        """Arguments as in `jaxlm.baselines.ngrams.count_ngrams`."""
        levels = count_ngrams(stream, length, vocab_size, order, scratch)
        self.vocab_size, self.order, self.keys = vocab_size, order, [level.keys for level in levels]
        self.num_ngrams = [int(np.count_nonzero(levels[0].counts)), *(len(level.keys) for level in levels[1:])]
        contexts = [1, *(len(level.keys) for level in levels[:-1])]
        self.discounts = [[discounts_of(counts) for counts in (level.counts, level.continuations)] for level in levels]
        self.highest, self.lower = (
            [weights_of(level, level[1 + way], discounts[way].values, size, vocab_size, scratch)
             for level, discounts, size in zip(levels, self.discounts, contexts, strict=True)] for way in (0, 1))
        for level in levels:
            scratch.drop(level[1:])

    def probabilities(self, history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """float64 [order, m]: of `tokens` (int [m]) in the model of each order.

        history: int [m, order - 1], the tokens before, the nearest first; -1 from where there are none.
        """
        lower, found = np.full(len(tokens), 1 / self.vocab_size), []
        for k, (keys, highest, weights) in enumerate(zip(self.keys, self.highest, self.lower, strict=True), 1):
            context = self._context(history[:, :k - 1])
            seen = context >= 0
            entry = find(keys, np.where(seen, context * self.vocab_size + tokens, -1))
            found.append(_interpolated(highest, context, entry, lower))
            lower = _interpolated(weights, context, entry, lower)
        return np.stack(found)

    def note(self) -> str:
        """Which orders have too few n-grams for their own three discounts, in a line; empty: none."""
        poor = [str(n) for n, found in enumerate(self.discounts, 1)
                if any(one.kind != "modified" for one in found[:1 if n == self.order else 2])]
        what = f"too few n-grams of order {', '.join(poor)} to estimate three discounts from; simpler ones stand in"
        return what if poor else ""

    def _context(self, history: np.ndarray) -> np.ndarray:
        """int64 [m]: places of contexts in their level; -1: never seen, or not as long."""
        place = np.zeros(len(history), np.int64)
        for number, tokens in enumerate(history.T[::-1]):
            place = find(self.keys[number], np.where((place >= 0) & (tokens >= 0), place * self.vocab_size + tokens, -1))
        return place


def _interpolated(weights: Shares, context: np.ndarray, entry: np.ndarray, lower: np.ndarray) -> np.ndarray:
    own, backoff = np.zeros(len(lower)), np.ones(len(lower))
    own[entry >= 0] = weights.own[entry[entry >= 0]]
    backoff[context >= 0] = weights.backoff[context[context >= 0]]
    return own + backoff * lower


def discounts_of(counts: np.ndarray) -> Discounts:
    """From how many n-grams occur once, twice, three and four times (Chen & Goodman 1999, equation 26).

    Where one of these is 0, or a discount would not lie between 0 and its count: one discount for all (Ney et al.
    1994); where that cannot be had, either, half of a count, at most 1.5 (KenLM's).
    """
    n1, n2, n3, n4 = sum((np.bincount(counts[part].clip(0, 5), minlength=6)[1:5] for part in chunks(len(counts))),
                         np.zeros(4, np.int64)).tolist()
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        values = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (values[1:] > 0).all() and (values[1:] < [1, 2, 3]).all():
            return Discounts(values, "modified")
    if n1 and n2:
        return Discounts(np.array([0, 1, 1, 1]) * n1 / (n1 + 2 * n2), "single")
    return Discounts(np.array([0, 0.5, 1, 1.5]), "constant")


def weights_of(level: Level, counts: np.ndarray, discounts: np.ndarray, contexts: int, vocab_size: int, scratch: Scratch
               ) -> Shares:
    """Shares of a level's n-grams by some way of counting them; the level below has `contexts` of them."""
    totals, taken = scratch.new(contexts, float), scratch.new(contexts, float)
    for part in chunks(len(counts)):
        context = level.keys[part] // vocab_size
        here = slice(int(context[0]), int(context[-1]) + 1)
        totals[here] += np.bincount(context - context[0], counts[part])
        taken[here] += np.bincount(context - context[0], discounts[counts[part].clip(max=3)])
    own, backoff = scratch.new(len(counts), float), scratch.new(contexts, float)
    for part in chunks(len(counts)):
        left = counts[part] - discounts[counts[part].clip(max=3)]
        own[part] = left / np.maximum(totals[level.keys[part] // vocab_size], 1)
    for part in chunks(contexts):
        backoff[part] = np.where(totals[part] > 0, taken[part] / np.maximum(totals[part], 1), 1)
    scratch.drop([totals, taken])
    return Shares(own, backoff)
