"""The layout of workflows: no node covers another, and a group that is in order stays as it is."""

from __future__ import annotations

from typing import Any

from safe_guidance.tools.layout import GAP, MARGIN, TITLE, arrange


def node(number: int, x: float, y: float, height: float = 100) -> dict[str, Any]:
    return {"id": number, "pos": [x, y], "size": [300, height]}


def group(*bounding: float) -> dict[str, Any]:
    return {"bounding": list(bounding)}


def test_a_node_that_is_drawn_higher_moves_what_is_below_it_and_stretches_its_group() -> None:
    # Two nodes in a group, one beside them, and a group with a node below.
    nodes = [node(1, 20, 50), node(2, 20, 200), node(3, 500, 50), node(4, 20, 450)]
    workflow = {"nodes": nodes, "groups": [group(0, 0, 340, 320), group(0, 380, 340, 200)]}
    arrange(workflow, {"1": (300, 180), "2": (300, 100), "3": (300, 100), "4": (200, 60)})
    assert [one["size"] for one in nodes] == [[300, 180], [300, 100], [300, 100], [300, 100]]
    second = 50 + 180 + GAP + TITLE
    assert [one["pos"] for one in nodes[:3]] == [[20, 50], [20, second], [500, 50]]
    upper, lower = (one["bounding"] for one in workflow["groups"])
    assert upper == [0, 0, 340, second + 100 + MARGIN]
    assert lower == [0, upper[3] + GAP, 340, 200] and nodes[3]["pos"][1] - lower[1] == 450 - 380


def test_a_workflow_with_room_enough_is_not_touched() -> None:
    workflow = {"nodes": [node(1, 20, 50), node(2, 20, 200)], "groups": [group(0, 0, 340, 320)]}
    arrange(workflow, {"1": (210, 80), "2": (300, 100)})
    assert workflow == {"nodes": [node(1, 20, 50), node(2, 20, 200)], "groups": [group(0, 0, 340, 320)]}
