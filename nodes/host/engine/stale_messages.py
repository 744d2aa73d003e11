"""Messages of nodes that take no part in a new prompt: bypassed, muted, disconnected or removed ones.

The web interface keeps a text until it gets another, so the last sentence of a bypassed node would stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

_watched: set[int] = set()
"""The server objects whose prompts are watched, by their `id`."""
_workflows: dict[str, str | None] = {}
"""The workflow in which each node was queued last; the same number may stand for other nodes elsewhere."""


def watch_prompts(server: Any, shown: set[str], clear: Callable[[str], None]) -> None:
    """Clear the messages of nodes that a newly queued prompt of their workflow does not run.

    Args:
        server: the host's server; one that cannot tell about prompts is left alone.
        shown: ids of the nodes that show a message.
        clear: removes the message of a node.
    """
    if id(server) in _watched or not hasattr(server, "add_on_prompt_handler"):
        return
    _watched.add(id(server))

    def on_prompt(queued: Any) -> Any:
        if isinstance(queued, dict) and not queued.get("partial_execution_targets"):
            workflow, running = _workflow_of(queued), nodes_that_run(queued.get("prompt"))
            left_out = [n for n in shown if n not in running and _workflows.get(n) == workflow]
            for node in left_out:
                clear(node)
            _workflows.update(dict.fromkeys(running, workflow))
        return queued

    server.add_on_prompt_handler(on_prompt)


def nodes_that_run(prompt: Any) -> set[str]:
    """Return the ids of a prompt's output nodes and of all nodes that they get their inputs from."""
    if not isinstance(prompt, dict):
        return set()
    # `nodes` is the host's module here.
    known: Mapping[str, Any] = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    waiting = [
        name
        for name, node in prompt.items()
        if isinstance(node, dict) and getattr(known.get(str(node.get("class_type"))), "OUTPUT_NODE", False)
    ]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        node = prompt.get(name)
        if name in found or not isinstance(node, dict):
            continue
        found.add(name)
        inputs = node.get("inputs")
        links = inputs.values() if isinstance(inputs, dict) else ()
        waiting += [str(link[0]) for link in links if isinstance(link, list) and len(link) == 2]
    return found


def _workflow_of(queued: Mapping[str, Any]) -> str | None:
    """Return the id of the workflow that a prompt was queued from; None for a prompt of a program."""
    found: Any = queued
    for key in ("extra_data", "extra_pnginfo", "workflow", "id"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None
