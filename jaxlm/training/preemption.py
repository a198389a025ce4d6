"""SIGTERM, Ctrl-C and the cloud's notice: every process agrees on the step after which the run is saved and ends.

A process that is told to stop raises its flag. The flags of all processes go round in a tiny program of their own, started before
each step and read after the step before has ended: all read the same answer at the same step, and no device waits for it.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.reporting.progress import print_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
Item = TypeVar("Item")


class Preemption:
    """Listens while it is entered. The first signal asks the run to save and end, the second ends the process at once."""

    def __init__(self, mesh: Mesh):
        self.signal: signal.Signals | None = None
        self.agreed = False  # the same on every process
        if jax.process_count() > 1:
            everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._flags = [jax.make_array_from_callback((mesh.size,), everywhere, lambda index, flag=flag: np.full(
                len(range(*index[0].indices(mesh.size))), flag)) for flag in (False, True)]
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():  # only there can signals be listened to
            self._before = {}
            return self
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._before = {number: signal.signal(number, _left_to_the_listener) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=[self._ear], daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(self._mouth)  # which ends the listener

    def _listen(self, ear: int) -> None:
        """In a thread, so that a second signal is heard even while the main thread waits for a device that never answers."""
        while heard := os.read(ear, 1):
            if heard[0] not in SIGNALS:
                continue
            number = signal.Signals(heard[0])
            if self.signal:
                print_line(f"{number.name} again: ended at once")
                os._exit(128 + number)
            self.signal = number
            print_line(f"{number.name}: saving after the step that is under way; once more ends at once")
        os.close(ear)

    @property
    def exit_code(self) -> int:
        """As shells count: 143 for SIGTERM, 130 for Ctrl-C; 143 where another process had the notice."""
        return 128 + (self.signal or signal.SIGTERM)

    def ask(self, step: int) -> Any:
        """Starts asking all processes, before `step` is started."""
        if jax.process_count() == 1:
            return None
        notice = multihost_utils.reached_preemption_sync_point(step)  # of a platform that tells JAX by other ways than a signal
        return self._any(self._flags[self.signal is not None or notice])

    def answer(self, asked: Any) -> bool:
        """Whether the run is to end, the same on every process that asked at the same place."""
        self.agreed = self.agreed or (self.signal is not None if asked is None else bool(asked))
        return self.agreed

    def until_agreed(self, items: Iterable[Item], step: int) -> Iterator[Item]:
        """The items, up to the one during which the processes agree to stop."""
        for item in items:
            asked = self.ask(step)
            yield item
            if self.answer(asked):
                return


def _left_to_the_listener(number: int, frame: FrameType | None) -> None:
    """The main thread is not disturbed."""
