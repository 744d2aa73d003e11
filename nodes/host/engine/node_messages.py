"""Messages on nodes: the web interface shows texts of few nodes by itself, and none of other packs' nodes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context

from .stale_messages import watch_prompts

_failed: set[str | None] = set()
"""Ids of nodes that show an error."""
_shown: set[str] = set()
"""Ids of nodes that show a message."""


def executing_node() -> str | None:
    """Return the id of the node that the host is executing; None outside a prompt."""
    context = get_executing_context()
    return None if context is None else context.node_id


def show_message(text: str, node: str | None) -> None:
    """Show a message on a node in the browser window that queued the prompt.

    Does nothing without a server or a node.
    """
    instance = _server()
    if node is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node)
        _shown.add(node)
        if not text:
            _shown.discard(node)


def _server() -> Any:
    """Return the host's server; None where the host's libraries are used alone, without its program."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _clear(node: str) -> None:
    show_message("", node)
    _failed.discard(node)


def message_ui(text: str, images: ui.PreviewImage | None = None) -> dict[str, Any]:
    """Show a message on the executing node, and return the `ui` that adds it and images to the history."""
    show_message(text, executing_node())
    return {**(images.as_dict() if images else {}), **ui.PreviewText(text).as_dict()}


@contextmanager
def errors_shown_at(node: str | None) -> Iterator[None]:
    """Show an error raised in the block as a message on a node, and raise it again.

    The interface itself only marks the node.
    """
    try:
        yield
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        show_message(str(error), node)
        _failed.add(node)
        raise


def with_error_messages(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Make a node class show its errors as messages until its next success; return the class."""
    watch_prompts(_server(), _shown, _clear)
    execute = vars(node)["execute"].__func__
    if hasattr(execute, "__wrapped__"):
        return node

    @functools.wraps(execute)
    def execute_and_show(cls: type[io.ComfyNode], *inputs: Any, **named: Any) -> io.NodeOutput:
        executing = executing_node()
        with errors_shown_at(executing):
            output: io.NodeOutput = execute(cls, *inputs, **named)
        if executing in _failed:
            _failed.discard(executing)
            # A message of the node's own has replaced the error already.
            if not output.ui:
                show_message("", executing)
        return output

    node.execute = classmethod(execute_and_show)  # type: ignore[method-assign, assignment]
    return node
