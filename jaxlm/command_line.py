"""The words behind `jaxlm VERB`: which options a verb takes, and what is said of words that it does not take."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import advice, key_table
from jaxlm.errors import UserError, nearest
from jaxlm.near_misses import MISSING, NOT_YET, SAME_VALUE, TWO_VERBS, VERBS, normal, right_key
from jaxlm.settings import expand_home, sections

ALL_VERBS = ("prepare", "train", "evaluate", "predict", "generate", "import", "export", "bench", "plan", "report")
WITH_JSON = ("evaluate", "predict", "generate", "bench", "plan")
LOCAL_PROCESSES = ("train", "evaluate", "predict", "generate", "import", "export", "bench")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found '{text}'")
    return int(text)


SWITCH = {"action": "store_true"}


class Option(NamedTuple):
    """An option of some verbs; `settings` are argparse's."""

    name: str
    verbs: tuple[str, ...]
    help: str
    settings: dict[str, Any] = SWITCH

    @property
    def written(self) -> str:
        value = self.settings.get("metavar")
        return f"{self.name} {value}" if value else self.name


OPTIONS = (
    Option("--target", ("plan",), "cpu:8; TPUs by topology, v5p:4x4x4 or 2xv5e:16x16, or by the cloud's name, v5p-128; GPUs of a "
           "node x nodes, h100:8x4", {"metavar": "TARGET", "required": True}),
    Option("--fast", ("plan",), "estimate at once, without a compiler (docs/planning.md: how far off)"),
    Option("--search", ("plan",), "find the fastest mesh, micro-batches and remat that fit, and write them as a config here; "
           "takes minutes"),
    Option("--explain", ("plan",), "how every array is cut and what each product sends, not compiled"),
    Option("--picture", ("plan",), "also draw memory and times",
           {"metavar": "FILE.png", "type": lambda name: Path(expand_home(name))}),
    Option("--prompt", ("generate",), "a text to continue, as typed, in place of generate.prompts; may be repeated",
           {"metavar": "TEXT", "action": "append", "default": []}),
    Option("--baseline", ("evaluate",), "ngram: beside the model, what n-grams of orders 1 to 5 (Kneser-Ney, of the train "
           "split) make of the same tokens", {"metavar": "NAME", "choices": ("ngram",)}),
    Option("--restart", ("train",), "start again after a crash, a kill or a hang, from the newest checkpoint; give up after N "
           "restarts in a row without a new one", {"metavar": "N", "type": _positive}),
    Option("--processes", LOCAL_PROCESSES, "start N processes on this machine, joined into one run (default 1)",
           {"metavar": "N", "type": _positive, "default": 1}),
    Option("--compile-only", ("train",), "compile the step, leave it in devices.compiled, and end"),
    Option("--target", ("train",), "with --compile-only: for devices that are not here, as in `jaxlm plan`",
           {"metavar": "TARGET"}),
    Option("--json", WITH_JSON, "JSON on standard output, for scripts"),
)
ONE_OF = ("--fast", "--search", "--explain")  # at most
HELP = ("-h", "--help")


def options_of(verb: str) -> list[Option]:
    return [option for option in OPTIONS if verb in option.verbs]


def positionals_of(verb: str) -> list[tuple[str, str]]:
    """(word, what it is) of what stands behind the verb without dashes."""
    if verb == "report":
        return [("RUN_DIR ...", "one: writes its report.md; several: compares them, and draws comparison.png in the first")]
    first = {"import": ("FOLDER", "a model as transformers saves it: config.json, safetensors, the tokenizer's files"),
             "export": ("RUN_DIR", "the directory of a run")}
    keys = {"import": "run_dir=RUN_DIR mesh.fsdp=8", "export": "out=FOLDER max_shard=5GB mesh.fsdp=8"}
    return [first.get(verb, ("CONFIG.yaml|RUN_DIR", "a run file, or the directory of an earlier run")),
            ("KEY=VALUE ...", f"keys, for example {keys.get(verb, 'train.steps=100 mesh.fsdp=8')}")]


