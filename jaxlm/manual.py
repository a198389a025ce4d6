"""`jaxlm help`: the verbs, the keys of a section, one key, as wide as the terminal is; docs/reference.md: all of it."""

import importlib.metadata
import json
import platform
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jaxlm
from jaxlm.command_line import ALL_VERBS, options_of, positionals_of
from jaxlm.config import Key, advice, key_table
from jaxlm.errors import UserError, nearest
from jaxlm.near_misses import VERBS, normal, right_key
from jaxlm.settings import Settings, sections

WIDE = 120  # columns, from which on keys are a table
EXIT_CODES = ("0 done, 1 failed, 2 bad input, 3 failed and would fail again, 75 hung, 130, 143 or 129 stopped by Ctrl-C, SIGTERM "
              "or a closed terminal (a run that trains has saved)")
TOP = "run"  # what the keys without a section are called
HOW_TO_SEE_KEYS = ("Keys: `jaxlm help` names their sections, `jaxlm help optimizer` shows one section, "
                   "`jaxlm help learning_rate` one key; docs/reference.md has all of them.")

HOW_KEYS_ARE_WRITTEN = (
    "In a run file they are nested, `optimizer: {learning_rate: 1e-3}`; on the command line they are written with dots, "
    "`optimizer.learning_rate=1e-3`, and win over the file. Text is taken as it stands. Numbers may be written 1000, 1_000, 1e3, "
    "1k, 2.5M or 5%, and bytes also 64MiB or 1GB. A list is written `[a, b]`, a mapping `{a: 1, b: 2}`.")


def width() -> int:
    """Columns of the terminal, or COLUMNS, or 80 where there is neither."""
    return max(shutil.get_terminal_size((80, 24)).columns, 40)


# ---- topics ----------------------------------------------------------------------------------------------------------

def show(topics: Sequence[str], summaries: Mapping[str, str]) -> str:
    """Help on these words, verbs, sections or keys; without any: the overview. Raises UserError for what is none."""
    if not topics:
        return overview(summaries)
    return "\n\n".join(_on(topic, summaries) for topic in topics)


def _on(topic: str, summaries: Mapping[str, str]) -> str:
    name = topic if topic in summaries else normal(topic.partition("=")[0])
    if name in summaries:  # train, generate and bench are sections, too
        pages = [verb_help(name, summaries[name]), *([section_help(name)] if name in section_names() else [])]
        return "\n\n".join(pages)
    if name in ("keys", "all"):
        return "\n\n".join(section_help(section) for section in section_names())
    if name in section_names():
        return section_help(name)
    keys, note = matching_keys(name)
    if keys:
        return "\n".join([*([note] if note else []), keys_help(keys)])
    if name in VERBS:
        return verb_help(VERBS[name], summaries[VERBS[name]])
    if note:
        raise UserError(f"no help for '{topic}': {note}")
    known = [key.name for key in key_table()]
    near = advice(name, known) if "." in name else nearest(name, [*ALL_VERBS, *section_names(), *(last(key) for key in known)])
    raise UserError(f"no help for '{topic}'{near or '; jaxlm help names the verbs and the sections of keys'}")


def topics_among(words: Sequence[str]) -> list[str]:
    """Those of a command's words that are keys or sections, to which its --help may belong."""
    names = [normal(word.partition("=")[0]) for word in words if not word.startswith("-")]
    return [name for name in names if name in section_names() or any(name in (key.name, last(key.name)) for key in key_table())]


def matching_keys(name: str) -> tuple[list[Key], str]:
    """Keys of that name or last name; else what it is called here, with a note; else those with the word in their
    names."""
    exact = [key for key in key_table() if name in (key.name, last(key.name))]
    if exact:
        return exact, ""
    right, note = right_key(name, [key.name for key in key_table()])
    if right:
        return [key for key in key_table() if key.name == right], f"{name}: here it is {right}. {note}".strip()
    within = re.compile(rf"(^|[._]){re.escape(name)}([._]|$)")
    return [key for key in key_table() if within.search(key.name)], note


def last(name: str) -> str:
    return name.rpartition(".")[2]


def section_names() -> list[str]:
    return [TOP, *(name for name, _ in sections())]


def keys_of(section: str) -> list[Key]:
    return [key for key in key_table() if (key.name.rpartition(".")[0] or TOP) == section]


# ---- pages -----------------------------------------------------------------------------------------------------------

def overview(summaries: Mapping[str, str]) -> str:
    """The verbs and the sections of keys, on one screen."""
    lines = ["usage: jaxlm VERB CONFIG.yaml|RUN_DIR [KEY=VALUE ...]", "       jaxlm report RUN_DIR ... | --version", ""]
    lines += [_indented(f"{verb:10}{summaries[verb]}", 2, 12) for verb in ALL_VERBS]
    lines += ["", "  jaxlm VERB --help   what a verb takes",
              "  jaxlm help WORD     keys of a section, or one key: jaxlm help learning_rate", "",
              _indented("Sections of keys: " + ", ".join(section_names()), 0, 2), "",
              _indented(f"Exit codes: {EXIT_CODES}", 0, 2)]
    return "\n".join(lines)


