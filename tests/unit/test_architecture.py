"""Imports run one way: nodes, then nodes/host, then guidance; a node file imports no other node file."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK_FOLDERS = ("demo", "formats", "guidance", "nodes", "reports")
FILES = [path.relative_to(ROOT) for folder in PACK_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
NODE_FILES = [
    path
    for path in FILES
    if path.parent == Path("nodes") and "\nNODES" in (ROOT / path).read_text(encoding="utf-8")
]
HOST_ROOMS = frozenset(
    f"nodes/host/{name}" for name in ("engine", "autograd", "attention", "files", "methods")
)
BELOW_THE_HOST = frozenset({"guidance", "formats", "reports", "demo"})
ARROWS: dict[str, frozenset[str]] = {
    "guidance": frozenset(),
    "formats": frozenset({"guidance"}),
    "reports": frozenset({"guidance", "formats"}),
    "demo": frozenset(),
    "nodes/host": frozenset(),
    "nodes/host/engine": frozenset({"guidance", "reports"}),
    "nodes/host/autograd": frozenset({"guidance", "reports", "nodes/host/engine"}),
    "nodes/host/attention": frozenset({"guidance", "reports", "nodes/host/engine", "nodes/host/autograd"}),
    "nodes/host/files": frozenset({"guidance", "formats", "reports", "demo", "nodes/host/engine"}),
    "nodes/host/methods": BELOW_THE_HOST | HOST_ROOMS,
    "nodes": BELOW_THE_HOST | HOST_ROOMS,
}
"""Folders that each folder may import from. Folders of `guidance` are one room.

Those of `nodes/host` are not.
"""
HOST_PACKAGES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
}
TORCH_ONLY = {
    "guidance": {"torch", "torchvision", "numpy"},
    "formats": {"torch", "torchvision", "numpy", "safetensors", "PIL"},
    "reports": {"torch", "torchvision", "numpy", "PIL", "kornia"},
    "demo": {"torch", "numpy"},
}
"""The packages each room may use besides the standard library."""
NODES_MAY_USE_OF_THE_HOST = {"comfy_api.latest", "comfy.model_patcher", "comfy.sd"}
"""The node API, and the classes of what flows through nodes, for annotations."""
MOST_LINES = 250
"""Lines of a module. A longer one has more than one idea."""
LONGER_MODULES = {
    Path("demo/world.py"),
    Path("demo/artwork_world.py"),
    Path("guidance/safe_denoiser/patch_posterior.py"),
}
"""The descriptions of the demo worlds, lists of words and sentences made of them; and one module to split."""
MOST_FUNCTION_LINES = 60
"""Lines of a function. Functions that only list a node's inputs may be longer."""
LISTS_INPUTS = re.compile(r"define_schema|\w+_inputs")
NEVER = {"pickle", "dill", "shelve", "marshal", "eval", "exec", "compile", "__import__", "print"}


def imports(path: Path) -> Iterator[str]:
    """Yield the imports of a file as absolute names.

    The pack's own begin with a dot-free path such as "guidance.core.composition".
    """
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                ("pack", *package[: len(package) - node.level + 1], *([node.module] if node.module else []))
            )
            yield from (f"{base}.{alias.name}" if node.module is None else base for alias in node.names)


def room_of(path: Path) -> str:
    """Return the room of ARROWS that a file, given relative to ROOT, lies in."""
    return "/".join(path.parts[: min(3, len(path.parts) - 1)]) if path.parts[0] == "nodes" else path.parts[0]


def room_of_module(name: str) -> str:
    """Return the room of a module of the pack, such as "nodes.host.engine.run"."""
    path = Path(*name.split("."))
    return room_of(
        path
        if (ROOT / path).is_dir() and not (ROOT / path).with_suffix(".py").is_file()
        else path.with_suffix(".py")
    )


def own(names: Iterator[str]) -> set[str]:
    return {name.removeprefix("pack.") for name in names if name.startswith("pack.")}


def foreign(names: Iterator[str]) -> set[str]:
    """Return the imports that are neither the pack's own nor the standard library's."""
    return {
        name
        for name in names
        if not name.startswith("pack.") and name.split(".")[0] not in sys.stdlib_module_names
    }


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(path)
    reached = {room_of_module(name) for name in own(imports(ROOT / path))} - {room}
    assert reached <= ARROWS[room], f"{path} may not import from {sorted(reached - ARROWS[room])}"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in TORCH_ONLY], ids=str)
def test_mathematics_formats_and_reports_know_no_host(path: Path) -> None:
    assert {name.split(".")[0] for name in foreign(imports(ROOT / path))} <= TORCH_ONLY[room_of(path)]


@pytest.mark.parametrize("path", NODE_FILES, ids=str)
def test_a_node_file_is_thin(path: Path) -> None:
    names = list(imports(ROOT / path))
    assert not own(iter(names)) & {f"nodes.{other.stem}" for other in NODE_FILES}
    of_the_host = {name for name in foreign(iter(names)) if name.split(".")[0] in HOST_PACKAGES}
    assert of_the_host <= NODES_MAY_USE_OF_THE_HOST


@pytest.mark.parametrize("path", NODE_FILES, ids=str)
def test_a_node_class_is_named_by_its_id(path: Path) -> None:
    names = {}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "io.ComfyNode" for base in node.bases):
            found = re.search(r"node_id='SafeGuidance(\w+)'", ast.unparse(node))
            names[node.name] = found and f"{found[1]}Node"
    assert names and all(name == expected for name, expected in names.items()), names


def test_every_folder_of_the_pack_has_its_arrows() -> None:
    assert {room_of(path) for path in FILES} == set(ARROWS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_that_runs_foreign_code_or_prints(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not NEVER & (called | set(imports(ROOT / path)))


@pytest.mark.parametrize("path", [path for path in FILES if path not in LONGER_MODULES], ids=str)
def test_a_module_is_short(path: Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path} has {lines} lines: make modules of one idea each"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_are_short(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = [(f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions]
    long = [
        (name, lines)
        for name, lines in lengths
        if lines > MOST_FUNCTION_LINES and not LISTS_INPUTS.fullmatch(name)
    ]
    assert not long, f"{path}: make several functions of {long}"


def test_the_reader_of_imports_reads_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "nodes" / "host").mkdir(parents=True)
    file = tmp_path / "nodes" / "host" / "a.py"
    lines = (
        "import os, comfy.sd",
        "from . import b",
        "from .c import d",
        "from ...guidance import e",
        "from ...guidance.f import g",
    )
    file.write_text("\n".join(lines))
    assert set(imports(file)) == {
        "os",
        "comfy.sd",
        "pack.nodes.host.b",
        "pack.nodes.host.c",
        "pack.guidance",
        "pack.guidance.f",
    }
