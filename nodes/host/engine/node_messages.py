"""Messages on nodes: the web interface shows texts of few nodes by itself, and none of other packs' nodes.

Every message and every error passes the gate of `reports/plain_text.py` here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context

from ....reports.plain_text import clean_error, is_encodable, several_lines, short
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
        instance.send_progress_text(several_lines(text), node)
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
    return {**(images.as_dict() if images else {}), **ui.PreviewText(several_lines(text)).as_dict()}


@contextmanager
def errors_shown_at(node: str | None) -> Iterator[None]:
    """Show an error raised in the block as a message on a node, and raise it again, harmless.

    The interface itself only marks the node. An interruption by the user passes as it is.
    """
    try:
        yield
    except Exception as error:
        if is_interruption(error):
            raise
        cleaned = clean_error(error)
        show_message(str(cleaned), node)
        _failed.add(node)
        if cleaned is error:
            raise
        raise cleaned from None


def is_interruption(error: BaseException) -> bool:
    """Return True for the host's signal that the user interrupts the prompt, which is no error."""
    return type(error).__name__ == "InterruptProcessingException"


def check_texts(inputs: Mapping[str, Any]) -> None:
    """Check that the texts among a node's inputs can be written to files and logs.

    Raises:
        ValueError: a text has half of a surrogate pair, as broken programs send it.
    """
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            check_texts(value)
        elif isinstance(value, str) and not is_encodable(value):
            raise ValueError(
                f"The text of '{short(name)}' has a character that is only half of one: '{short(value)}'. "
                "Delete that character, or type the text again."
            )


def with_error_messages(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Make a node class check its texts and show its errors as messages until its next success; return it."""
    watch_prompts(_server(), _shown, _clear)
    execute = vars(node)["execute"].__func__
    if hasattr(execute, "__wrapped__"):
        return node
    if "fingerprint_inputs" in vars(node):
        _clean_fingerprint(node)

    @functools.wraps(execute)
    def execute_and_show(cls: type[io.ComfyNode], *inputs: Any, **named: Any) -> io.NodeOutput:
        executing = executing_node()
        with errors_shown_at(executing):
            check_texts({**{f"input {i + 1}": value for i, value in enumerate(inputs)}, **named})
            output: io.NodeOutput = execute(cls, *inputs, **named)
        if executing in _failed:
            _failed.discard(executing)
            # A message of the node's own has replaced the error already.
            if not output.ui:
                show_message("", executing)
        return output

    node.execute = classmethod(execute_and_show)  # type: ignore[method-assign, assignment]
    return node


def _clean_fingerprint(node: type[io.ComfyNode]) -> None:
    """Make the errors of a node's fingerprint harmless: the host writes them to its log."""
    fingerprint: Callable[..., Any] = vars(node)["fingerprint_inputs"].__func__

    @functools.wraps(fingerprint)
    def fingerprint_cleanly(cls: type[io.ComfyNode], *inputs: Any, **named: Any) -> Any:
        try:
            return fingerprint(cls, *inputs, **named)
        except Exception as error:
            raise clean_error(error) from None

    node.fingerprint_inputs = classmethod(fingerprint_cleanly)  # type: ignore[method-assign, assignment]
