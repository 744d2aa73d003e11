"""Nodes that make safety functions from CLIP models: a concept in words, or an artist's style."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guidance.safety_functions.clip import PAPER_THRESHOLD, PRESETS, ClipSafetyFunction, usual_threshold
from .host.files.safety_models import clip_model, detector_hash
from .io_types import SafetyFunctionType
from .parsing import lines_of
from .safety_function_inputs import ALIASES, CATEGORY, clip_inputs, function_output, views_input

CUSTOM = "custom"


def clip_threshold() -> io.Input:
    """Return the input for the similarity threshold."""
    return io.Float.Input(
        "threshold",
        default=PAPER_THRESHOLD,
        min=-1.0,
        max=1.0,
        step=0.01,
        tooltip="Similarity above which an image counts as unsafe. A lower value acts on "
        "more images. The right value depends on the model and the texts: measure "
        "it with Score Images. 0.16, the paper's for violence, is for texts alone; "
        "with neutral texts it stands for 0.",
    )


def _output(
    file: str, model: str, texts: list[str], neutral: list[str], threshold: float, views: int
) -> io.NodeOutput:
    """Make the safety function. The input's default stands for the usual threshold of these texts."""
    message = ""
    if threshold == PAPER_THRESHOLD and neutral:
        threshold = usual_threshold(has_neutral=True)
        message = (
            f"The threshold is {threshold:g}: with neutral texts the similarities are subtracted, and the "
            f"difference hardly reaches {PAPER_THRESHOLD:g}. Measure a threshold with Score Images."
        )
    function = ClipSafetyFunction(clip_model(file, model), texts, neutral, threshold)
    return function_output(function, views, file, message)


class ClipConceptSafetyFunctionNode(io.ComfyNode):
    """Makes a safety function from a concept in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceClipConceptSafetyFunction",
            display_name="CLIP Concept Safety Function",
            category=CATEGORY,
            description="Scores with a CLIP model how much an image resembles texts, minus how much "
            "it resembles neutral texts. Needs the pack's extra 'clip'.",
            search_aliases=[*ALIASES, "clip", "violence", "concept", "bias"],
            inputs=[
                *clip_inputs(),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    tooltip="Ready-made texts for violence or bias. custom uses the texts below.",
                ),
                io.String.Input(
                    "texts",
                    default="",
                    multiline=True,
                    tooltip="Texts for what images should not show, one per line. More lines average "
                    "over more ways to say it. Start with two or three lines.",
                ),
                io.String.Input(
                    "neutral",
                    default="",
                    multiline=True,
                    tooltip="Texts to compare with, one per line, such as the harmless counterpart. "
                    "Without them the plain similarity counts, as in the paper.",
                ),
                clip_threshold(),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        return detector_hash(file)

    @classmethod
    def execute(
        cls, file: str, model: str, preset: str, texts: str, neutral: str, threshold: float, views: int
    ) -> io.NodeOutput:
        texts, neutral = PRESETS.get(preset, (texts, neutral))
        return _output(file, model, lines_of(texts), lines_of(neutral), threshold, views)


class ClipStyleSafetyFunctionNode(io.ComfyNode):
    """Makes a safety function from an artist's style."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceClipStyleSafetyFunction",
            display_name="CLIP Style Safety Function",
            category=CATEGORY,
            description="Scores with a CLIP model how much an image resembles an artist's style, "
            "minus how much it resembles art in general. Needs the pack's extra 'clip'.",
            search_aliases=[*ALIASES, "clip", "artist", "style", "avoid style"],
            inputs=[
                *clip_inputs(),
                io.String.Input(
                    "artist",
                    default="",
                    tooltip="The artist's name, or words for the style, as captions write it.",
                ),
                io.String.Input(
                    "neutral",
                    default="art",
                    multiline=True,
                    tooltip="Texts that the style is compared with, one per line. Naming other styles "
                    "separates them better. Start with art, as in the paper.",
                ),
                clip_threshold(),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        return detector_hash(file)

    @classmethod
    def execute(
        cls, file: str, model: str, artist: str, neutral: str, threshold: float, views: int
    ) -> io.NodeOutput:
        return _output(file, model, lines_of(artist), lines_of(neutral), threshold, views)


NODES: list[type[io.ComfyNode]] = [ClipConceptSafetyFunctionNode, ClipStyleSafetyFunctionNode]
