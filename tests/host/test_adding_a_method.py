"""The page on adding a method works as printed: its files pass all checks in a copy of the pack."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding_a_method.md"
FILES = dict(
    re.findall(r"\*\*`([\w/.]+)`\*\*\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
)
COPIED = ("assets", "demo", "evaluation", "formats", "guidance", "nodes", "reports")
SINGLE_FILES = (
    "__init__.py",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/shared/network_watch/sitecustomize.py",
    "tests/unit/test_architecture.py",
    "tests/unit/test_language.py",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the pack with the page's files in it, registered as the page says."""
    root = tmp_path_factory.mktemp("pack")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*SINGLE_FILES, *FILES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(
            FILES[name] if name in FILES else (ROOT / name).read_text(encoding="utf-8"), encoding="utf-8"
        )
    extension = root / "nodes" / "extension.py"
    text = extension.read_text(encoding="utf-8")
    for opening in ("from . import (\n", "FAMILIES = (\n"):
        assert opening in text
        text = text.replace(opening, f"{opening}    perp_negative,\n")
    extension.write_text(text, encoding="utf-8")
    return root


def run(root: Path, *command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def test_the_page_has_every_file_of_a_method() -> None:
    assert {"/".join(Path(name).parts[:-1]) for name in FILES} == {
        "guidance",
        "nodes/host/methods",
        "nodes",
        "tests/unit",
        "tests/host",
    }


def test_ruff_and_mypy_accept_its_code(copy: Path) -> None:
    run(copy, "ruff", "check", *FILES)
    run(copy, "ruff", "format", "--check", *FILES)
    run(copy, "mypy", *FILES)


def test_its_code_follows_the_language_and_the_architecture(copy: Path) -> None:
    run(
        copy,
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "perp_negative",
        *(f for f in SINGLE_FILES if "unit" in f),
    )


@pytest.mark.skipif(
    "SAFE_GUIDANCE_HOST" not in os.environ,
    reason="no ComfyUI is known; run the tests with 'python3 dev.py test'",
)
def test_its_tests_pass(copy: Path) -> None:
    run(
        copy, "pytest", "-q", "-p", "no:cacheprovider", *(name for name in FILES if name.startswith("tests/"))
    )
