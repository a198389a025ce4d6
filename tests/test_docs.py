"""What README and docs promise of their form: lines of at most 120 characters, links that lead somewhere, commands
that exist."""

import re
import shlex
from pathlib import Path

import pytest

from jaxlm.cli import ALL_VERBS
from jaxlm.config import Origin, load

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tpu_scripts/*.md")])
COMMAND = re.compile(r"^    (jaxlm .*?)(?:\s{2,}#.*)?$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    long = [number for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, f"{page.name}: lines over 120 characters: {long}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_commands_are_commands() -> None:
    """Line 23: every command that README shows is a verb, and every key in it can be set as it stands."""
    commands = COMMAND.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(commands) > 10
    for command in commands:
        _, verb, *rest = shlex.split(command)
        assert verb in ALL_VERBS, command
        overrides = [word for word in rest if "=" in word and not word.startswith("--")]
        load(str(ROOT / "configs/quickstart.yaml"), overrides, about=lambda init: Origin({}, None, None))


def test_readme_is_for_a_first_hour() -> None:
    """Line 23: short."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
