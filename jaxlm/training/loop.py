"""The loop over steps: batch, step, log, evaluate, save; and what watches over them.

The host runs one step ahead of the devices: it reads a step's numbers while the next one is under way.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import multihost

from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.console.progress import TrainingProgress, optional
from jaxlm.errors import Preempted, RunError
from jaxlm.models.model import Params
from jaxlm.reporting.evaluated import write_evaluation
from jaxlm.reporting.goodput import Account
from jaxlm.reporting.metrics import MetricsWriter
from jaxlm.runtime import executables
from jaxlm.runtime.compiler import find_programs
from jaxlm.safety.copies import find_differences, has_copies, make_digests
from jaxlm.safety.preemption import WEEK, Preemption
from jaxlm.safety.watch import Watch
from jaxlm.storage.files import as_path, plain, write_text
from jaxlm.tasks.find import find_task
from jaxlm.training.clock import Clock
from jaxlm.training.evaluation import Evaluated, evaluate_run
from jaxlm.training.feed import SkippedRows, abstract_batch, on_devices, place_in_schedule
from jaxlm.training.length import Hours
from jaxlm.training.stages import Stage
from jaxlm.training.step import Batch, Trainer, TrainState, as_saved

SHOWN_EXAMPLES = 4
ENDLESS = 10**9  # steps, more than any run has: where its end is a time
Sampler = Callable[[Params], str]  # what the parameters make of some text, on the training mesh; all processes call it


class Output(NamedTuple):
    """Where a run's figures go; on process 0 only, elsewhere all of it does nothing."""

    progress: TrainingProgress
    metrics: MetricsWriter | None
    account: Account

    def row(self, step: int, row: dict[str, Any]) -> None:
        self.progress.update(step, row)
        if self.metrics:
            self.metrics.write({"step": step} | row)

    def samples(self, step: int, text: str, shown: bool) -> None:
        if shown:
            self.progress.print(f"samples after step {step}:\n{text}")
        if self.metrics:
            self.metrics.write_samples(step, text)

    def flush(self) -> None:
        """Until everything so far lies where the run directory is."""
        if self.metrics:
            self.metrics.flush()
            self.account.flush()


