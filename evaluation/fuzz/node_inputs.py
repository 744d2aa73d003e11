"""Hostile numbers and texts at every node, by the nodes' own schemas, in the real host in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from hypothesis import strategies as st

from .detector_files import CLEAR, MOST_CHARACTERS
from .user_files import TEXTS

SMALL_COUNTS = 3
"""Steps, iterations, images and the like are at most this, because they only cost time."""
SEEDS = ("seed", "noise_seed")
SLOW = frozenset({"SafeGuidanceOptimizeGuidelineTokens", "SafeGuidanceSampleAndRecordAttention"})
"""Nodes that a run of many inputs leaves to their own tests, because they sample."""


class Objects:
    """Objects for the connections of the pack's nodes, made once."""

    def __init__(self) -> None:
        from ...formats.guideline_token_file import load as load_tokens
        from ...formats.negation_set import load
        from ...nodes.extension import SafeGuidanceExtension
        from ...nodes.host.files.demo_model import load_demo_model
        from ...nodes.host.files.folders import (
            ASSETS,
            GUIDELINE_TOKENS,
            NEGATION_SETS,
            file_names,
            file_path,
            register_model_folders,
        )
        from ...reports.trace_file import read_trace

        register_model_folders()
        nodes = asyncio.run(SafeGuidanceExtension().get_node_list())
        self.nodes = {node.GET_SCHEMA().node_id: node for node in nodes}
        model, clip, vae = load_demo_model()
        tokens = clip.tokenize("a yellow star")
        self.values: dict[str, Any] = {
            "MODEL": model,
            "CLIP": clip,
            "VAE": vae,
            "CONDITIONING": clip.encode_from_tokens_scheduled(tokens),
            "LATENT": {"samples": torch.zeros(1, 4, 32, 32)},
            "IMAGE": torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(0)),
            "MASK": torch.ones(1, 128, 128),
            "NEGATION_SET": load(file_path(NEGATION_SETS, "demo_star (bundled)")),
            "GUIDELINE_TOKENS": load_tokens(file_path(GUIDELINE_TOKENS, file_names(GUIDELINE_TOKENS)[0])),
            "SAFETY_TRACE": read_trace(next((ASSETS / "traces").glob("*.json"))),
        }
        classifier = self.nodes["SafeGuidanceClassifierSafetyFunction"]
        self.values["SAFETY_FUNCTION"] = classifier.EXECUTE_NORMALIZED(**self.defaults(classifier)).args[0]

    def defaults(self, node: Any) -> dict[str, Any]:
        """Return a node's inputs: defaults of widgets, and objects for required connections."""
        found: dict[str, Any] = {}
        for entry in node.GET_SCHEMA().inputs:
            kind = entry.io_type
            options = getattr(entry, "options", None)
            default = getattr(entry, "default", None)
            if kind in self.values:
                found[entry.id] = self.values[kind]
            elif kind == "COMBO":
                found[entry.id] = default if default is not None else (options or [""])[0]
            elif default is not None:
                found[entry.id] = default
            elif kind in ("STRING", "INT", "FLOAT", "BOOLEAN"):
                found[entry.id] = {"STRING": "", "INT": 1, "FLOAT": 1.0, "BOOLEAN": False}[kind]
        return found

    def fuzzed(self) -> dict[str, Any]:
        """Return the nodes that have numbers or texts and whose connections can be filled, by their ids."""
        found = {}
        for node_id, node in self.nodes.items():
            inputs = node.GET_SCHEMA().inputs
            filled = self.defaults(node)
            required = [entry.id for entry in inputs if not getattr(entry, "optional", False)]
            if node_id not in SLOW and all(name in filled for name in required) and widgets(node):
                found[node_id] = node
        return found


def widgets(node: Any) -> list[Any]:
    """Return the inputs of a node that are numbers or texts."""
    return [entry for entry in node.GET_SCHEMA().inputs if entry.io_type in ("INT", "FLOAT", "STRING")]


def values(entry: Any) -> st.SearchStrategy[Any]:
    """Return values that the host passes on for a widget: within its limits, and NaN."""
    if entry.io_type == "STRING":
        return TEXTS
    least = entry.min if entry.min is not None else -(10**6)
    most = entry.max if entry.max is not None else 10**6
    if entry.io_type == "INT":
        is_seed = entry.id in SEEDS
        return st.integers(least, most if is_seed else min(most, max(least, 1) + SMALL_COUNTS))
    edges = [float("nan"), float(least), float(most), -0.0 if least <= 0 else float(least)]
    return st.one_of(st.floats(least, most), st.sampled_from(edges))


@st.composite
def inputs(draw: st.DrawFn, node: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Draw a node's inputs with one to three numbers and texts changed."""
    found = dict(defaults)
    for entry in node.GET_SCHEMA().inputs:
        if entry.io_type == "INT" and entry.id not in SEEDS:
            found[entry.id] = min(found[entry.id], max(entry.min or 0, SMALL_COUNTS))
    for _ in range(draw(st.integers(1, 3))):
        entry = draw(st.sampled_from(widgets(node)))
        found[entry.id] = draw(values(entry))
    return found


def answer(node: Any, given: dict[str, Any]) -> str:
    """Execute a node as the server does and return "done" or the text of its error.

    Raises:
        AssertionError: the error is not clear.
    """
    try:
        with torch.inference_mode():
            node.EXECUTE_NORMALIZED(**given)
    except Exception as error:
        text = str(error)
        assert type(error) in (ValueError, FileNotFoundError, ImportError), f"{type(error).__name__}: {text}"
        assert CLEAR.fullmatch(text) and len(text) <= MOST_CHARACTERS, f"The error is not clear: {text!r}"
        text.encode("utf-8")
        return text
    return "done"
