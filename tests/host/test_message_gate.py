"""Every message of a node passes the gate: none stops the host, forges a log line or runs in a browser."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch

from safe_guidance.formats.negation_set import from_images

HTML = "<img src=x onerror=alert(1)> [[free|https://example.org]]"


@pytest.fixture
def nodes(host: Any) -> dict[str, Any]:
    """The pack's nodes by display name, as the host gets them."""
    import asyncio

    from safe_guidance.nodes.extension import SafeGuidanceExtension

    return {
        node.GET_SCHEMA().display_name: node for node in asyncio.run(SafeGuidanceExtension().get_node_list())
    }


def texts_of(node: Any) -> list[str]:
    """Return the names of a node's inputs that take any text."""
    return [each.id for each in node.GET_SCHEMA().inputs if each.io_type == "STRING"]


def test_a_text_that_no_log_can_write_is_refused_at_every_node(nodes: dict[str, Any]) -> None:
    tried = 0
    for node in nodes.values():
        for name in texts_of(node):
            with pytest.raises(ValueError, match=f"The text of '{name}' has a character") as raised:
                node.EXECUTE_NORMALIZED(**{name: "a\udc80\n[ERROR] b" + "x" * 5000})
            shown = "".join(traceback.format_exception(raised.value))
            shown.encode("utf-8")
            assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
            tried += 1
    assert tried > 20


def test_a_fingerprints_error_is_harmless(nodes: dict[str, Any]) -> None:
    for name in ("Load Negation Set", "Load Guideline Tokens"):
        with pytest.raises((FileNotFoundError, ValueError)) as raised:
            nodes[name].fingerprint_inputs(name="/etc/\udcff\nx")
        "".join(traceback.format_exception(raised.value)).encode("utf-8")
        assert "\n" not in str(raised.value) and "/etc" not in str(raised.value)


def test_names_of_sets_stay_text_in_messages(nodes: dict[str, Any], shown: dict[str, str]) -> None:
    from comfy_execution.utils import CurrentNodeContext

    images = from_images(torch.rand(2, 16, 16, 3), name=HTML + "\nsecond line" + "y" * 3000)
    with CurrentNodeContext("prompt", "1"):
        output = nodes["Preview Negation Set"].EXECUTE_NORMALIZED(negation_set=images, most=4)
    for text in (shown["1"], *output.ui["text"]):
        assert "<" not in text and "[[" not in text and "img src=x" in text
        assert all(len(line) <= 500 for line in text.split("\n"))


def test_an_interruption_is_no_error(nodes: dict[str, Any], shown: dict[str, str]) -> None:
    from comfy.model_management import InterruptProcessingException

    from safe_guidance.nodes.host.engine.node_messages import errors_shown_at

    with pytest.raises(InterruptProcessingException), errors_shown_at("7"):
        raise InterruptProcessingException
    assert shown == {}
