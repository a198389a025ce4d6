"""The front door: parse, call, print."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm import config, manual
from jaxlm.command_line import ALL_VERBS, HELP, about_verb, parse
from jaxlm.console.progress import optional, print_line
from jaxlm.errors import LostProcess, Preempted, RunError, UserError, reason, without_secrets
from jaxlm.safety.launcher import COORDINATOR, NUM_PROCESSES, PROCESS_ID, is_follower, let_the_first_speak
from jaxlm.settings import Settings
from jaxlm.storage.files import json_text

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.planning.targets import Target


def train(settings: Settings, arguments: argparse.Namespace) -> None:
    """train: prepare the corpus if need be, train, evaluate, write the run report; resume if RUN_DIR has checkpoints"""
    if arguments.target and not arguments.compile_only:
        raise UserError("--target: only with --compile-only; a run takes the devices that are here")
    if arguments.compile_only:
        if arguments.processes > 1:
            raise UserError("--compile-only is done by one process; leave --processes away")
        from jaxlm.planning.lowering import compile_ahead
        from jaxlm.planning.targets import find_target

        paths = compile_ahead(settings, arguments.target and find_target(arguments.target))
        print(f"compiled: {', '.join(map(str, paths))}; `jaxlm train` with these settings starts with it")
        return

    from jaxlm.interop.importing import open_weights
    from jaxlm.runtime.processes import is_main
    from jaxlm.serving.samples import make_sampler
    from jaxlm.serving.sampling import generate_from_run
    from jaxlm.tasks.find import find_task
    from jaxlm.training.run import train

    summary, samples = train(settings, make_sampler, open_weights), []
    with optional("the run is finished, but has no samples"):
        samples = generate_from_run(settings) if find_task(settings).continues_text else []
    if is_main():
        _tell_the_end(settings, summary, SEPARATOR.join(f"{sample.marked()}\n" for sample in samples))


def _tell_the_end(settings: Settings, summary: dict[str, Any], samples: str) -> None:
    """Samples, report and figures of a run that is finished and saved, whatever becomes of these."""
    from jaxlm.reporting.report import write_report
    from jaxlm.storage.files import as_path, write_text

    line = f"{settings.run_dir}: {_in_short(summary)}"
    if samples:
        with optional("the run is finished, but its samples.txt is not written"):
            write_text(as_path(settings.run_dir) / "samples.txt", samples)
    with optional("the run is finished, but its report is not written"):
        line += f"; see {write_report(settings.run_dir)}"
    with optional("the run is finished, but what it shows cannot be"):
        print(*([samples] if samples else []), line, sep="\n", flush=True)
        if settings.logging.tensorboard:
            _say(f"curves: {_words('tensorboard', '--logdir', settings.run_dir)} (pip install tensorboard)")
        _say_next(*(_how_to_use(settings) or ["evaluate", settings.run_dir]))


def _how_to_use(settings: Settings) -> list[str]:
    """The command that makes something of a trained model; []: there is none."""
    from jaxlm.tasks.find import find_task

    task = find_task(settings)
    if task.answers_records:
        return ["predict", settings.run_dir, "data.raw=FILE"]
    return ["generate", settings.run_dir, "--prompt", "TEXT"] if task.continues_text else []


def prepare(settings: Settings, arguments: argparse.Namespace) -> None:
    """prepare: raw text to tokenizer and corpus"""
    from jaxlm.checks import check_held_out
    from jaxlm.data.description import describe
    from jaxlm.training.corpora import open_corpora
    from jaxlm.training.stages import prepare_stages

    check_held_out(settings)
    mixtures = prepare_stages(settings) if settings.stages else [open_corpora(settings, list, notes=False)]
    for corpus in {str(corpus.directory): corpus for corpora in mixtures for corpus, _ in corpora}.values():
        for line in describe(corpus, settings):
            print(line)
    _say_next("train", arguments.config, *arguments.overrides)


def evaluate(settings: Settings, arguments: argparse.Namespace) -> None:
    """evaluate: a checkpoint over the whole validation set"""
    from jaxlm.runtime.processes import is_main
    from jaxlm.training.evaluating import evaluate_checkpoint

    row = evaluate_checkpoint(settings, with_baseline=arguments.baseline is not None)
    if is_main():
        baseline = {} if arguments.json else row.pop("baseline", {})
        _print_figures(row, arguments.json)
        _print_baseline(baseline)
        _say_next(*(_how_to_use(settings) or ["report", settings.run_dir]))


def predict(settings: Settings, arguments: argparse.Namespace) -> None:
    """predict: what a checkpoint says of each record of data.raw, into predictions.jsonl"""
    from jaxlm.console.units import counted
    from jaxlm.runtime.processes import is_main
    from jaxlm.serving.predicting import predict

    if not any(override.startswith("data.raw=") for override in arguments.overrides):
        raise UserError("predict: name the file of records, data.raw=FILE (the run's own data.raw is what it learned from)")
    found = predict(settings)
    if is_main():
        if arguments.json:
            print(json_text(found._asdict() | {"path": str(found.path)}))
        else:
            cut = f", of which {found.truncated:,} lost their end (data.sequence_length={settings.data.sequence_length})"
            print(f"{found.path}: {counted(found.records, 'record')}{cut if found.truncated else ''}")
        _say_next("evaluate", settings.run_dir, "data.raw=LABELLED_FILE")


def generate(settings: Settings, arguments: argparse.Namespace) -> None:
    """generate: continue generate.prompts with a checkpoint"""
    from jaxlm.runtime.processes import is_main
    from jaxlm.serving.sampling import generate_from_run

    samples = generate_from_run(settings)
    if is_main():
        if arguments.json:
            print("\n".join(json.dumps(sample._asdict()) for sample in samples))
        else:
            print(SEPARATOR.join(f"{sample.marked()}\n" for sample in samples), end="")
        _say_next("evaluate", settings.run_dir)


def import_(settings: Settings, arguments: argparse.Namespace) -> None:
    """import: a Hugging Face folder to a run directory"""
    from jaxlm.interop.importing import import_folder
    from jaxlm.runtime.processes import is_main

    import_folder(arguments.config, settings)
    if is_main():
        _say_next(*(["generate", settings.run_dir, "--prompt", "TEXT"] if settings.task.name == "causal_lm" else
                    ["evaluate", settings.run_dir, "data.raw=TEXT"]))


def export(settings: Settings, arguments: argparse.Namespace) -> None:
    """export: a run directory to a Hugging Face folder"""
    from jaxlm.interop.exporting import export_run

    export_run(settings)


def bench(settings: Settings, arguments: argparse.Namespace) -> None:
    """bench: time the training step on random tokens"""
    from jaxlm.runtime.processes import is_main
    from jaxlm.training.bench import bench

    figures = bench(settings)
    if is_main():
        _print_figures(figures, arguments.json)
        _say_next("train", arguments.config, *arguments.overrides)


def plan(settings: Settings, arguments: argparse.Namespace) -> None:
    """plan: memory, traffic and speed on devices that are not here, from their own compiler"""
    from jaxlm.planning.describe import check_picture, describe, draw
    from jaxlm.planning.planned_stage import to_plan
    from jaxlm.planning.targets import find_target

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of what XLA says beside an error; the error we tell ourselves
    target = find_target(arguments.target)
    if arguments.picture and (arguments.explain or arguments.search):
        raise UserError("--picture draws one plan; leave --explain or --search away")
    if arguments.explain and arguments.json:
        raise UserError("--explain is for people; leave --json away")
    if arguments.picture:
        check_picture(arguments.picture)
    settings, assumed = to_plan(settings, target)
    if assumed:
        print(f"jaxlm: {assumed}", file=sys.stderr)
    if arguments.explain:
        from jaxlm.planning.explain import explain

        _console().print(explain(settings, target), highlight=False, soft_wrap=True)
        _say_next("plan", arguments.config, *arguments.overrides, "--target", arguments.target)
        return
    if arguments.search:
        _search(settings, target, arguments, assumed)
        return
    if arguments.fast:
        from jaxlm.planning.estimated_plan import estimated_plan

        made = estimated_plan(settings, target)
    else:
        from jaxlm.planning.compiled_plan import compiled_plan

        made = compiled_plan(settings, target)
    made = made._replace(assumed=assumed)
    if arguments.json:
        print(json_text(made.to_json()))
    else:
        _console().print(describe(made), highlight=False)
    if arguments.picture:
        draw(made, arguments.picture)
        print(f"drawn: {arguments.picture}", file=sys.stderr)
    if made.fits is False:
        _say_next("plan", arguments.config, *arguments.overrides, "--target", arguments.target, "--search")
    else:
        text = [] if settings.data.raw or settings.data.corpus else ["data.raw=TEXT"]
        _say_next("train", arguments.config, *arguments.overrides, *text)


def _search(settings: Settings, target: "Target", arguments: argparse.Namespace, assumed: str | None) -> None:
    from jaxlm.planning.search import ranking, search, write_config

    choices = search(settings, target, report=lambda line: print(line, file=sys.stderr, flush=True))
    best = choices[0].plan._replace(assumed=assumed)
    path = Path(f"{Path(arguments.config).stem}_{target.name.replace(':', '_')}.yaml")
    write_config(best, path, arguments.config)
    if arguments.json:
        print(json_text([choice.plan.to_json() | {"note": choice.note} for choice in choices]))
    else:
        _console().print(ranking(choices), highlight=False, soft_wrap=True)
    print(f"written to {path}", file=sys.stderr)
    _say_next("train", str(path))


def report(run_dirs: Sequence[str]) -> None:
    """report: one page about a run, or a table that compares several"""
    from jaxlm.reporting.plots import plot_comparison
    from jaxlm.reporting.report import compare, fitted, write_report
    from jaxlm.storage.files import as_path, read_text

    if len(run_dirs) == 1:
        path = write_report(run_dirs[0])
        print(read_text(path))
        print(f"written to {path}")
        _say_next("report", run_dirs[0], "OTHER_RUN")
    else:
        _console().print(fitted(compare(run_dirs), manual.width()))
        picture = as_path(run_dirs[0]) / "comparison.png"
        plot_comparison(run_dirs, picture)
        print(f"loss curves: {picture}")
        _say_next("report", run_dirs[0])


def _print_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_text(figures))
        return
    for name, value in figures.items():
        if isinstance(value, dict):
            value = " ".join(f"{axis}={size}" for axis, size in value.items())
        print(f"{name:20} {_shown(value)}")


def _print_baseline(baseline: dict[str, dict[str, float | None]]) -> None:
    """One line for each yardstick, its figures in columns."""
    columns = list(next(iter(baseline.values()), {}))
    if columns:
        print(f"\n{'baseline':20}" + "".join(f" {name.replace('_', ' '):>14}" for name in columns))
    for name, figures in baseline.items():
        print(f"{name:20}" + "".join(f" {_shown(figures[key]):>14}" for key in columns))


def _shown(value: Any) -> str:
    """A figure for people."""
    return "not known" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _say_next(*words: str) -> None:
    """The last line of a verb: the command that comes next. On standard error: standard output is for what was asked
    for."""
    _say(f"next: {_words('jaxlm', *words)}")


def _say(line: str) -> None:
    if sys.stdout:
        sys.stdout.flush()  # so that it stands below what it is about, also where both go into one file
    print(line, file=sys.stderr)


def _words(*words: str) -> str:
    """A command as it can be pasted into a shell."""
    return shlex.join(map(str, words))


def _in_short(summary: dict[str, Any]) -> str:
    from jaxlm.console.units import format_count, format_duration
    from jaxlm.reporting.runs import best_told

    figures = [f"{summary['steps']:,} steps in {format_duration(summary['wall_seconds'])}"]
    if summary["tokens_per_second"]:
        figures.append(f"{format_count(summary['tokens_per_second'])} tokens/s")
    if summary["val_loss"] is not None:
        figures.append(f"validation loss {summary['val_loss']:.4f}")
    if best := best_told(summary.get("best")):
        figures.append(f"best {best} (checkpoint.step={summary['best']['step']})")
    if summary.get("skipped_rows"):
        figures.append(f"{summary['skipped_rows']:,} rows skipped")
    return ", ".join(figures)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=manual.width())


VERBS: dict[str, Callable[[Settings, argparse.Namespace], None]] = {
    "train": train, "prepare": prepare, "evaluate": evaluate, "predict": predict, "generate": generate, "import": import_,
    "export": export, "bench": bench, "plan": plan}
SUMMARIES = {
    "train": "prepare if need be, train, evaluate, report; go on in a RUN_DIR",
    "prepare": "raw text to tokenizer and corpus",
    "evaluate": "a checkpoint over the whole validation set",
    "predict": "what a checkpoint says of each record: predictions.jsonl",
    "generate": "continue generate.prompts with a checkpoint",
    "import": "a Hugging Face folder to a run directory",
    "export": "a run to a Hugging Face folder that says the same, proven",
    "bench": "time the training step on random tokens",
    "plan": "memory, traffic, speed on devices elsewhere, by their compiler",
    "report": "one page about a run, or a table that compares several",
}
SEPARATOR = "-" * 40 + "\n"  # between samples, which may themselves hold empty lines
RESUMED = ("train", "prepare")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `jaxlm ARGUMENTS`. Exit codes: see jaxlm.manual.EXIT_CODES."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        _settle_log()
        return code
    except UserError as error:
        if is_follower():
            let_the_first_speak()
        return _failed(str(error), 2)
    except LostProcess as error:
        let_the_first_speak()
        return _failed(str(error), error.exit_code)
    except RunError as error:
        return _failed(str(error), error.exit_code)
    except Preempted as error:
        if str(error):
            print_line(f"jaxlm: {error}")
        _settle_log()
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _failed(f"the current folder has been removed; cd to one that is there ({reason(error)})" if _is_nowhere()
                       else reason(error), 1)
    except KeyboardInterrupt:
        hint = "; the same command goes on where it was stopped" if arguments[0] in RESUMED else ""
        print_line(f"jaxlm: interrupted{hint}")
        return 130


def _failed(message: str, code: int) -> int:
    """Says why, and leaves: at once where other processes wait for this one, which would wait for them."""
    line = without_secrets(" ".join(message.split()))  # a message may quote what a file holds: a terminal must not obey it
    line = "jaxlm: " + "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    if code == 2:
        _settle_log(refused=True)
    joined = sys.modules.get("jaxlm.runtime.processes")
    if joined and joined.has_joined():
        from jaxlm.runtime.runtime_log import leave

        leave(line, code)
    print_line(line)
    return code


def _settle_log(refused: bool = False) -> None:
    """Of one of several processes, which ends well or has refused its input."""
    if log := sys.modules.get("jaxlm.runtime.runtime_log"):
        log.settle(refused)


def _is_nowhere() -> bool:
    try:
        return not os.getcwd()
    except FileNotFoundError:
        return True


def _run(arguments: list[str]) -> int:
    verb, words = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if verb in (*HELP, "help", "--version", "-V", "version"):
        print(_about(verb, words))
        return 0
    if verb not in ALL_VERBS:
        raise UserError(about_verb(verb))
    if any(word in HELP for word in words):
        topics = manual.topics_among(words)
        print(manual.show(topics, SUMMARIES) if topics else manual.verb_help(verb, SUMMARIES[verb]))
        return 0
    parsed = parse(verb, words)
    if verb == "report":
        report(parsed.runs)
        return 0
    settings = _settings_of(verb, parsed)
    processes, restarts = getattr(parsed, "processes", 1), getattr(parsed, "restart", None)
    if (processes > 1 or restarts is not None) and not getattr(parsed, "compile_only", False):
        from jaxlm.checkpoints.manifest import newest_step
        from jaxlm.safety.supervisor import supervise

        given = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if name in os.environ]
        if given and processes > 1:
            raise UserError(f"--processes {processes} starts a run of its own here, and {given[0]} is set; unset it, or "
                            "leave --processes away")
        baseline = getattr(parsed, "baseline", None)
        arguments = [verb, parsed.config, *parsed.overrides, *(["--json"] if parsed.json else []),
                     *(["--baseline", baseline] if baseline else [])]
        return supervise(arguments, settings, processes, restarts or 0, newest_step)
    if verb != "plan":  # which needs JAX only where it compiles
        _import_jax()
    VERBS[verb](settings, parsed)
    return 0


def _settings_of(verb: str, parsed: argparse.Namespace) -> Settings:
    """Of a run file or a run directory; for `import`, of the model's own config.json."""
    if verb != "import":
        return config.load(parsed.config, parsed.overrides, _about_origin)
    from jaxlm.interop.source import import_settings

    return import_settings(parsed.config, parsed.overrides)


def _about_origin(place: str) -> config.Origin:
    from jaxlm.interop.source import about_place

    return about_place(place)


def _import_jax() -> None:
    """JAX reads its environment variables when it is imported, and raises what it cannot read."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise UserError(f"JAX does not start: {reason(error)}; mend or unset that variable") from None


def _about(verb: str, words: list[str]) -> str:
    """What `help`, `--help` and `--version` print."""
    if verb in ("--version", "-V", "version"):
        return manual.version()
    if words == ["--markdown"]:
        return manual.reference(SUMMARIES).rstrip()
    return manual.show([word for word in words if word not in HELP], SUMMARIES)
