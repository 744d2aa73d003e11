"""Conversion of workflows from the editor's format into API prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from .graphs import GraphError, Prompt
from .widget_values import node_name, widget_values

ObjectInfo: TypeAlias = dict[str, Any]
"""The server's answer to `/object_info`: a description of every node class."""

MUTED, BYPASSED = 2, 4
NOTES = frozenset({"Note", "MarkdownNote"})
VIRTUAL = NOTES | {"Reroute", "PrimitiveNode"}
ANY = frozenset({"", "*"})


def load_workflow(path: Path) -> dict[str, Any]:
    """Load a workflow file in the editor's format.

    Raises:
        GraphError: when the file has another format.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("nodes"), list)
        or not isinstance(content.get("links"), list)
    ):
        raise GraphError(
            f"{path.name} is not a workflow of the editor. "
            "Save it with the menu's Save, not with Export (API)."
        )
    return content


def to_prompt(workflow: dict[str, Any], object_info: ObjectInfo) -> Prompt:
    """Convert a workflow of the editor (version 0.4) into the API prompt that the browser would send.

    Notes and muted nodes are left out, bypassed nodes pass on the first input of the wanted type, reroutes
    and primitives are resolved.

    Raises:
        GraphError: on subgraphs, unknown nodes, damaged links, and widget values that do not fit the node's
            description.
    """
    return _Conversion(workflow, object_info).prompt()


class _Conversion:
    """Conversion of one workflow, with its nodes and links by id."""

    def __init__(self, workflow: dict[str, Any], object_info: ObjectInfo) -> None:
        self._info = object_info
        subgraphs = {graph["id"] for graph in workflow.get("definitions", {}).get("subgraphs", [])}
        self._nodes: dict[Any, dict[str, Any]] = {node["id"]: node for node in workflow["nodes"]}
        for node in self._nodes.values():
            if node["type"] in subgraphs:
                raise GraphError(
                    f"{node_name(node)} is a subgraph, which is not supported. "
                    "Unpack the subgraph in the editor and save again."
                )
        if not all(isinstance(link, list) and len(link) >= 5 for link in workflow["links"]):
            raise GraphError(
                "The workflow's links are not those of version 0.4. Save it with a current editor."
            )
        self._links: dict[Any, list[Any]] = {link[0]: link for link in workflow["links"]}

    def prompt(self) -> Prompt:
        """Return the API prompt."""
        sent = [
            node
            for node in self._nodes.values()
            if node["type"] not in VIRTUAL and node.get("mode", 0) not in (MUTED, BYPASSED)
        ]
        return {str(node["id"]): self._node(node) for node in sent}

    def _node(self, node: dict[str, Any]) -> dict[str, Any]:
        info = self._info.get(node["type"])
        if info is None:
            raise GraphError(
                f"The server has no node class for {node_name(node)}. Install the pack that provides it."
            )
        inputs = widget_values(node, info)
        for socket in node.get("inputs") or []:
            if socket.get("link") is not None:
                inputs.update(self._linked(socket))
        title = node.get("title") or info.get("display_name") or node["type"]
        return {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}

    def _linked(self, socket: dict[str, Any]) -> dict[str, Any]:
        source = self._source(socket["link"], str(socket["type"]), frozenset())
        return {} if source is None else {socket["name"]: source[0]}

    def _source(self, link_id: Any, wanted: str, seen: frozenset[Any]) -> tuple[Any] | None:
        """Return what a link finally provides: a link or a constant, or None for nothing.

        The value is in a tuple, because a constant may be anything, None included.
        """
        link = self._links.get(link_id)
        node = self._nodes.get(link[1]) if link else None
        if link is None or node is None:
            raise GraphError(
                f"Link {link_id} has no source node: the workflow is damaged. "
                "Open it in the editor, repair it and save it again."
            )
        if link_id in seen:
            raise GraphError(
                f"{node_name(node)} is linked to itself. Open the workflow in the editor and remove the loop."
            )
        seen |= {link_id}
        mode, slot = node.get("mode", 0), link[2]
        if mode == MUTED:
            return None
        if mode == BYPASSED:
            passed, wanted = _bypass(node, slot, wanted)
        elif node["type"] == "Reroute":
            passed = node["inputs"][0].get("link")
        elif node["type"] == "PrimitiveNode":
            return (node["widgets_values"][0],)
        else:
            return ([str(node["id"]), slot],)
        return None if passed is None else self._source(passed, wanted, seen)


def _bypass(node: dict[str, Any], slot: int, wanted: str) -> tuple[Any, str]:
    """Return the link (or None) and the type of the input that a bypassed node passes on to an output.

    It is the input at the same place if the types agree, else the first of the wanted type, else the first
    that fits.
    """
    sockets, given = node.get("inputs") or [], str(node["outputs"][slot]["type"])
    same_place = [
        socket for socket in sockets[slot : slot + 1] if _fits(socket, given) and _fits(socket, wanted)
    ]
    if wanted in ANY:
        candidates = sockets[slot : slot + 1] or sockets
    else:
        exact = [socket for socket in sockets if socket["type"] == wanted]
        candidates = (
            same_place
            or exact
            or [socket for socket in sockets if _fits(socket, given) and _fits(socket, wanted)]
        )
    return (candidates[0].get("link"), str(candidates[0]["type"])) if candidates else (None, wanted)


def _fits(socket: dict[str, Any], other: str) -> bool:
    own = str(socket["type"])
    return own in ANY or other in ANY or not {*own.lower().split(",")}.isdisjoint(other.lower().split(","))
