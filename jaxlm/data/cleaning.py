"""Optional filters between reading and tokenizing: repair, length, repetition, script, exact and near duplicates.

Each drop has a reason, and the reasons are counted. Filters on one document run in the reading processes; duplicates
are found afterwards over the whole corpus, where the first document in order is the one that is kept.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from functools import cache, lru_cache

import numpy as np

from jaxlm.errors import UserError, nearest
from jaxlm.settings import CleaningSettings

REASONS = ("empty", "too_short", "too_long", "repetitive", "other_script", "exact_duplicate", "near_duplicate")
RUN_WORDS = 5
PERMUTATIONS = 128  # the similarity estimate has a standard error below 1 / (2 sqrt(128)) = 4.5 %
SCHEME = "affine32"  # datasketch's family of hash functions: 32-bit values
MOST_MISSED = 0.01
BATCH_RUNS = 2**14  # runs hashed at a time: 128 eight-byte values each
# Chinese and Japanese do without blanks: each of their characters counts as a word. Longer stretches than 64 are no
# words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]{1,64}")


def clean(text: str | None, settings: CleaningSettings) -> tuple[str, str | None]:
    """The mended text and the reason to drop it, None to keep it. A text of None was too long to be read."""
    if text is None:
        return "", "too_long"
    if settings.repair_unicode:
        text = mend(text)
    if not text.strip():
        return text, "empty"
    if len(text) < settings.min_characters:
        return text, "too_short"
    if len(text.encode()) > settings.max_bytes:
        return text, "too_long"
    if settings.max_repetition < 1 and repetition(text) > settings.max_repetition:
        return text, "repetitive"
    if settings.scripts and script_fraction(text, settings.scripts) < settings.min_script_fraction:
        return text, "other_script"
    return text, None


def mend(text: str) -> str:
    """Undoes wrong decoding ("schÃ¶n") and normalizes to NFC, with ftfy (Speer 2019). Quotes, widths and line ends
    stay."""
    import ftfy

    return ftfy.fix_text(text, ftfy.TextFixerConfig(
        unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
        uncurl_quotes=False, fix_line_breaks=False, remove_control_chars=False, normalization="NFC", explain=False))


# ----------------------------------------------------------------------------------------------------------- repetition

def repetition(text: str) -> float:
    """The larger share of repeats: among the lines that are not blank, and among the runs of 5 words.

    A repeat is one that equals an earlier one. The measures are those of Rae et al. 2021 (Gopher), table A1:
    duplicate lines and duplicate 5-grams, counted here instead of weighted by their characters.
    """
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    runs = word_runs(text)
    return max(repeated_share(len(set(lines)), len(lines)), repeated_share(len(np.unique(runs)), len(runs)))


def repeated_share(distinct: int, total: int) -> float:
    return 1 - distinct / total if total else 0.0


def word_runs(text: str) -> np.ndarray:
    """uint64 hashes of every run of 5 words, lowercase and without punctuation; of the whole text where it is
    shorter."""
    words = np.fromiter((word_hash(match[0]) for match in WORD.finditer(text.lower())), np.uint64)
    if len(words) < RUN_WORDS:
        return np.array([word_hash(text.strip().lower())], np.uint64)
    runs = np.zeros(len(words) - RUN_WORDS + 1, np.uint64)
    for place in range(RUN_WORDS):  # a polynomial in the words' hashes, modulo 2**64
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + words[place:place + len(runs)]
    return runs


@lru_cache(maxsize=2**16)
def word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


# -------------------------------------------------------------------------------------------------------------- scripts

def script_fraction(text: str, scripts: list[str]) -> float:
    """The share of letters in these scripts; 1 for a text without letters."""
    letters = Counter({script: 0 for script in scripts})
    for character, count in Counter(text).items():
        if character.isalpha():
            letters[script_of(character)] += count
    total = letters.total()
    return sum(letters[script] for script in scripts) / total if total else 1.0


@lru_cache(maxsize=2**16)
def script_of(character: str) -> str:
    """The first word of the letter's Unicode name, where Unicode puts the script: latin, cyrillic, cjk, hangul,
    arabic, ..."""
    name = unicodedata.name(character, "unknown").lower().replace("fullwidth ", "").replace("halfwidth ", "")
    return re.split(r"[ -]", name)[0]


@cache
def known_scripts() -> frozenset[str]:
    letters = (chr(code) for code in range(0x110000) if chr(code).isalpha())
    return frozenset(script_of(letter) for letter in letters)


def check_scripts(scripts: list[str]) -> None:
    """UserError for a name that is no script."""
    for script in scripts:
        if script not in known_scripts():
            raise UserError(f"data.cleaning.scripts: unknown script '{script}', expected first words of Unicode names, "
                            f"in lowercase: latin, cyrillic, cjk, ...{nearest(script.lower(), known_scripts())}")


# ----------------------------------------------------------------------------------------------------------- duplicates

def text_digest(text: str) -> bytes:
    """16 bytes that stand for the text: sha256, cut."""
    return hashlib.sha256(text.encode()).digest()[:16]


def texts_digest(texts: list[str]) -> bytes:
    """16 bytes that stand for a record's texts; for a single one those of `text_digest`."""
    if len(texts) == 1:
        return text_digest(texts[0])
    return hashlib.sha256(b"".join(map(text_digest, texts))).digest()[:16]


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """bool [n]: whether the digest (`S16`) is the first of its kind."""
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return first


def signature(text: str) -> np.ndarray:
    """uint32 [128]: MinHash (Broder 1997) of the text's set of 5-word runs (as Lee et al. 2022 compare documents)."""
    from datasketch import MinHash

    minhash = MinHash(PERMUTATIONS, hashfunc=int, scheme=SCHEME)
    runs = (np.unique(word_runs(text)) >> np.uint64(32)).tolist()
    for start in range(0, len(runs), BATCH_RUNS):
        minhash.update_batch(runs[start:start + BATCH_RUNS])
    return minhash.hashvalues


class NearDuplicates:
    """Documents kept so far; finds those whose estimated Jaccard similarity to one of them reaches the threshold.

    Candidates come from locality-sensitive hashing, in memory: a few KB for each document that is kept.
    """

    def __init__(self, threshold: float):
        from datasketch import MinHashLSH

        self.threshold = threshold
        self.index = MinHashLSH(num_perm=PERMUTATIONS, params=bands_and_rows(threshold))
        self.kept: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> bool:
        """Whether a document with this signature is new; if so it is remembered."""
        from datasketch import MinHash

        minhash = MinHash(PERMUTATIONS, hashvalues=values, scheme=SCHEME)
        for number in self.index.query(minhash):
            if np.mean(self.kept[number] == values) >= self.threshold:
                return False
        self.index.insert(len(self.kept), minhash)
        self.kept.append(values)
        return True


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """The longest bands that still make candidates of all but 1 % of the pairs that are as similar as the threshold.

    A pair of similarity s shares one of b bands of r rows with probability 1 - (1 - s**r)**b (Leskovec et al. 2014,
    3.4.2).
    """
    rows = max((rows for rows in range(1, PERMUTATIONS // 2 + 1)
                if (1 - threshold**rows)**(PERMUTATIONS // rows) <= MOST_MISSED), default=1)
    return PERMUTATIONS // rows, rows
