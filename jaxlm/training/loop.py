"""`jaxlm train`: from settings to a trained, evaluated, resumable run directory."""

import fcntl
import functools
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.data.loading import Batches
from jaxlm.errors import UserError
from jaxlm.models.model import Params
from jaxlm.models.sizes import num_parameters, training_flops
from jaxlm.parallel import distributed, executables
from jaxlm.parallel.compiler import programs_folder
from jaxlm.parallel.mesh import crossings
from jaxlm.reporting.files import check_folder, write_json, write_text
from jaxlm.reporting.hardware import peak_flops
from jaxlm.reporting.metrics import MetricsWriter, plain, read_metrics
from jaxlm.reporting.plots import plot_loss
from jaxlm.reporting.progress import TrainingProgress, print_line
from jaxlm.reporting.runs import read_summary
from jaxlm.reporting.units import counted, format_count
from jaxlm.settings import Settings, dump, to_dict
from jaxlm.training.checkpoints import FIXED_KEYS, MODEL_KEYS, Checkpoints, refuse_changes, versions
from jaxlm.training.evaluation import evaluate
from jaxlm.training.setup import (
    Corpora,
    Run,
    SkippedRows,
    check_corpora,
    lay_mesh,
    make_training_batches,
    make_validation_batches,
    micro_batch_size,
    on_devices,
    open_corpora,
    resolve,
    start,
)
from jaxlm.training.step import TrainState


class Output(NamedTuple):
    """Where a run's figures go; on process 0 only, elsewhere both do nothing."""

    progress: TrainingProgress
    metrics: MetricsWriter | None

    def row(self, step: int, row: dict[str, Any]) -> None:
        self.progress.update(step, row)
        if self.metrics:
            self.metrics.write({"step": step} | row)


def train(settings: Settings) -> dict[str, Any]:
    """Trains to `train.steps`, from the newest checkpoint when there is one. Returns the summary (see summary.json).

    Raises:
      UserError: the input is wrong; nothing has been written then.
    """
    started = time.monotonic()
    check_folder(settings.run_dir, "run_dir")
    mesh = lay_mesh(settings)
    corpora = open_corpora(settings, accept=functools.partial(check_corpora, settings))
    settings = resolve(settings, corpora[0][0].tokenizer)
    run = start(settings, mesh)
    run_dir, total, main = Path(settings.run_dir), settings.train.steps, distributed.is_main()
    with _alone_in(run_dir), jax.set_mesh(mesh), Checkpoints(run_dir, settings.checkpoint) as checkpoints:
        state, first, earlier = _start_or_resume(run, checkpoints, corpora)
        started -= earlier
        summary = _finished_summary(run_dir, total) if first == total else None
        if summary:
            if main:
                print_line(f"{run_dir}: finished, all {total} steps are done; raise train.steps to go on")
            return summary
        if main:
            write_text(run_dir / "config.yaml", dump(settings))
        writer = MetricsWriter(run_dir, tensorboard=settings.logging.tensorboard, resume_step=first) if main else None
        try:
            with TrainingProgress(total, first, enabled=main) as progress:
                output = Output(progress, writer)
                for line in _describe(run, corpora, first):
                    progress.print(line)
                results = _loop(run, corpora, state, first, checkpoints, output, started)
        finally:
            if writer:
                writer.close()
    summary = _summary(run, results, time.monotonic() - started)
    if main:
        write_json(run_dir / "summary.json", summary)
        plot_loss(run_dir)
    return summary


@contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """Holds run_dir for this run; the end of its process, in any way, frees it. Raises UserError while another run holds it."""
    if not distributed.is_main():
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run_dir={run_dir}: another `jaxlm train` is at work in it; wait for its end, "
                            "or choose another run_dir") from None
        yield


def _start_or_resume(run: Run, checkpoints: Checkpoints, corpora: Corpora) -> tuple[TrainState, int, float]:
    """The newest checkpoint's state, or a fresh one; the number of steps already done, and the seconds they took."""
    if not checkpoints.steps:
        return run.trainer.init(run.settings.seed), 0, 0.0
    step = checkpoints.choose(None)
    saved, own = checkpoints.metadata(step), _metadata(run, corpora)
    refuse_changes(FIXED_KEYS, saved["settings"], own["settings"], checkpoints.directory)
    if saved["corpora"] != own["corpora"]:
        raise UserError(f"data.corpus: not the text, or not the weights, that the checkpoints in {checkpoints.directory} were "
                        "trained on; set it back, or choose another run_dir")
    if step > run.settings.train.steps:
        raise UserError(f"train.steps={run.settings.train.steps}: the checkpoints in {checkpoints.directory} have {step} steps "
                        "already; expected at least as many, or choose another run_dir")
    return checkpoints.restore(step, run.trainer), step, saved.get("wall_seconds", 0.0)


