"""dev.py: its command lines, those that the documentation names, and the module search path."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest

from developer_modules import ROOT, dev

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "web" / "docs").rglob("*.md")),
]
NAMES = {"study": dev.STUDIES, "make": dev.GENERATED}


def documented_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the page and the words of every dev.py command in code."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = [line for line in text.splitlines() if line.startswith("    ")]
        code += re.findall(r"`([^`]+)`", text)
        for snippet in code:
            for command in re.findall(r"\bdev\.py ([a-z][^#`]*)", snippet):
                yield str(page.relative_to(ROOT)), command.split()


def parse_documented(words: list[str]) -> None:
    """Parse a command line with the parser that would read it. Raises SystemExit when it does not fit."""
    from safe_guidance.evaluation import demo, soak
    from safe_guidance.evaluation.benches import cli
    from safe_guidance.evaluation.fuzz import cli as fuzz

    command, arguments = dev.parse(words)
    if command in NAMES:
        dev.parse_name(command, NAMES[command], arguments)
    elif command == "demo":
        demo.parser().parse_args(arguments)
    elif command == "bench":
        cli.parser().parse_args(arguments)
    elif command == "fuzz":
        fuzz.parser().parse_args(arguments)
    elif command == "soak":
        soak.parser().parse_args(arguments)


@pytest.mark.parametrize(("page", "words"), sorted(documented_commands()), ids=str)
def test_every_documented_command_is_accepted(page: str, words: list[str]) -> None:
    parse_documented(words)


def test_arguments_reach_the_command_untouched() -> None:
    arguments = ["-h", "--size", "3", "--", "x", "-k", "a or b"]
    for command in ("demo", "test", "bench"):
        assert dev.parse([command, *arguments]) == (command, arguments)
    assert dev.parse(["serve"]) == ("serve", [])


def test_a_test_run_can_name_its_host() -> None:
    assert dev.split_leg("test", ["-k", "a"]) == ("pinned", ["-k", "a"])
    assert dev.split_leg("test", ["--host", "lowest", "-k", "a"]) == ("lowest", ["-k", "a"])
    assert dev.split_leg("demo", ["--host", "x"]) == ("pinned", ["--host", "x"])
    for leg in ("lowest", "newest-frontend"):
        _, paths = dev.split_leg("test", ["--host", leg])
        assert paths and all((ROOT / path).exists() for path in paths)
    with pytest.raises(SystemExit):
        dev.split_leg("test", ["--host", "newest"])


@pytest.mark.parametrize("words", [["demo", "--fast"], ["study", "none"], ["make", "pictures"], ["fly"]])
def test_the_check_of_documented_commands_notices_mistakes(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_documented(words)


@pytest.mark.parametrize("argv", [[], ["dance"], ["serve", "--what"]])
def test_unknown_command_lines_are_rejected(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        dev.parse(argv)
    assert error.value.code == 2


def test_the_root_is_removed_from_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(dev.ROOT), *sys.path])
    dev.keep_root_off_path()
    assert str(dev.ROOT) not in sys.path
