"""Text under a node: the interface itself shows the texts of few nodes' outputs, and none of other packs'."""

from __future__ import annotations

import sys
from typing import Any

from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context


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


def with_text(text: str, pictures: ui.PreviewImage | None = None) -> dict[str, Any]:
    """What a node returns as `ui` to show a text, below pictures if it has any, and to leave both in the history."""
    show_text(text, executing_node())
    return {**(pictures.as_dict() if pictures else {}), **ui.PreviewText(text).as_dict()}
