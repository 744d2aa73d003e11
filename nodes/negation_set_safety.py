"""Node that makes a safety function from a negation set."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..formats.negation_set import NegationSet
from ..guidance.safety_functions.embedding_density import calibrate
from ..guidance.safety_functions.negation_set import NegationSetSafetyFunction
from ..reports.leave_one_out import in_words
from .host.autograd.auxiliary_models import load_networks
from .host.autograd.image_encoders import ClipVisionEncoder, OpenClipEncoder
from .host.files.negation_embeddings import embed
from .host.files.safety_models import clip_model, detector_hash
from .io_types import NegationSetType, SafetyFunctionType
from .safety_function_inputs import ALIASES, CATEGORY, clip_inputs, function_output, views_input


class NegationSetSafetyFunctionNode(io.ComfyNode):
    """Makes a safety function from the images of a negation set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceNegationSetSafetyFunction",
            display_name="Negation Set Safety Function",
            category=CATEGORY,
            description="Scores how much an image means the same as the unwanted images of a negation "
            "set, compared with its neutral images. Other people, poses and layouts count as well. "
            "Connect a CLIP_VISION, as IP-Adapter workflows do.",
            search_aliases=[
                *ALIASES,
                "images like these",
                "concept from images",
                "clip vision",
                "avoid images",
            ],
            inputs=[
                NegationSetType.Input(
                    "negation_set",
                    tooltip="Images to keep away from. Images with an empty mask are neutral: what is left "
                    "when the unwanted is gone. Start with 20 of each; more make it more certain.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Image encoder: CLIP, SigLIP or DINO from Load CLIP Vision. A larger one tells "
                    "finer differences. Without it the file below is used.",
                ),
                *clip_inputs(),
                io.Float.Input(
                    "false_alarms",
                    default=0.02,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="Share of neutral images that may count as unwanted. A higher value finds more "
                    "and touches more harmless images. Start with 0.02.",
                ),
                views_input(),
            ],
            outputs=[SafetyFunctionType.Output(display_name="safety_function")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        return detector_hash(file)

    @classmethod
    def execute(
        cls,
        negation_set: NegationSet,
        file: str,
        model: str,
        false_alarms: float,
        views: int,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        encoder = (
            OpenClipEncoder(clip_model(file, model), file)
            if clip_vision is None
            else ClipVisionEncoder(clip_vision)
        )
        load_networks(encoder.networks)
        density = calibrate(*embed(negation_set, encoder), false_alarms)
        name = f"images like {negation_set.name or 'the negation set'}"
        function = NegationSetSafetyFunction(encoder, density, name)
        return function_output(function, views, file if clip_vision is None else "", in_words(density.check))


NODES: list[type[io.ComfyNode]] = [NegationSetSafetyFunctionNode]
