"""The front door: parse, call, print."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm import config
from jaxlm.errors import Preempted, RunError, UserError, nearest, without_secrets
from jaxlm.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.planning.targets import Target

KEY_TABLE_NOTE = "Every key, with its type, default, unit and meaning. Set it in CONFIG.yaml (nested), or as KEY=VALUE behind it."


def train(settings: Settings, arguments: argparse.Namespace) -> None:
    """train: prepare the corpus if need be, train, evaluate, write the run report; resume if RUN_DIR has checkpoints"""
    if arguments.target and not arguments.compile_only:
        raise UserError("--target: only with --compile-only; a run takes the devices that are here")
    if arguments.compile_only:
        if arguments.processes > 1:
            raise UserError("--compile-only is done by one process; leave --processes away")
        from jaxlm.planning.compilation import compile_ahead
        from jaxlm.planning.targets import find_target

        path = compile_ahead(settings, arguments.target and find_target(arguments.target))
        print(f"compiled: {path}; `jaxlm train` with these settings starts with it")
        return

    from jaxlm.generation.sampling import generate_from_run
    from jaxlm.parallel.distributed import is_main
    from jaxlm.reporting.files import as_path, write_text
    from jaxlm.reporting.report import write_report
    from jaxlm.training.loop import train

    summary = train(settings)
    samples = generate_from_run(settings) if settings.model.family == "gpt" else []
    if is_main():
        if samples:
            text = SEPARATOR.join(f"{sample.prompt}{sample.text}\n" for sample in samples)
            write_text(as_path(settings.run_dir) / "samples.txt", text)
            print(text)
        print(f"{settings.run_dir}: {_in_short(summary)}; see {write_report(settings.run_dir)}")


def prepare(settings: Settings, arguments: argparse.Namespace) -> None:
    """prepare: raw text to tokenizer and corpus"""
    from jaxlm.training.setup import open_corpora

    for corpus, _ in open_corpora(settings):
        for line in corpus.describe():
            print(line)


def evaluate(settings: Settings, arguments: argparse.Namespace) -> None:
    """evaluate: a checkpoint over the whole validation set"""
    from jaxlm.parallel.distributed import is_main
    from jaxlm.training.loop import evaluate_checkpoint

    row = evaluate_checkpoint(settings)
    if is_main():
        _print_figures(row, arguments.json)


def generate(settings: Settings, arguments: argparse.Namespace) -> None:
    """generate: continue generate.prompts with a checkpoint"""
    from jaxlm.generation.sampling import generate_from_run
    from jaxlm.parallel.distributed import is_main

    samples = generate_from_run(settings)
    if is_main():
        if arguments.json:
            print("\n".join(json.dumps(sample._asdict(), ensure_ascii=False) for sample in samples))
        else:
            print(SEPARATOR.join(f"{sample.prompt}{sample.text}\n" for sample in samples), end="")


def bench(settings: Settings, arguments: argparse.Namespace) -> None:
    """bench: time the training step on random tokens"""
    from jaxlm.parallel.distributed import is_main
    from jaxlm.training.bench import bench

    figures = bench(settings)
    if is_main():
        _print_figures(figures, arguments.json)


def plan(settings: Settings, arguments: argparse.Namespace) -> None:
    """plan: memory, traffic and speed on devices that are not here, from their own compiler"""
    from jaxlm.planning.describe import check_picture, describe, draw
    from jaxlm.planning.targets import find_target
    from jaxlm.planning.vocabulary import with_vocabulary

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of what XLA says beside an error; the error we tell ourselves
    target = find_target(arguments.target)
    if arguments.picture and (arguments.explain or arguments.search):
        raise UserError("--picture draws one plan; leave --explain or --search away")
    if arguments.explain and arguments.json:
        raise UserError("--explain is for people; leave --json away")
    if arguments.picture:
        check_picture(arguments.picture)
    settings, assumed = with_vocabulary(settings)
    if assumed:
        print(f"jaxlm: {assumed}", file=sys.stderr)
    if arguments.explain:
        from jaxlm.planning.explain import explain

        _console().print(explain(settings, target), highlight=False, soft_wrap=True)
        return
    if arguments.search:
        _search(settings, target, arguments, assumed)
        return
    if arguments.fast:
        from jaxlm.planning.estimate import estimated_plan

        made = estimated_plan(settings, target)
    else:
        from jaxlm.planning.compiled import compiled_plan

        made = compiled_plan(settings, target)
    made = made._replace(assumed=assumed)
    if arguments.json:
        print(json.dumps(made.to_json()))
    else:
        _console().print(describe(made), highlight=False)
    if arguments.picture:
        draw(made, arguments.picture)
        print(f"drawn: {arguments.picture}", file=sys.stderr)


def _search(settings: Settings, target: "Target", arguments: argparse.Namespace, assumed: str | None) -> None:
    from jaxlm.planning.search import ranking, search, write_config

    choices = search(settings, target, report=lambda line: print(line, file=sys.stderr, flush=True))
    best = choices[0].plan._replace(assumed=assumed)
    path = Path(f"{Path(arguments.config).stem}_{target.name.replace(':', '_')}.yaml")
    write_config(best, path, arguments.config)
    if arguments.json:
        print(json.dumps([choice.plan.to_json() | {"note": choice.note} for choice in choices]))
    else:
        _console().print(ranking(choices), highlight=False, soft_wrap=True)
    print(f"written to {path}", file=sys.stderr)


def report(run_dirs: Sequence[str]) -> None:
    """report: one page about a run, or a table that compares several"""
    from jaxlm.reporting.files import as_path, read_text
    from jaxlm.reporting.plots import plot_comparison
    from jaxlm.reporting.report import compare, write_report

    if len(run_dirs) == 1:
        path = write_report(run_dirs[0])
        print(read_text(path))
        print(f"written to {path}")
    else:
        _console().print(compare(run_dirs))
        picture = as_path(run_dirs[0]) / "comparison.png"
        plot_comparison(run_dirs, picture)
        print(f"loss curves: {picture}")


def _print_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        if isinstance(value, dict):
            value = " ".join(f"{axis}={size}" for axis, size in value.items())
        print(f"{name:20} {'not known' if value is None else f'{value:.6g}' if isinstance(value, float) else value}")


def _in_short(summary: dict[str, Any]) -> str:
    from jaxlm.reporting.units import format_count, format_duration

    figures = [f"{summary['steps']:,} steps in {format_duration(summary['wall_seconds'])}"]
    if summary["tokens_per_second"]:
        figures.append(f"{format_count(summary['tokens_per_second'])} tokens/s")
    if summary["val_loss"] is not None:
        figures.append(f"validation loss {summary['val_loss']:.4f}")
    if summary.get("skipped_rows"):
        figures.append(f"{summary['skipped_rows']:,} rows skipped")
    return ", ".join(figures)


def _console() -> "Console":
    """As wide as the terminal; wide enough for any table where there is none."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


