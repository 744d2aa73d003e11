"""API prompts, the graphs of nodes that a server runs: search for nodes, and edits."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

Prompt: TypeAlias = dict[str, dict[str, Any]]
"""Nodes by id: {"class_type": ..., "inputs": {name: value or [id, slot]}, "_meta": {"title": ...}}."""


class GraphError(ValueError):
    """A workflow that cannot be converted, or an edit that fits no node."""


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
