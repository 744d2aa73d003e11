"""Nodes that combine safety functions, which score how unsafe an image is, and show their scores."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..guidance.safety_functions.interface import CombinedSafetyFunction, SafetyFunction
from ..reports.safety_scores import overlay_scores, scores_in_words, scores_json
from .host.autograd.auxiliary_models import assess
from .host.engine.node_messages import message_ui
from .io_types import SafetyFunctionType
from .safety_function_inputs import ALIASES, CATEGORY


class CombineSafetyFunctionsNode(io.ComfyNode):
    """Combines several safety functions into one."""

    MOST = 4

    @classmethod
    def define_schema(cls) -> io.Schema:
        further = [
            SafetyFunctionType.Input(
                f"function{i}", optional=i > 1, tooltip="Safety function to combine with the others."
            )
            for i in range(1, cls.MOST + 1)
        ]
        weights = [
            io.Float.Input(
                f"weight{i}",
                default=1.0,
                min=0.0,
                max=1000.0,
                step=0.05,
                advanced=True,
                tooltip="Weight of this function's score; 0 leaves it out. A higher value gives it "
                "more influence. Start with 1.",
            )
            for i in range(1, cls.MOST + 1)
        ]
        return io.Schema(
            node_id="SafeGuidanceCombineSafetyFunctions",
            display_name="Combine Safety Functions",
            category=CATEGORY,
            description="Combines several safety functions into one: an image counts as unsafe as "
            "soon as one of them says so.",
            search_aliases=[*ALIASES, "merge detectors"],
            inputs=[
                *further,
                io.Combo.Input(
                    "combination",
                    options=["sum", "maximum"],
                    default="sum",
                    tooltip="How scores are combined. sum adds them by their weights; maximum uses only "
                    "the highest. Start with sum.",
                ),
                *weights,
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def execute(cls, combination: Any, **inputs: Any) -> io.NodeOutput:
        numbers = [i for i in range(1, cls.MOST + 1) if inputs.get(f"function{i}") is not None]
        functions = [inputs[f"function{i}"] for i in numbers]
        weights = [inputs[f"weight{i}"] for i in numbers]
        return io.NodeOutput(CombinedSafetyFunction(functions, weights, combination))


class ScoreImagesNode(io.ComfyNode):
    """Scores images with a safety function."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Shows what a safety function finds in images: scores, whether it would "
            "act, and where it found something.",
            search_aliases=[*ALIASES, "score", "nsfw check"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Images to score, such as decoded results."),
                SafetyFunctionType.Input(
                    "safety_function", tooltip="Safety function that scores the images."
                ),
            ],
            outputs=[io.Image.Output(display_name="overlay"), io.String.Output(display_name="scores")],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, safety_function: SafetyFunction) -> io.NodeOutput:
        found = assess(safety_function, images)
        shown = overlay_scores(images, found)
        return io.NodeOutput(
            shown,
            scores_json(safety_function.name, found, safety_function.note),
            ui=message_ui(scores_in_words(found, safety_function.note), ui.PreviewImage(shown, cls=cls)),
        )


NODES: list[type[io.ComfyNode]] = [CombineSafetyFunctionsNode, ScoreImagesNode]
