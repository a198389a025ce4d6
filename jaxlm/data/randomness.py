"""Random numbers that are pure functions of their key, for whole arrays of keys at once.

NumPy's generators are seeded one at a time, which costs more than making a row of a batch, and may change their
streams between NumPy versions. These are SplitMix64 streams (Steele, Lea, Flood 2014): row 7 of step 1,000,000 needs
no other row and no earlier step, and comes out the same on every machine and version.

The shuffle is a Feistel network (Luby, Rackoff 1988) with cycle walking (Black, Rogaway 2002). It is not Grain's
`index_shuffle`, which never returns for some seeds when there are fewer than about a hundred elements (seen in Grain
0.2.18).
"""

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
FEISTEL_ROUNDS = 12
ORDER, OFFSET, SAMPLE, MASK, VALIDATION, STAGE = range(6)  # what a key is for


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection that scatters every bit: the output function of SplitMix64. Overwrites `values`."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def make_keys(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 [n]: one key for each combination of the parts (whole numbers, broadcast; of a Python int the low 64
    bits)."""
    result = np.zeros(1, np.uint64)
    for part in parts:
        part = part % 2**64 if isinstance(part, int) else part
        result = mix((result ^ np.asarray(part).astype(np.uint64)) + GAMMA)
    return result


def random_words(keys: np.ndarray, count: int) -> np.ndarray:
    """uint64 [n, count]: the first `count` words of the stream of each key (uint64 [n])."""
    return mix(keys[:, None] + GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def below(words: np.ndarray, limit: int | np.ndarray) -> np.ndarray:
    """int64: uniform in [0, limit) from random words; limit < 2**53, broadcast."""
    return ((words >> np.uint64(11)) * 2.0**-53 * limit).astype(np.int64)


def shuffled(indices: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """int64 [n]: where the permutation of range(count) that belongs to the key (uint64 [n]) takes each index (int64
    [n])."""
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = random_words(keys, FEISTEL_ROUNDS)
    result = indices.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):  # the network permutes up to 4 * count numbers; walk on until back inside
        left, right = result[outside] >> half, result[outside] & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(right + round_keys[outside, number]) & mask)
        result[outside] = left << half | right
        outside = outside[result[outside] >= count]
    return result.astype(np.int64)