def _loop(run: Run, corpora: Corpora, state: TrainState, first: int, checkpoints: Checkpoints, output: Output,
          started: float) -> dict[str, Any]:
    settings, total = run.settings, run.settings.train.steps
    batches, validation = make_training_batches(settings, corpora), make_validation_batches(settings, corpora)
    metadata = _metadata(run, corpora)
    clock = _Clock(run, first, batches)
    skipped = SkippedRows(batches, run.mesh, checkpoints.metadata(first).get("skipped_rows", 0) if first else 0)
    val_row = _last_evaluation(settings.run_dir, first)

    with on_devices(batches, first, total, run.mesh, settings.data.prefetch) as source:
        source, step_function = iter(source), None
        pending = None  # (step, metrics) of the step before: read one step late, so that the device never waits for the host
        for step in range(first + 1, total + 1):
            asked = time.monotonic()
            batch = next(source)
            waited = time.monotonic() - asked
            if step_function is None:
                asked = time.monotonic()
                step_function = _compile(run, state, batch, output)
                clock.compile_seconds = time.monotonic() - asked
                clock.restart(step - 1)
            state, metrics = step_function(state, batch)
            clock.data_wait += waited
            if pending:
                _log(pending, clock, skipped, settings, output)
            pending = (step, metrics)
            evaluating = step % settings.eval.every_steps == 0 or step == total
            saving = step % settings.checkpoint.every_steps == 0 or step == total
            if evaluating or saving:
                _log(pending, clock, skipped, settings, output)
                pending = None
                if evaluating and validation:
                    val_row = evaluate_run(run, state.params, validation, corpora, whole=step == total)
                    output.row(step, val_row)
                if saving:
                    so_far = metadata | {"wall_seconds": time.monotonic() - started} | skipped.column(step)
                    checkpoints.save(state, step, so_far, val_row.get("val_loss") if evaluating else None)
                clock.restart(step)
    return {"val_loss": val_row.get("val_loss"), "skipped_rows": skipped.count(total), "clock": clock}


def _compile(run: Run, state: TrainState, batch: dict[str, jax.Array], output: Output) -> jax.stages.Compiled:
    """The step, from a program that `jaxlm train --compile-only` has left, if there is one."""
    lowered, folder = run.trainer.step.lower(state, batch), programs_folder(run.settings.devices)
    ready = folder and executables.load(lowered, run.mesh, folder)
    if ready:
        output.progress.print(f"step: compiled before, taken from {folder}")
    return ready or lowered.compile()


def _log(pending: tuple[int, dict[str, jax.Array]], clock: "_Clock", skipped: SkippedRows, settings: Settings,
         output: Output) -> None:
    """Waits for a step; writes its row when one is due. The loss is that step's own, the times are means since the last row, and
    the rows skipped those of all steps."""
    step, metrics = pending
    jax.block_until_ready(metrics)
    if step % settings.logging.every_steps == 0 or step in (1, settings.train.steps):
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        output.row(step, values | clock.speed(step) | skipped.column(step))


def evaluate_run(run: Run, params: Params, validation: Batches, corpora: Corpora, whole: bool) -> dict[str, float]:
    """Metrics over the whole validation set, or over eval.steps batches of it."""
    steps = len(validation) if whole else min(len(validation), run.settings.eval.steps or len(validation))
    bytes_per_token = sum(c.validation.num_bytes for c, _ in corpora) / sum(c.validation.num_tokens for c, _ in corpora)
    with on_devices(validation, 0, steps, run.mesh, run.settings.data.prefetch) as source:
        row = evaluate(run.trainer, params, source, bytes_per_token)
    return row | SkippedRows(validation, run.mesh).column(steps, "val_skipped_rows")


class _Clock:
    """Step times between rows; evaluation, saving and compiling do not count."""

    def __init__(self, run: Run, first: int, batches: Batches):
        length, devices = run.settings.data.sequence_length, run.mesh.devices.flatten()
        predictions = batches.spec["masked_positions"][0][0] if "masked_positions" in batches.spec else length
        self.tokens = batches.global_batch_size * length
        self.flops = batches.global_batch_size * training_flops(run.settings.model, length, predictions)
        peak = peak_flops(devices[0].device_kind)
        self.peak = peak and peak * len(devices)
        self.compile_seconds = 0.0
        self.restart(first)

    def restart(self, step: int) -> None:
        self.since, self.step, self.data_wait = time.monotonic(), step, 0.0

    def speed(self, step: int) -> dict[str, float | None]:
        """Columns of a row at `step`, and a new interval."""
        steps = max(1, step - self.step)
        seconds = (time.monotonic() - self.since) / steps
        wait = self.data_wait / steps
        self.restart(step)
        return {"tokens_per_second": self.tokens / seconds, "mfu": self.mfu(seconds), "step_seconds": seconds,
                "data_wait_seconds": wait}

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilization (Chowdhery et al. 2022, appendix B); None where the device's peak is not published."""
        return self.flops / seconds / self.peak if self.peak else None


