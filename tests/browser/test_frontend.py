"""The host's own web interface as a person sees it: templates, workflows, help, tooltips, search."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from PIL import Image

from safe_guidance.evaluation import graphs, workflow_conversion
from safe_guidance.evaluation.example_inputs import write_example_images
from safe_guidance.evaluation.frontend import (
    BROWSER_VARIABLE,
    HOW_TO_GET_ONE,
    Frontend,
    FrontendError,
    find_browser,
)
from safe_guidance.evaluation.server import PACK_NAME, ComfyServer
from safe_guidance.tools import workflows
from safe_guidance.tools.layout import TITLE

if TYPE_CHECKING:
    from playwright.sync_api import Locator

ROOT = Path(__file__).resolve().parents[2]
DEMO_WORKFLOWS = sorted((ROOT / "workflows").glob("demo_*.json"))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FEW_STEPS = 2
Sides: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom."""
ONLY_NODE = """name => {
    app.graph.clear();
    const node = LiteGraph.createNode(name);
    node.pos = [500, 300];
    app.graph.add(node);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.canvas.selectNode(node);
}"""

AFTER_GENERATE = """name => {
    const node = LiteGraph.createNode(name);
    return node.widgets.find(widget => widget.name === 'seed').linkedWidgets.map(widget => widget.value);
}"""
"""What happens to a new node's seed after each run."""

WIDGETS_SHOWN = """names => app.graph._nodes.flatMap(node =>
    (node.widgets ?? [])
        .filter(widget => names.includes(widget.name))
        .map(widget => [widget.name, node.isWidgetVisible(widget)]))"""
"""JavaScript that tells if the interface shows these widgets when advanced ones are shown."""
SHOW_ADVANCED = "() => app.graph._nodes.forEach(node => { node.showAdvanced = true; })"

BLUEPRINT = "Safe KSampler"
USE_BLUEPRINT = """title => {
    const nodes = app.graph._nodes, node = nodes.find(one => one.title === title);
    const slot = (one, name) => one.inputs.findIndex(input => input.name === name);
    for (const old of nodes.filter(one => ['SafeGuidanceSafeDenoiser', 'KSampler'].includes(one.type))) {
        for (const input of old.inputs.filter(input => input.link != null && slot(node, input.name) >= 0)) {
            const link = app.graph.getLink(input.link), origin = app.graph.getNodeById(link.origin_id);
            if (origin.type !== 'SafeGuidanceSafeDenoiser')
                origin.connect(link.origin_slot, node, slot(node, input.name));
        }
        if (old.type === 'KSampler')
            for (const id of [...old.outputs[0].links]) {
                const link = app.graph.getLink(id);
                node.connect(0, app.graph.getNodeById(link.target_id), link.target_slot);
            }
        app.graph.remove(old);
    }
}"""


@pytest.fixture(scope="module")
def frontend(server: ComfyServer) -> Iterator[Frontend]:
    """Yield one browser window for the whole module.

    It is closed at the end, because its event loop would disturb other modules.
    """
    browser = find_browser()
    if browser is None:
        pytest.skip(HOW_TO_GET_ONE)
    write_example_images(server.base / "input")
    with Frontend(server.url, browser) as window:
        yield window


@pytest.fixture
def window(frontend: Frontend) -> Iterator[Frontend]:
    """Yield the window, and check at the end of the test that it had no error."""
    frontend.close_dialogs()
    frontend.problems.clear()
    yield frontend
    assert [problem for problem in frontend.problems if not is_about_a_missing_model(problem)] == []


def is_about_a_missing_model(problem: str) -> bool:
    """Return True for the error that follows a request for a missing file's size, which the server
    forbids.
    """
    workflows = (workflow_conversion.load_workflow(path) for path in WORKFLOWS)
    urls = {
        model["url"]
        for workflow in workflows
        for node in workflow["nodes"]
        for model in node["properties"].get("models", [])
    }
    return any(url in problem for url in urls)


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    found: dict[str, Any] = server.get_json("/object_info")
    return found


def own_nodes(server: ComfyServer) -> list[str]:
    info: dict[str, Any] = server.get_json("/object_info")
    return sorted(name for name, node in info.items() if node["python_module"].endswith(f".{PACK_NAME}"))