class _Parser(argparse.ArgumentParser):
    """One line instead of the usage text."""

    def error(self, message: str) -> None:
        raise UserError(f"{self.prog}: {message}; see jaxlm {self.prog} --help")


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=verb, add_help=False)
    parser.set_defaults(json=False)
    if verb == "report":
        parser.add_argument("runs", nargs="+", type=expand_home, metavar="RUN_DIR")
    else:
        parser.add_argument("config", type=expand_home, metavar=positionals_of(verb)[0][0].partition("|")[0])
        parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    one_of = parser.add_mutually_exclusive_group() if verb == "plan" else parser
    for option in options_of(verb):
        (one_of if option.name in ONE_OF else parser).add_argument(option.name, **option.settings)
    return parser


def parse(verb: str, arguments: Sequence[str]) -> argparse.Namespace:
    """What a verb was told. Raises UserError, with the right word where one is near."""
    if empty := next((argument for argument in arguments if argument.startswith("--") and argument.endswith("=--")), None):
        raise UserError(f"'{empty}': expected a value")  # before Python 3.13 argparse makes [] of it
    _refuse_unknown_options(verb, arguments)
    parsed = _parser(verb).parse_intermixed_args(arguments)
    if verb != "report" and "=" in parsed.config and not Path(parsed.config).exists():
        word = positionals_of(verb)[0][0].partition("|")[0]
        example = ", for example configs/quickstart.yaml" if word == "CONFIG.yaml" else ""
        raise UserError(f"{verb}: {word} is missing before '{parsed.config}'{example}")
    if prompts := getattr(parsed, "prompt", None):
        parsed.overrides = [*parsed.overrides, f"generate.prompts={json.dumps(_checked(prompts))}"]
    return parsed


def _checked(prompts: list[str]) -> list[str]:
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"--prompt {prompt!a}: not UTF-8 text") from None
    return prompts


def _refuse_unknown_options(verb: str, arguments: Sequence[str]) -> None:
    names = [option.name for option in options_of(verb)]
    for place, argument in enumerate(arguments):
        if argument == "--":
            return
        name = argument.partition("=")[0]
        if not re.fullmatch(r"-{1,2}[A-Za-z][\w.-]*", name) or any(known.startswith(name) for known in (*names, *HELP)):
            continue
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        value = argument.partition("=")[2] or ("" if following.startswith("-") or "=" in following else following)
        raise UserError(f"{verb}: {_about_option(verb, name, value, names)}; see jaxlm {verb} --help")


def _about_option(verb: str, name: str, value: str, names: Sequence[str]) -> str:
    """What to write instead of an option that the verb does not have."""
    others = [option for option in OPTIONS if option.name == name]
    if others:
        return f"{name} is an option of {', '.join(other for option in others for other in option.verbs)}"
    known = [key.name for key in key_table()]
    bare = name.lstrip("-")
    key, note = right_key(bare, known)
    namesakes = [full for full in known if full.rpartition(".")[2] == normal(bare).rpartition(".")[2]]
    if right := key or next(iter(namesakes), None):
        value = value if value and (not note or note in SAME_VALUE) else "..."
        return f"unknown option {name}; keys are set without dashes: {right}={value}" + (f" ({note.rstrip('.')})" if note else "")
    if normal(bare) in MISSING:
        return f"unknown option {name}; {note}"
    return f"unknown option {name}{nearest(name, names) or advice(normal(bare), known)}"


def about_verb(word: str) -> str:
    """What to say of a first word that is no verb."""
    verbs = ", ".join(ALL_VERBS)
    name = normal(word)
    if word.startswith("-"):
        return f"expected a verb before {word}, one of {verbs}; see jaxlm help"
    if word.endswith((".yaml", ".yml")) or Path(word).exists() or "://" in word:
        return f"'{word}': expected a verb before it, for example jaxlm train {word}; one of {verbs}"
    if "=" in word:
        return f"'{word}': expected a verb and a run file before it: jaxlm train CONFIG.yaml {word}"
    if name in NOT_YET:
        return f"unknown verb '{word}': nothing here {NOT_YET[name]} yet; there are {verbs}"
    near = TWO_VERBS.get(name) or (f"; did you mean '{VERBS[name]}'?" if name in VERBS else nearest(word, ALL_VERBS))
    if not near and (name in {prefix for prefix, _ in sections()} or name in {key.name for key in key_table()}):
        near = f"; for what this key is: jaxlm help {word}"
    return f"unknown verb '{word}', expected one of {verbs}{near}"