def _describe(run: Run, corpora: Corpora, first: int) -> list[str]:
    """What a user wants to see before the first step."""
    settings = run.settings
    ways = math.prod(run.mesh.shape[axis] for axis in ("data", "fsdp", "expert"))  # a pipeline has one micro-batch in every stage
    device = run.mesh.devices.flatten()[0]
    axes = "".join(f", {axis}={size}" for axis, size in run.mesh.shape.items() if size > 1)
    slow = " and ".join(f"{axis} ({parts})" for axis, parts in crossings(run.mesh).items())
    batch, length = settings.data.global_batch_size, settings.data.sequence_length
    accumulation = settings.train.gradient_accumulation
    lines = [
        f"{settings.model.family} of {format_count(num_parameters(settings.model))} parameters, {settings.train.precision} "
        f"compute; {counted(run.mesh.size, f'{device.device_kind} device')}{axes}; {counted(jax.process_count(), 'process')}"
        + (f"; between slices or nodes: {slow}" if slow else ""),
        f"corpus of {format_count(sum(corpus.train.num_tokens for corpus, _ in corpora))} tokens; "
        f"a step takes {counted(batch, 'sequence')} of {length} = {format_count(batch * length)} tokens"
        + (f", in {accumulation} micro-batches" if accumulation > 1 else "")
        + f", {micro_batch_size(settings) // ways} on each device at a time",
    ]
    if first:
        lines.append(f"resuming from step {first} of {settings.train.steps} ({Path(settings.run_dir) / 'checkpoints'})")
    return lines


def _metadata(run: Run, corpora: Corpora) -> dict[str, Any]:
    tokenizer = corpora[0][0].tokenizer
    return {"settings": to_dict(run.settings), "tokenizer": tokenizer.to_dict(), "tokenizer_digest": tokenizer.digest,
            "corpora": [[corpus.digest, weight] for corpus, weight in corpora], "mesh": dict(run.mesh.shape),
            "versions": versions()}


def _last_evaluation(run_dir: str, step: int) -> dict[str, Any]:
    """The evaluation row that a finished run ended with, so that resuming it changes nothing."""
    rows = [row for row in read_metrics(run_dir) if "val_loss" in row and row["step"] <= step]
    return rows[-1] if rows else {}


def _finished_summary(run_dir: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run that had ended at `steps` before, with the times it took; None where it had not."""
    summary = read_summary(run_dir / "summary.json")
    return summary if summary and summary.get("steps") == steps else None


def _summary(run: Run, results: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
    settings, clock = run.settings, results["clock"]
    times = [row["step_seconds"] for row in read_metrics(settings.run_dir) if row.get("step_seconds")]
    seconds = statistics.median(times) if times else None  # of the whole run, also where it was interrupted
    steps = settings.train.steps
    return {
        "steps": steps, "tokens": steps * clock.tokens, "val_loss": plain(results["val_loss"]),
        "skipped_rows": results["skipped_rows"],
        "tokens_per_second": seconds and clock.tokens / seconds, "mfu": seconds and clock.mfu(seconds),
        "devices": run.mesh.size, "device_kind": run.mesh.devices.flatten()[0].device_kind, "mesh": dict(run.mesh.shape),
        "parameters": num_parameters(run.settings.model), "wall_seconds": wall_seconds, "compile_seconds": clock.compile_seconds,
    }


def evaluate_checkpoint(settings: Settings) -> dict[str, float]:
    """A checkpoint of run_dir over the whole validation set: `step` and the metrics. Raises UserError."""
    mesh = lay_mesh(settings)
    with Checkpoints(settings.run_dir) as checkpoints, jax.set_mesh(mesh):
        step = checkpoints.choose(settings.checkpoint.step)
        corpora = open_corpora(settings, accept=functools.partial(check_corpora, settings))
        run = start(resolve(settings, corpora[0][0].tokenizer), mesh)
        saved = checkpoints.metadata(step)
        refuse_changes(MODEL_KEYS, saved["settings"], to_dict(run.settings), checkpoints.directory)
        if saved["tokenizer_digest"] != corpora[0][0].tokenizer.digest:
            raise UserError(f"data.corpus: prepared with another tokenizer than the model in {settings.run_dir} was trained with")
        validation = make_validation_batches(run.settings, corpora)
        if validation is None:
            raise UserError("data.validation: this corpus holds no validation text; prepare one with data.validation above 0")
        return {"step": step} | evaluate_run(run, checkpoints.restore_params(step, run.trainer), validation, corpora, whole=True)
