"""Standard output and standard error that a run survives: closed, full, without a reader, or of an encoding that
lacks letters.

What was asked for goes to standard output, and that it cannot be written is an error (once: `OSError`, named
"standard output"). Standard error only says how it goes: what cannot be written there is dropped, for no run ends
because nobody looks.
"""

import io
import os
import select
import sys
from typing import TextIO

NAMES = ("standard input", "standard output", "standard error")


class _File(io.FileIO):
    """A standard stream's file descriptor."""

    def __init__(self, descriptor: int, number: int):
        super().__init__(descriptor, "w", closefd=False)
        self.number, self.given_up = number, number == 2

    def write(self, data: bytes) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not wait, and is full
                select.select([], [self], [])
            return written
        except OSError as error:
            if self.given_up:
                return len(data)
            self.given_up = True  # what Python still holds would fail again at its end
            raise OSError(error.errno, error.strerror, NAMES[self.number]) from None


def steady() -> None:
    """Makes this process's standard streams so. Call at its start: where one is closed, the next file would take its
    number."""
    for number in range(3):
        _open_where_closed(number)
    sys.stdin = sys.__stdin__ = sys.stdin or open(0, closefd=False)  # noqa: SIM115 (as long as the process)
    for number in (1, 2):
        write_to(number, number)


def write_to(number: int, descriptor: int) -> None:
    """Lets Python write standard stream `number` (1 or 2) to a file descriptor, letters that the encoding lacks as
    escapes."""
    name = ("stdout", "stderr")[number - 1]
    before: TextIO | None = getattr(sys, name)
    if before:
        before.flush()
    raw = _File(descriptor, number)
    stream = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=before.encoding if before else "utf-8", errors="backslashreplace",
        line_buffering=number == 2 or raw.isatty(), write_through=getattr(before, "write_through", False))
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _open_where_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        os.dup2(descriptor, number)
        if descriptor != number:
            os.close(descriptor)
        os.set_inheritable(number, True)
