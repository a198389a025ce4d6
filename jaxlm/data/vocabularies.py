"""Which token of one vocabulary is which of another, whatever kind of tokenizer each belongs to."""

from dataclasses import asdict

import numpy as np

from jaxlm.data.tokenizers import Tokenizer

NO_TEXT = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


def same_tokens(own: Tokenizer, other: Tokenizer) -> np.ndarray:
    """int64 [own.vocab_size]: the id in `other` of each token; -1: there is none.

    Special tokens are the same by their role, others by their text and whether they begin a word: `_the`, `the` of
    WordPiece and ` the` are one. Parts of a character have no text: theirs is their name.
    """
    found = np.full(own.vocab_size, -1)
    there = {key: token for token, key in _keys(other).items()}
    for token, key in _keys(own).items():
        found[token] = there.get(key, -1)
    roles, roles_there = asdict(own.special), asdict(other.special)
    for role, token in roles.items():
        if token is not None and roles_there[role] is not None and found[token] < 0:
            found[token] = roles_there[role]
    return found


def _keys(tokenizer: Tokenizer) -> dict[int, tuple]:
    names, special = {token: name for name, token in tokenizer.vocabulary.items()}, tokenizer.special.ids
    keys = {}
    for token in range(tokenizer.vocab_size):
        if token not in special:
            text = tokenizer.token_text(token)
            named = NO_TEXT in text or not text.strip()
            keys[token] = ((names.get(token, f"{tokenizer.kind} {token}"),) if named
                           else (tokenizer.token_starts_word(token), text.strip()))
    return keys
