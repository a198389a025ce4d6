"""Masked-language modelling: which tokens are to be predicted and what stands in their place.

Devlin et al. 2019, "BERT", section 3.1: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay as
they are.
"""

import math

import numpy as np

from jaxlm.data.randomness import MASK, below, make_keys, random_words
from jaxlm.data.rows import Rows, Sequences, Spans, row_spec
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.settings import MaskingSettings

ARRAYS = ("masked_positions", "masked_targets", "masked_mask")


def num_predictions(settings: MaskingSettings, sequence_length: int) -> int:
    """Slots P for predictions in one sequence: max_predictions, or probability * sequence_length rounded up."""
    wanted = settings.max_predictions or math.ceil(round(settings.probability * sequence_length, 6))
    return min(wanted, sequence_length)


class Masker:
    """Masks batches of token ids made with a tokenizer that has a mask token."""

    def __init__(self, tokenizer: Tokenizer, settings: MaskingSettings, sequence_length: int):
        special = np.isin(np.arange(tokenizer.vocab_size), sorted(tokenizer.special.ids))
        self.mask_token = tokenizer.special.mask
        self.special = special
        self.ordinary = np.flatnonzero(~special).astype(np.int32)
        self.starts_word = np.asarray(tokenizer.starts_word, bool) | special if settings.whole_word else None
        self.probability = settings.probability
        self.num_predictions = num_predictions(settings, sequence_length)

    def __call__(self, tokens: np.ndarray, real: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
        """Mask tokens (int32 [B, T]) where `real` (bool [B, T]; False: padding), each row by its own key (uint64 [B]).

        Returns tokens [B, T], masked_positions [B, P] (rising), masked_targets [B, P] and masked_mask bool [B, P];
        unused slots come last and are 0. In a row with m tokens that are real and not special, round(probability *
        m) are chosen, at least 1 (if m > 0) and at most P; fewer where whole words do not add up to that.
        """
        maskable = real & ~self.special[tokens]
        wanted = np.rint(self.probability * maskable.sum(axis=1)).astype(np.int64)
        wanted = np.clip(wanted, 1, self.num_predictions)
        if self.starts_word is None:
            chosen = choose_tokens(maskable, wanted, keys)
        else:
            chosen = choose_words(maskable, self.starts_word[tokens], wanted, keys)
        rows, positions = np.nonzero(chosen)
        counts = chosen.sum(axis=1)
        used = np.arange(self.num_predictions) < counts[:, None]
        masked_positions = np.zeros(used.shape, np.int32)
        masked_targets = np.zeros(used.shape, np.int32)
        masked_positions[used] = positions
        masked_targets[used] = tokens[rows, positions]
        tokens = tokens.copy()
        tokens[rows, positions] = self.replacements(masked_targets, keys)[used]
        return {"tokens": tokens, "masked_positions": masked_positions, "masked_targets": masked_targets, "masked_mask": used}

    def replacements(self, targets: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """int32 [B, P]: what stands in the place of each target. Draws from another stream of the keys than the
        choice does."""
        words = random_words(~keys, 2 * targets.shape[1]).reshape(*targets.shape, 2)
        tenth = below(words[..., 0], 10)
        replaced = self.ordinary[below(words[..., 1], len(self.ordinary))]
        return np.where(tenth < 8, np.int32(self.mask_token), np.where(tenth == 8, replaced, targets))


class Masked:
    """The rows of other sequences, masked; each by the key of its sample."""

    def __init__(self, sequences: Sequences, masker: Masker):
        self.sequences, self.masker = sequences, masker
        self.count, self.padding_share = sequences.count, sequences.padding_share
        [length] = sequences.spec["tokens"].shape
        self.spec = {**sequences.spec, **row_spec(masker.num_predictions, ARRAYS, positions=length)}

    def rows(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> Rows:
        rows = self.sequences.rows(indices, epoch_keys, sample_keys)
        real = rows["segment_ids"] > 0 if "segment_ids" in rows else np.ones(rows["tokens"].shape, bool)
        return rows | self.masker(rows["tokens"], real, make_keys(MASK, sample_keys))

    def spans(self, indices: np.ndarray, epoch_keys: np.ndarray, sample_keys: np.ndarray) -> list[Spans]:
        return self.sequences.spans(indices, epoch_keys, sample_keys)


def choose_tokens(maskable: np.ndarray, wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [B, T]: in each row `wanted` (int64 [B]) of the maskable tokens (bool [B, T]), or all where there are
    fewer."""
    length = maskable.shape[1]
    most = min(int(wanted.max(initial=1)), length)
    scores = random_words(keys, length) | ~maskable * np.uint64(2**64 - 1)  # the lowest are chosen; never the last possible
    lowest = np.argpartition(scores, most - 1, axis=1)[:, :most]
    lowest_scores = np.take_along_axis(scores, lowest, axis=1)
    lowest = np.take_along_axis(lowest, np.argsort(lowest_scores, axis=1, kind="stable"), axis=1)
    chosen = np.zeros(maskable.shape, bool)
    np.put_along_axis(chosen, lowest, np.arange(most) < wanted[:, None], axis=1)
    return chosen & maskable


# Whole-word masking (Devlin et al. 2019, released code) draws words until enough tokens are hidden, for a row at a
# time; here for all rows at once, since it runs for every batch on the host. Words are put into a random order by
# sorting one hash each; then one pass over ranks: at rank r every row looks at its r-th word, and takes it if it
# still fits. Rows differ in how much room they have left, not in what is done, so each rank is a few array
# operations.
#
#     tokens     my  dog  ##gy  is  h  ##air  ##y       wanted = 3 tokens
#     word_of     0    1     1   2  3      3    3
#     sizes       1    2     1   3                      random order: 3, 0, 1, 2
#     rank 0: word 3 takes all 3, so h ##air ##y are chosen; in the order 0, 3, 1, 2: my, not word 3, dog ##gy
#
# A word that does not fit is passed over, not cut: half a word beside its other half is no task. So fewer than
# `wanted` may be hidden, and rows with one long word only would have nothing; these alone get a part of it. Scores of
# words are below 2**63, and what is no word has just that: it comes last.
def choose_words(maskable: np.ndarray, starts: np.ndarray, wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [B, T]: whole words in random order, each if it still fits into `wanted` (int64 [B]) tokens.

    A word begins where `starts` (bool [B, T]) is True, or after a token that is not maskable (bool [B, T]). Where no
    word is short enough, the first `wanted` tokens of one are chosen: a row without predictions would teach nothing.
    """
    num_rows, length = maskable.shape
    starts = starts.copy()
    starts[:, 0] = True
    starts[:, 1:] |= ~maskable[:, :-1]
    word_of = np.cumsum(starts, axis=1) - 1
    rows = np.broadcast_to(np.arange(num_rows)[:, None], maskable.shape)
    sizes = np.bincount((rows * length + word_of)[maskable], minlength=num_rows * length).reshape(num_rows, length)
    scores = np.where(sizes > 0, random_words(keys, length) >> np.uint64(1), np.uint64(2**63))  # no word: last
    order = np.argsort(scores, axis=1, kind="stable")
    ordered_sizes = np.take_along_axis(sizes, order, axis=1)

    taken = np.zeros(sizes.shape, bool)
    room = np.minimum(wanted, sizes.sum(axis=1))
    for rank in range(length):
        fits = (ordered_sizes[:, rank] > 0) & (ordered_sizes[:, rank] <= room)
        taken[fits, order[fits, rank]] = True
        room = room - fits * ordered_sizes[:, rank]
        if not room.any():
            break
    chosen = np.take_along_axis(taken, word_of, axis=1) & maskable
    too_long = ~taken.any(axis=1)
    part = (word_of == order[:, :1]) & maskable & too_long[:, None]
    return chosen | part & (np.cumsum(part, axis=1) <= wanted[:, None])
