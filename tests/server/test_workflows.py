"""Every shipped workflow runs on a real server and does what its note says.

The demonstration's probe changes nothing.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safe_guidance.evaluation import demo, graphs, runner, workflow_conversion
from safe_guidance.evaluation.cases import memorisation
from safe_guidance.evaluation.prompt_sets.prompts import load_prompts
from safe_guidance.evaluation.report import ImageArray
from safe_guidance.evaluation.server import ComfyServer

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
WORKFLOWS = sorted(FOLDER.glob("demo_*.json"))
CALLS = {
    **dict.fromkeys(("none", "safe_denoiser", "spell", "safree", "safree+safe_denoiser"), 20),
    "sld_weak": 33,
    **dict.fromkeys(
        ("sld_medium", "sld_strong", "sld_max", "semantic_guidance", "sld_medium+safe_denoiser"), 40
    ),
}
"""Model calls of methods that need the same number whatever they draw."""
BY_HAND: dict[str, dict[str, Any]] = {
    "demo_safe_denoiser": {"strength": 1.2, "start_sigma": 1000.0, "end_sigma": 0.15, "threshold": 0.7},
    "demo_safe_denoiser_style": {"strength": 1.0, "start_sigma": 1.5, "end_sigma": 0.0, "threshold": 0.2},
    "demo_safe_denoiser_memorisation": {
        "strength": 4.0,
        "start_sigma": 1000.0,
        "end_sigma": 0.5,
        "threshold": 1.0,
        "temperature": 0.02,
    },
}
"""The values with which Safe Denoiser's workflows were measured. Temperature and cap are in the test."""
TOLD_APART = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
EVERY_FILE = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def object_info(server: ComfyServer) -> dict[str, Any]:
    found: dict[str, Any] = server.get_json("/object_info")
    return found


@pytest.fixture(scope="session", autouse=True)
def _images_to_load(server: ComfyServer) -> None:
    """Return the images in the host's input folder, for workflows that load some."""
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 128)).save(Path(server.base) / "input" / f"unwanted_{index}.png")


def test_there_are_workflows() -> None:
    assert WORKFLOWS
    assert set(demo.METHODS.values()) <= {path.name for path in WORKFLOWS}


def make_image(server: ComfyServer, prompt: graphs.Prompt) -> ImageArray:
    """Return the first image that a prompt saves."""
    (saved,) = graphs.find(prompt, "SaveImage")
    outputs = server.run(prompt)["outputs"]
    return runner.decode(server.images({"outputs": {saved: outputs[saved]}})[0])


def shipped(name: str, object_info: dict[str, Any]) -> graphs.Prompt:
    return workflow_conversion.to_prompt(
        workflow_conversion.load_workflow(FOLDER / f"{name}.json"), object_info
    )


@TOLD_APART
def test_a_workflow_runs_and_saves_an_image(
    server: ComfyServer, object_info: dict[str, Any], path: Path
) -> None:
    found = make_image(server, shipped(path.stem, object_info))
    assert found.shape == (128, 128, 3)
    # A broken model or decoder gives a uniform image.
    assert found.std() > 5


def test_the_sampler_node_gives_the_image_of_the_separate_nodes(
    server: ComfyServer, object_info: dict[str, Any]
) -> None:
    separate, one = (
        make_image(server, shipped(name, object_info))
        for name in ("demo_safe_denoiser", "demo_safe_denoiser_sampler")
    )
    assert np.array_equal(separate, one)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("demo_safe_denoiser", "SafeGuidanceSafeDenoiser"),
        ("demo_safe_denoiser_sampler", "SafeGuidanceSafeDenoiserSampler"),
    ],
)
def test_without_strength_the_image_is_the_plain_one(
    server: ComfyServer, object_info: dict[str, Any], name: str, node: str
) -> None:
    off = graphs.set_inputs(shipped(name, object_info), node, strength=0.0)
    assert np.array_equal(make_image(server, off), make_image(server, shipped("demo_plain", object_info)))


def test_an_image_after_another_is_another(server: ComfyServer, object_info: dict[str, Any]) -> None:
    """The same prompt and seed run twice give the same image, unless Sparse Repellency has the first one."""
    apart = shipped("demo_spell_earlier", object_info)
    together = graphs.set_inputs(apart, "SafeGuidanceSparseRepellency", radius=0.0)
    (saved,) = graphs.find(apart, "SaveImage")
    for prompt, same in ((together, True), (apart, False)):
        outputs = server.run(prompt)["outputs"]
        first, second = (runner.decode(file) for file in server.images({"outputs": {saved: outputs[saved]}}))
        assert np.array_equal(first, second) == same
        if same:
            before = first
    assert np.array_equal(first, before), "the first image knows of no other"


@EVERY_FILE
def test_a_workflow_file_is_whole_and_tidy(object_info: dict[str, Any], path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert uuid.UUID(workflow["id"]) and workflow["version"] == 0.4
    assert workflow["last_node_id"] >= max(nodes) and workflow["last_link_id"] >= max(
        link[0] for link in workflow["links"]
    )
    for link, source, slot, target, socket, kind in workflow["links"]:
        assert (
            link in nodes[source]["outputs"][slot]["links"]
            and nodes[target]["inputs"][socket]["link"] == link
        )
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert (
            nodes[source]["pos"][0] < nodes[target]["pos"][0]
            or nodes[source]["pos"][1] < nodes[target]["pos"][1]
        )
    assert sum(node["type"] == "MarkdownNote" for node in nodes.values()) == 1
    assert workflow["groups"] and all(group["title"] for group in workflow["groups"])
    for node in nodes.values():
        known = [*object_info.get(node["type"], {}).get("input", {}).values()]
        assert all(any(socket["name"] in names for names in known) for socket in node["inputs"])


@EVERY_FILE
def test_nodes_do_not_overlap(path: Path) -> None:
    boxes = [(*node["pos"], *node["size"]) for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]]
    for i, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:i]:
            apart = (
                x >= other_x + other_width
                or other_x >= x + width
                or y >= other_y + other_height
                or other_y >= y + height
            )
            assert apart


