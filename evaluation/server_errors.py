"""Errors of a ComfyUI server and of the prompts that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ServerError(RuntimeError):
    """Error of a server that did not start, stopped by itself or gave an unexpected answer."""


class PortTaken(ServerError):
    """Error of a port that another process took before the server started."""


class PromptRejected(ServerError):
    """Error of a prompt that the server rejected.

    `errors` is its answer, with `error` and `node_errors` by node id.
    """

    def __init__(self, errors: Mapping[str, Any]) -> None:
        super().__init__(f"ComfyUI rejected the prompt. Correct these inputs: {_rejection(errors)}")
        self.errors = dict(errors)


def _rejection(errors: Mapping[str, Any]) -> str:
    nodes = errors.get("node_errors") or {}
    found = [
        f"node {node_id} ({node.get('class_type')}): {error.get('message')} {error.get('details')}".strip()
        for node_id, node in nodes.items()
        for error in node.get("errors", [])
    ]
    general = errors.get("error")
    return "; ".join(found) or str(general.get("message") if isinstance(general, Mapping) else general)


class PromptFailed(ServerError):
    """Error of a prompt that failed or was interrupted in one of its nodes."""

    def __init__(self, node_type: str, exception_type: str, message: str) -> None:
        super().__init__(f"{node_type} failed with {exception_type}: {message.strip()}")
        self.node_type = node_type
        self.exception_type = exception_type
        self.message = message
