"""SIGTERM, Ctrl-C, a closed terminal (SIGHUP) and the cloud's notice: every process agrees on the step after which
the run is saved and ends.

A process asks here before it begins a step (or a batch of an evaluation): that is a turn, and all processes take the
same turns. One that is told to stop says so through the coordinator; all then hold still between two turns, say how
many they have taken, and take no more than the one that has taken the most. Until somebody is told, nothing is sent,
and no device ever has a part in it.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Self, TypeVar

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from jaxlm.console.progress import print_line
from jaxlm.safety.launcher import LAUNCHER, STOPS, is_follower, stops

KEY = "jaxlm/preemption"  # at the coordinator
STOP, OVER = "stop", "over"  # who says one of them first, says it for all
WEEK = 7 * 24 * 3600 * 1000  # milliseconds: what waits for others waits until the hang watch ends it
Item = TypeVar("Item")


class Preemption:
    """Listens while it is entered. The first signal asks the run to save and end, the second ends the process at
    once."""

    _uses = itertools.count()  # the same number in every process
    _taken = 0  # turns of all uses so far: JAX counts them, too

    def __init__(self):
        self._key = f"{KEY}/{next(self._uses)}"  # a word is said once
        self.signal: signal.Signals | None = None
        self.agreed = False  # not to go on; after the same turn on every process
        self._turns = Preemption._taken  # that this process has taken
        self._last: int | None = None  # that any may take
        self._between_turns = threading.Lock()
        self._coordinator = multihost.get_jax_distributed_client() if jax.process_count() > 1 else None
        self._agreeing = threading.Thread(target=self._agree, daemon=True, name="preemption")

    def __enter__(self) -> Self:
        if self._coordinator:
            self._agreeing.start()
        if threading.current_thread() is not threading.main_thread():  # only there can signals be listened to
            self._before = {}
            return self
        self._before = {number: signal.signal(number, _left_to_the_listener) for number in stops()}
        if not self._before:
            return self
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._wakeup = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=[self._ear], daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        Preemption._taken = self._turns
        if self._coordinator:
            self._say(OVER)
            self._agreeing.join()
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(self._mouth)  # which ends the listener

    def _listen(self, ear: int) -> None:
        """In a thread, so that a second signal is heard even while the main thread waits for a device that never
        answers."""
        while heard := os.read(ear, 1):
            if heard[0] not in STOPS:
                continue
            number = signal.Signals(heard[0])
            if self.signal and number == signal.SIGHUP:  # which a terminal's end sends more than once, by kernel and shell
                continue
            if self.signal:
                print_line(f"{number.name} again: ended at once")
                os._exit(128 + number)
            self.signal = number
            if not is_follower():
                told = "told to stop" if LAUNCHER in os.environ else number.name  # a launcher makes SIGTERM of what it gets
                print_line(f"{told}: saving after this step or the next; once more ends at once")
            threading.Thread(target=self._say, args=[STOP], daemon=True).start()  # the coordinator may be the one that hangs
        os.close(ear)

    @property
    def exit_code(self) -> int:
        """As shells count: 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP; 143 where another process had the
        notice."""
        return 128 + (self.signal or signal.SIGTERM)

    def may_go_on(self) -> bool:
        """Takes a turn, if there is one more; the same on every process that asks at the same place."""
        if self._coordinator and multihost_utils.reached_preemption_sync_point(self._turns):
            self.agreed = True  # a platform that tells JAX by other ways than a signal; JAX has counted turns likewise
        with self._between_turns:
            self.agreed = self.agreed or (self._last is not None and self._turns >= self._last)
            self._turns += not self.agreed
        return not self.agreed

    def until_agreed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, up to the one during which the processes agree to stop."""
        for item in items:
            yield item
            if not self.may_go_on():
                return

    def _say(self, word: str) -> None:
        if not self._coordinator:
            self._last = self._turns
            return
        with suppress(jax.errors.JaxRuntimeError):  # said by another already; or the coordinator is gone, and JAX ends us
            self._coordinator.key_value_set(self._key, word)

    def _agree(self) -> None:
        """In a thread: waits until a word is said, and where it is to stop, finds the last turn."""
        with suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone, and JAX ends this process
            if self._coordinator.blocking_key_value_get(self._key, WEEK) == STOP:
                with self._between_turns:
                    self._coordinator.key_value_set(f"{self._key}/turns/{jax.process_index()}", str(self._turns))
                    self._coordinator.wait_at_barrier(f"{self._key}/turns", WEEK)
                    self._last = max(int(turns) for _, turns in self._coordinator.key_value_dir_get(f"{self._key}/turns"))


def _left_to_the_listener(number: int, frame: FrameType | None) -> None:
    """The main thread is not disturbed."""
