"""Kneser-Ney as its papers write it down."""

from collections import Counter

import pytest


class Formula:
    """The definition, one n-gram at a time."""

    def __init__(self, sequences, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        self.counts, self.continuations = {}, {}
        for n in range(1, order + 2):
            grams = [tuple(tokens[i - n + 1:i + 1]) for tokens in sequences for i in range(max(1, n - 1), len(tokens))]
            self.counts[n] = Counter(grams)
        for n in range(1, order + 1):
            self.continuations[n] = Counter(gram[1:] for gram in self.counts[n + 1])
            if n > 1:
                self.continuations[n].update(tuple(tokens[:n]) for tokens in sequences if len(tokens) >= n)

    def probability(self, token, history, order):
        """`history`: the oldest first."""
        return self._interpolated(token, history, order, self.counts[order]) if len(history) >= order - 1 else \
            self._lower(token, history, len(history) + 1)

    def _lower(self, token, history, n):
        return 1 / self.vocab_size if n == 0 else self._interpolated(token, history, n, self.continuations[n])

    def _interpolated(self, token, history, n, counts):
        context = tuple(history[len(history) - n + 1:])
        lower = self._lower(token, history, n - 1)
        following = [count for gram, count in counts.items() if gram[:-1] == context]
        if not following:
            return lower
        taken = self.discounts(counts)
        count = counts[(*context, token)]
        own = (count - taken[min(count, 3)]) / sum(following)
        return own + sum(taken[min(each, 3)] for each in following) / sum(following) * lower

    @staticmethod
    def discounts(counts):
        n1, n2, n3, n4 = (sum(count == j for count in counts.values()) for j in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2) if n1 else 0
        if n1 and n2 and n3 and n4:
            modified = [0, *(j - (j + 1) * y * more / less for j, less, more in ((1, n1, n2), (2, n2, n3), (3, n3, n4)))]
            if all(0 < modified[j] < j for j in (1, 2, 3)):
                return modified
        return [0, y, y, y] if n1 and n2 else [0, 0.5, 1, 1.5]


@pytest.fixture(scope="session")
def formula_of() -> type[Formula]:
    return Formula
