"""`jaxlm train`: from settings to a trained, evaluated, resumable run directory."""

import dataclasses
import functools
import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.checkpoints.checkpoints import Best, Checkpoints
from jaxlm.checkpoints.manifest import finished_steps, newest_step
from jaxlm.checks import check_held_out
from jaxlm.console.progress import TrainingProgress, optional, print_line
from jaxlm.console.units import counted, format_count
from jaxlm.data.corpus import TOKENIZER
from jaxlm.data.sequences import start_token
from jaxlm.errors import LostProcess, RunError, UserError, reason
from jaxlm.parallel.mesh import crossings, islands_of
from jaxlm.reporting.goodput import Account, goodput
from jaxlm.reporting.metrics import MetricsWriter, read_metrics
from jaxlm.reporting.plots import plot_loss
from jaxlm.reporting.report import write_report
from jaxlm.reporting.runs import read_summary
from jaxlm.runtime import processes, runtime_log
from jaxlm.safety.watch import Watch
from jaxlm.settings import Settings, dump, length_of, to_dict
from jaxlm.stages import STAGES
from jaxlm.storage.files import Location, as_path, check_folder, lock, make_folder, plain, write_json, write_text
from jaxlm.storage.remote import is_remote
from jaxlm.tasks.find import find_task
from jaxlm.training.changes import (
    FIXED_KEYS,
    check_allowed,
    describe_change,
    find_changes,
    refuse_changes,
    refuse_rise,
)
from jaxlm.training.corpora import Corpora
from jaxlm.training.feed import micro_batch_size
from jaxlm.training.footprint import count_parameters
from jaxlm.training.length import last_step, length_lines, refuse_length
from jaxlm.training.loop import Loop, Output, Sampler
from jaxlm.training.origin import origin_of
from jaxlm.training.setup import join
from jaxlm.training.stages import (
    Stage,
    by_its_schedule,
    lay_stages,
    open_stages,
    stage_after,
    stage_lines,
    stage_that_saved,
)
from jaxlm.training.step import Trainer, TrainState, from_saved, start
from jaxlm.training.transfer import Opener, RunWeights, begin_with

SamplerMaker = Callable[[Trainer, Corpora], Sampler | None]


def train(settings: Settings, make_sampler: SamplerMaker | None = None, open_weights: Opener = RunWeights) -> dict[str, Any]:
    """Trains to the end of the run (`jaxlm.training.length`), from the newest good checkpoint when there is one.
    Returns the summary (see summary.json).

    Args:
      settings: of the run.
      make_sampler: what logging.samples_every_steps is to show; for example jaxlm.serving.samples.make_sampler.
      open_weights: the trained weights that `init` names; run directories alone where it is not given.

    Raises:
      UserError: the input is wrong; nothing has been written then.
      RunError: it cannot go on, for a reason outside the input.
      Preempted: it was told to stop, and has saved.
    """
    account = Account(_process_start())
    check_folder(settings.run_dir, "run_dir")
    check_allowed(settings.checkpoint.allow)
    check_held_out(settings)
    if finished_steps(settings.run_dir) == [0]:
        raise UserError(f"run_dir={settings.run_dir}: imported weights, for which no optimizer has a state; begin another run "
                        f"with init={settings.run_dir}")
    if settings.checkpoint.step is not None:
        raise UserError(f"checkpoint.step={settings.checkpoint.step}: `train` goes on from the newest good checkpoint; the key "
                        "is for `evaluate` and `generate`")
    guards = settings.guards
    if processes.is_one_of_several(settings.devices):
        make_folder(settings.run_dir)
        runtime_log.divert(settings)
    with Watch(settings.run_dir, (guards.start_seconds, guards.step_seconds, guards.save_seconds)) as watch:
        watch.one_of(*processes.place())
        with watch.phase("joining the other processes", guards.start_seconds):
            laid = lay_stages(settings, join(settings))
        watch.one_of(jax.process_index(), jax.process_count())
        with watch.phase("opening the corpus"):
            stages = open_stages(settings, laid)
        first = stages[0].settings  # otherwise config.yaml has the settings as they were given
        resolved = dataclasses.replace(settings, task=first.task, model=dataclasses.replace(
            settings.model, vocab_size=first.model.vocab_size))
        stage = stage_after(stages, newest_step(settings.run_dir))
        trainer = start(stage.settings, stage.mesh, stage.schedule())
        saving = functools.partial(watch.phase, seconds=guards.save_seconds)
        with (_alone_in(as_path(settings.run_dir)), _in_one_line(settings.run_dir), closing(account),
              Checkpoints(settings.run_dir, settings.checkpoint, saving, Best(*find_task(first).best)) as checkpoints):
            with watch.phase("reading the checkpoint", guards.restore_seconds):
                step = checkpoints.choose(None) if checkpoints.steps else None
            run = Run(resolved, stages, checkpoints, watch, account, make_sampler, open_weights)
            while True:
                if stage is not stage_after(stages, step or 0):  # the newest checkpoint was damaged, or a stage is over
                    stage = stage_after(stages, step or 0)
                    trainer = start(stage.settings, stage.mesh, stage.schedule())
                with jax.set_mesh(stage.mesh):
                    summary = _run_stage(run, stage, trainer, step)
                if stage.is_last:
                    return summary
                step = stage.stop


