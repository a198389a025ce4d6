"""The one error that means "the input is wrong", as against "the program failed"."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: the file, line or key, what was expected, the nearest right thing.

    `jaxlm` prints it without a traceback and exits with code 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the choice closest to `word`, or an empty string when none is close."""
    spelled = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.6)
    return f"; did you mean '{spelled[matches[0]]}'?" if matches else ""