VERBS: dict[str, Callable[[Settings, argparse.Namespace], None]] = {
    "train": train, "prepare": prepare, "evaluate": evaluate, "generate": generate, "bench": bench,
    "plan": plan}
SEPARATOR = "-" * 40 + "\n"  # between samples, which may themselves hold empty lines
EXIT_CODES = ("0 done, 1 failed, 2 bad input, 3 failed and would fail again, 75 hung, 130 or 143 stopped by Ctrl-C or SIGTERM "
              "(a run that trains has saved)")
ALL_VERBS = (*VERBS, "report")
RESUMED = ("train", "prepare")
LOCAL_PROCESSES = ("train", "evaluate", "generate", "bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `jaxlm ARGUMENTS`. Exit codes: see EXIT_CODES."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _failed(str(error), 2)
    except RunError as error:
        return _failed(str(error), error.exit_code)
    except Preempted as error:
        if str(error):
            print(f"jaxlm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds of it
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _failed(f"{error.filename}: {error.strerror}", 1)
    except KeyboardInterrupt:
        hint = "; the same command goes on where it was stopped" if arguments[0] in RESUMED else ""
        print(f"jaxlm: interrupted{hint}", file=sys.stderr)
        return 130


def _failed(message: str, code: int) -> int:
    """Says why, and leaves: at once where other processes wait for this one, which would wait for them."""
    line = without_secrets(" ".join(message.split()))  # a message may quote what a file holds: a terminal must not obey it
    print("jaxlm: " + "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line), file=sys.stderr)
    distributed = sys.modules.get("jaxlm.parallel.distributed")
    if distributed and distributed.has_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
        return 0
    if verb not in ALL_VERBS:
        raise UserError(f"unknown verb '{verb}', expected one of {', '.join(ALL_VERBS)}{nearest(verb, ALL_VERBS)}")
    if empty := next((argument for argument in arguments if argument.startswith("--") and argument.endswith("=--")), None):
        raise UserError(f"'{empty}': expected a value")  # before Python 3.13 argparse makes [] of it
    parsed = _parser(verb).parse_intermixed_args(arguments[1:])
    if verb == "report":
        report(parsed.runs)
        return 0
    settings = config.load(parsed.config, parsed.overrides)
    processes, restarts = getattr(parsed, "processes", 1), getattr(parsed, "restart", None)
    if (processes > 1 or restarts is not None) and not getattr(parsed, "compile_only", False):
        from jaxlm.training.supervisor import supervise

        arguments = [verb, parsed.config, *parsed.overrides, *(["--json"] if parsed.json else [])]
        return supervise(arguments, settings, processes, restarts or 0)
    VERBS[verb](settings, parsed)
    return 0


class _Parser(argparse.ArgumentParser):
    """One line instead of the usage text, and the keys' table behind --help."""

    def error(self, message: str) -> None:
        raise UserError(f"{self.prog.removeprefix('jaxlm ')}: {message}; see {self.prog} --help")

    def print_help(self, file=None) -> None:
        super().print_help(file)
        if self.prog != "jaxlm report":
            _print_keys()


def _parser(verb: str) -> argparse.ArgumentParser:
    if verb == "report":
        parser = _Parser(prog="jaxlm report", description=_summary_of(report))
        parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="one: writes its report.md; several: prints a table "
                            "and draws comparison.png in the first")
        return parser
    parser = _Parser(prog=f"jaxlm {verb}", description=_summary_of(VERBS[verb]))
    parser.add_argument("config", metavar="CONFIG.yaml", help="a run file, or the run directory of an earlier `jaxlm train`")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="for example train.steps=100 mesh.fsdp=8")
    if verb == "plan":
        _add_plan_options(parser)
    if verb in ("evaluate", "generate", "bench", "plan"):
        parser.add_argument("--json", action="store_true", help="JSON on standard output, for scripts")
    else:
        parser.set_defaults(json=False)
    if verb == "train":
        parser.add_argument("--compile-only", action="store_true", help="compile the step, leave it in devices.compiled, and end")
        parser.add_argument("--restart", type=_positive, metavar="N",
                            help="start again after a crash, a kill or a hang, from the newest checkpoint; give up after N "
                            "restarts in a row without a new one")
        parser.add_argument("--target", help="with --compile-only: for devices that are not here, as in `jaxlm plan`")
    if verb in LOCAL_PROCESSES:
        parser.add_argument("--processes", type=_positive, default=1, metavar="N",
                            help="start N processes on this machine, joined into one run (default 1)")
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="cpu:8; TPU slices by topology, v5p:4x4x4 or 2xv5e:16x16, or by the "
                        "cloud's name, v5p-128; GPUs of a node x nodes, h100:8x4")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fast", action="store_true",
                     help="estimate all of it at once, without a compiler (how far off it can be: docs/planning.md)")
    how.add_argument("--search", action="store_true",
                     help="find the mesh, micro-batches and remat that are predicted fastest and fit, and write them as a "
                     "config into this folder; compiles a few, which takes minutes")
    how.add_argument("--explain", action="store_true",
                     help="show how every array is cut and what each product sends, without compiling")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw memory and times")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found '{text}'")
    return int(text)


def _summary_of(function: Callable) -> str:
    return function.__doc__.partition(": ")[2].strip()


def _overview() -> str:
    lines = ["usage: jaxlm VERB CONFIG.yaml [KEY=VALUE ...]", "       jaxlm report RUN_DIR ...", ""]
    lines += [f"  {name:10} {_summary_of(function)}" for name, function in (*VERBS.items(), ("report", report))]
    lines += ["", "jaxlm VERB --help lists every key. Exit codes:", f"  {EXIT_CODES}"]
    return "\n".join(lines)


def _print_keys() -> None:
    from rich.table import Table

    table = Table(title=KEY_TABLE_NOTE, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    widths = {"key": None, "type": 40, "default": None, "unit": None, "meaning": None}
    for column, width in widths.items():
        table.add_column(column, overflow="fold", no_wrap=column == "key", max_width=width)
    for name, kind, default, unit, meaning in config.key_table():
        table.add_row(name, kind, json.dumps(default), unit, meaning)
    print()
    _console().print(table, markup=False, highlight=False)