class Run(NamedTuple):
    """One start of a run: what is the same in all of its stages."""

    settings: Settings  # as they were given, before they followed the devices
    stages: list[Stage]
    checkpoints: Checkpoints
    watch: Watch
    account: Account
    make_sampler: SamplerMaker | None
    open_weights: Opener


def _run_stage(run: Run, stage: Stage, trainer: Trainer, step: int | None) -> dict[str, Any]:
    """Trains to the end of a stage, from its checkpoint of `step`; None: there is none. Returns the summary of the run
    so far."""
    run_dir, main = as_path(run.settings.run_dir), processes.is_main()
    checkpoints, account, corpora = run.checkpoints, run.account, stage.corpora
    make_sampler = run.make_sampler if run.settings.logging.samples_every_steps else None
    sample = make_sampler(trainer, corpora) if make_sampler else None
    metadata = _metadata(trainer, stage)
    with run.watch.phase("reading the checkpoint", trainer.settings.guards.restore_seconds):
        state, first, saved, taken = _start_or_resume(run, stage, trainer, step)
    changed = find_changes(saved, metadata) if saved else {}
    told = [describe_change(key, values) for key, values in changed.items()]
    ended = first == (last_step(trainer.settings, saved) if stage.stop is None else stage.stop)
    summary = _finished_summary(run_dir, first) if ended else None
    if summary:
        if main:
            key = (f"{STAGES}.{stage.number}." if stage.count else "") + stage.settings.train.length.partition("=")[0]
            print_line(f"{run_dir}: finished, all {first} steps are done; raise {key} to go on (with "
                       "'checkpoint.allow=[schedule]' where the learning rate has come down)")
            if told:
                print_line(f"ignored, since no step is left: {', '.join(told)}")
        _refuse_divergence(run_dir, summary)
        return summary
    if main:
        origin = [*(stage_lines(run.stages, stage) if stage.count else length_lines(trainer.settings)),
                  *(() if account.has_begun else
                    origin_of(trainer.settings, first, run.stages[-1].stop, checkpoints.set_aside, taken)),
                  *(taken if first else ()),
                  *(f"changed at step {first}: {line}" for line in told)]
    if main and not account.has_begun:
        write_text(run_dir / "config.yaml", dump(run.settings))
        if not is_remote(run_dir):
            corpora[0][0].tokenizer.save(run_dir / TOKENIZER)
        account.earlier = saved.get("wall_seconds", 0.0)
        account.begin(run_dir, first)
    writer = MetricsWriter(run_dir, tensorboard=trainer.settings.logging.tensorboard, resume_step=first) if main else None
    try:
        if changed and writer:
            writer.write({"step": first, "time": time.time(), "changed": changed} | stage.column())
        with TrainingProgress(run.stages[-1].stop, first, enabled=main) as progress:
            loop = Loop(trainer, stage, checkpoints, Output(progress, writer, account), run.watch, sample)
            for line in [*_describe(trainer, corpora, loop.batches.padding_share), *origin] if main else ():
                progress.print(line)
            loop.run(state, first, metadata, _last_evaluation(run_dir, first), saved)
    finally:
        if writer:
            writer.close()
    account.write()
    account.flush()
    summary = _baseline_so_far(run_dir) | _summary(run, trainer, loop)
    if main and stage.is_last:
        write_json(run_dir / "summary.json", summary)
        with optional("the run is finished, but loss.png is not drawn"):
            figure = find_task(trainer.settings).best[0]
            plot_loss(run_dir, figure if figure != "val_loss" else None)
        if summary["diverged"]:
            write_report(run_dir)
    if stage.is_last:
        _refuse_divergence(run_dir, summary)
    return summary


def _refuse_divergence(run_dir: Location, summary: dict[str, Any]) -> None:
    """Raises RunError for a run that has ended without a loss: nobody may take its weights for trained ones."""
    if summary.get("diverged"):
        raise RunError(f"{run_dir}: ended after {summary['steps']} steps with a loss that is not a number: what it has learned "
                       "is lost; lower optimizer.learning_rate, or raise schedule.warmup_steps, and begin again in another "
                       f"run_dir (see {run_dir / 'report.md'})", exit_code=3)


