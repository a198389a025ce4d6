"""Errors that are told in one line, without a traceback: wrong input, and what went wrong around a run that was
right."""

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any

SHOWN = 200  # characters of a wrong value in a message

# https://user:password@..., s3://key:secret/with/it@...; a Path has lost one of the slashes
USERINFO = re.compile(r"(?<=:/)(/?)(?:[^/\s@]*:(?!\d+/)\S*|[^/\s@]+)@")
QUERY = re.compile(r"([?&][\w.-]*(?:token|secret|password|signature|sig|key|credential)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE)


class UserError(Exception):
    """Bad input. The message is one line: the file, line or key, what was expected, the nearest right thing.

    `jaxlm` prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """The run cannot go on, through no fault of its input: a full disk, a damaged file, a hung process, a broken
    device.

    The message is one line: what happened, where, and what helps. `jaxlm` prints it without a traceback and exits with
    `exit_code`: 1, or 3 where starting again would only repeat it.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class LostProcess(RunError):
    """An exchange with another process of the run failed: that one, which most likely has ended, knows why."""


class Preempted(Exception):
    """The run was told to stop, has saved, and can be gone on with; the message, of one process, says how.
    `exit_code`: as shells count signals."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def reason(error: Exception) -> str:
    """An error as the end of a line that says what it was about."""
    line = " ".join(str(error).split("\n", 1)[0].split())
    if isinstance(error, (UserError, RunError)):
        return line
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def without_secrets(text: str) -> str:
    """The text with `***` for what stands in URLs to be let in: user and password, signatures, tokens, keys."""
    return QUERY.sub(r"\1***", USERINFO.sub(r"\1***@", text))


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the choice closest to `word`, or an empty string when none is close."""
    spelled = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.6)
    return f"; did you mean '{spelled[matches[0]]}'?" if matches else ""


def shown(value: Any) -> str:
    """A wrong value as a message shows it: its repr, cut where it is long, without ever making the whole of it (a
    few lines of YAML can stand for gigabytes)."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = SHOWN
    return short.repr(value)


def printable(text: str) -> str:
    """With escapes in place of control characters: a terminal must not obey what a file holds, or is called."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def clipped(text: str) -> str:
    """Text as a message shows it: cut where it is long."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
