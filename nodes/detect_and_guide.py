"""Detect-and-Guide (DAG): find a concept in the model's cross-attention and guide away from it only there."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..guidance.core.noise_level import SigmaWindow
from ..guidance.detect_and_guide.attention_maps import Normalization
from ..guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..guidance.detect_and_guide.settings import DetectAndGuideSettings
from ..reports.detection_report import detection_sheet, detections_in_words
from .dag_inputs import ALIASES, CATEGORY
from .detector_guide_inputs import (
    DEFAULTS,
    detection_inputs,
    map_inputs,
    outcome_inputs,
    scale_inputs,
    window_inputs,
)
from .host.attention.detection_maps import detect
from .host.engine.hooks import attach
from .host.engine.node_messages import message_ui
from .host.methods.detect_and_guide import DetectAndGuideCorrection
from .io_types import GuidelineTokensType
from .parsing import noise_levels
from .shared_inputs import seed_input


class DAGDetectorGuideNode(io.ComfyNode):
    """Attaches Detect-and-Guide to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceDAGDetectorGuide",
            display_name="DAG Detector + Guide",
            category=CATEGORY,
            description="Finds a concept in the model's own attention during sampling and "
            "guides away from it only there, more strongly where it is larger and more "
            "certain. Images in which nothing is found stay bit-identical and cost "
            "nothing extra. For Stable Diffusion, SDXL, Flux and most other transformers.",
            search_aliases=[*ALIASES, "self regulation", "local negative prompt"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model to protect: Stable Diffusion 1.x to 3.5, SDXL, Flux, Chroma, Qwen-Image, "
                    "HunyuanVideo, Wan or Cosmos-Predict2. The attention of other models cannot be read.",
                ),
                GuidelineTokensType.Input(
                    "guideline_tokens",
                    tooltip="Guideline tokens of the concept to find, learnt for this kind of model.",
                ),
                io.Conditioning.Input(
                    "safety", tooltip="Text to guide away from, in few words, such as: nudity, naked, sexual."
                ),
                io.Float.Input(
                    "strength",
                    default=DEFAULTS.strength,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip="Guidance strength where the concept is found; 0 is off. A higher value "
                    "removes more and distorts more. Start with 1, the paper's.",
                ),
                io.Combo.Input(
                    "host_mask",
                    options=["SEGA", "SLD"],
                    default=DEFAULTS.host_mask,
                    tooltip="Which values are changed inside the detected regions. SEGA changes the tenth "
                    "that responds most strongly to the safety text; SLD changes all values where the"
                    " prompt leans towards the safety text, which is more. Start with SEGA.",
                ),
                *detection_inputs(),
                *window_inputs(),
                *scale_inputs(),
                *map_inputs(),
                *outcome_inputs(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Area of the image in which to detect and to guide, in white. Without a "
                    "mask it is the whole image.",
                ),
                GuidelineTokensType.Input(
                    "guideline_tokens_2",
                    optional=True,
                    tooltip="Guideline tokens of a second concept. At each position the more certain "
                    "concept decides.",
                ),
                GuidelineTokensType.Input(
                    "guideline_tokens_3",
                    optional=True,
                    tooltip="Guideline tokens of a third concept. At each position the most certain "
                    "concept decides.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        guideline_tokens: GuidelineTokens,
        safety: list[Any],
        mask: torch.Tensor | None = None,
        normalization: Normalization = "joint",
        guideline_tokens_2: GuidelineTokens | None = None,
        guideline_tokens_3: GuidelineTokens | None = None,
        connectivity: str = "8",
        start_sigma: float = DEFAULTS.window.high,
        end_sigma: float = 0.0,
        **settings: Any,
    ) -> io.NodeOutput:
        concepts = [
            tokens
            for tokens in (guideline_tokens, guideline_tokens_2, guideline_tokens_3)
            if tokens is not None
        ]
        window = SigmaWindow(high=start_sigma, low=end_sigma)
        chosen = DetectAndGuideSettings(window=window, connectivity=int(connectivity), **settings)
        return io.NodeOutput(
            attach(model, DetectAndGuideCorrection(concepts, safety, chosen, mask, normalization))
        )


class DAGDetectionMapNode(io.ComfyNode):
    """Shows where and how certainly the detector finds its concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceDAGDetectionMap",
            display_name="DAG Detection Map",
            category=CATEGORY,
            description="Shows what the DAG detector finds in an image at chosen noise levels: "
            "where, how certain, and whether it would act. Connect the latent of a "
            "sampler, or an encoded image.",
            search_aliases=[*ALIASES, "why did it fire", "heat map", "daam"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model whose attention is read: one that DAG Detector + Guide works on.",
                ),
                io.Vae.Input("vae", tooltip="VAE of the model. It decodes the image shown behind the map."),
                GuidelineTokensType.Input(
                    "guideline_tokens", tooltip="Guideline tokens of the concept to find."
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt that made the image, or one that describes it."
                ),
                io.Latent.Input("samples", tooltip="Latent of a sampler, or an encoded image."),
                io.String.Input(
                    "sigmas",
                    default="7, 5, 3, 2, 1",
                    tooltip="Noise levels (sigma) at which to detect. A higher level is closer to what "
                    "the detector sees early in sampling. Start with 7, 5, 3, 2, 1.",
                ),
                seed_input("Seed of the noise that is added. The same seed gives the same maps."),
            ],
            outputs=[
                io.Mask.Output(display_name="mask"),
                io.Image.Output(display_name="overlay"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: Any,
        guideline_tokens: GuidelineTokens,
        positive: list[Any],
        samples: dict[str, Any],
        sigmas: str,
        seed: int,
    ) -> io.NodeOutput:
        levels = noise_levels(sigmas)
        maps = detect(model, guideline_tokens, positive, samples["samples"], levels, seed)
        images = vae.decode(samples["samples"])[..., :3].cpu()
        images = images.reshape(-1, *images.shape[-3:])  # (N, H, W, 3), also from (N, 1, H, W, 3)
        shown = torch.nn.functional.interpolate(
            maps, size=images.shape[1:3], mode="bilinear", align_corners=False
        )
        sheet = detection_sheet(images, shown)
        report = detections_in_words(maps, levels, DEFAULTS.detection_threshold)
        return io.NodeOutput(
            shown.amax(1), sheet, report, ui=message_ui(report, ui.PreviewImage(sheet, cls=cls))
        )


NODES: list[type[io.ComfyNode]] = [DAGDetectorGuideNode, DAGDetectionMapNode]