def verb_help(verb: str, summary: str) -> str:
    """What the verb does, its arguments and options."""
    options = options_of(verb)
    needed = [option.written for option in options if option.settings.get("required")]
    words = [word.replace("KEY=VALUE ...", "[KEY=VALUE ...]") for word, _ in positionals_of(verb)]
    usage = " ".join(["usage: jaxlm", verb, *words, *needed, *(["[options]"] if len(options) > len(needed) else [])])
    rows = [*positionals_of(verb), *((option.written, option.help) for option in options)]
    column = 4 + max(len(word) for word, _ in rows)
    lines = [_indented(usage, 0, 7), "", _indented(_sentence(summary), 0, 0), ""]
    lines += [_indented(f"{word:{column - 2}}{what}", 2, column) for word, what in rows]
    return "\n".join(lines if verb == "report" else [*lines, "", _indented(HOW_TO_SEE_KEYS, 0, 0)])


def section_help(section: str) -> str:
    about = dict(sections()).get(section, Settings).__doc__ or ""
    below = [name for name in section_names() if name.startswith(f"{section}.")]
    lines = [_indented(f"{section}: {' '.join(about.split())}", 0, 2)]
    if below:
        lines.append(_indented(f"see also: {', '.join(f'jaxlm help {name}' for name in below)}", 2, 4))
    return "\n".join([*lines, "", keys_help(keys_of(section))])


def keys_help(keys: Sequence[Key]) -> str:
    """A table where there is room for it, else a paragraph for each key."""
    return _table(keys) if width() >= WIDE else "\n".join(_paragraph(key) for key in keys)


def _paragraph(key: Key) -> str:
    kind = f"{key.type}{f', in {key.unit}' if key.unit and key.unit not in key.type else ''}"
    return "\n".join([f"{key.name}={written(key.default)}", _indented(kind, 4, 6), _indented(key.help, 4, 4)])


def _table(keys: Sequence[Key]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column, most in (("key", None), ("type", 30), ("default", 24), ("unit", None), ("meaning", None)):
        table.add_column(column, overflow="fold", no_wrap=column in ("key", "unit"), max_width=most)
    for key in keys:
        table.add_row(key.name, key.type, written(key.default), key.unit, key.help)
    console = Console(width=width(), color_system=None)
    with console.capture() as capture:
        console.print(table, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def written(value: Any) -> str:
    """A value as it stands behind `key=`."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _indented(text: str, first: int, rest: int) -> str:
    return textwrap.fill(text, width() - 1, initial_indent=" " * first, subsequent_indent=" " * rest, break_long_words=False,
                         break_on_hyphens=False)


# ---- the reference page ----------------------------------------------------------------------------------------------

def reference(summaries: Mapping[str, str]) -> str:
    """docs/reference.md."""
    lines = ["# Reference", "", "Made by `jaxlm help --markdown > docs/reference.md`; a test compares.", "", "## Verbs", "",
             "    jaxlm VERB CONFIG.yaml|RUN_DIR [KEY=VALUE ...]", "    jaxlm report RUN_DIR ...",
             "    jaxlm help [VERB|SECTION|KEY ...]", "    jaxlm --version", ""]
    for verb in ALL_VERBS:
        lines += [f"### jaxlm {verb}", "", *_filled(f"{_sentence(summaries[verb])}"), ""]
        for name, what in (*positionals_of(verb), *((option.written, option.help) for option in options_of(verb))):
            lines += _filled(f"- `{name}`: {what}")
        lines.append("")
    lines += [*_filled(f"Exit codes: {EXIT_CODES}."), "", "## Keys", "",
              *_filled(HOW_KEYS_ARE_WRITTEN), ""]
    for section in section_names():
        about = dict(sections()).get(section, Settings).__doc__ or ""
        lines += [f"### {section}", "", *_filled(about), ""]
        for key in keys_of(section):
            unit = f", in {key.unit}" if key.unit else ""
            lines += _filled(f"- **`{key.name}`** = `{written(key.default)}` ({key.type}{unit}): {key.help}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _filled(text: str) -> Iterator[str]:
    yield from textwrap.wrap(" ".join(text.split()), 119, subsequent_indent="  " if text.startswith("- ") else "",
                             break_long_words=False, break_on_hyphens=False)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


# ---- version ---------------------------------------------------------------------------------------------------------

def version() -> str:
    """jaxlm's version, and those of what a run's numbers depend on."""
    found = {name: _installed(name) or "not installed" for name in ("jax", "jaxlib", "flax")}
    plugins = sorted({f"{item.metadata['Name']} {item.version}" for item in importlib.metadata.distributions()
                      if re.fullmatch(r"libtpu|jax[-_].*(plugin|pjrt)|jax[-_]metal", item.metadata["Name"] or "")})
    return "\n".join([f"jaxlm {jaxlm.__version__}", *(f"{name} {number}" for name, number in found.items()),
                      f"Python {platform.python_version()}",
                      f"accelerators: {', '.join(plugins) or 'no plug-in installed; CPU only'}"])


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
