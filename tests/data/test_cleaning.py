"""Cleaning: every filter against a direct computation of what it promises."""

import random

import numpy as np
import pytest

from jaxlm.data.cleaning import (
    REASONS,
    NearDuplicates,
    bands_and_rows,
    check_scripts,
    clean,
    first_occurrences,
    repetition,
    script_fraction,
    signature,
    text_digest,
    word_runs,
)
from jaxlm.errors import UserError
from jaxlm.settings import CleaningSettings

WORDS = [f"word{number}" for number in range(300)]


def random_text(generator, length):
    return " ".join(generator.choices(WORDS, k=length))


def runs_of(text):
    """The definition: the set of runs of five words."""
    words = text.lower().split()
    return {tuple(words[start:start + 5]) for start in range(len(words) - 4)}


def jaccard(one, other):
    return len(runs_of(one) & runs_of(other)) / len(runs_of(one) | runs_of(other))


@pytest.mark.parametrize("text, changed, reason", [
    (None, {}, "too_long"),
    (" \n\t ", {}, "empty"),
    ("short", {"min_characters": 6}, "too_short"),
    ("longer", {"min_characters": 6}, None),
    ("é" * 5, {"max_bytes": 9}, "too_long"),
    ("é" * 5, {"max_bytes": 10}, None),
    ("same line\n" * 9 + "other", {"max_repetition": 0.5}, "repetitive"),
    ("same line\n" * 9 + "other", {}, None),
    ("ein deutscher Satz, größer", {"scripts": ["latin"]}, None),
    ("русский текст", {"scripts": ["latin", "greek"]}, "other_script"),
    ("русский или latin", {"scripts": ["latin"], "min_script_fraction": 0.3}, None),
    ("12:30", {"scripts": ["latin"]}, None),
])
def test_each_reason(text, changed, reason):
    kept, found = clean(text, CleaningSettings(**changed))
    assert found == reason and (reason is None or reason in REASONS)
    assert kept == (text or "")


def test_repair_undoes_wrong_decoding_and_nothing_else():
    settings = CleaningSettings(repair_unicode=True)
    assert clean("schÃ¶n e\u0301", settings) == ("schön é", None)
    untouched = "“quotes” &amp; ﬁ ＡＢ\r\n\tx\x1b[0m"
    assert clean(untouched, settings) == (untouched, None)


def test_repetition_counts_repeats_of_lines_and_runs():
    generator = random.Random(1)
    assert repetition(random_text(generator, 400)) < 0.02
    lines = [random_text(generator, 8) for _ in range(10)]
    text = "\n".join(lines + lines[:5] + [""])
    assert repetition(text) == pytest.approx(5 / 15)
    words = random_text(generator, 60)
    text = words + " " + words
    runs = [tuple(text.split()[start:start + 5]) for start in range(116)]
    assert repetition(text) == pytest.approx(1 - len(set(runs)) / len(runs))
    assert repetition("") == repetition("one") == 0


def test_runs_are_those_of_the_definition():
    generator = random.Random(2)
    for length in (1, 4, 5, 6, 50, 500):
        text = random_text(generator, length)
        assert len(np.unique(word_runs(text))) == max(1, len(runs_of(text)))
    assert word_runs("A b, c d e!").tolist() == word_runs("a B c d (e)").tolist() != word_runs("e d c b a").tolist()
    assert len(word_runs("人人生而自由")) == 2


def test_script_fraction():
    assert script_fraction("abc где 123", ["latin"]) == 0.5
    assert script_fraction("日本ですＡ", ["cjk", "hiragana"]) == pytest.approx(4 / 5)
    check_scripts(["latin", "cjk", "hangul", "arabic", "devanagari"])
    with pytest.raises(UserError, match=r"^data\.cleaning\.scripts: unknown script 'cyrilic'.*did you mean 'cyrillic'\?$"):
        check_scripts(["cyrilic"])


def test_first_occurrences():
    seen, expected, items = set(), [], random.Random(3).choices("abcdefgh", k=50)
    for item in items:
        expected.append(item not in seen)
        seen.add(item)
    assert first_occurrences(np.array([text_digest(item) for item in items], "S16")).tolist() == expected


def test_signatures_estimate_the_jaccard_similarity():
    generator = random.Random(4)
    text = random_text(generator, 500)
    for changes in (0, 3, 15, 40):
        words = text.split()
        for place in generator.sample(range(500), changes):
            words[place] = f"other{place}"
        other = " ".join(words)
        assert np.mean(signature(text) == signature(other)) == pytest.approx(jaccard(text, other), abs=4 * 0.045)


def test_near_duplicates_of_a_kept_document_are_dropped():
    generator = random.Random(5)
    known, kept = NearDuplicates(0.7), []
    for number in range(60):
        text = random_text(generator, 300)
        if number % 3 == 2:
            words = generator.choice(kept).split()
            words[generator.randrange(300)] = "changed"
            text = " ".join(words)
        is_new = max((jaccard(text, earlier) for earlier in kept), default=0) < 0.7
        assert is_new == (number % 3 != 2) == known.add(signature(text))
        if is_new:
            kept.append(text)
    assert NearDuplicates(1.0).add(signature("a"))


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_few_candidates_are_missed(threshold):
    bands, rows = bands_and_rows(threshold)
    assert bands >= 2 and bands * rows <= 128 and (1 - threshold**rows)**bands <= 0.01
