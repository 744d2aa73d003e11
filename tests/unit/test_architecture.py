"""Imports run one way: nodes, then nodes/host, then guidance; a node file imports no other node file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MATHEMATICS = sorted((ROOT / "guidance").glob("*.py"))
NODE_FILES = [path for path in sorted((ROOT / "nodes").glob("*.py")) if "\nNODES" in path.read_text(encoding="utf-8")]
HOST_FILES = sorted((ROOT / "nodes" / "host").glob("*.py"))
HOST_PACKAGES = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview", "nodes", "server"}
MATHEMATICS_MAY_USE = {"torch", "torchvision", "numpy", "safetensors", "PIL"}
NODES_MAY_USE_OF_THE_HOST = {"comfy_api.latest", "comfy.model_patcher", "comfy.sd"}
"""The node API, and the classes of what flows through nodes, for annotations."""
NEVER = {"pickle", "dill", "shelve", "marshal", "eval", "exec", "compile", "__import__", "print"}


def imports(path: Path) -> Iterator[str]:
    """What a file imports, as absolute names; the pack's own begin with a dot-free path such as "guidance.composition"."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(("pack", *package[: len(package) - node.level + 1], *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" if node.module is None else base for alias in node.names)


def own(names: Iterator[str]) -> set[str]:
    return {name.removeprefix("pack.") for name in names if name.startswith("pack.")}


def foreign(names: Iterator[str]) -> set[str]:
    """Imports that are neither the pack's own nor the standard library's."""
    return {name for name in names if not name.startswith("pack.") and name.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda path: path.stem)
def test_mathematics_knows_neither_the_host_nor_the_rooms_above(path: Path) -> None:
    names = list(imports(path))
    assert all(name.startswith("guidance") for name in own(iter(names)))
    assert {name.split(".")[0] for name in foreign(iter(names))} <= MATHEMATICS_MAY_USE


@pytest.mark.parametrize("path", NODE_FILES, ids=lambda path: path.stem)
def test_a_node_file_is_thin(path: Path) -> None:
    names = list(imports(path))
    assert not own(iter(names)) & {f"nodes.{other.stem}" for other in NODE_FILES}
    assert [name for name in own(iter(names)) if name.split(".")[0] not in ("guidance", "nodes")] == []
    of_the_host = {name for name in foreign(iter(names)) if name.split(".")[0] in HOST_PACKAGES}
    assert of_the_host <= NODES_MAY_USE_OF_THE_HOST


@pytest.mark.parametrize("path", HOST_FILES, ids=lambda path: path.stem)
def test_the_hosts_rooms_do_not_know_the_nodes(path: Path) -> None:
    names = own(imports(path))
    assert [name for name in names if name.split(".")[0] != "guidance" and not name.startswith("nodes.host")] == []


@pytest.mark.parametrize("path", [*MATHEMATICS, *NODE_FILES, *HOST_FILES], ids=lambda path: path.stem)
def test_nothing_that_runs_foreign_code_or_prints(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not NEVER & (called | set(imports(path)))


def test_the_reader_of_imports_reads_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "nodes" / "host").mkdir(parents=True)
    file = tmp_path / "nodes" / "host" / "a.py"
    lines = ("import os, comfy.sd", "from . import b", "from .c import d", "from ...guidance import e", "from ...guidance.f import g")
    file.write_text("\n".join(lines))
    assert set(imports(file)) == {"os", "comfy.sd", "pack.nodes.host.b", "pack.nodes.host.c", "pack.guidance", "pack.guidance.f"}