class Pending(NamedTuple):
    """A step that is under way."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Batch


class Loop:
    """One start of a stage of a run, from the state it begins with to its last step."""

    def __init__(self, trainer: Trainer, stage: Stage, checkpoints: Checkpoints, output: Output, watch: Watch,
                 sample: Sampler | None = None):
        self.sample, self.stage, self.corpora = sample, stage, stage.corpora
        self.trainer, self.checkpoints, self.output, self.watch = trainer, checkpoints, output, watch
        self.settings, self.guards, self.account = trainer.settings, trainer.settings.guards, output.account
        self.batches, self.hours = stage.batches, None
        self.validation = stage.validation
        self.preemption = Preemption()
        if trainer.settings.logging.samples_every_steps and sample is None:
            output.progress.print("WARNING: logging.samples_every_steps: there is nothing to show samples of, so none are made")
        self.compare = None
        if self.guards.compare_every_steps:
            if has_copies(trainer.params.shardings, trainer.params.shapes):
                self.compare = make_digests(trainer.mesh, trainer.params.shardings)
            else:
                output.progress.print("WARNING: guards.compare_every_steps: no parameter is on two devices; nothing is compared")

    # Devices are given work without being waited for: `step_function` returns at once, with arrays that are not
    # there yet. The host stays one step ahead and no more: it sends off step n, and only then waits for step n - 1
    # (`_finish(before)`) and writes its row.
    #
    #     host      send 5 | wait 4, row 4 | send 6 | wait 5, row 5 | send 7 ...
    #     devices          4        |        5          |        6        ...
    #
    # Waiting for n itself would leave devices idle while rows are written and batches fetched; never waiting would
    # run ahead of faults without bound, and hide where time goes. So whatever needs a finished state (saving,
    # evaluation, comparing copies) first finishes `pending`, and restarts the clock after it. The state is donated:
    # after the call the old arrays are gone, and only the returned one may be used. That is why a step whose
    # numbers are bad is undone within the compiled step (jaxlm/safety/guards.py): here it would be too late. All
    # processes must walk through the same calls, for each is an exchange: what decides between branches is the same
    # everywhere (step numbers, metrics of the whole batch) or agreed upon first (`preemption`). One process that
    # alone stopped for a signal would leave the others waiting for ever in their next step.
    def run(self, state: TrainState, first: int, metadata: dict[str, Any], last_evaluation: dict[str, Any], saved: dict[str, Any]
           ) -> None:
        """Steps `first` + 1 to the last. `metadata`: of every checkpoint; `last_evaluation`: the row of the one
        before; `saved`: what the checkpoint that it begins with says of itself.

        Raises:
          Preempted: it was told to stop, and has saved.
          RunError: it cannot go on.
        """
        self.metadata, self.val_row = metadata, last_evaluation
        if self.settings.train.hours is not None:
            self.hours = Hours(self.settings, first, saved, lambda: self.account.spent)
            self.output.progress.total_steps = self.last
        self.already_skipped = int(state.recent.skipped) - self.account.skipped
        self.skipped_rows = SkippedRows(self.batches, self.trainer.mesh, saved.get("skipped_rows", 0), self.stage.start)
        self.clock = Clock(self.trainer, self.stage, self.skipped_rows, first, saved)
        self.last_loss = {"loss": saved["loss"]} if "loss" in saved else {}
        with self.account.spending("compile"), self.watch.phase("compiling", self.guards.compile_seconds):
            step_function = self._compile(state)
            # Through the coordinator, which waits: the devices' first exchange gives up (Gloo's after 30 s) where one
            # process still compiles what another has found in its cache.
            multihost.get_barrier_sync_fn()(key="compiled", timeout_ms=WEEK)  # the watch ends it before
        self.clock.restart(first)
        if self.hours:
            self.hours.begin()
        start, stop = self.stage.start, self.last or ENDLESS
        with self.preemption, on_devices(self.batches, first - start, stop - start, self.trainer.mesh,
                                         self.settings.data.prefetch) as source:
            source, pending, step = iter(source), None, first
            if saved.get("evaluation_due"):
                self._evaluate(first, state.params)
                self._end_if_told(first)
            while step != self.last:
                step += 1
                with self.watch.phase(f"step {step}", self._deadline(step, first)):
                    batch = self._next(source, step)
                    with self.account.spending("steps"):
                        state, metrics = step_function(state, batch)
                        before, pending = pending, Pending(step, metrics, batch)
                        self._finish(before)
                        self.preemption.may_go_on()
                if self._skipped_too_many(before):
                    self._diagnose(step_function, state, pending)
                if self._pauses_after(step):
                    self._look_at_the_clock(step, pending)
                    with self.watch.phase(f"step {step}", self.guards.step_seconds), self.account.spending("steps"):
                        self._finish(pending)
                    pending = None
                    self._pause(step, state)
                    self.clock.restart(step)
                self._end_if_told(step)
        self._wait_for_save()

    @property
    def last(self) -> int | None:
        """The last step of the stage; None: nobody knows yet."""
        return self.hours.last if self.hours else self.stage.stop

    def _look_at_the_clock(self, step: int, pending: Pending) -> None:
        if self.hours and self.hours.looks_at(step):
            with self.watch.phase(f"step {step}", self.guards.step_seconds), self.account.spending("steps"):
                jax.block_until_ready(pending.metrics)
                self.output.progress.print(self.hours.look(step))
            self.output.progress.total_steps = self.last

    @property
    def best(self) -> dict[str, Any] | None:
        """The best of the checkpoints that are kept; None: none was measured. Process 0 alone knows."""
        figure, found = find_task(self.settings).best[0], self.checkpoints.best
        return found and {"figure": figure, "step": found[0], "value": found[1]}

    def _deadline(self, step: int, first: int) -> float | None:
        """Seconds; the first two steps may wait for processes that are still compiling."""
        limits = [self.guards.step_seconds, *([self.guards.compile_seconds] if step <= first + 2 else [])]
        return None if None in limits else sum(limits)

    def _compile(self, state: TrainState) -> jax.stages.Compiled:
        """The step, from a program that `jaxlm train --compile-only` has left, if there is one."""
        batch = abstract_batch(self.settings, self.trainer.mesh)
        lowered, folder, ready = self.trainer.step.lower(state, batch), find_programs(self.settings.devices), None
        with optional("the program that was compiled before is not taken"):
            ready = folder and executables.load(lowered, self.trainer.mesh, folder)
        if ready:
            self.output.progress.print(f"step: compiled before, taken from {folder}")
        return ready or lowered.compile()

    def _next(self, source: Iterator[Batch], step: int) -> Batch:
        asked = time.monotonic()
        with self.account.spending("data_wait"), self.watch.phase(f"waiting for batch {step}"):
            batch = next(source)
        self.clock.data_wait += time.monotonic() - asked
        return batch | place_in_schedule(self.hours.place(step - 1), self.trainer.mesh) if self.hours else batch

    def _finish(self, pending: Pending | None) -> None:
        """Waits for a step; writes its row when one is due. The loss is that step's own, times are means since the
        last row."""
        if pending is None:
            return
        with self.watch.phase(f"waiting for step {pending.step}"):
            jax.block_until_ready(pending.metrics)
        self.checkpoints.check()
        step = pending.step
        self.clock.tokens.add(pending.metrics)
        if step % self.settings.logging.every_steps == 0 or step in (1, self.last):
            values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
            skipped = int(values.pop("skipped_steps"))
            values = {name: value for name, value in values.items() if name not in ("tokens", "skipped_in_a_row")}
            values |= ({"skipped_steps": skipped} if skipped else {}) | self.skipped_rows.column(step)
            self.last_loss = {"loss": values["loss"]}
            self.output.row(step, self.clock.way(step) | values | self.clock.speed(step))
            self.account.reached(step, skipped - self.already_skipped)

    # ---- between steps -----------------------------------------------------------------------------------------------

    def _due(self, step: int, interval: int | None) -> bool:
        return bool(interval) and step % interval == 0

    def _saves_at(self, step: int) -> bool:
        keep = self.settings.checkpoint
        return self._due(step, keep.every_steps) or self._due(step, keep.keep_every_steps) or step == self.last or (
            self.hours is not None and step == self.hours.look_at)

    def _evaluates_at(self, step: int) -> bool:
        return self.validation is not None and (self._due(step, self.settings.eval.every_steps) or step == self.last)

    def _samples_at(self, step: int) -> bool:
        return self.sample is not None and self._due(step, self.settings.logging.samples_every_steps)

    def _pauses_after(self, step: int) -> bool:
        return (self._saves_at(step) or self._evaluates_at(step) or self._due(step, self.guards.compare_every_steps)
                or self._samples_at(step) or self.preemption.agreed or (self.hours is not None and self.hours.looks_at(step)))

    def _pause(self, step: int, state: TrainState) -> None:
        """Compares, evaluates, shows samples and saves, as far as each is due. A run that was told to stop saves at
        once."""
        if self.compare and self._due(step, self.guards.compare_every_steps):
            self._compare_copies(step, state.params)
        evaluation = None
        if self._evaluates_at(step) and not self.preemption.agreed:
            evaluation = self._evaluate(step, state.params)
        if self._samples_at(step) and not self.preemption.agreed:
            with self.account.spending("evaluation"), self.watch.phase(f"samples after step {step}", self.guards.compile_seconds):
                ends = step == self.last and self.stage.is_last
                shows_itself = ends and find_task(self.settings).continues_text  # when it has ended
                self.output.samples(step, self.sample(state.params), shown=not shows_itself)
        if self._saves_at(step) or self.preemption.agreed:
            cut_short = self._evaluates_at(step) and self.preemption.agreed
            with self.account.spending("checkpoint"), self.watch.phase(f"starting to save step {step}", self.guards.save_seconds):
                about = self.metadata | {"evaluation_due": cut_short, "wall_seconds": self.account.wall_seconds}
                about |= self.skipped_rows.column(step) | plain(self.last_loss) | {"tokens": self.clock.tokens.total(step)}
                about |= {"slots": self.clock.total_slots(step)} | ({"hours": self.hours.saved()} if self.hours else {})
                self.checkpoints.save(as_saved(state), step, about, evaluation, first=self.output.flush)
            self.account.reached(step, int(state.recent.skipped) - self.already_skipped)
            self.account.write()

    def _evaluate(self, step: int, params: Params) -> dict[str, float | None] | None:
        """Writes a row and returns its figures; None when it was told to stop meanwhile."""
        with self.account.spending("evaluation"):
            found = evaluate_run(
                self.trainer, params, self.validation, self.corpora, whole=step == self.last,
                through=lambda source: self.watch.each(
                    self.preemption.until_agreed(source), f"evaluation after step {step}: batch", self.guards.step_seconds))
        if self.preemption.agreed:
            return None
        self.val_row = found.metrics
        self.output.row(step, self.clock.way(step) | found.metrics)
        if step == self.last and self.output.metrics:
            with optional("evaluation.json is not written"):
                self._tell(step, found)
        return found.metrics

    def _tell(self, step: int, found: Evaluated) -> None:
        """What the evaluation of a labelled set found, beside its figures."""
        tokenizer = self.corpora[0][0].tokenizer
        judged = find_task(self.settings).judged(found.terms, found.verdicts, self.validation.sample, tokenizer)
        if judged:
            write_evaluation(self.settings.run_dir, {"step": step, "figures": found.metrics} | judged)

    def _end_if_told(self, step: int) -> None:
        if self.preemption.agreed:
            self._wait_for_save()
            message = f"preempted after step {step}, which is saved; resume with `jaxlm train {self.settings.run_dir}`"
            raise Preempted(message if self.output.metrics else "", self.preemption.exit_code)

    def _wait_for_save(self) -> None:
        with self.account.spending("checkpoint"):
            self.checkpoints.wait()

    # ---- what went wrong ---------------------------------------------------------------------------------------------

    def _compare_copies(self, step: int, params: Params) -> None:
        with self.watch.phase(f"comparing copies after step {step}", self.guards.step_seconds):
            digests = np.asarray(self.compare(params))
        params = self.trainer.params
        different = find_differences(digests, self.trainer.mesh, params.shardings, params.shapes)
        if different:
            raise RunError(f"step {step}: copies of the parameters differ, so a device computes or stores wrongly: "
                           f"{'; '.join(different)}; take it out, and go on from a checkpoint before the fault")

    def _skipped_too_many(self, finished: Pending | None) -> bool:
        return finished is not None and int(finished.metrics["skipped_in_a_row"]) > self.guards.most_skipped

    def _diagnose(self, step_function: jax.stages.Compiled, state: TrainState, last: Pending) -> None:
        """Runs the newest step once more, if it was skipped too: nothing has changed since, so it must come to the
        same numbers.

        Raises:
          RunError: what it is, and which examples the step had.
        """
        in_a_row = int(last.metrics["skipped_in_a_row"])
        if in_a_row == 0:
            return
        loss, norm = float(last.metrics["loss"]), float(last.metrics["grad_norm"])
        _, again = step_function(state._replace(step=state.step - 1), last.batch)
        found = (f"step {last.step}: {in_a_row} steps in a row were skipped, the last for its loss of {loss:.4g} and gradient "
                 f"norm of {norm:.4g}")
        if int(again["skipped_in_a_row"]) == 0:
            raise RunError(f"{found}; run once more it came to {float(again['loss']):.4g} and {float(again['grad_norm']):.4g}: a "
                           "transient fault, most likely of the hardware")
        examples = self.batches.examples(last.step - 1 - self.stage.start)
        path = as_path(self.settings.run_dir) / f"diagnosis-{last.step}.json"
        if self.output.metrics:
            write_text(path, "".join(json.dumps(example._asdict()) + "\n" for example in examples))
        shown = ", ".join(map(str, examples[:SHOWN_EXAMPLES]))
        raise RunError(f"{found}; the same when run once more: bad data, or a model that has diverged; its {len(examples)} "
                       f"examples are in {path}, the first: {shown}", exit_code=3)