def _process_start() -> float:
    """When this process began, by `time.time()`: imports count. Where the system does not say, now."""
    try:
        since_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # starttime, man 5 proc
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux, or one that keeps it to itself
        age = 0.0
    return time.time() - max(age, 0.0)


@contextmanager
def _in_one_line(run_dir: str) -> Iterator[None]:
    """What is raised when a disk is full or gone, or another process, as a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or run_dir}: {error.strerror or error}; what has been saved stays") from error
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise LostProcess(f"process {jax.process_index()}: an exchange with another process failed, which has most likely ended "
                          f"({reason(error)[:160]}); start all of them again to go on{runtime_log.where()}") from error


@contextmanager
def _alone_in(run_dir: Location) -> Iterator[None]:
    """Holds run_dir for this run; the end of its process, in any way, frees it. Raises UserError while another run
    holds it.

    A bucket knows no lock that ends with its holder: nothing is held there.
    """
    if not processes.is_main() or is_remote(run_dir):
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w") as file:
        if not lock(file):
            raise UserError(f"run_dir={run_dir}: another `jaxlm train` is at work in it; wait for its end, "
                            "or choose another run_dir")
        yield


def _start_or_resume(run: Run, stage: Stage, trainer: Trainer, step: int | None
                     ) -> tuple[TrainState, int, dict[str, Any], list[str]]:
    """In this order: the run's own newest good checkpoint, which is that of `step`; the weights of `init`; new ones.

    Returns the state, the steps already done, what the checkpoint says of itself, and what is to be said of `init`.
    """
    checkpoints = run.checkpoints
    if step is None:
        init = trainer.settings.init
        weights = run.open_weights(init) if init else None  # before anything is computed: it may be refused
        state = trainer.init(trainer.settings.seed)
        if weights is None:
            return state, 0, {}, []
        params, lines = begin_with(weights, trainer, stage.corpora[0][0].tokenizer, state.params)
        return state._replace(params=params), 0, {}, lines
    saved = checkpoints.metadata(step)
    own = stage_that_saved(run.stages, step, saved, checkpoints.directory)
    if saved["corpora"] != _digests(own) and "data.corpus" not in trainer.settings.checkpoint.allow:
        raise UserError(f"data.corpus: not the text, or not the weights, that the checkpoints in {checkpoints.directory} were "
                        "trained on; set it back, choose another run_dir, or insist with 'checkpoint.allow=[data.corpus]'")
    refuse_changes(FIXED_KEYS, saved["settings"], to_dict(own.settings), checkpoints.directory)
    if not stage.count:
        refuse_length(trainer.settings, step, saved, checkpoints.directory)
    refuse_rise(*by_its_schedule(stage, saved, step), checkpoints.directory, stage.schedule_start)
    if own is not stage and own.settings.optimizer.name != stage.settings.optimizer.name:
        found = checkpoints.restore(step, trainer.saved.part(lambda tree: {"params": tree["params"], "clock": tree["clock"]}))
        lines = [f"optimizer.name={stage.settings.optimizer.name}: its state begins anew; that of {own.settings.optimizer.name} "
                 "is left behind"]
        return from_saved(found | {"optimizer": trainer.init(0).optimizer}), step, saved, lines
    return from_saved(checkpoints.restore(step, trainer.saved)), step, saved, []


def _describe(trainer: Trainer, corpora: Corpora, padding_share: float) -> list[str]:
    """What a user wants to see before the first step."""
    settings = trainer.settings
    # a pipeline has one micro-batch in every stage
    ways = math.prod(trainer.mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    device = trainer.mesh.devices.flatten()[0]
    axes = "".join(f", {axis}={size}" for axis, size in trainer.mesh.shape.items() if size > 1)
    slow = " and ".join(f"{axis} ({parts})" for axis, parts in crossings(trainer.mesh).items())
    batch, length = settings.data.global_batch_size, settings.data.sequence_length
    accumulation = settings.train.gradient_accumulation
    lines = [
        f"{settings.model} of {format_count(count_parameters(settings))} parameters, {settings.train.precision} "
        f"compute; {counted(trainer.mesh.size, f'{device.device_kind} device')}{axes}; {counted(jax.process_count(), 'process')}"
        + (f"; between {islands_of(device.platform)}: {slow}" if slow else ""),
        f"corpus of {format_count(sum(corpus.train.num_tokens for corpus, _ in corpora))} tokens; "
        f"a step takes {counted(batch, 'sequence')} of {length} = {format_count(batch * length)} "
        + (f"slots, {1 - padding_share:.1%} of them tokens" if padding_share >= 0.0005 else "tokens")
        + (f", in {accumulation} micro-batches" if accumulation > 1 else "")
        + f", {micro_batch_size(settings) // ways} on each device at a time",
    ]
    lines += find_task(settings).notes([corpus for corpus, _ in corpora])
    for corpus, _ in corpora:
        lines += [f"{corpus.directory}: {corpus.lost}"] if find_task(settings).continues_text and corpus.loses_text else []
        lines += corpus.warnings()
    if find_task(settings).continues_text and settings.data.packing == "documents" and (
            start_token(corpora[0][0].tokenizer.special, "documents") is None or not settings.data.start_token):
        why = "the tokenizer has none" if settings.data.start_token else "data.start_token=false"
        lines.append(f"documents begin without a start token ({why}): their first token is not learnt, so an empty prompt "
                     "begins with anything")
    schedule, steps = settings.schedule, settings.train.steps or 0
    rest = steps - (schedule.decay_steps or steps)
    if schedule.name in ("linear", "cosine") and rest and schedule.final_ratio == 0:
        lines.append(f"WARNING: schedule.decay_steps={schedule.decay_steps}: the last {rest} steps have a learning rate of 0; "
                     "set schedule.final_ratio, or schedule.decay_steps=null")
    return lines


def _metadata(trainer: Trainer, stage: Stage) -> dict[str, Any]:
    tokenizer = stage.corpora[0][0].tokenizer
    return {"settings": to_dict(trainer.settings), "tokenizer": tokenizer.to_dict(), "tokenizer_digest": tokenizer.digest,
            "corpora": _digests(stage), "streams": list(stage.corpora[0][0].streams),
            "mesh": dict(trainer.mesh.shape), "versions": versions()} | stage.metadata()


def _digests(stage: Stage) -> list[list]:
    return [[corpus.digest, weight] for corpus, weight in stage.corpora]


def versions() -> dict[str, str]:
    """Versions of the packages whose numbers end up in a checkpoint."""
    packages = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {name: importlib.metadata.version(name) for name in packages}


def _last_evaluation(run_dir: str, step: int) -> dict[str, Any]:
    """The evaluation row that a finished run ended with, so that resuming it changes nothing."""
    rows = [row for row in read_metrics(run_dir) if "val_loss" in row and row["step"] <= step]
    return rows[-1] if rows else {}


def _finished_summary(run_dir: Location, steps: int) -> dict[str, Any] | None:
    """The summary of a run that had ended at `steps` before, with the times it took; None where it had not."""
    summary = read_summary(run_dir / "summary.json")
    return summary if summary and summary.get("steps") == steps else None


def _baseline_so_far(run_dir: Location) -> dict[str, Any]:
    """What `jaxlm evaluate --baseline` has added to the summary of an earlier end: the run's text is the same."""
    return {key: value for key, value in (read_summary(run_dir / "summary.json") or {}).items() if key == "baseline"}


