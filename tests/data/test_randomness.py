import numpy as np
import pytest

from jaxlm.data.randomness import below, make_keys, random_words, shuffled


def splitmix64(state: int, count: int) -> list[int]:
    """The generator of Steele, Lea and Flood 2014 in Python's whole numbers."""
    words = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        words.append(word ^ word >> 31)
    return words


def test_words_are_splitmix64():
    keys = np.array([0, 1, 2**64 - 1], np.uint64)
    assert random_words(keys, 5).tolist() == [splitmix64(int(key), 5) for key in keys]
    assert random_words(keys[:1], 1)[0, 0] == 0xE220A8397B1DCDAF  # the published first output of seed 0


def test_keys_differ_by_each_part_and_broadcast():
    keys = np.concatenate([make_keys(seed, purpose, np.arange(1000)) for seed in (0, 1, 2**40, -1) for purpose in (0, 1)])
    assert len(np.unique(keys)) == len(keys) == 8000
    np.testing.assert_array_equal(make_keys(3, 1, np.array([7])), make_keys(3, 1, 7))


@pytest.mark.parametrize("limit", [1, 2, 7, 10**6, 2**45])
def test_below_is_uniform(limit):
    drawn = below(random_words(make_keys(5, np.arange(1000)), 20), limit)
    assert drawn.min() >= 0 and drawn.max() < limit
    assert abs(drawn.mean() / max(1, limit - 1) - 0.5 * (limit > 1)) < 0.01
    assert below(np.array([2**64 - 1], np.uint64), limit)[0] == limit - 1


def test_shuffled_is_a_permutation_of_any_size():
    for count in [*range(1, 130), 1000, 4096, 4097, 10**5]:
        for seed in range(3):
            places = shuffled(np.arange(count), count, make_keys(seed, np.zeros(count, int)))
            assert np.array_equal(np.sort(places), np.arange(count)), count


def test_shuffled_takes_each_index_anywhere():
    count, trials = 5, 20000
    places = np.stack([shuffled(np.full(trials, index), count, make_keys(np.arange(trials))) for index in range(count)])
    share = np.stack([np.bincount(row, minlength=count) for row in places]) / trials
    assert np.abs(share - 1 / count).max() < 5 * np.sqrt(0.16 / trials)
    seen = np.unique(places.T, axis=0, return_counts=True)[1] / trials * 120
    assert len(seen) == 120 and seen.min() > 0.6 and seen.max() < 1.5  # every permutation, and about equally often


def test_shuffled_separates_neighbours():
    count = 2**33 + 5
    places = shuffled(np.arange(50000), count, make_keys(np.full(50000, 7)))
    assert len(np.unique(places)) == 50000
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.02
    assert abs(places.mean() / count - 0.5) < 0.01


def test_streams_never_change():
    """A resumed run must see the examples that it would have seen, whatever is upgraded in between."""
    assert shuffled(np.arange(8), 8, make_keys(1, np.zeros(8, int))).tolist() == [3, 4, 0, 2, 7, 1, 5, 6]
    assert below(random_words(make_keys(3, 4), 6), 1000).tolist() == [[377, 698, 441, 126, 734, 165]]
