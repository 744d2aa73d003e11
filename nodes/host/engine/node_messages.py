"""Text under a node: the interface itself shows the texts of few nodes' outputs, and none of other packs'."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context

_failed: set[str | None] = set()
"""Ids of nodes under which an error stands."""


def executing_node() -> str | None:
    """Id of the node that the host is executing; None outside a prompt."""
    context = get_executing_context()
    return None if context is None else context.node_id


def show_text(text: str, node: str | None) -> None:
    """Show a text under a node in the window that queued the prompt; nothing where there is no server or no node."""
    # The server is a module of the host's program, absent where its libraries are used alone.
    instance: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node)


def with_text(text: str, images: ui.PreviewImage | None = None) -> dict[str, Any]:
    """What a node returns as `ui` to show a text, below images if it has any, and to leave both in the history."""
    show_text(text, executing_node())
    return {**(images.as_dict() if images else {}), **ui.PreviewText(text).as_dict()}


@contextmanager
def error_shown(node: str | None) -> Iterator[None]:
    """Show an error's sentence under a node and raise it again: the interface itself says no more than that a node failed."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        show_text(str(error), node)
        _failed.add(node)
        raise


def telling(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node class, whose execution shows its errors under it, and takes them away once it succeeds."""
    execute = vars(node)["execute"].__func__
    if not hasattr(execute, "__wrapped__"):

        @functools.wraps(execute)
        def told(cls: type[io.ComfyNode], *inputs: Any, **named: Any) -> io.NodeOutput:
            executing = executing_node()
            with error_shown(executing):
                output: io.NodeOutput = execute(cls, *inputs, **named)
            if executing in _failed:
                _failed.discard(executing)
                # A text of the node's own is there by now, if it has one.
                if not output.ui:
                    show_text("", executing)
            return output

        node.execute = classmethod(told)  # type: ignore[method-assign, assignment]
    return node
