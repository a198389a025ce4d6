"""Kneser-Ney against the formula, written out with dictionaries, and against numbers computed by hand."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from jaxlm.baselines import ngrams
from jaxlm.baselines.kneser_ney import KneserNey, discounts_of
from jaxlm.baselines.ngrams import Scratch

# Chen & Goodman 1999, section 2: the corpus of their examples.
SENTENCES = ["JOHN READ MOBY DICK", "MARY READ A DIFFERENT BOOK", "SHE READ A BOOK BY CHER"]


def model_of(sequences, vocab_size, order, folder):
    """Of sequences of tokens, in one piece each."""
    stream = [(np.array(tokens, np.int32), np.arange(len(tokens)) == 0) for tokens in sequences]
    return KneserNey(stream, sum(map(len, sequences)), vocab_size, order, Scratch(folder))


def histories(sequences, order):
    """Of every token that is predicted: those before it, the nearest first, and itself."""
    rows = [([tokens[i - j] if j <= i else -1 for j in range(1, order)], tokens[i])
            for tokens in sequences for i in range(1, len(tokens))]
    return np.array([row for row, _ in rows]).reshape(len(rows), order - 1), np.array([token for _, token in rows])


def drawn(seed, vocab_size=12, sequences=40, longest=30):
    """Sequences with few frequent tokens and many rare ones, some of them empty or of one token."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size + 1)
    return [random.choice(vocab_size, random.integers(0, longest), p=weights / weights.sum()).tolist() for _ in range(sequences)]


@pytest.mark.parametrize(("seed", "longest", "sequences"), [(0, 30, 40), (1, 4, 60), (2, 400, 2)])
@pytest.mark.parametrize("chunk", [2**22, 7])
def test_probabilities_are_those_of_the_formula(seed, longest, sequences, chunk, formula_of, tmp_path, monkeypatch):
    """All orders, of text that was counted and of text that was not: unknown contexts, documents shorter than the
    order, and counts merged from many chunks."""
    monkeypatch.setattr(ngrams, "CHUNK", chunk)
    train, other, order = drawn(seed, sequences=sequences, longest=longest), drawn(seed + 100, sequences=5), 4
    ours, formula = model_of(train, 12, order, tmp_path), formula_of(train, 12, order)
    for sequence in (train[:5], other):
        history, tokens = histories(sequence, order)
        found = ours.probabilities(history, tokens)
        for n in range(1, order + 1):
            want = [formula.probability(token, [each for each in row[::-1] if each >= 0], n)
                    for row, token in zip(history.tolist(), tokens.tolist(), strict=True)]
            np.testing.assert_allclose(found[n - 1], want, rtol=1e-12)


@pytest.mark.parametrize("history", [[3, 1, 0, 2], [3, 11, 11, 11], [0, -1, -1, -1], [-1, -1, -1, -1], [11, 10, 9, 8]])
def test_probabilities_sum_to_one(history, tmp_path):
    """After contexts that were seen, seen in part, never seen, cut short by a document's start, and without any."""
    model = model_of(drawn(3), 12, 5, tmp_path)
    everything = model.probabilities(np.tile(history, (12, 1)), np.arange(12))
    np.testing.assert_allclose(everything.sum(axis=1), 1, rtol=1e-13)
    assert (everything > 0).all()


def test_the_example_of_chen_and_goodman_by_hand(tmp_path):
    """Bigrams of their three sentences, with <BOS> and <EOS>: 17 distinct ones, of which READ A occurs twice and the
    others once. None occurs three times: one discount, D = n1 / (n1 + 2 n2) (Ney et al. 1994)."""
    words = sorted({word for line in SENTENCES for word in line.split()})
    ids = {word: number for number, word in enumerate(["<BOS>", "<EOS>", *words])}
    sequences = [[0, *(ids[word] for word in line.split()), 1] for line in SENTENCES]
    model = model_of(sequences, len(ids), 2, tmp_path)

    bigrams = Counter(pair for tokens in sequences for pair in itertools.pairwise(tokens))
    n1, n2 = 16, 1
    assert sorted(bigrams.values()) == [1] * n1 + [2] * n2
    discount = Fraction(n1, n1 + 2 * n2)  # 16 / 18
    # Unigrams count what they follow: READ three names; <EOS> DICK, BOOK and CHER; BOOK A and DIFFERENT; <BOS> nothing;
    # the nine others one word each. None follows four words, so one discount again: 9 / (9 + 2).
    before = {word: 1 for word in ids} | {"READ": 3, "<EOS>": 3, "BOOK": 2, "<BOS>": 0}
    below, kinds, total = Fraction(9, 11), 12, 17

    def unigram(word):
        return max(before[word] - below, 0) / total + below * kinds / total / len(ids)

    def bigram(count, context_count, followers, word):
        return max(count - discount, 0) / context_count + discount * followers / context_count * unigram(word)

    def ours(context, word):
        return model.probabilities(np.array([[ids[context]]]), np.array([ids[word]]))[1, 0]

    assert ours("READ", "A") == pytest.approx(float(bigram(2, 3, 2, "A")), rel=1e-14)  # READ A, READ A, READ MOBY
    assert ours("A", "BOOK") == pytest.approx(float(bigram(1, 2, 2, "BOOK")), rel=1e-14)
    assert ours("READ", "BOOK") == pytest.approx(float(bigram(0, 3, 2, "BOOK")), rel=1e-14)  # never seen
    assert ours("<BOS>", "JOHN") == pytest.approx(float(bigram(1, 3, 3, "JOHN")), rel=1e-14)
    assert ours("<EOS>", "JOHN") == pytest.approx(float(unigram("JOHN")), rel=1e-14)  # nothing follows <EOS>


def test_modified_discounts_by_hand():
    """20 n-grams that occur once, 8 twice, 4 three times, 2 four times: Y = 20 / 36."""
    counts = np.repeat([0, 1, 2, 3, 4, 9], [5, 20, 8, 4, 2, 3])
    y = 20 / 36
    values, kind = discounts_of(counts)
    assert kind == "modified"
    np.testing.assert_allclose(values, [0, 1 - 2 * y * 8 / 20, 2 - 3 * y * 4 / 8, 3 - 4 * y * 2 / 4], rtol=1e-15)
    assert discounts_of(np.repeat([1, 2], [6, 2])).kind == "single"
    assert discounts_of(np.array([7, 9])).kind == "constant"


@pytest.mark.parametrize("sequences", [[], [[]], [[4]], [[4], [5]]])
def test_without_anything_to_predict_all_tokens_are_alike(sequences, tmp_path):
    model = model_of(sequences, 6, 3, tmp_path)
    np.testing.assert_array_equal(model.probabilities(np.array([[1, 2], [-1, -1]]), np.array([3, 0])), np.full((3, 2), 1 / 6))


def test_higher_orders_win_on_text_with_structure(tmp_path):
    """0 1 2 3 0 1 2 3 with a fork after 2: order 3 knows which way it goes, order 1 only how often each token is."""
    text = [0, 1, 2, 3, 0, 1, 2, 4] * 50
    model = model_of([text], 5, 4, tmp_path)
    losses = -np.log(model.probabilities(*histories([text], 4))).mean(axis=1)
    assert losses[0] > 1.5 > losses[1] and abs(losses[1] - math.log(2) / 4) < 0.1
