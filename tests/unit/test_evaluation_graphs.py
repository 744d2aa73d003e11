"""Workflows of the editor become prompts as the browser would send them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safe_guidance.evaluation import graphs, widget_values
from safe_guidance.evaluation.graphs import GraphError
from safe_guidance.evaluation.workflow_conversion import BYPASSED, MUTED, load_workflow, to_prompt

# Timings say nothing about this code on a busy machine.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUMBER: dict[str, Any] = {"default": 1}
OBJECT_INFO: dict[str, Any] = {
    "Loader": {"input": {"required": {}}, "input_order": {"required": []}, "display_name": "Load It"},
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"default": 0}],
                "steps": ["INT", {"default": 20}],
                "name": [["euler", "heun"]],
            },
            "optional": {
                "text": ["STRING", {"multiline": True}],
                "mask": ["MASK"],
                "hint": ["STRING", {"forceInput": True}],
            },
        },
        # The order of the description differs from that of the inputs' names on purpose.
        "input_order": {"required": ["model", "name", "seed", "steps"], "optional": ["text", "mask", "hint"]},
        "display_name": "Sample It",
    },
    "Patch": {"input": {"required": {"vae": ["VAE"], "model": ["MODEL"]}}, "display_name": "Patch It"},
    "Counter": {
        "input": {
            "required": {
                "pick": ["COMBO", {"options": ["a", "b"], "control_after_generate": True}],
                "n": ["INT", NUMBER],
            }
        }
    },
    "Varying": {"input": {"required": {"kind": ["COMFY_DYNAMICCOMBO_V3", {}]}}},
    "Bare": {"input": {"required": {"n": ["INT", {}], "on": ["BOOLEAN", {"default": True}]}}},
}


def node(
    key: int,
    kind: str,
    inputs: dict[str, tuple[str, int | None]] | None = None,
    outputs: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Make a node of the editor: inputs as name -> (type, link), outputs as a string of types."""
    sockets = [{"name": name, "type": type_, "link": link} for name, (type_, link) in (inputs or {}).items()]
    return {
        "id": key,
        "type": kind,
        "inputs": sockets,
        "outputs": [{"type": t} for t in outputs.split()],
        **more,
    }


def workflow(*nodes: dict[str, Any], links: list[list[Any]] | None = None) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links or [], "version": 0.4}