def test_the_template_browser_shows_every_workflow_with_its_image(window: Frontend) -> None:
    window.page.get_by_role("button", name="Templates").click()
    window.page.get_by_text(PACK_NAME, exact=True).first.click()
    for path in WORKFLOWS:
        card = window.page.get_by_test_id(f"template-workflow-{path.stem}")
        card.scroll_into_view_if_needed()
        image = card.locator("img").first
        image.wait_for()
        with Image.open(path.with_suffix(".jpg")) as file:
            width = file.width
        window.page.wait_for_function(
            "([image, width]) => image.naturalWidth === width", arg=[image.element_handle(), width]
        )


def test_a_click_on_a_template_opens_it(window: Frontend) -> None:
    name = WORKFLOWS[0].stem
    window.page.get_by_role("button", name="Templates").click()
    window.page.get_by_text(PACK_NAME, exact=True).first.click()
    window.page.get_by_test_id(f"template-workflow-{name}").click()
    expected = len(workflow_conversion.load_workflow(WORKFLOWS[0])["nodes"])
    window.page.wait_for_function("count => app.graph._nodes.length === count", arg=expected)


@pytest.mark.parametrize("path", DEMO_WORKFLOWS, ids=lambda path: path.stem)
def test_a_demo_workflow_is_sent_as_python_sends_it_and_runs(
    window: Frontend, object_info: dict[str, Any], path: Path
) -> None:
    window.load_template(path.stem)
    assert window.red_nodes() == []
    assert window.to_prompt() == workflow_conversion.to_prompt(
        workflow_conversion.load_workflow(path), object_info
    )
    window.limit_steps(FEW_STEPS)
    window.run()
    assert window.red_nodes() == []
    assert covered(workflow_conversion.load_workflow(path), window.node_sizes()) == [], (
        "texts and images of a run need room: dev.py make layout"
    )


def test_a_setting_that_has_no_effect_is_told_under_the_node_in_a_sentence(window: Frontend) -> None:
    window.load_template("demo_sld_medium")
    window.set_widget("KSampler", "cfg", 1)
    window.limit_steps(FEW_STEPS)
    window.run()
    told = window.page.get_by_text(
        "CFG is 1, so the negative prompt is evaluated for SLD alone. More CFG costs nothing more."
    )
    assert told.is_visible()
    assert in_sight(
        told,
        window.page.get_by_text("CFG is 1").locator(
            "xpath=ancestor::div[contains(@class, 'overflow-y-auto')]"
        ),
    )


def test_an_error_is_told_under_the_node_in_two_sentences_and_goes_when_it_is_mended(
    window: Frontend,
) -> None:
    window.load_template("demo_semantic_guidance")
    window.limit_steps(FEW_STEPS)
    window.set_widget("SafeGuidanceSemanticGuidance", "remove", "")
    with pytest.raises(FrontendError):
        window.run()
    told = window.page.get_by_text(
        "Semantic Guidance has no concept. Write one under remove or add, or connect a Semantic Concept."
    )
    assert told.is_visible()
    window.set_widget("SafeGuidanceSemanticGuidance", "remove", "star")
    window.run()
    assert told.count() == 0 and window.page.get_by_text("Semantic Guidance acted").is_visible()
    window.problems.clear()


def in_sight(text: Locator, frame: Locator) -> bool:
    """Return True when the whole text is visible in its scrollable frame."""
    inner, outer = text.bounding_box(), frame.last.bounding_box()
    assert inner and outer
    return outer["y"] <= inner["y"] and inner["y"] + inner["height"] <= outer["y"] + outer["height"]


def test_what_a_node_reports_stands_under_it(window: Frontend) -> None:
    window.load_template("demo_negation_set_from_folder")
    window.limit_steps(FEW_STEPS)
    window.run()
    for text in ("duplicates dropped", "images in models/negation_sets", "image 1: reference"):
        assert window.page.get_by_text(text).is_visible()


