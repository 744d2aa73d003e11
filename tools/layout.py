"""Give every node of the workflows the room that the interface draws it with: `python3 dev.py make layout`.

The editor draws a node as high as its widgets need, whatever a workflow's file says. This writes the drawn sizes into workflows/*.json,
stretches groups to hold their nodes, and moves down what would be covered. Needs a Chromium, as the browser tests do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.frontend import HOW_TO_GET_ONE, Frontend, find_browser
from ..evaluation.graphs import load_workflow
from ..evaluation.server import ComfyServer

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
TITLE = 30
"""Height of a node's title bar, which lies above its position."""
GAP, MARGIN = 30, 15
"""Room between two boxes, and between a node and its group's edge."""


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
    """Move boxes down, from the top on, until none covers another."""
    placed: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.top):
        top = max((other.bottom + GAP for other in placed if other.shares_columns(box) and other.bottom > box.top), default=box.top)
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


def main(argv: Sequence[str]) -> int:
    """Lay out every workflow."""
    argparse.ArgumentParser(prog="dev.py make layout", description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    browser = find_browser()
    if browser is None:
        sys.stderr.write(f"{HOW_TO_GET_ONE}\n")
        return 1
    with ComfyServer(device="cpu") as server, Frontend(server.url, browser) as window:
        for path in sorted(FOLDER.glob("*.json")):
            workflow = load_workflow(path)
            window.load_template(path.stem)
            arrange(workflow, window.node_sizes())
            text = json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"
            if text != path.read_text(encoding="utf-8"):
                path.write_text(text, encoding="utf-8")
                sys.stdout.write(f"workflows/{path.name}\n")
    return 0