def sampler(link: int | None = 1, values: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    return node(
        9,
        "Sampler",
        {"model": ("MODEL", link)},
        "LATENT",
        widgets_values=values or ["heun", 5, "fixed", 8, "hello"],
        **more,
    )


LOADER = node(1, "Loader", outputs="MODEL CLIP VAE")


def test_widgets_come_in_the_order_of_the_description_and_control_after_generate_is_dropped() -> None:
    prompt = to_prompt(workflow(LOADER, sampler(), links=[[1, 1, 0, 9, 0, "MODEL"]]), OBJECT_INFO)
    assert prompt == {
        "1": {"class_type": "Loader", "inputs": {}, "_meta": {"title": "Load It"}},
        "9": {
            "class_type": "Sampler",
            "inputs": {"model": ["1", 0], "name": "heun", "seed": 5, "steps": 8, "text": "hello"},
            "_meta": {"title": "Sample It"},
        },
    }


def test_a_nodes_own_title_is_kept() -> None:
    prompt = to_prompt(workflow(sampler(None, title="Mine")), OBJECT_INFO)
    assert prompt["9"]["_meta"]["title"] == "Mine"


def test_a_linked_widget_takes_the_link_and_later_values_do_not_shift() -> None:
    linked = sampler()
    linked["inputs"].append({"name": "seed", "type": "INT", "link": 2, "widget": {"name": "seed"}})
    flow = workflow(
        LOADER,
        linked,
        node(2, "Loader", outputs="INT"),
        links=[[1, 1, 0, 9, 0, "MODEL"], [2, 2, 0, 9, 1, "INT"]],
    )
    assert to_prompt(flow, OBJECT_INFO)["9"]["inputs"] == {
        "model": ["1", 0],
        "name": "heun",
        "seed": ["2", 0],
        "steps": 8,
        "text": "hello",
    }


def test_missing_trailing_values_are_the_defaults_that_the_editor_shows() -> None:
    inputs = to_prompt(workflow(sampler(None, ["euler"])), OBJECT_INFO)["9"]["inputs"]
    assert inputs == {"name": "euler", "seed": 0, "steps": 20, "text": ""}


def test_a_value_without_a_default_has_to_be_in_the_file() -> None:
    with pytest.raises(GraphError, match=r"no value for n\b"):
        to_prompt(workflow(node(1, "Bare")), OBJECT_INFO)


def test_values_by_name_are_taken_by_name() -> None:
    inputs = to_prompt(
        workflow(sampler(None, None) | {"widgets_values": {"seed": 3, "name": "heun"}}), OBJECT_INFO
    )["9"]["inputs"]
    assert inputs == {"name": "heun", "seed": 3, "steps": 20, "text": ""}


def test_a_seed_without_control_after_generate_is_an_error_because_the_browser_would_shift() -> None:
    with pytest.raises(GraphError, match="control after generate"):
        to_prompt(workflow(sampler(None, ["heun", 5, 8, "hello"])), OBJECT_INFO)


def test_a_controlled_combo_has_a_filter_too() -> None:
    flow = workflow(node(1, "Counter", widgets_values=["b", "randomize", "", 4]))
    assert to_prompt(flow, OBJECT_INFO)["1"]["inputs"] == {"pick": "b", "n": 4}


def test_a_list_as_value_is_not_mistaken_for_a_link() -> None:
    inputs = to_prompt(workflow(node(1, "Counter", widgets_values=[["1", 0], "fixed", "", 4])), OBJECT_INFO)[
        "1"
    ]["inputs"]
    assert inputs["pick"] == {"__value__": ["1", 0]}


def test_notes_and_muted_nodes_are_left_out_with_the_links_from_them() -> None:
    flow = workflow(
        LOADER | {"mode": MUTED},
        sampler(),
        node(3, "MarkdownNote", widgets_values=["text"]),
        links=[[1, 1, 0, 9, 0, "MODEL"]],
    )
    prompt = to_prompt(flow, OBJECT_INFO)
    assert set(prompt) == {"9"} and "model" not in prompt["9"]["inputs"]


def test_a_bypassed_node_passes_on_its_input_of_the_type() -> None:
    patch = node(2, "Patch", {"vae": ("VAE", 2), "model": ("MODEL", 3)}, "MODEL", mode=BYPASSED)
    links = [[1, 2, 0, 9, 0, "MODEL"], [2, 1, 2, 2, 0, "VAE"], [3, 1, 0, 2, 1, "MODEL"]]
    prompt = to_prompt(workflow(LOADER, patch, sampler(), links=links), OBJECT_INFO)
    assert set(prompt) == {"1", "9"} and prompt["9"]["inputs"]["model"] == ["1", 0]


def test_a_bypassed_node_prefers_the_input_at_the_same_place() -> None:
    two = node(2, "Patch", {"a": ("MODEL", 2), "b": ("MODEL", 3)}, "MODEL MODEL", mode=BYPASSED)
    other = node(3, "Loader", outputs="MODEL")
    links = [[1, 2, 1, 9, 0, "MODEL"], [2, 1, 0, 2, 0, "MODEL"], [3, 3, 0, 2, 1, "MODEL"]]
    prompt = to_prompt(workflow(LOADER, other, two, sampler(), links=links), OBJECT_INFO)
    assert prompt["9"]["inputs"]["model"] == ["3", 0]


@pytest.mark.parametrize("inputs", [{}, {"vae": ("VAE", 2)}, {"model": ("MODEL", None)}])
def test_a_bypassed_node_without_a_fitting_linked_input_leaves_the_input_open(
    inputs: dict[str, tuple[str, int | None]],
) -> None:
    patch = node(2, "Unknown to the server", inputs, "MODEL", mode=BYPASSED)
    links = [[1, 2, 0, 9, 0, "MODEL"], [2, 1, 2, 2, 0, "VAE"]]
    assert (
        "model" not in to_prompt(workflow(LOADER, patch, sampler(), links=links), OBJECT_INFO)["9"]["inputs"]
    )


def test_a_primitive_gives_its_value() -> None:
    linked = sampler(None)
    linked["inputs"].append({"name": "steps", "type": "INT", "link": 1, "widget": {"name": "steps"}})
    flow = workflow(
        linked,
        node(2, "PrimitiveNode", outputs="INT", widgets_values=[33, "fixed"]),
        links=[[1, 2, 0, 9, 1, "INT"]],
    )
    prompt = to_prompt(flow, OBJECT_INFO)
    assert set(prompt) == {"9"} and prompt["9"]["inputs"]["steps"] == 33


@PATIENT
@given(st.lists(st.sampled_from(["Reroute", "Patch"]), max_size=8))
def test_any_chain_of_reroutes_and_bypassed_nodes_leads_back_to_the_source(chain: list[str]) -> None:
    links, nodes = [[1, 1, 0, 2, 0, "MODEL"]], []
    for i, kind in enumerate(chain):
        name, type_ = ("", "*") if kind == "Reroute" else ("model", "MODEL")
        nodes.append(
            node(i + 2, kind, {name: (type_, i + 1)}, type_, mode=0 if kind == "Reroute" else BYPASSED)
        )
        links.append([i + 2, i + 2, 0, i + 3, 0, type_])
    links[-1][3] = 9
    flow = workflow(LOADER, sampler(len(links)) | {"id": 99}, *nodes, links=links)
    prompt = to_prompt(flow, OBJECT_INFO)
    assert set(prompt) == {"1", "99"} and prompt["99"]["inputs"]["model"] == ["1", 0]


def test_a_loop_of_reroutes_is_an_error() -> None:
    loop = node(2, "Reroute", {"": ("*", 2)}, "*")
    with pytest.raises(GraphError, match="is linked to itself"):
        to_prompt(
            workflow(loop, sampler(), links=[[1, 2, 0, 9, 0, "MODEL"], [2, 2, 0, 2, 0, "MODEL"]]), OBJECT_INFO
        )


@pytest.mark.parametrize("links", [[], [[1, 77, 0, 9, 0, "MODEL"]]])
def test_a_link_to_nowhere_is_an_error(links: list[list[Any]]) -> None:
    with pytest.raises(GraphError, match="damaged"):
        to_prompt(workflow(sampler(), links=links), OBJECT_INFO)


def test_links_of_another_version_are_an_error() -> None:
    flow = workflow(sampler(None)) | {"links": [{"id": 1, "origin_id": 2}]}
    with pytest.raises(GraphError, match=r"version 0\.4"):
        to_prompt(flow, OBJECT_INFO)


def test_an_unknown_node_is_named() -> None:
    with pytest.raises(GraphError, match=r'node 4 "Shiny" \(FromAnotherPack\)'):
        to_prompt(workflow(node(4, "FromAnotherPack", title="Shiny")), OBJECT_INFO)


def test_a_subgraph_is_named_as_such() -> None:
    flow = workflow(node(4, "1b2c")) | {"definitions": {"subgraphs": [{"id": "1b2c"}]}}
    with pytest.raises(GraphError, match="subgraph"):
        to_prompt(flow, OBJECT_INFO)


def test_a_varying_set_of_widgets_is_an_error() -> None:
    with pytest.raises(GraphError, match="varying"):
        to_prompt(workflow(node(4, "Varying", widgets_values=["x"])), OBJECT_INFO)


def test_a_widget_of_an_unknown_type_is_recognised_by_its_socket() -> None:
    info = {"Odd": {"input": {"required": {"hue": ["COLOR", {"default": "#000"}], "n": ["INT", NUMBER]}}}}
    odd = node(1, "Odd", widgets_values=["#fff", 7])
    odd["inputs"] = [{"name": "hue", "type": "COLOR", "link": None, "widget": {"name": "hue"}}]
    assert to_prompt(workflow(odd), info)["1"]["inputs"] == {"hue": "#fff", "n": 7}


VALUES = {
    "INT": st.integers(),
    "FLOAT": st.floats(allow_nan=False),
    "STRING": st.text("ab 1") | st.sampled_from(sorted(widget_values.AFTER_GENERATE)),
    "BOOLEAN": st.booleans(),
    "COMBO": st.sampled_from(["euler", "fixed"]),
    "MODEL": st.none(),
}


@PATIENT
@given(st.data())
def test_every_saved_widget_value_arrives_at_its_input(data: st.DataObject) -> None:
    names = data.draw(st.permutations(["seed", "noise_seed", "a", "b", "c", "d"]))
    kinds = {name: data.draw(st.sampled_from(sorted(VALUES))) for name in names}
    optional = data.draw(st.sets(st.sampled_from(names)))
    order = {
        "required": [n for n in names if n not in optional],
        "optional": [n for n in names if n in optional],
    }
    described = {
        section: {name: [kinds[name], {}] for name in sorted(members)} for section, members in order.items()
    }
    expected, saved = {}, []
    for name in order["required"] + order["optional"]:
        if kinds[name] != "MODEL":
            expected[name] = data.draw(VALUES[kinds[name]])
            saved.append(expected[name])
            if kinds[name] == "INT" and name in widget_values.SEEDS:
                saved.append(data.draw(st.sampled_from(sorted(widget_values.AFTER_GENERATE))))
    flow = workflow(node(1, "Any", widgets_values=saved))
    assert to_prompt(flow, {"Any": {"input": described, "input_order": order}})["1"]["inputs"] == expected


PROMPT: graphs.Prompt = {
    "1": {"class_type": "Loader", "inputs": {}},
    "2": {"class_type": "Patch", "inputs": {"model": ["1", 0], "vae": ["1", 2]}, "_meta": {"title": "First"}},
    "7": {"class_type": "Patch", "inputs": {"model": ["2", 0], "vae": ["1", 2]}, "_meta": {"title": "Patch"}},
    "8": {"class_type": "Sampler", "inputs": {"model": ["7", 0], "seed": 1}, "_meta": {"title": "Sample It"}},
}


def test_a_title_wins_over_a_class() -> None:
    assert graphs.find(PROMPT, "First") == ["2"]
    assert graphs.find(PROMPT, "Patch") == ["7"]
    assert graphs.find(PROMPT, "Loader") == ["1"]
    with pytest.raises(GraphError, match='no node "Nothing"'):
        graphs.find(PROMPT, "Nothing")


def test_set_inputs_edits_a_copy() -> None:
    before = copy.deepcopy(PROMPT)
    assert graphs.set_inputs(PROMPT, "Sampler", seed=5)["8"]["inputs"] == {"model": ["7", 0], "seed": 5}
    assert before == PROMPT


def test_set_inputs_refuses_an_input_that_is_not_there() -> None:
    with pytest.raises(GraphError, match="no input sede"):
        graphs.set_inputs(PROMPT, "Sampler", sede=5)


def test_the_origin_of_a_model_is_its_loader() -> None:
    assert graphs.origin(PROMPT, "8", "model") == ("1", 0)
    assert graphs.origin(PROMPT, "2", "vae") == ("1", 2)
    with pytest.raises(GraphError, match="not linked"):
        graphs.origin(PROMPT, "8", "seed")


def test_insert_between_reroutes_every_taker_of_the_output_and_no_other() -> None:
    before = copy.deepcopy(PROMPT)
    edited, key = graphs.insert_between(PROMPT, ("1", 2), "Tap", "vae", extra=3)
    assert key == "9" and edited["9"]["inputs"] == {"vae": ["1", 2], "extra": 3}
    assert edited["2"]["inputs"] == {"model": ["1", 0], "vae": ["9", 0]}
    assert edited["7"]["inputs"] == {"model": ["2", 0], "vae": ["9", 0]}
    assert edited["8"] == PROMPT["8"] and before == PROMPT


def test_a_prompt_file_is_not_taken_for_a_workflow(tmp_path: Path) -> None:
    path = tmp_path / "api.json"
    path.write_text(json.dumps(PROMPT))
    with pytest.raises(GraphError, match=r"api\.json is not a workflow"):
        load_workflow(path)