@pytest.mark.parametrize(
    "path", [path for path in WORKFLOWS if path not in DEMO_WORKFLOWS], ids=lambda path: path.stem
)
def test_a_checkpoints_workflow_offers_the_missing_file_and_is_otherwise_whole(
    window: Frontend, object_info: dict[str, Any], path: Path
) -> None:
    window.load_template(path.stem)
    workflow = workflow_conversion.load_workflow(path)
    (model,) = (model for node in workflow["nodes"] for model in node["properties"].get("models", []))
    window.page.get_by_text(f"{model['name']} is missing").wait_for()
    assert [name.partition(" ")[2] for name in window.red_nodes()] == ["Load Checkpoint"]
    assert window.to_prompt() == workflow_conversion.to_prompt(workflow, object_info)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_is_covered_when_nodes_have_the_size_they_are_drawn_with(
    frontend: Frontend, path: Path
) -> None:
    frontend.close_dialogs()
    frontend.load_template(path.stem)
    assert covered(workflow_conversion.load_workflow(path), frontend.node_sizes()) == []


def covered(workflow: dict[str, Any], sizes: dict[str, list[float]]) -> list[str]:
    """Return the overlaps: two nodes, two groups, or a node and a group that holds only part of it."""
    nodes, groups = {}, {}
    for node in workflow["nodes"]:
        (left, top), (width, height) = node["pos"], sizes[str(node["id"])]
        nodes[f"{node['id']} {node['type']}"] = (left, top - TITLE, left + width, top + height)
    for group in workflow["groups"]:
        left, top, width, height = group["bounding"]
        groups[group["title"]] = (left, top, left + width, top + height)
    alike = (pair for boxes in (nodes, groups) for pair in itertools.combinations(boxes.items(), 2))
    astride = (
        pair for pair in itertools.product(nodes.items(), groups.items()) if not holds(pair[1][1], pair[0][1])
    )
    return [f"{one} / {other}" for (one, a), (other, b) in (*alike, *astride) if overlap(a, b)]


def overlap(one: Sides, other: Sides) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def holds(outer: Sides, inner: Sides) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def test_every_node_has_its_help_page_with_an_image_in_the_interface(
    window: Frontend, server: ComfyServer
) -> None:
    for name in own_nodes(server):
        window.page.evaluate(ONLY_NODE, name)
        window.page.get_by_test_id("info-button").click()
        title = (
            (ROOT / "web" / "docs" / f"{name}.md")
            .read_text(encoding="utf-8")
            .splitlines()[0]
            .removeprefix("# ")
        )
        heading = window.page.get_by_role("heading", name=title, exact=True)
        heading.wait_for()
        image = heading.locator("xpath=..").locator("img").first
        window.page.wait_for_function("image => image.naturalWidth > 100", arg=image.element_handle())
    # The interface asks for a page in its own language first.
    window.problems[:] = [problem for problem in window.problems if "/en.md" not in problem]


@pytest.mark.parametrize("words", ["nsfw", "negative image", "avoid style", "concept erasing"])
def test_a_search_for_what_people_call_it_finds_nodes(window: Frontend, words: str) -> None:
    window.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    window.page.keyboard.type(words, delay=20)
    window.page.get_by_text(PACK_NAME, exact=True).first.wait_for()


def test_the_blueprint_is_found_by_its_name_and_stands_in_for_the_two_nodes(window: Frontend) -> None:
    window.load_template("demo_safe_denoiser")
    window.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    window.page.keyboard.type(BLUEPRINT, delay=20)
    window.page.get_by_text(BLUEPRINT, exact=True).first.wait_for()
    window.page.keyboard.press("Enter")
    window.page.wait_for_function(
        "title => app.graph._nodes.some(node => node.title === title)", arg=BLUEPRINT
    )
    window.page.evaluate(USE_BLUEPRINT, BLUEPRINT)
    assert window.red_nodes() == []
    kinds = [node["class_type"] for key, node in window.to_prompt().items() if ":" in key]
    assert sorted(kinds) == ["KSampler", "SafeGuidanceSafeDenoiser"]
    names = window.page.evaluate(
        "title => app.graph._nodes.find(node => node.title === title).inputs.map(input => input.name)",
        BLUEPRINT,
    )
    assert len(names) == len(set(names))
    window.limit_steps(FEW_STEPS)
    window.run()
    assert window.red_nodes() == []


