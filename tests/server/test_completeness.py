"""Every node and every workflow has all that a person needs to find, understand and use it."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safe_guidance.evaluation.server import PACK_NAME, ComfyServer

locales = importlib.import_module("safe_guidance.tools.locales")

ROOT = Path(__file__).resolve().parents[2]
DOCS, WORKFLOWS, LOCALES = ROOT / "web" / "docs", ROOT / "workflows", ROOT / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir() if path.name != locales.BASE)
PERMANENT_NAMES = {
    "SafeGuidanceSafeDenoiserSampler": "Safe Denoiser Sampler",
    "SafeGuidanceSafeTextEmbeddingGuidance": "Safe Text Embedding Guidance",
    "SafeGuidanceDAGDetectorGuide": "DAG Detector + Guide",
}
IMAGE_BYTES, IMAGE_SIDE = 40_000, 384
IMAGE = re.compile(r"!\[([^\]]+)\]\(([^)]+)\)")


@pytest.fixture(scope="session")
def nodes(server: ComfyServer) -> dict[str, dict[str, Any]]:
    """Return the descriptions of this pack's nodes."""
    info: dict[str, dict[str, Any]] = server.get_json("/object_info")
    return {name: node for name, node in info.items() if node["python_module"].endswith(f".{PACK_NAME}")}


@pytest.fixture(scope="session")
def core(server: ComfyServer) -> set[str]:
    """Return the input names of the host's KSampler, which need no explanation."""
    info = server.get_json("/object_info/KSampler")["KSampler"]
    return {name for section in info["input"].values() for name in section}


def inputs(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of a node's inputs by name."""
    return {
        name: spec[1] if len(spec) > 1 else {}
        for section in ("required", "optional")
        for name, spec in node["input"].get(section, {}).items()
    }


def plain(text: str) -> str:
    """Return a name without underscores and capitals: help pages may write it either way."""
    return text.lower().replace("_", " ")


def help_page(name: str) -> str:
    path = DOCS / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def test_node_ids_and_categories_are_the_packs_own(nodes: dict[str, Any]) -> None:
    assert nodes
    for name, node in nodes.items():
        assert re.fullmatch(r"SafeGuidance[A-Z][A-Za-z0-9]+", name)
        assert node["category"].split("/")[0] == "safe guidance", name


def test_every_input_has_a_tooltip(nodes: dict[str, Any]) -> None:
    assert [
        f"{name}.{key}"
        for name, node in nodes.items()
        for key, options in inputs(node).items()
        if not options.get("tooltip")
    ] == []


def test_every_node_has_a_description_and_search_aliases(nodes: dict[str, Any]) -> None:
    assert [
        name for name, node in nodes.items() if not node["description"] or not node.get("search_aliases")
    ] == []


def test_every_node_has_a_help_page_with_its_name_and_an_image(nodes: dict[str, Any]) -> None:
    for name, node in nodes.items():
        page = help_page(name)
        assert page.startswith(f"# {node['display_name']}\n"), f"web/docs/{name}.md"
        images = IMAGE.findall(page)
        assert images, f"web/docs/{name}.md shows no image"
        assert [file for _, file in images if not (DOCS / file).is_file()] == []


def test_every_help_page_names_every_setting(nodes: dict[str, Any], core: set[str]) -> None:
    missing = []
    for name, node in nodes.items():
        page = plain(help_page(name))
        settings = [
            key for key, options in inputs(node).items() if key not in core and not options.get("advanced")
        ]
        missing += [f"{name}.{key}" for key in settings if plain(key) not in page]
    assert missing == []


def test_there_is_no_help_page_for_a_node_that_is_not_there(nodes: dict[str, Any]) -> None:
    assert {path.stem for path in DOCS.glob("*.md")} <= set(nodes)


def test_every_node_is_shown_in_a_workflow(nodes: dict[str, Any]) -> None:
    used = {
        node["type"]
        for path in WORKFLOWS.glob("*.json")
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]
    }
    assert set(nodes) <= used


def test_every_workflow_has_a_small_image() -> None:
    workflows = {path.stem for path in WORKFLOWS.glob("*.json")}
    assert {path.stem for path in WORKFLOWS.glob("*.jpg")} == workflows
    for name in workflows:
        path = WORKFLOWS / f"{name}.jpg"
        with Image.open(path) as image:
            assert image.size == (IMAGE_SIDE, IMAGE_SIDE)
        assert path.stat().st_size < IMAGE_BYTES


def test_images_of_help_pages_are_small_and_used() -> None:
    used = {file for path in DOCS.glob("*.md") for _, file in IMAGE.findall(path.read_text(encoding="utf-8"))}
    for path in DOCS.glob("*.jpg"):
        assert path.name in used and path.stat().st_size < IMAGE_BYTES, path.name


def test_the_english_texts_are_those_of_the_schemas(server: ComfyServer) -> None:
    expected = locales.english(server.get_json("/object_info"))
    assert locales.read(LOCALES / locales.BASE / locales.FILE) == expected, "run: python3 dev.py make locales"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_covers_exactly_the_english_texts(language: str) -> None:
    base, translated = (locales.read(LOCALES / name / locales.FILE) for name in (locales.BASE, language))
    assert locales.missing(base, translated) == []
    assert locales.missing(translated, base) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_descriptions_and_tooltips_are_translated(language: str) -> None:
    english, other = (
        dict(locales.leaves(locales.read(LOCALES / name / locales.FILE))) for name in (locales.BASE, language)
    )
    assert [
        path
        for path, text in english.items()
        if path[-1] in ("description", "tooltip") and other[path] == text
    ] == []


def test_texts_hold_nothing_that_the_interface_takes_for_syntax() -> None:
    # Its message format uses these for placeholders, plurals and links.
    for path in LOCALES.glob("*/*.json"):
        assert [text for _, text in locales.leaves(locales.read(path)) if set(text) & set("{}|@")] == []


@pytest.mark.parametrize("language", [locales.BASE, *LANGUAGES])
def test_the_names_of_the_three_methods_nodes_are_permanent(language: str, nodes: dict[str, Any]) -> None:
    texts = locales.read(LOCALES / language / locales.FILE)
    for name, shown in PERMANENT_NAMES.items():
        if name in nodes:
            assert texts[name]["display_name"] == nodes[name]["display_name"] == shown


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_menus_are_translated(language: str, nodes: dict[str, Any]) -> None:
    categories = locales.read(LOCALES / language / "main.json")["nodeCategories"]
    assert set(categories) == {part for node in nodes.values() for part in node["category"].split("/")}
