"""Write the sizes at which the interface draws the nodes into the workflows: `python3 dev.py make layout`.

The editor draws a node as high as its widgets need, whatever a workflow's file says, and higher once a run
has shown a text or an image on it. This tool runs the workflows that need no checkpoint, writes the sizes
drawn afterwards into workflows/*.json, stretches groups to hold their nodes, and moves down nodes that would
be covered. It needs a Chromium, as the browser tests do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.example_inputs import write_example_images
from ..evaluation.frontend import HOW_TO_GET_ONE, Frontend, find_browser
from ..evaluation.server import ComfyServer
from ..evaluation.workflow_conversion import load_workflow

RUNNABLE = "demo_"
STEPS = 2
"""Enough for every text and image that a run shows on a node."""
FOLDER = Path(__file__).resolve().parents[1] / "workflows"
TITLE = 30
"""Height of a node's title bar, which lies above its position."""
GAP, LEAST_GAP, MARGIN = 30, 15, 15
"""Space between two boxes where one is moved, between two that stay, and between a node and its group's
edge."""


@dataclass
class Box:
    """A rectangle that moves down as a whole."""

    left: float
    top: float
    width: float
    height: float
    move: Callable[[float], None]

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def shares_columns(self, other: Box) -> bool:
        return self.left < other.left + other.width and other.left < self.left + self.width


def spread(boxes: Sequence[Box]) -> None:
    """Move boxes down, from the top on, until none covers another or touches it."""
    placed: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.top):
        above = (other.bottom for other in placed if other.shares_columns(box))
        top = max((bottom + GAP for bottom in above if bottom + LEAST_GAP > box.top), default=box.top)
        if top > box.top:
            box.move(top - box.top)
            box.top = top
        placed.append(box)


def arrange(workflow: dict[str, Any], sizes: Mapping[str, Sequence[float]]) -> None:
    """Lay a workflow out anew for the sizes its nodes (by id) are drawn with."""
    members = [[node for node in workflow["nodes"] if _holds(group, node)] for group in workflow["groups"]]
    for node in workflow["nodes"]:
        node["size"] = [max(pair) for pair in zip(node["size"], map(round, sizes[str(node["id"])]))]
    grouped = {node["id"] for nodes in members for node in nodes}
    outer = [_node_box(node) for node in workflow["nodes"] if node["id"] not in grouped]
    for group, nodes in zip(workflow["groups"], members):
        spread([_node_box(node) for node in nodes])
        lowest = max((node["pos"][1] + node["size"][1] for node in nodes), default=group["bounding"][1])
        if lowest > group["bounding"][1] + group["bounding"][3]:
            group["bounding"][3] = lowest + MARGIN - group["bounding"][1]
        outer.append(_group_box(group, nodes))
    spread(outer)


def _holds(group: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
    left, top, width, height = group["bounding"]
    x, y = node["pos"]
    return bool(left <= x < left + width and top <= y < top + height)


def _node_box(node: dict[str, Any]) -> Box:
    def move(distance: float) -> None:
        node["pos"][1] += distance

    (x, y), (width, height) = node["pos"], node["size"]
    return Box(x, y - TITLE, width, height + TITLE, move)


def _group_box(group: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> Box:
    def move(distance: float) -> None:
        group["bounding"][1] += distance
        for node in nodes:
            node["pos"][1] += distance

    left, top, width, height = group["bounding"]
    return Box(left, top, width, height, move)


def _type_of(workflow: Mapping[str, Any]) -> dict[str, str]:
    return {str(node["id"]): node["type"] for node in workflow["nodes"]}


def grown(window: Frontend, workflow: Mapping[str, Any], growth: dict[str, float]) -> dict[str, list[float]]:
    """Run the open workflow and return the sizes its nodes need then.

    `growth` collects by how much each type of node grows.
    """
    types, before = _type_of(workflow), window.least_heights()
    window.limit_steps(STEPS)
    window.run()
    after = window.least_heights()
    for key, height in after.items():
        growth[types[key]] = max(growth.get(types[key], 0.0), height - before[key])
    return {key: [width, max(height, after[key])] for key, (width, height) in window.node_sizes().items()}


def foreseen(
    window: Frontend, workflow: Mapping[str, Any], growth: Mapping[str, float]
) -> dict[str, list[float]]:
    """Return the sizes of the open workflow's nodes after a run, estimated from the growth in other
    workflows."""
    types, least = _type_of(workflow), window.least_heights()
    return {
        key: [width, max(height, least[key] + growth.get(types[key], 0.0))]
        for key, (width, height) in window.node_sizes().items()
    }


def main(argv: Sequence[str]) -> int:
    """Lay out every workflow."""
    argparse.ArgumentParser(
        prog="dev.py make layout", description=(__doc__ or "").splitlines()[0]
    ).parse_args(argv)
    browser = find_browser()
    if browser is None:
        sys.stderr.write(f"{HOW_TO_GET_ONE}\n")
        return 1
    growth: dict[str, float] = {}
    with ComfyServer(device="cpu") as server:
        write_example_images(server.base / "input")
        with Frontend(server.url, browser) as window:
            for path in sorted(
                FOLDER.glob("*.json"), key=lambda path: (not path.stem.startswith(RUNNABLE), path.stem)
            ):
                workflow = load_workflow(path)
                window.load_template(path.stem)
                arrange(
                    workflow,
                    (grown if path.stem.startswith(RUNNABLE) else foreseen)(window, workflow, growth),
                )
                text = json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"
                if text != path.read_text(encoding="utf-8"):
                    path.write_text(text, encoding="utf-8")
                    sys.stdout.write(f"workflows/{path.name}\n")
    return 0