def test_a_workflow_saved_before_the_settings_were_automatic_keeps_its_numbers(window: Frontend) -> None:
    window.load_template("demo_build_masked_set")
    (node,) = [n for n in window.to_prompt().values() if n["class_type"] == "SafeGuidanceSafeDenoiser"]
    names = ("strength", "mode", "start_sigma", "end_sigma", "threshold", "temperature", "cap", "use")
    assert [node["inputs"][name] for name in names] == [
        *(1.2, "calibrated", 1000.0, 0.15, 0.7, 0.1, 2.0),
        "automatic",
    ]


def test_the_interface_in_french_shows_the_translations(window: Frontend) -> None:
    texts = json.loads((ROOT / "locales" / "fr" / "nodeDefs.json").read_text(encoding="utf-8"))[
        "SafeGuidanceLoadNegationSet"
    ]
    try:
        window.set_language("fr")
        window.page.evaluate(ONLY_NODE, "SafeGuidanceLoadNegationSet")
        shown = window.page.evaluate(
            "() => [app.graph._nodes[0].title, app.graph._nodes[0].widgets[0].label]"
        )
    finally:
        window.set_language("en")
        # Loading the page has the interface look for files of the user's that are not there.
        window.problems.clear()
    assert shown == [texts["display_name"], texts["inputs"]["name"]["name"]]


def test_a_named_browser_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match=BROWSER_VARIABLE):
        find_browser({BROWSER_VARIABLE: str(tmp_path / "none")})


def test_a_named_browser_is_used(tmp_path: Path) -> None:
    program = tmp_path / "browser"
    program.touch(mode=0o755)
    assert find_browser({**os.environ, BROWSER_VARIABLE: str(program)}) == str(program)


@pytest.mark.parametrize(
    "name",
    ["SampleAndRecordAttention", "OptimizeGuidelineTokens", "DAGDetectionMap", "DemoAnnotatedSet"],
)
def test_a_seed_that_others_rely_on_stays_after_a_run(window: Frontend, name: str) -> None:
    """Masks are painted on the images of a fixed seed, and learning again takes minutes. A seed of
    KSampler changes.
    """
    assert window.page.evaluate(AFTER_GENERATE, f"SafeGuidance{name}") == ["fixed"]
    assert window.page.evaluate(AFTER_GENERATE, "SafeGuidanceSafeDenoiserSampler") == ["randomize"]


def test_ablation_settings_are_hidden_and_a_saved_workflow_still_sets_them(
    window: Frontend, object_info: dict[str, Any]
) -> None:
    kind = "SafeGuidanceDAGDetectorGuide"
    described = {**object_info[kind]["input"]["required"], **object_info[kind]["input"]["optional"]}
    hidden = [name for name, spec in described.items() if len(spec) > 1 and spec[1].get("hidden")]
    assert "coverage" in hidden and "normalization" in hidden and "strength" not in hidden
    workflow = workflow_conversion.load_workflow(ROOT / "workflows" / "demo_dag.json")
    (node,) = (node for node in workflow["nodes"] if node["type"] == kind)
    # A workflow stores values by position, so this changes the hidden ones of a file from before they were
    # hidden.
    values = dict(
        workflows.read_widgets(node, object_info[kind]), coverage=0.9, connectivity="4", stacked=True
    )
    workflows.write_widgets(node, object_info[kind], values)
    window.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    window.page.wait_for_timeout(300)
    window.page.evaluate(SHOW_ADVANCED)
    shown = dict(window.page.evaluate(WIDGETS_SHOWN, [*hidden, "strength", "hold_threshold"]))
    assert shown == {**dict.fromkeys(hidden, False), "strength": True, "hold_threshold": True}
    sent = window.to_prompt()
    assert sent == workflow_conversion.to_prompt(workflow, object_info)
    inputs = sent[graphs.find(sent, kind)[0]]["inputs"]
    assert (inputs["coverage"], inputs["connectivity"], inputs["stacked"]) == (0.9, "4", True)
    window.limit_steps(FEW_STEPS)
    window.run()
    assert window.red_nodes() == []
