"""Nodes that make safety functions from detectors and classifiers: NudeNet, or a file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guidance.safety_functions import nudenet
from ..guidance.safety_functions.classifier import ClassifierSafetyFunction
from .host.files.folders import BUNDLED_SUFFIX
from .host.files.safety_files import DEMO_GUIDE, safety_names
from .host.files.safety_models import classifier, detector_hash, nudenet_network
from .io_types import SafetyFunctionType
from .parsing import names_of
from .safety_function_inputs import ALIASES, CATEGORY, function_output, views_input

PACKAGE = "from the nudenet package"


class NudeNetSafetyFunctionNode(io.ComfyNode):
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
                    tooltip="Side in pixels to which images are scaled for the detector. A higher value finds"
                    " smaller details and costs more. Start with 320, for which this detector was "
                    "made; the paper uses a detector made for 640.",
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
        unsafe = nudenet.classes_from(classes)
        return function_output(nudenet.NudeNetSafetyFunction(network, unsafe, threshold, size), views)


class ClassifierSafetyFunctionNode(io.ComfyNode):
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
        function = ClassifierSafetyFunction(classifier(file), output.strip(), names_of(classes), threshold)
        return function_output(function, views, file)


NODES: list[type[io.ComfyNode]] = [NudeNetSafetyFunctionNode, ClassifierSafetyFunctionNode]
