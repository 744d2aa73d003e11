"""The page on adding a method works as printed: its files are put into a copy of the pack, and its tests are run there."""

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
COPIED = ("guidance", "nodes", "evaluation", "assets")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack with the page's files in it, its modules named where the page says."""
    root = tmp_path_factory.mktemp("pack")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "pyproject.toml", "tests/conftest.py", *FILES):
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


def test_the_page_has_all_the_files_of_a_method() -> None:
    assert {"/".join(Path(name).parts[:-1]) for name in FILES} == {
        "guidance",
        "nodes/host",
        "nodes",
        "tests/unit",
        "tests/host",
    }


def test_its_code_has_this_repositorys_form(copy: Path) -> None:
    run(copy, "ruff", "check", *FILES)
    run(copy, "ruff", "format", "--check", *FILES)


@pytest.mark.skipif(
    "SAFE_GUIDANCE_HOST" not in os.environ,
    reason="no ComfyUI is known; run the tests with 'python3 dev.py test'",
)
def test_its_tests_pass(copy: Path) -> None:
    run(
        copy, "pytest", "-q", "-p", "no:cacheprovider", *(name for name in FILES if name.startswith("tests/"))
    )
