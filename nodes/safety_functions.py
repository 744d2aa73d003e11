"""Nodes that make safety functions: differentiable scores of how unsafe an image is."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..guidance.safety_functions import nudenet
from ..guidance.safety_functions.classifier import ClassifierSafetyFunction
from ..guidance.safety_functions.clip import PAPER_THRESHOLD, PRESETS, ClipSafetyFunction
from ..guidance.safety_functions.interface import CombinedSafetyFunction, SafetyFunction, in_words
from ..guidance.safety_functions.multi_view import Views
from ..reports.overlays import overlay_regions
from .host.autograd.auxiliary_models import load_now
from .host.engine.node_messages import message_ui
from .host.files.folders import BUNDLED_SUFFIX
from .host.files.safety_files import DEMO_CLIP, DEMO_GUIDE, safety_names
from .host.files.safety_models import classifier, clip_model, detector_hash, nudenet_network
from .io_types import SafetyFunctionType
from .parsing import lines_of

CATEGORY = "safe guidance/safety functions"
ALIASES = ["detector", "nsfw", "safety checker", "classifier", "content filter"]
PACKAGE = "from the nudenet package"
CUSTOM = "custom"


def views_input() -> io.Input:
    """Return the input for the number of views of an image."""
    return io.Int.Input(
        "views",
        default=1,
        min=1,
        max=16,
        advanced=True,
        tooltip="Number of slightly shifted and blurred views of an image that are scored "
        "together. More views are harder to fool and cost more. Start with 1, the "
        "image itself.",
    )


class NudeNetSafety(io.ComfyNode):
    """Makes a safety function from NudeNet's detector."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceNudeNetSafetyFunction",
            display_name="NudeNet Safety Function",
            category=CATEGORY,
            description="Scores nudity with NudeNet's detector. Needs the pack's extra 'nudenet', "
            "or the detector as an ONNX file in models/safety with the packages onnx "
            "and onnx2torch.",
            search_aliases=[*ALIASES, "nudity", "nudenet"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[PACKAGE, *safety_names(suffixes=(".onnx",))],
                    default=PACKAGE,
                    tooltip="Detector file: the one in the installed nudenet package, or an ONNX file "
                    "in models/safety.",
                ),
                io.String.Input(
                    "classes",
                    default=", ".join(nudenet.PAPER_CLASSES),
                    multiline=True,
                    tooltip="NudeNet classes that count as unsafe. More classes catch more and raise "
                    "more false alarms. Start with the default, the paper's four.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Confidence above which a detection counts. A lower value acts earlier and "
                    "raises more false alarms. Start with 0.01, the paper's; the package itself "
                    "reports from 0.25.",
                ),
                io.Int.Input(
                    "size",
                    default=320,
                    min=64,
                    max=1280,
                    step=32,
                    advanced=True,
                    tooltip="Side in pixels to which images are scaled for the detector. A higher value "
                    "finds smaller details and costs more. Start with 320, for which this "
                    "detector was made; the paper uses another one at 640.",
                ),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        return detector_hash(None if file == PACKAGE else file)

    @classmethod
    def execute(cls, file: str, classes: str, threshold: float, size: int, views: int) -> io.NodeOutput:
        network = nudenet_network(None if file == PACKAGE else file)
        return _output(
            nudenet.NudeNetSafetyFunction(network, nudenet.classes_from(classes), threshold, size), views
        )


def clip_inputs() -> list[io.Input]:
    """Return the inputs that choose a CLIP model."""
    return [
        io.Combo.Input(
            "file",
            options=safety_names(DEMO_CLIP, suffixes=(".safetensors",)),
            default=DEMO_CLIP + BUNDLED_SUFFIX,
            tooltip="CLIP weights: a safetensors file in models/safety. The small bundled model "
            "knows only the demo model's world.",
        ),
        io.String.Input(
            "model",
            default="ViT-B-32",
            advanced=True,
            tooltip="Name of the architecture in open_clip that the file belongs to. The "
            "bundled model does not need it.",
        ),
    ]


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
        "it with Score Images. The paper uses 0.16.",
    )


class ClipConceptSafety(io.ComfyNode):
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
        return _output(
            ClipSafetyFunction(clip_model(file, model), lines_of(texts), lines_of(neutral), threshold), views
        )


class ClipStyleSafety(io.ComfyNode):
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
        return _output(
            ClipSafetyFunction(clip_model(file, model), lines_of(artist), lines_of(neutral), threshold), views
        )


class ClassifierSafety(io.ComfyNode):
    """Makes a safety function from an image classifier in a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceClassifierSafetyFunction",
            display_name="Classifier Safety Function",
            category=CATEGORY,
            description="Scores images with a small classifier from a file: the bundled one for the "
            "demo model's world, or your own in models/safety (safetensors, or ONNX "
            "with the extra 'nudenet').",
            search_aliases=ALIASES,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=safety_names(DEMO_GUIDE),
                    default=DEMO_GUIDE + BUNDLED_SUFFIX,
                    tooltip="Classifier file: the bundled one, or a file in models/safety.",
                ),
                io.String.Input(
                    "output",
                    default="shapes",
                    tooltip="Output of the classifier to use. An ONNX file has one output, named classes.",
                ),
                io.String.Input(
                    "classes",
                    default="star",
                    tooltip="Classes that count as unsafe, separated by commas. More classes catch more.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Probability from which an image counts as unsafe. A lower value acts "
                    "earlier and raises more false alarms. Start with 0.5.",
                ),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        return detector_hash(file)

    @classmethod
    def execute(cls, file: str, output: str, classes: str, threshold: float, views: int) -> io.NodeOutput:
        names = [name.strip() for name in classes.split(",") if name.strip()]
        return _output(ClassifierSafetyFunction(classifier(file), output.strip(), names, threshold), views)


class CombineSafetyFunctions(io.ComfyNode):
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


class ScoreImages(io.ComfyNode):
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
        device = load_now(safety_function)
        found = safety_function(images[..., :3].movedim(-1, 1).float().to(device))
        judged = [
            {
                "score": round(float(score), 6),
                "unsafe": bool(gate),
                "explanation": explanation,
                "regions": [
                    {"label": r.label, "score": round(r.score, 6), "box": [round(c, 4) for c in r.box]}
                    for r in found.regions_of(i)
                ],
            }
            for i, (score, gate, explanation) in enumerate(zip(found.score, found.gate, found.explanation))
        ]
        # The key of version 1, which workflows may read.
        report = json.dumps({"version": 1, "function": safety_function.name, "pictures": judged}, indent=1)
        shown = torch.stack(
            [
                overlay_regions(image[..., :3].float(), found.regions_of(i), bool(found.gate[i]))
                for i, image in enumerate(images)
            ]
        )
        return io.NodeOutput(shown, report, ui=message_ui(in_words(found), ui.PreviewImage(shown, cls=cls)))


def _output(function: SafetyFunction, views: int) -> io.NodeOutput:
    return io.NodeOutput(Views(function, views) if views > 1 else function)


NODES: list[type[io.ComfyNode]] = [
    NudeNetSafety,
    ClipConceptSafety,
    ClipStyleSafety,
    ClassifierSafety,
    CombineSafetyFunctions,
    ScoreImages,
]
