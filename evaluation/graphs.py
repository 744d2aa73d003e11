"""Conversion of workflows from the editor's format into API prompts, and edits of API prompts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

Prompt: TypeAlias = dict[str, dict[str, Any]]
"""Nodes by id: {"class_type": ..., "inputs": {name: value or [id, slot]}, "_meta": {"title": ...}}."""
ObjectInfo: TypeAlias = dict[str, Any]
"""The server's answer to `/object_info`: a description of every node class."""

MUTED, BYPASSED = 2, 4
NOTES = frozenset({"Note", "MarkdownNote"})
VIRTUAL = NOTES | {"Reroute", "PrimitiveNode"}
WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
AFTER_GENERATE = frozenset({"fixed", "increment", "decrement", "randomize", "increment-wrap"})
ANY = frozenset({"", "*"})
SEEDS = frozenset({"seed", "noise_seed"})


class GraphError(ValueError):
    """A workflow that cannot be converted, or an edit that fits no node."""


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


def find(prompt: Prompt, title_or_class: str) -> list[str]:
    """Find the ids of the nodes with this title, or of this class when no title matches.

    Raises:
        GraphError: when there is none.
    """
    titled = [key for key, node in prompt.items() if node.get("_meta", {}).get("title") == title_or_class]
    found = titled or [key for key, node in prompt.items() if node["class_type"] == title_or_class]
    if not found:
        raise GraphError(
            f'The prompt has no node "{title_or_class}". Use the title or the class of one of its nodes.'
        )
    return found


def set_inputs(prompt: Prompt, title_or_class: str, **values: Any) -> Prompt:
    """Copy the prompt with these inputs set in every node that `find` returns.

    Raises:
        GraphError: when there is no such node, or it has no such input.
    """
    edited = copy.deepcopy(prompt)
    for key in find(edited, title_or_class):
        inputs = edited[key]["inputs"]
        missing = sorted(set(values) - set(inputs))
        if missing:
            raise GraphError(
                f'"{title_or_class}" has no input {", ".join(missing)}. '
                f"Its inputs are {', '.join(sorted(inputs))}."
            )
        inputs.update(values)
    return edited


def add_node(prompt: Prompt, class_type: str, **inputs: Any) -> tuple[Prompt, str]:
    """Copy the prompt with one more node, and return the copy and the new node's id."""
    key = str(max((int(key) for key in prompt if key.isdecimal()), default=0) + 1)
    edited = copy.deepcopy(prompt)
    edited[key] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}
    return edited, key


def insert_between(
    prompt: Prompt, source: tuple[str, int], class_type: str, input_name: str, **inputs: Any
) -> tuple[Prompt, str]:
    """Copy the prompt with a new node inserted behind an output, and return the copy and the new node's id.

    All inputs that were linked to the output are linked to the new node's first output instead.

    Args:
        source: node id and output slot whose links are re-routed.
        input_name: the new node's input that takes the output; `inputs` are its others.
    """
    old = list(source)
    edited, key = add_node(prompt, class_type)
    for node in edited.values():
        node["inputs"] = {name: [key, 0] if value == old else value for name, value in node["inputs"].items()}
    edited[key]["inputs"] = {input_name: old, **inputs}
    return edited, key


def origin(prompt: Prompt, key: str, input_name: str) -> tuple[str, int]:
    """Trace an input such as `model` upstream and return the node and slot where its value first appears.

    Raises:
        GraphError: when the input is not linked.
    """
    link = prompt[key]["inputs"].get(input_name)
    if not is_link(link):
        raise GraphError(
            f"Input {input_name} of node {key} is not linked. "
            f'Link it to the node that provides "{input_name}".'
        )
    upstream = prompt[link[0]]["inputs"].get(input_name)
    return origin(prompt, link[0], input_name) if is_link(upstream) else (link[0], link[1])


def is_link(value: Any) -> bool:
    """Return True when an input's value is a link [node id, output slot] rather than a constant."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


class _Conversion:
    """Conversion of one workflow, with its nodes and links by id."""

    def __init__(self, workflow: dict[str, Any], object_info: ObjectInfo) -> None:
        self._info = object_info
        subgraphs = {graph["id"] for graph in workflow.get("definitions", {}).get("subgraphs", [])}
        self._nodes: dict[Any, dict[str, Any]] = {node["id"]: node for node in workflow["nodes"]}
        for node in self._nodes.values():
            if node["type"] in subgraphs:
                raise GraphError(
                    f"{_name(node)} is a subgraph, which is not supported. "
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
                f"The server has no node class for {_name(node)}. Install the pack that provides it."
            )
        inputs = self._widgets(node, info)
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
                f"{_name(node)} is linked to itself. Open the workflow in the editor and remove the loop."
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

    def _widgets(self, node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        values = node.get("widgets_values") or []
        specs = list(_widget_specs(node, info))
        if isinstance(values, dict):
            return {name: values.get(name, _default(node, name, spec)) for name, spec in specs}
        rest = list(values)
        inputs = {}
        for name, spec in specs:
            value = rest.pop(0) if rest else _default(node, name, spec)
            inputs[name] = {"__value__": value} if isinstance(value, list) else value
            if rest:
                rest = rest[_companions(node, name, spec, rest) :]
        return inputs


def _widget_specs(node: dict[str, Any], info: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield name and description of the inputs with a widget, in the order of the saved widget values."""
    shown = {socket["name"] for socket in node.get("inputs") or [] if socket.get("widget")}
    for section in ("required", "optional"):
        described = info["input"].get(section, {})
        for name in info.get("input_order", {}).get(section, described):
            spec = described[name]
            if spec[0] == "COMFY_DYNAMICCOMBO_V3":
                raise GraphError(
                    f"Input {name} of {_name(node)} has a varying set of widgets, which is not supported. "
                    "Use another node."
                )
            if name in shown or (_kind(spec) in WIDGET_TYPES and not _options(spec).get("forceInput")):
                yield name, spec


def _companions(node: dict[str, Any], name: str, spec: list[Any], rest: list[Any]) -> int:
    """Count the values in `rest` of widgets that the editor adds after this one and does not send."""
    kind = _kind(spec)
    if not (_options(spec).get("control_after_generate") or (kind == "INT" and name in SEEDS)):
        return 0
    if rest[0] not in AFTER_GENERATE:
        raise GraphError(
            f'After {name} of {_name(node)} the value of "control after generate" is missing, '
            'which would shift all others. Insert "fixed".'
        )
    return 2 if kind == "COMBO" else 1


def _default(node: dict[str, Any], name: str, spec: list[Any]) -> Any:
    """Return what the editor shows in a widget for which the file has no value."""
    options = _options(spec)
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    if "default" in options:
        return options["default"]
    if choices:
        return choices[0]
    if _kind(spec) == "STRING":
        return ""
    raise GraphError(
        f"{_name(node)} has no value for {name}. Open the workflow in the editor, set it and save again."
    )


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


def _kind(spec: list[Any]) -> str:
    return "COMBO" if isinstance(spec[0], list) else str(spec[0])


def _options(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def _name(node: dict[str, Any]) -> str:
    title = node.get("title")
    return f'node {node["id"]} "{title}" ({node["type"]})' if title else f"node {node['id']} ({node['type']})"
