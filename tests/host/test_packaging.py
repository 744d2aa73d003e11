"""The package for the registry: metadata that its tools read, and only the files that a user needs.

What loading them costs.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pathspec
import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEEDED = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "__init__.py"}
NEEDED_FOLDERS = {"assets", "demo", "formats", "guidance", "locales", "nodes", "reports", "web", "workflows"}
OPTIONAL = {"subgraphs"}
MOST_BYTES = 25_000_000
ICON_SIDE = 400
SECONDS = 0.3
HEAVY = {
    "nudenet",
    "onnx",
    "onnx2torch",
    "onnxruntime",
    "open_clip",
    "cv2",
    "timm",
    "matplotlib",
    "skimage",
    "pandas",
    "playwright",
}
LOAD = """
import asyncio, gc, importlib.util, json, sys, time
root, host, base = sys.argv[1:]
sys.path.insert(0, host)
sys.argv = [sys.argv[0], "--cpu", "--base-directory", base, "--disable-all-custom-nodes"]
import comfy.options
comfy.options.enable_args_parsing()
# The host has all of its own modules before it loads a pack.
import comfy_api.latest, nodes
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
# A collection of the host's own objects may fall into any moment.
gc.collect()
gc.freeze()
before, start = set(sys.modules), time.process_time()
init = root + "/__init__.py"
spec = importlib.util.spec_from_file_location("safe_guidance", init, submodule_search_locations=[root])
pack = sys.modules["safe_guidance"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)

async def load():
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    return await extension.get_node_list()

found = asyncio.run(load())
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "nodes": len(found), "modules": sorted(set(sys.modules) - before)}))
"""


def packed() -> list[str]:
    """Return the files that comfy-cli packs: those in git that .comfyignore does not name."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("This is no git checkout, and what is packed is what git knows.")
    ignored = pathspec.PathSpec.from_lines(
        "gitignore", (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    )
    return [name for name in listed.stdout.splitlines() if not ignored.match_file(name)]


def test_the_package_has_what_a_user_needs_and_no_more() -> None:
    top = {name.split("/")[0] for name in packed()}
    assert top - OPTIONAL == NEEDED | NEEDED_FOLDERS
    assert sum((ROOT / name).stat().st_size for name in packed()) < MOST_BYTES
    assert any(name.startswith("web/docs/") for name in packed())


def test_the_metadata_are_those_that_the_registry_reads() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert {"Repository", "Documentation", "Issues", "Bug Tracker"} <= set(project["urls"])
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"} <= set(comfy)
    assert project["dependencies"] == []


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {PROJECT['project']['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["Icon", "Banner"])
def test_the_registrys_images_are_in_the_repository(name: str) -> None:
    path = ROOT / PROJECT["tool"]["comfy"][name].partition("/main/")[2]
    with Image.open(path) as image:
        width, height = image.size
    assert (width == height <= ICON_SIDE) if name == "Icon" else width * 9 == height * 21


@pytest.mark.skipif(
    "SAFE_GUIDANCE_HOST" not in os.environ,
    reason="no ComfyUI is known; run the tests with 'python3 dev.py test'",
)
def test_the_packed_files_load_quickly_and_import_nothing_heavy(tmp_path: Path) -> None:
    for name in ("models", "custom_nodes", "input", "output", "temp", "user"):
        (tmp_path / name).mkdir()
    pack = tmp_path / "custom_nodes" / "safe-guidance"
    for file in packed():
        (pack / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, pack / file)
    # Python compiles a pack once, at the first start after its installation.
    compileall.compile_dir(str(pack), quiet=1)
    command = [sys.executable, "-c", LOAD, str(pack), os.environ["SAFE_GUIDANCE_HOST"], str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert loaded["nodes"] > 5
    # Seconds of this process, not of the clock: other work on the machine does not count.
    assert loaded["seconds"] < SECONDS
    assert {name.split(".")[0] for name in loaded["modules"]} & HEAVY == set()


def test_the_extras_can_be_installed_from_a_clone(tmp_path: Path) -> None:
    """`pip install .[nudenet]`, as error messages and the README say, up to pip's downloads."""
    pytest.importorskip("setuptools")
    for name in packed():
        if name.endswith(".py") or "/" not in name:
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    program = "import setuptools.build_meta as b; print(b.prepare_metadata_for_build_wheel('.'))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    metadata = (tmp_path / result.stdout.splitlines()[-1] / "METADATA").read_text(encoding="utf-8")
    for extra, packages in PROJECT["project"]["optional-dependencies"].items():
        assert f"Provides-Extra: {extra}" in metadata
        assert all(f'Requires-Dist: {package}; extra == "{extra}"' in metadata for package in packages)
    top_level = tmp_path / "safe_guidance.egg-info" / "top_level.txt"
    assert not top_level.exists() or not top_level.read_text(encoding="utf-8").strip()
