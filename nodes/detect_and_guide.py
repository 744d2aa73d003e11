"""Detect-and-Guide (DAG): find a concept in the model's own attention, and guide away from it there only."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..guidance.core.noise_level import SigmaWindow
from ..guidance.detect_and_guide.attention_maps import Normalization
from ..guidance.detect_and_guide.guidance import DetectAndGuideSettings
from ..guidance.detect_and_guide.guideline_tokens import GuidelineTokens
from ..reports.curves import overlay
from .host.attention.detection_maps import detect
from .host.engine.hooks import attach
from .host.engine.node_messages import message_ui
from .host.methods.detect_and_guide import DetectAndGuideCorrection
from .io_types import GuidelineTokensType
from .shared_inputs import DAG_ALIASES, DAG_CATEGORY, noise_levels, seed_input

DEFAULTS = DetectAndGuideSettings()
NORMALIZATIONS: tuple[Normalization, ...] = ("joint", "per map")


def _number(
    name: str,
    default: float,
    most: float,
    tooltip: str,
    step: float = 0.01,
    least: float = 0.0,
    advanced: bool = True,
) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=default,
        min=least,
        max=most,
        step=step,
        round=0.0001,
        optional=advanced,
        advanced=advanced,
        tooltip=tooltip,
    )


def _switch(name: str, default: bool, tooltip: str) -> io.Boolean.Input:
    return io.Boolean.Input(name, default=default, optional=True, advanced=True, tooltip=tooltip)


class DAGDetectorGuide(io.ComfyNode):
    """MODEL in, MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceDAGDetectorGuide",
            display_name="DAG Detector + Guide",
            category=DAG_CATEGORY,
            description="Finds a concept in the model's own cross-attention while an image is sampled, and guides away from it there: "
            "harder where it is larger and surer. Images without it come out bit-identical and cost nothing. For SD 1.x, SD 2.x "
            "and SDXL.",
            search_aliases=[*DAG_ALIASES, "self regulation", "local negative prompt"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to protect: a UNet, such as Stable Diffusion 1.x, 2.x or SDXL.",
                ),
                GuidelineTokensType.Input(
                    "guideline_tokens", tooltip="What to look for; made for this kind of model."
                ),
                io.Conditioning.Input(
                    "safety", tooltip="A text of what to guide away from, such as: nudity, naked, sexual."
                ),
                io.Float.Input(
                    "strength",
                    default=DEFAULTS.strength,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How hard to guide where the concept is found. 0 is off, 1 the paper's; more removes more and distorts more.",
                ),
                io.Combo.Input(
                    "host_mask",
                    options=["SEGA", "SLD"],
                    default=DEFAULTS.host_mask,
                    tooltip="What is changed inside the found regions. SEGA: the tenth of all positions that differ most from the safety "
                    "text. SLD: wherever the prompt leans towards the safety text.",
                ),
                _number(
                    "detection_threshold",
                    DEFAULTS.detection_threshold,
                    1.0,
                    "How sure a detection must be. More spares more images, less catches more. 0.5 is the threshold that the tokens "
                    "were calibrated for.",
                    advanced=False,
                ),
                _number(
                    "hold_threshold",
                    DEFAULTS.hold_threshold,
                    1.0,
                    "The same once the concept was found in an image: less keeps pushing while the thing fades. 0.5 is the paper, which "
                    "has no such memory.",
                ),
                _number(
                    "edit_threshold",
                    DEFAULTS.edit_threshold,
                    1.0,
                    "How faint a detection may be to be changed with what was found. Less changes more around it. 0 is the paper's 0.01, "
                    "or the tokens' own background noise where that is more.",
                    step=0.001,
                ),
                _number(
                    "core",
                    DEFAULTS.core,
                    1.0,
                    "Once found, positions count as the thing from this share of the surest one on. Less takes more of a thing whose "
                    "middle alone is sure. 0 is the paper: only positions above the detection threshold.",
                ),
                _number(
                    "reach",
                    DEFAULTS.reach,
                    1.0,
                    "How far around the thing changes may go, as a share of the image's side. Less spares what is beside it. 0 is the "
                    "paper: everywhere above the edit threshold.",
                ),
                _number(
                    "start_sigma",
                    DEFAULTS.window.high,
                    1000.0,
                    "Noise level at which the method begins; 7.56 is step 5 of 50 (paper). More begins earlier, when maps are vague.",
                ),
                _number(
                    "end_sigma",
                    0.0,
                    1000.0,
                    "Noise level at which the method stops. More leaves the details alone.",
                ),
                _number(
                    "base",
                    DEFAULTS.base,
                    1000.0,
                    "AreaScaler: scale for an object that fills the image; smaller ones get their share of it. More pushes harder.",
                ),
                _number(
                    "coverage",
                    DEFAULTS.coverage,
                    1.01,
                    "With this share of the image above the edit threshold, no object is told apart yet and nothing is done. "
                    "More acts on vaguer maps.",
                ),
                _number(
                    "magnitude",
                    DEFAULTS.magnitude,
                    100.0,
                    "MagnitudeScaler: how many times harder sure positions are guided than faint ones, at most. 1 is off.",
                    step=0.1,
                    least=1.0,
                ),
                _number("cap", DEFAULTS.cap, 1000.0, "Largest scale of all. Less is gentler.", step=0.1),
                _number(
                    "quantile",
                    DEFAULTS.quantile,
                    1.0,
                    "SEGA: share of the positions of every channel that stay as they are. More changes less.",
                ),
                _number(
                    "sld_threshold",
                    DEFAULTS.sld_threshold,
                    10.0,
                    "SLD: how far the prompt must stay beyond the safety text to be left alone. More changes more.",
                    step=0.001,
                    least=-10.0,
                ),
                io.Combo.Input(
                    "connectivity",
                    options=["8", "4"],
                    default=str(DEFAULTS.connectivity),
                    optional=True,
                    advanced=True,
                    tooltip="Whether positions that touch at a corner are one object (8) or two (4).",
                ),
                io.Combo.Input(
                    "fill",
                    options=["nearest", "blur"],
                    default=DEFAULTS.fill,
                    optional=True,
                    advanced=True,
                    tooltip="How an object's scale reaches the fainter positions around it: that of the nearest object, or fading.",
                ),
                io.Combo.Input(
                    "normalization",
                    options=list(NORMALIZATIONS),
                    default="joint",
                    optional=True,
                    advanced=True,
                    tooltip="joint: an image without the concept stays below the threshold. per map: the paper's words taken literally; "
                    "every image then counts as detected.",
                ),
                _switch(
                    "stacked",
                    DEFAULTS.stacked,
                    "Average the maps of all steps so far instead of using each step's own. Steadier, slower to notice changes.",
                ),
                _switch(
                    "bounded",
                    DEFAULTS.bounded,
                    "Keep the changed image's values within those that it has: no over-saturation and no grain at scales that "
                    "remove. Off is the paper.",
                ),
                _switch(
                    "look_first",
                    DEFAULTS.look_first,
                    "Sample the image without the guidance first, see where the thing comes out, then sample it again: finds "
                    "more surely, and everything around it stays as it was. Doubles the time of images in which something is found. "
                    "Off is the paper.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to look and to act, white for yes. Without it, everywhere.",
                ),
                GuidelineTokensType.Input(
                    "guideline_tokens_2",
                    optional=True,
                    tooltip="A second concept; the surer one decides at each place.",
                ),
                GuidelineTokensType.Input(
                    "guideline_tokens_3",
                    optional=True,
                    tooltip="A third concept; the surest decides at each place.",
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


class DAGDetectionMap(io.ComfyNode):
    """Where and how surely a detector sees its concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceDAGDetectionMap",
            display_name="DAG Detection Map",
            category=DAG_CATEGORY,
            description="Shows what the DAG detector sees in an image at chosen noise levels: where, how surely, whether it would act. "
            "Give it what a sampler made for a prompt, or an encoded image.",
            search_aliases=[*DAG_ALIASES, "why did it fire", "heat map", "daam"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model whose attention is read."),
                io.Vae.Input(
                    "vae", tooltip="The VAE that belongs to the model, for the image under the map."
                ),
                GuidelineTokensType.Input("guideline_tokens", tooltip="What to look for."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt that made the image, or one that describes it."
                ),
                io.Latent.Input("samples", tooltip="A sampler's result or an encoded image."),
                io.String.Input(
                    "sigmas",
                    default="7, 5, 3, 2, 1",
                    tooltip="Noise levels to look at. More noise is closer to what the detector sees early on.",
                ),
                seed_input("Of the noise; the same seed gives the same maps."),
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
        shown = torch.nn.functional.interpolate(
            maps, size=images.shape[1:3], mode="bilinear", align_corners=False
        )
        # A row per image: the image, then its map at every noise level.
        rows = [
            torch.cat([p, *(overlay(p, m) for m in of_image)], dim=1) for p, of_image in zip(images, shown)
        ]
        report = "\n".join(_line(i, m, levels) for i, m in enumerate(maps))
        sheet = torch.stack(rows)
        return io.NodeOutput(
            shown.amax(1), sheet, report, ui=message_ui(report, ui.PreviewImage(sheet, cls=cls))
        )


def _line(index: int, maps: torch.Tensor, levels: tuple[float, ...]) -> str:
    parts = []
    for map_, level in zip(maps, levels):
        highest, share = float(map_.max()), float((map_ >= DEFAULTS.detection_threshold).float().mean())
        parts.append(
            f"sigma {level:g}: {highest:.2f}" + (f", found on {share:.1%}" if share else ", not found")
        )
    return f"image {index + 1}: " + "; ".join(parts)


NODES: list[type[io.ComfyNode]] = [DAGDetectorGuide, DAGDetectionMap]
