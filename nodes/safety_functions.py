"""Safety functions: what counts as unsafe in an image, as a score that guidance can decrease."""

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
from ..reports.overlay import overlay
from .host.autograd.decoders import load_now
from .host.engine.node_messages import message_ui
from .host.files.folders import BUNDLED_SUFFIX
from .host.files.safety_files import DEMO_CLIP, DEMO_GUIDE, safety_names, safety_path
from .host.files.safety_models import classifier, clip_model, nudenet_network
from .io_types import SafetyFunctionType
from .shared_inputs import lines_of

CATEGORY = "safe guidance/safety functions"
ALIASES = ["detector", "nsfw", "safety checker", "classifier", "content filter"]
PACKAGE = "from the nudenet package"
CUSTOM = "custom"


def views_input() -> io.Input:
    """How often an image is looked at."""
    return io.Int.Input(
        "views",
        default=1,
        min=1,
        max=16,
        advanced=True,
        tooltip="How many slightly shifted and softened views of an image are judged together. More makes guidance change what is "
        "seen instead of fooling the detector, and costs more; 1 judges the image as it is.",
    )


class NudeNetSafety(io.ComfyNode):
    """NudeNet's detector."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceNudeNetSafetyFunction",
            display_name="NudeNet Safety Function",
            category=CATEGORY,
            description="Scores nudity with NudeNet's detector. Needs the pack's extra 'nudenet', or the detector as an ONNX file in "
            "models/safety together with the packages onnx and onnx2torch.",
            search_aliases=[*ALIASES, "nudity", "nudenet"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[PACKAGE, *safety_names(suffixes=(".onnx",))],
                    default=PACKAGE,
                    tooltip="The detector: the one that the installed nudenet package brings, or an ONNX file in models/safety.",
                ),
                io.String.Input(
                    "classes",
                    default=", ".join(nudenet.PAPER_CLASSES),
                    multiline=True,
                    tooltip="What counts as unsafe, as names of NudeNet's classes. More classes catch more and misfire more. "
                    "The default is the paper's four.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Confidence above which something counts. Less acts earlier and misfires more often; 0.01 is the paper's, "
                    "0.25 is what the package itself reports.",
                ),
                io.Int.Input(
                    "size",
                    default=320,
                    min=64,
                    max=1280,
                    step=32,
                    advanced=True,
                    tooltip="Side in pixels at which the detector looks. More finds smaller things and costs more; 320 is what this "
                    "detector was made for, the paper guides with another at 640.",
                ),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def execute(cls, file: str, classes: str, threshold: float, size: int, views: int) -> io.NodeOutput:
        network = nudenet_network(None if file == PACKAGE else file)
        return _output(
            nudenet.NudeNetSafetyFunction(network, nudenet.classes_from(classes), threshold, size), views
        )


def clip_inputs() -> list[io.Input]:
    """Which CLIP model."""
    return [
        io.Combo.Input(
            "file",
            options=safety_names(DEMO_CLIP, suffixes=(".safetensors",)),
            default=DEMO_CLIP + BUNDLED_SUFFIX,
            tooltip="The CLIP model's weights: a safetensors file in models/safety, or the small bundled one, which knows only the "
            "demo model's world.",
        ),
        io.String.Input(
            "model",
            default="ViT-B-32",
            advanced=True,
            tooltip="open_clip's name of the architecture that the file belongs to. The bundled model does not need it.",
        ),
    ]


def clip_threshold() -> io.Input:
    """When a similarity counts."""
    return io.Float.Input(
        "threshold",
        default=PAPER_THRESHOLD,
        min=-1.0,
        max=1.0,
        step=0.01,
        tooltip="Similarity above which an image counts as unsafe. Less acts on more images. Which value divides depends on the "
        "model and the texts: look with Score Images first. 0.16 is the paper's.",
    )


class ClipConceptSafety(io.ComfyNode):
    """A concept in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceClipConceptSafetyFunction",
            display_name="CLIP Concept Safety Function",
            category=CATEGORY,
            description="Scores how much an image resembles texts, less how much it resembles neutral ones, by a CLIP model. "
            "Needs the pack's extra 'clip'.",
            search_aliases=[*ALIASES, "clip", "violence", "concept", "bias"],
            inputs=[
                *clip_inputs(),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    tooltip="Ready-made texts; custom uses those below.",
                ),
                io.String.Input(
                    "texts",
                    default="",
                    multiline=True,
                    tooltip="What images should not show, one text a line. More lines average over more ways to say it.",
                ),
                io.String.Input(
                    "neutral",
                    default="",
                    multiline=True,
                    tooltip="What it should be compared with, one text a line. Without, the bare similarity counts, as in the paper.",
                ),
                clip_threshold(),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def execute(
        cls, file: str, model: str, preset: str, texts: str, neutral: str, threshold: float, views: int
    ) -> io.NodeOutput:
        texts, neutral = PRESETS.get(preset, (texts, neutral))
        return _output(
            ClipSafetyFunction(clip_model(file, model), lines_of(texts), lines_of(neutral), threshold), views
        )


