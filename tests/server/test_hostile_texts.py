"""Hostile texts through the real server's /prompt: a clear error each, and the prompt worker lives on."""

from __future__ import annotations

from typing import Any

import pytest

from safe_guidance.evaluation.server import ComfyServer
from safe_guidance.evaluation.server_errors import PromptFailed

HALF = "\ud800"
"""Half of a surrogate pair, which no log and no file can hold."""
SET = {"class_type": "SafeGuidanceLoadNegationSet", "inputs": {"name": "demo_star (bundled)"}}


def defaults(server: ComfyServer, node: str) -> dict[str, Any]:
    """Return a node's widgets with their defaults."""
    info = server.get_json(f"/object_info/{node}")[node]["input"]
    found: dict[str, Any] = {}
    for name, (kind, *rest) in {**info["required"], **info.get("optional", {})}.items():
        options = rest[0] if rest else {}
        if isinstance(kind, list):
            found[name] = kind[0] if kind else ""
        elif kind == "COMBO" and options.get("options"):
            found[name] = options["options"][0]
        elif "default" in options:
            found[name] = options["default"]
    return found


def saving(server: ComfyServer, **texts: str) -> dict[str, Any]:
    inputs = {"negation_set": ["1", 0], "file_name": "x", "overwrite": True, **texts}
    return {"1": SET, "2": {"class_type": "SafeGuidanceSaveNegationSet", "inputs": inputs}}


def building(server: ComfyServer, **texts: str) -> dict[str, Any]:
    image = {"width": 32, "height": 32, "batch_size": 1, "color": 0}
    inputs = {"images": ["1", 0], "name": "", "source": "", "licence": "", **texts}
    return {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "SafeGuidanceBuildNegationSet", "inputs": inputs},
        "3": {
            "class_type": "SafeGuidancePreviewNegationSet",
            "inputs": {"negation_set": ["2", 0], "most": 4},
        },
    }


def classifying(server: ComfyServer, **texts: str) -> dict[str, Any]:
    node = "SafeGuidanceClassifierSafetyFunction"
    image = {"width": 32, "height": 32, "batch_size": 1, "color": 0}
    return {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": node, "inputs": {**defaults(server, node), **texts}},
        "3": {
            "class_type": "SafeGuidanceScoreImages",
            "inputs": {"images": ["1", 0], "safety_function": ["2", 0]},
        },
    }


def optimising(server: ComfyServer, **texts: str) -> dict[str, Any]:
    node = "SafeGuidanceOptimizeGuidelineTokens"
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "masks": ["3", 0]}
    image = {"width": 128, "height": 128, "batch_size": 1, "color": 0}
    return {
        "1": {"class_type": "SafeGuidanceLoadDemoModel", "inputs": {}},
        "2": {"class_type": "EmptyImage", "inputs": image},
        "3": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 128, "height": 128}},
        "4": {"class_type": node, "inputs": {**defaults(server, node), **links, **texts}},
        "5": {
            "class_type": "SafeGuidanceSaveGuidelineTokens",
            "inputs": {"guideline_tokens": ["4", 0], "name": "x", "source": "", "licence": ""},
        },
    }


def check_alive(server: ComfyServer) -> None:
    outputs = server.run(building(server, name="good"), timeout=60)["outputs"]
    assert "1 images" in outputs["3"]["text"][0]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        (saving, "file_name"),
        (building, "name"),
        (building, "source"),
        (classifying, "classes"),
        (classifying, "output"),
        (optimising, "words"),
        (optimising, "sigmas"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_half_a_character_stops_no_server(server: ComfyServer, prompt: Any, name: str) -> None:
    with pytest.raises(PromptFailed, match=f"The text of '{name}' has a character that is only half of one"):
        server.run(prompt(server, **{name: f"a{HALF}b"}), timeout=60)
    check_alive(server)


@pytest.mark.parametrize(
    ("prompt", "name"), [(saving, "file_name"), (classifying, "classes"), (optimising, "sigmas")]
)
def test_an_echoed_text_is_short_and_forges_no_line(server: ComfyServer, prompt: Any, name: str) -> None:
    text = "\n[ERROR] forged line\n/home/someone/secret/<script>alert(1)</script>:[[a|b]]" + "x, " * 50_000
    with pytest.raises(PromptFailed) as raised:
        server.run(prompt(server, **{name: text}), timeout=60)
    message = str(raised.value)
    assert len(message) < 700 and "<" not in message.split(": ", 2)[-1] and "[[" not in message
    assert "/home/someone" not in message
    assert "\n[ERROR] forged line" not in server.log.read_text(encoding="utf-8", errors="replace")
    check_alive(server)


def test_a_message_of_a_set_with_html_is_only_text(server: ComfyServer) -> None:
    outputs = server.run(building(server, name="<img src=x onerror=alert(1)>\n[[a|https://b]]"))["outputs"]
    text = outputs["3"]["text"][0]
    assert "img src=x" in text and "<" not in text and "[[" not in text