def _summary(run: Run, trainer: Trainer, loop: Loop) -> dict[str, Any]:
    settings, clock, stage = trainer.settings, loop.clock, loop.stage.column().get("stage")
    rows = [row for row in read_metrics(settings.run_dir) if row.get("stage") == stage]
    times = [row["step_seconds"] for row in rows if row.get("step_seconds")]
    seconds = statistics.median(times) if times else None  # of the whole run, or the stage, also where it was interrupted
    steps = loop.last
    slots, tokens = clock.total_slots(steps), clock.tokens.total(steps)
    last = {"loss": loop.last_loss, "val_loss": loop.val_row}
    losses = plain({name: row[name] for name, row in last.items() if name in row})
    slots_per_second = seconds and clock.slots / seconds
    return plain({
        "steps": steps, "length": length_of(run.settings), "tokens": tokens, "slots": slots,
        "loss": losses.get("loss"), "val_loss": losses.get("val_loss"),
        **{name: value for name, value in loop.val_row.items() if name.startswith("val_")}, "best": loop.best,
        "diverged": None in losses.values(),
        "skipped_rows": loop.skipped_rows.count(steps),
        "tokens_per_second": seconds and tokens and slots_per_second * (tokens / slots), "slots_per_second": slots_per_second,
        "mfu": seconds and clock.mfu(seconds),
        "devices": trainer.mesh.size, "device_kind": trainer.mesh.devices.flatten()[0].device_kind,
        "mesh": dict(trainer.mesh.shape),
        "parameters": count_parameters(trainer.settings), "wall_seconds": loop.account.wall_seconds,
        "compile_seconds": loop.account.parts["compile"], "goodput": goodput(settings.run_dir),
    })
