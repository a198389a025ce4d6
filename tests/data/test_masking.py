from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.data.masking import Masker, num_predictions
from jaxlm.data.randomness import make_keys
from jaxlm.data.tokenizers import SpecialTokens
from jaxlm.settings import MaskingSettings

VOCABULARY = 500
SPECIAL = SpecialTokens(pad=0, unk=100, cls=101, sep=102, mask=103)
TOKENIZER = SimpleNamespace(special=SPECIAL, vocab_size=VOCABULARY, starts_word=np.arange(VOCABULARY) % 3 != 0)


def make_rows(num_rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] text [SEP] text [SEP] padding, with lengths from 8 up."""
    generator = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(VOCABULARY), sorted(SPECIAL.ids))
    tokens = generator.choice(ordinary, (num_rows, length)).astype(np.int32)
    lengths = generator.integers(8, length + 1, num_rows)
    tokens[:, 0], tokens[:, 5] = SPECIAL.cls, SPECIAL.sep
    tokens[np.arange(num_rows), lengths - 1] = SPECIAL.sep
    real = np.arange(length) < lengths[:, None]
    return np.where(real, tokens, SPECIAL.pad), real


def unmasked(result: dict[str, np.ndarray]) -> np.ndarray:
    """The tokens as they were, from what was masked and the targets."""
    tokens = result["tokens"].copy()
    for row, (positions, targets, used) in enumerate(
            zip(result["masked_positions"], result["masked_targets"], result["masked_mask"], strict=True)):
        tokens[row, positions[used]] = targets[used]
    return tokens


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_what_it_says(whole_word):
    tokens, real = make_rows(300, 64)
    masker = Masker(TOKENIZER, MaskingSettings(whole_word=whole_word), 64)
    before = tokens.copy()
    result = masker(tokens, real, make_keys(1, np.arange(300)))
    np.testing.assert_array_equal(tokens, before)
    np.testing.assert_array_equal(unmasked(result), tokens)
    assert result["masked_positions"].shape == (300, 10)  # 64 * 0.15 = 9.6
    assert not np.isin(result["masked_targets"][result["masked_mask"]], sorted(SPECIAL.ids)).any()
    used = result["masked_mask"]
    assert not result["masked_positions"][~used].any() and not result["masked_targets"][~used].any()
    for row in range(300):
        positions = result["masked_positions"][row, used[row]]
        assert (np.diff(positions) > 0).all() and real[row, positions].all()
        maskable = int((real[row] & ~np.isin(tokens[row], sorted(SPECIAL.ids))).sum())
        wanted = min(10, max(1, round(0.15 * maskable)))
        assert len(positions) <= wanted if whole_word else len(positions) == wanted
        assert len(positions) >= 1


def test_80_10_10_and_uniform():
    tokens, real = make_rows(4000, 40)
    result = Masker(TOKENIZER, MaskingSettings(probability=0.3), 40)(tokens, real, make_keys(2, np.arange(4000)))
    used = result["masked_mask"]
    rows = np.nonzero(used)[0]
    now = result["tokens"][rows, result["masked_positions"][used]]
    then = result["masked_targets"][used]
    count = len(now)
    margin = 4 * np.sqrt(0.16 / count)
    assert abs((now == SPECIAL.mask).mean() - 0.8) < margin
    assert abs((now == then).mean() - 0.1) < margin + 1 / VOCABULARY
    replaced = now[(now != SPECIAL.mask) & (now != then)]
    assert abs(len(replaced) / count - 0.1) < margin + 1 / VOCABULARY
    assert not np.isin(replaced, sorted(SPECIAL.ids)).any()
    assert len(np.unique(replaced)) > 0.95 * (VOCABULARY - len(SPECIAL.ids))  # from the whole vocabulary

    share = np.zeros(40)
    np.add.at(share, result["masked_positions"][used], 1)
    share = (share / real.sum(axis=0))[6:20]  # columns that are text in nearly each row
    assert share.std() / share.mean() < 0.1  # no place is preferred


def words_of(tokens: np.ndarray, real: np.ndarray) -> list[list[int]]:
    """Positions of each word of one row."""
    words, previous_ordinary = [], False
    for position, (token, is_real) in enumerate(zip(tokens.tolist(), real.tolist(), strict=True)):
        ordinary = is_real and token not in SPECIAL.ids
        if ordinary:
            if TOKENIZER.starts_word[token] or not previous_ordinary:
                words.append([])
            words[-1].append(position)
        previous_ordinary = ordinary
    return words


def test_whole_words_are_whole():
    tokens, real = make_rows(500, 64, seed=3)
    result = Masker(TOKENIZER, MaskingSettings(whole_word=True), 64)(tokens, real, make_keys(3, np.arange(500)))
    missing = 0
    for row in range(500):
        chosen = set(result["masked_positions"][row, result["masked_mask"][row]].tolist())
        words = words_of(tokens[row], real[row])
        wanted = min(10, max(1, round(0.15 * sum(map(len, words)))))
        if wanted >= min(map(len, words)):
            assert all(chosen.issuperset(word) or chosen.isdisjoint(word) for word in words)
        left = [len(word) for word in words if chosen.isdisjoint(word)]
        assert all(length > wanted - len(chosen) for length in left)  # nothing that still fits was left out
        missing += wanted - len(chosen)
    assert missing < 10


def test_one_long_word_is_masked_in_part():
    tokens = np.array([[SPECIAL.cls] + [3] * 20 + [SPECIAL.sep]], np.int32)  # 3 begins no word
    result = Masker(TOKENIZER, MaskingSettings(whole_word=True), 22)(tokens, tokens >= 0, make_keys(1, 1))
    assert result["masked_positions"][0, result["masked_mask"][0]].tolist() == [1, 2, 3]


@pytest.mark.parametrize("whole_word", [False, True])
def test_each_row_depends_on_its_own_key_only(whole_word):
    tokens, real = make_rows(32, 48)
    keys = make_keys(7, np.arange(32))
    masker = Masker(TOKENIZER, MaskingSettings(whole_word=whole_word), 48)
    whole = masker(tokens, real, keys)
    some = np.array([30, 2, 17])
    part = masker(tokens[some], real[some], keys[some])
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name][some])
    other = masker(tokens, real, make_keys(8, np.arange(32)))
    assert (other["masked_positions"] != whole["masked_positions"]).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("whole_word", [False, True])
def test_rows_without_text_have_no_predictions(whole_word):
    tokens = np.full((3, 12), SPECIAL.pad, np.int32)
    tokens[1, :2] = SPECIAL.cls, SPECIAL.sep
    result = Masker(TOKENIZER, MaskingSettings(whole_word=whole_word), 12)(tokens, tokens != 0, make_keys(np.arange(3)))
    assert not result["masked_mask"].any()
    np.testing.assert_array_equal(result["tokens"], tokens)


def test_number_of_slots():
    assert num_predictions(MaskingSettings(), 128) == 20
    assert num_predictions(MaskingSettings(probability=0.07), 100) == 7
    assert num_predictions(MaskingSettings(max_predictions=5), 128) == 5
    assert num_predictions(MaskingSettings(max_predictions=500), 128) == 128
    tokens, real = make_rows(50, 128)
    few = Masker(TOKENIZER, MaskingSettings(max_predictions=5), 128)(tokens, real, make_keys(np.arange(50)))
    assert few["masked_mask"].shape == (50, 5) and few["masked_mask"].sum(axis=1).max() == 5
