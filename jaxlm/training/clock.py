"""What a row of metrics.jsonl says of time and of the way so far: seconds, tokens, epochs, how fast and how well
used."""

import time
from typing import Any

import jax
import numpy as np

from jaxlm.data.batches import Batches
from jaxlm.runtime.chips import products_peak
from jaxlm.training.feed import SkippedRows
from jaxlm.training.footprint import training_flops
from jaxlm.training.stages import Stage
from jaxlm.training.step import Trainer

FETCHED_AT_ONCE = 256  # counts that may lie on the devices


class TokenCount:
    """The tokens that the steps so far have had. Padding is none: a batch has `slots` places, and in some of them no
    token.

    Where rows can hold padding the step counts what they hold (`tokens` of its metrics); else every slot is a token,
    but for the rows that data.damaged=skip has made padding. The same on every mesh.
    """

    def __init__(self, batches: Batches, slots: int, skipped_rows: SkippedRows, first: int, saved: dict[str, Any]):
        """From step `first` on, whose checkpoint says `saved`; one that is older than this count knows no `tokens`, and
        unless no slot was empty they stay unknown."""
        self.varies = "segment_ids" in batches.spec
        self.slots, self._row_slots, self._skipped_rows = slots, slots // batches.global_batch_size, skipped_rows
        counted_then = 0 if first == 0 else None if self.varies else first * slots - skipped_rows.earlier * self._row_slots
        self._earlier: int | None = saved.get("tokens", counted_then)
        self._first, self._here, self._waiting = first, 0, []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """One more step, which is done."""
        if self.varies:
            self._waiting.append(metrics["tokens"])
            if len(self._waiting) == FETCHED_AT_ONCE:
                self._fetch()

    def since_start(self, step: int) -> int:
        """Of the steps of this start, up to and with `step`. All processes must ask (see SkippedRows)."""
        if self.varies:
            self._fetch()
            return self._here
        lost = self._skipped_rows.count(step) - self._skipped_rows.earlier
        return (step - self._first) * self.slots - lost * self._row_slots

    def total(self, step: int) -> int | None:
        """Of the whole run; None: not known."""
        return None if self._earlier is None else self._earlier + self.since_start(step)

    def _fetch(self) -> None:
        self._here += int(np.sum(jax.device_get(self._waiting), dtype=np.int64))
        self._waiting = []


class Clock:
    """Step times between rows; evaluation, saving and compiling do not count."""

    def __init__(self, trainer: Trainer, stage: Stage, skipped_rows: SkippedRows, first: int, saved: dict[str, Any]):
        self.stage, batches = stage, stage.batches
        length, devices = trainer.settings.data.sequence_length, trainer.mesh.devices.flatten()
        self.first, self.slots = first, batches.global_batch_size * length
        self.slots_before = saved.get("slots", first * self.slots)  # of the batches that earlier starts had
        self.tokens = TokenCount(batches, self.slots, skipped_rows, first, saved)
        self.epochs = batches.global_batch_size / batches.sequences_per_epoch  # that a step takes
        self.flops = batches.global_batch_size * training_flops(trainer.settings)
        peak = products_peak(devices[0].device_kind, trainer.settings.train.precision)
        self.peak = peak and peak * len(devices)
        self.restart(first)

    def total_slots(self, step: int) -> int:
        """Places for tokens in all batches up to `step`."""
        return self.slots_before + (step - self.first) * self.slots

    def restart(self, step: int) -> None:
        """A new interval, from the end of `step` on."""
        before = self.tokens.since_start(step) if step > self.first else 0
        self.since, self.step, self.data_wait, self.before = time.monotonic(), step, 0.0, before

    def way(self, step: int) -> dict[str, float | int | None]:
        """Columns of every row at `step`: the stage, Unix time in seconds, tokens so far, epochs so far (of all corpora
        together)."""
        epoch = self.stage.epochs + (step - self.stage.start) * self.epochs
        return self.stage.column() | {"time": time.time(), "tokens": self.tokens.total(step), "epoch": epoch}

    def speed(self, step: int) -> dict[str, float | None]:
        """Columns of a training row at `step`, and a new interval. Slots are told where they are not all tokens."""
        steps = max(1, step - self.step)
        seconds = max(time.monotonic() - self.since, 1e-9) / steps  # a clock may be too coarse for a tiny model
        wait, tokens = self.data_wait / steps, (self.tokens.since_start(step) - self.before) / steps
        self.restart(step)
        slots = {"slots_per_second": self.slots / seconds} if self.tokens.varies else {}
        return {"tokens_per_second": tokens / seconds} | slots | {
            "mfu": self.mfu(seconds), "step_seconds": seconds, "data_wait_seconds": wait}

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilization (Chowdhery et al. 2022, appendix B), of all slots; None where the device's peak is
        not published."""
        return self.flops / seconds / self.peak if self.peak else None
