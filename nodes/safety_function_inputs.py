"""Category, search words and inputs that the nodes of safety functions share."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.safety_functions.interface import SafetyFunction
from ..guidance.safety_functions.multi_view import Views
from .host.engine.node_messages import message_ui
from .host.files.folders import BUNDLED_SUFFIX
from .host.files.safety_files import DEMO_CLIP, bundled_note, safety_names

CATEGORY = "safe guidance/safety functions"
ALIASES = ["detector", "nsfw", "safety checker", "classifier", "content filter"]


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


def function_output(function: SafetyFunction, views: int, file: str = "", message: str = "") -> io.NodeOutput:
    """Return a safety function as a node's output, with `views` views of each image.

    Args:
        function: the safety function.
        views: at least 1.
        file: its detector, by the name that the node lists. A bundled one says what it does not know.
        message: sentence to show on the node.
    """
    function.note = bundled_note(file)
    told = " ".join(filter(None, (message, function.note)))
    made = Views(function, views) if views > 1 else function
    return io.NodeOutput(made, ui=message_ui(told)) if told else io.NodeOutput(made)