class ClipStyleSafety(io.ComfyNode):
    """An artist's style."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceClipStyleSafetyFunction",
            display_name="CLIP Style Safety Function",
            category=CATEGORY,
            description="Scores how much an image resembles an artist's style, less how much it resembles art in general, by a CLIP "
            "model. Needs the pack's extra 'clip'.",
            search_aliases=[*ALIASES, "clip", "artist", "style", "avoid style"],
            inputs=[
                *clip_inputs(),
                io.String.Input(
                    "artist", default="", tooltip="The artist, or words for the style, as captions name it."
                ),
                io.String.Input(
                    "neutral",
                    default="art",
                    multiline=True,
                    tooltip="What the style is compared with, one text a line. The paper compares with 'art'; naming other styles "
                    "divides more sharply.",
                ),
                clip_threshold(),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def execute(
        cls, file: str, model: str, artist: str, neutral: str, threshold: float, views: int
    ) -> io.NodeOutput:
        return _output(
            ClipSafetyFunction(clip_model(file, model), lines_of(artist), lines_of(neutral), threshold), views
        )


class ClassifierSafety(io.ComfyNode):
    """An image classifier from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceClassifierSafetyFunction",
            display_name="Classifier Safety Function",
            category=CATEGORY,
            description="Scores images with a small classifier from a file: the bundled one of the demo model's world, or your own in "
            "models/safety (safetensors, or ONNX with the extra 'nudenet').",
            search_aliases=ALIASES,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=safety_names(DEMO_GUIDE),
                    default=DEMO_GUIDE + BUNDLED_SUFFIX,
                    tooltip="The classifier: the bundled one, or a file in models/safety.",
                ),
                io.String.Input(
                    "output",
                    default="shapes",
                    tooltip="Which of the classifier's outputs counts. An ONNX file has one, named classes.",
                ),
                io.String.Input(
                    "classes",
                    default="star",
                    tooltip="Which of its classes are unsafe, separated by commas. More classes catch more.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Probability from which an image counts as unsafe. Less acts earlier and misfires more often.",
                ),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> float:
        return safety_path(file).stat().st_mtime

    @classmethod
    def execute(cls, file: str, output: str, classes: str, threshold: float, views: int) -> io.NodeOutput:
        names = [name.strip() for name in classes.split(",") if name.strip()]
        return _output(ClassifierSafetyFunction(classifier(file), output.strip(), names, threshold), views)


class CombineSafetyFunctions(io.ComfyNode):
    """Several functions as one."""

    MOST = 4

    @classmethod
    def define_schema(cls) -> io.Schema:
        further = [
            SafetyFunctionType.Input(f"function{i}", optional=i > 1, tooltip="One of them.")
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
                tooltip="How much this one's score counts. More pulls harder its way; 0 leaves it out.",
            )
            for i in range(1, cls.MOST + 1)
        ]
        return io.Schema(
            node_id="SafeGuidanceCombineSafetyFunctions",
            display_name="Combine Safety Functions",
            category=CATEGORY,
            description="Several safety functions as one: images count as unsafe as soon as one of them says so.",
            search_aliases=[*ALIASES, "merge detectors"],
            inputs=[
                *further,
                io.Combo.Input(
                    "combination",
                    options=["sum", "maximum"],
                    default="sum",
                    tooltip="sum: all of them pull together, in proportion to their weights. maximum: only the strongest one does.",
                ),
                *weights,
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def execute(cls, combination: Any, **inputs: Any) -> io.NodeOutput:
        numbers = [i for i in range(1, cls.MOST + 1) if inputs.get(f"function{i}") is not None]
        functions, weights = ([inputs[f"{name}{i}"] for i in numbers] for name in ("function", "weight"))
        return io.NodeOutput(CombinedSafetyFunction(functions, weights, combination))


class ScoreImages(io.ComfyNode):
    """What a safety function says about images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="Shows what a safety function sees in images: scores, whether it would act, and where it found something.",
            search_aliases=[*ALIASES, "score", "nsfw check"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to look at."),
                SafetyFunctionType.Input("safety_function", tooltip="Who looks."),
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
        report = json.dumps({"version": 1, "function": safety_function.name, "images": judged}, indent=1)
        shown = torch.stack(
            [
                overlay(image[..., :3].float(), found.regions_of(i), bool(found.gate[i]))
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
