"""The project's language: verbs in docstrings, informative tooltips and help pages, no old dialect."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("demo", "evaluation", "formats", "guidance", "installer", "nodes", "reports", "tools")
CODE = [ROOT / "dev.py", *(path for folder in CODE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]
PROSE = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "web" / "docs").rglob("*.md")),
    *sorted((ROOT / "workflows").glob("*.json")),
    *sorted((ROOT / "subgraphs").glob("*.json")),
    ROOT / "locales" / "en" / "nodeDefs.json",
]
TRAINED_ON = '"a picture"'
"""Text that the bundled CLIP model was trained on, in the tool that made it."""
VERBS = frozenset(
    """
    accept act add advance allow analyse answer append apply approximate ask assemble assert assess
    attach average begin blend blur bound build cache calibrate call cap change charge check choose
    claim clamp classify clear clip collect combine come compare compose compute configure connect
    continue convert copy correct count create crop cut decide decode define delete derive describe
    detect difference differentiate dilate discard display distribute do download draw drive drop embed empty
    encode end enforce ensure enter estimate evaluate execute expand extract fail fall fetch fill filter
    find finish fit flatten forget format forward free gather generate get give group guide hand hash
    have hide hold identify import include initialise insert install interpolate interrupt invert
    iterate join judge keep label lay leave let limit list listen load locate lock log look lower make
    map mark mask measure merge mix move name normalise note open optimise orthogonalise pack pad paint
    parse pass pick place plot pool predict prepare press print process produce project promote protect
    prune publish push put raise read rebuild record reduce refuse register reject release remake
    remember remove render repeat replace report reproduce require rescale reserve reset resize resolve
    restore resume return reveal round run sample save say scale scan score search see select send
    separate serve set shape share shift show shrink shuffle shut sign simulate skip sort split spread
    start steer step stop store strip subtract sum summarise swap switch take tell test tile time total
    trace track train transform translate truncate try turn unlock unpack update use validate verify
    wait walk warn watch weight wrap write yield zero
    """.split()
)
"""First words that a function's docstring may have. Add a verb when a new one is needed; never a noun."""
LANGUAGES = ("en", "fr")
HELP = sorted((ROOT / "web" / "docs").glob("*.md"))
NOT_A_TITLE = re.compile(r"(What|How|Whether|Where|Which|Who|When|Why)\b")
DIALECT = {
    # Keys of files and reports, and values that saved workflows hold, keep their names.
    r"pictures?(?!\.[{0\"]|\":| \(sigma 9\))": "image",
    r"looks? first|looking first": "two-pass",
    r"(?<![\".])rehears\w+(?![\":=])": "two-pass, first pass",
    r"the things?": "subject",
    r"what is fine|are fine|is fine": "safe or neutral reference",
    r"under (the|a|its|that) node": "node message",
    r"in parts": "resume",
    r"doctor": "diagnostics",
    r"islands?": "differentiable layers",
    r"\w*studio\w*(?<!a studio)(?<!studios)": "in-process sampler",
    r"refused with a sentence": "raise a clear error",
    r"(is|are) the heart": "say what it is",
    r"who looks": "say what the input is",
    r"on the node's face": "visible inputs",
}
"""Expressions of the first version, and what the field says instead."""
FRENCH_DIALECT = {
    r"photos?": "image",
    r"(la|les|une|des) choses?": "sujet",
    r"est permis|sont permises": "référence sûre ou neutre",
    r"regarder d'abord": "deux passes",
    r"sous le nœud": "message du nœud",
}
"""The same in French."""
HELP_PARTS = (r"# .+", r"", r"[A-Z].+[.)*]", r"", r"!\[.+\]\(\S+\)")
"""First lines of a help page: the title, one paragraph of what and when, the image."""
SHORTEST_TOOLTIP = 25
"""Characters. Less says what an input is called, not what it does."""


def docstrings(kinds: tuple[type, ...], paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield the place and the first line of every docstring of some kinds of definition."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                yield place, text.splitlines()[0]


def verb(line: str) -> str:
    """Return the first word in lower case; British and American spellings of one verb are one."""
    return re.sub(r"ize$", "ise", re.split(r"[^A-Za-z]", line, maxsplit=1)[0].lower())


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_of_functions_begin_with_a_verb(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    wrong = [f"{place} {line}" for place, line in docstrings(kinds, [path]) if verb(line) not in VERBS]
    assert not wrong, "begin these with a verb in the imperative:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_of_classes_and_modules_are_no_riddles(path: Path) -> None:
    found = docstrings((ast.Module, ast.ClassDef), [path])
    wrong = [f"{place} {line}" for place, line in found if NOT_A_TITLE.match(line)]
    assert not wrong, "say what it is or does:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", [*PROSE, *CODE], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_of_the_old_dialect(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace(TRAINED_ON, "")
    wrong = []
    for pattern, better in DIALECT.items():
        for match in re.finditer(rf"\b({pattern})\b", text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            wrong.append(f"{path.relative_to(ROOT)}:{line} '{match.group()}': say {better}")
    assert not wrong, "\n".join(wrong)


def tooltips(language: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every input's tooltip; the text is empty where there is none."""
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for node, texts in nodes.items():
        for name, entry in texts.get("inputs", {}).items():
            yield f"{node}.{name}", entry.get("tooltip", "")


@pytest.mark.parametrize("language", LANGUAGES)
def test_tooltips_have_room_to_say_something(language: str) -> None:
    short = [f"{place}: '{text}'" for place, text in tooltips(language) if len(text) < SHORTEST_TOOLTIP]
    assert not short, "say what it is, what a higher value does, a value to start with:\n" + "\n".join(short)


@pytest.mark.parametrize("language", LANGUAGES)
def test_tooltips_are_whole_sentences(language: str) -> None:
    wrong = [f"{place}: '{text}'" for place, text in tooltips(language) if not text.endswith(".")]
    assert not wrong, "end these with a full stop:\n" + "\n".join(wrong)


def test_no_word_of_the_old_dialect_in_french() -> None:
    text = (ROOT / "locales" / "fr" / "nodeDefs.json").read_text(encoding="utf-8")
    found = {
        f"'{match.group()}': say {better}"
        for pattern, better in FRENCH_DIALECT.items()
        for match in re.finditer(rf"\b({pattern})\b", text, re.IGNORECASE)
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("path", HELP, ids=lambda path: path.stem)
def test_a_help_page_has_the_parts_in_order(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, (pattern, line) in enumerate(zip(HELP_PARTS, lines), 1):
        assert re.fullmatch(pattern, line), (
            f"{path.name}:{number} '{line}': a title, one paragraph, the image"
        )
    text = "\n".join(lines)
    inputs = "| input | what it does | start with |\n" in text or "The node has no inputs." in text
    assert inputs, f"{path.name} has no table '| input | what it does | start with |'"
    bullets = [line for line in lines if re.match(r"- \*\*\w+\*\*: \*(More|Less|Try first)", line)]
    assert not bullets, "put inputs into the table:\n" + "\n".join(bullets)


def test_the_files_of_this_test_are_those_of_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a checkout of git")
    folders = {name.split("/")[0] for name in listed if "/" in name}
    assert folders <= {*CODE_FOLDERS, "tests"}
