"""Values of a node's widgets, as the editor saves them in the order in which it shows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .graphs import GraphError

WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
AFTER_GENERATE = frozenset({"fixed", "increment", "decrement", "randomize", "increment-wrap"})
SEEDS = frozenset({"seed", "noise_seed"})


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a node's widgets by the name of their input.

    Args:
        node: in the editor's format.
        info: the server's description of its class.

    Raises:
        GraphError: the values do not fit the description.
    """
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
                    f"Input {name} of {node_name(node)} has a varying set of widgets, "
                    "which is not supported. Use another node."
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
            f'After {name} of {node_name(node)} the value of "control after generate" is missing, '
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
        f"{node_name(node)} has no value for {name}. Open the workflow in the editor, set it and save again."
    )


def _kind(spec: list[Any]) -> str:
    return "COMBO" if isinstance(spec[0], list) else str(spec[0])


def _options(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def node_name(node: dict[str, Any]) -> str:
    """Return a node's id, title and class for a message."""
    title = node.get("title")
    return f'node {node["id"]} "{title}" ({node["type"]})' if title else f"node {node['id']} ({node['type']})"
