"""The workflows for real checkpoints.

Derived by their tool, and running once a model is there, for which the demo model stands in.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from safe_guidance.evaluation import graphs, workflow_conversion
from safe_guidance.evaluation.server import ComfyServer

workflows = importlib.import_module("safe_guidance.tools.workflows")

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
DERIVED = [(checkpoint, name) for checkpoint in workflows.CHECKPOINTS for name in workflows.RECIPES]
EACH = pytest.mark.parametrize(
    ("checkpoint", "name"), DERIVED, ids=lambda value: getattr(value, "prefix", value)
)
FEW_STEPS, SMALL = 2, 128


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    found: dict[str, Any] = server.get_json("/object_info")
    return found


def on_the_demo_model(prompt: graphs.Prompt) -> graphs.Prompt:
    """Put the demo model, its image size and few steps in place of the checkpoint."""
    for node in prompt.values():
        if node["class_type"] == workflows.LOADER:
            node.update(class_type=workflows.DEMO_LOADER, inputs={})
        small = {"width": SMALL, "height": SMALL, "steps": FEW_STEPS}
        # A method may call something else steps, too.
        node["inputs"].update(
            {name: value for name, value in small.items() if isinstance(node["inputs"].get(name), int)}
        )
    return prompt


def test_every_file_for_a_checkpoint_has_a_recipe() -> None:
    expected = {f"{checkpoint.prefix}_{name}" for checkpoint, name in DERIVED}
    assert {path.stem for path in FOLDER.glob("*.json") if not path.stem.startswith("demo_")} == expected


@EACH
def test_the_file_is_what_the_tool_derives(object_info: dict[str, Any], checkpoint: Any, name: str) -> None:
    file = json.loads((FOLDER / f"{checkpoint.prefix}_{name}.json").read_text(encoding="utf-8"))
    assert file == workflows.derive(name, workflows.RECIPES[name], checkpoint, object_info), (
        "run: python3 dev.py make workflows"
    )


@EACH
def test_the_workflow_runs_with_a_model_in_the_loader(
    server: ComfyServer, object_info: dict[str, Any], checkpoint: Any, name: str
) -> None:
    workflow = workflow_conversion.load_workflow(FOLDER / f"{checkpoint.prefix}_{name}.json")
    prompt = on_the_demo_model(workflow_conversion.to_prompt(workflow, object_info))
    assert server.images(server.run(prompt))


@EACH
def test_the_loader_says_which_file_it_needs_and_where_it_comes_from(checkpoint: Any, name: str) -> None:
    nodes = workflow_conversion.load_workflow(FOLDER / f"{checkpoint.prefix}_{name}.json")["nodes"]
    (loader,) = (node for node in nodes if node["type"] == workflows.LOADER)
    (model,) = loader["properties"]["models"]
    assert model["name"] == loader["widgets_values"][0] == model["url"].rsplit("/", 1)[-1]
    assert model["directory"] == "checkpoints" and model["url"].startswith("https://huggingface.co/")


@EACH
def test_every_text_and_setting_of_a_recipe_has_a_node(
    object_info: dict[str, Any], checkpoint: Any, name: str
) -> None:
    recipe = workflows.RECIPES[name]
    nodes = workflow_conversion.load_workflow(FOLDER / f"{checkpoint.prefix}_{name}.json")["nodes"]
    titles, kinds = {node.get("title") for node in nodes}, {node["type"]: node for node in nodes}
    assert set(recipe.texts) <= titles
    for key, values in recipe.settings.items():
        kind = key if key in kinds else next(node["type"] for node in nodes if node.get("title") == key)
        assert set(values) <= {widget for widget, _ in workflows.widgets(object_info[kind])}