@pytest.mark.parametrize(
    ("name", "node", "setting"),
    [
        ("demo_stg", "SafeGuidanceSafeTextEmbeddingGuidance", {"rho": 0.0}),
        ("demo_sdg", "SafeGuidanceSafeDataGuidance", {"strength": 0.0}),
        # NudeNet has nothing to object to in the demo world, at any setting.
        ("demo_stg_nudenet", "SafeGuidanceSafeTextEmbeddingGuidance", {}),
    ],
)
def test_guidance_that_is_off_or_has_nothing_to_do_gives_the_plain_image(
    server: ComfyServer, object_info: dict[str, Any], name: str, node: str, setting: dict[str, float]
) -> None:
    off = graphs.set_inputs(shipped(name, object_info), node, **setting)
    assert np.array_equal(make_image(server, off), make_image(server, shipped("demo_plain", object_info)))


@pytest.mark.parametrize(
    ("name", "node", "off"),
    [
        ("demo_safe_denoiser_memorisation", "SafeGuidanceSafeDenoiser", {"strength": 0.0}),
        ("demo_spell_memorisation", "SafeGuidanceSparseRepellency", {"radius": 0.0}),
    ],
)
def test_a_memorised_image_comes_back_only_when_the_method_is_off(
    server: ComfyServer, object_info: dict[str, Any], name: str, node: str, off: dict[str, float]
) -> None:
    references = memorisation.training_images()

    def is_copy(prompt: graphs.Prompt) -> bool:
        found = make_image(server, prompt)
        measures = (memorisation.nearest_distance, memorisation.nearest_similarity)
        return memorisation.is_near_copy(*(measure(found, references) for measure in measures))

    assert not is_copy(shipped(name, object_info))
    without = graphs.set_inputs(shipped(name, object_info), node, **off)
    assert is_copy(without)
    assert not is_copy(graphs.set_inputs(without, "LoraLoaderModelOnly", strength_model=0.0))


@pytest.mark.parametrize("name", demo.METHODS)
def test_the_probe_counts_and_changes_no_image(
    server: ComfyServer, object_info: dict[str, Any], name: str
) -> None:
    records = load_prompts()["named"][:2]
    method = runner.load_method(name, demo.METHODS[name], object_info)
    probed = [runner.generate(server, method, record) for record in records]
    plain = graphs.set_inputs(
        shipped(Path(method.workflow).stem, object_info), "Prompt", text=records[0].prompt
    )
    plain[method.sampler]["inputs"]["seed"] = records[0].seed
    assert np.array_equal(make_image(server, plain), probed[0].image)
    # 20 steps, counted afresh in every run; a text that a method needs is one call more at the steps that
    # need it.
    assert all(shot.calls == CALLS[name] if name in CALLS else shot.calls >= 20 for shot in probed)
    assert all(shot.seconds > 0 for shot in probed)


def test_three_workflows_have_the_same_automatic_settings_and_differ_in_the_set(
    object_info: dict[str, Any],
) -> None:
    nodes = []
    for name in BY_HAND:
        prompt = shipped(name, object_info)
        (key,) = graphs.find(prompt, "SafeGuidanceSafeDenoiser")
        inputs = prompt[key]["inputs"]
        nodes.append({name: value for name, value in inputs.items() if not isinstance(value, list)})
    assert nodes[0] == nodes[1] == nodes[2]
    automatic = {name for name, value in nodes[0].items() if value == -1}
    assert automatic == {"strength", "start_sigma", "end_sigma", "threshold", "temperature", "cap"}
    assert nodes[0]["use"] == "automatic"


@pytest.mark.parametrize("name", BY_HAND)
def test_automatic_settings_give_the_image_of_the_measured_numbers(
    server: ComfyServer, object_info: dict[str, Any], name: str
) -> None:
    short = graphs.set_inputs(shipped(name, object_info), "KSampler", steps=8)
    numbers = {"temperature": 0.1, "cap": 2.0, **BY_HAND[name]}
    found = make_image(server, short)
    by_hand = graphs.set_inputs(short, "SafeGuidanceSafeDenoiser", **numbers)
    assert np.array_equal(found, make_image(server, by_hand))
    off = graphs.set_inputs(short, "SafeGuidanceSafeDenoiser", strength=0.0)
    assert not np.array_equal(found, make_image(server, off))


def test_a_workflow_saved_before_the_settings_were_automatic_keeps_its_numbers(
    object_info: dict[str, Any],
) -> None:
    name = "demo_build_masked_set"
    saved = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    (before,) = [node for node in saved if node["type"] == "SafeGuidanceSafeDenoiser"]
    assert len(before["widgets_values"]) == 8, "this file stands for those saved without `use`"
    prompt = shipped(name, object_info)
    (key,) = graphs.find(prompt, "SafeGuidanceSafeDenoiser")
    inputs = prompt[key]["inputs"]
    names = ["strength", "mode", "start_sigma", "end_sigma", "threshold", "temperature", "cap"]
    assert [inputs[name] for name in names] == before["widgets_values"][:7]
    assert all(value == "calibrated" or value >= 0 for value in before["widgets_values"])
