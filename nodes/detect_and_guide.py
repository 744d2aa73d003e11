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
from ..reports.overlays import overlay_map
from .dag_inputs import ALIASES, CATEGORY
from .host.attention.detection_maps import detect
from .host.engine.hooks import attach
from .host.engine.node_messages import message_ui
from .host.methods.detect_and_guide import DetectAndGuideCorrection
from .io_types import GuidelineTokensType
from .parsing import noise_levels
from .shared_inputs import HIDDEN, seed_input

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
    hidden: bool = False,
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
        extra_dict=HIDDEN if hidden else None,
        tooltip=tooltip,
    )


class DAGDetectorGuide(io.ComfyNode):
    """Attaches Detect-and-Guide to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceDAGDetectorGuide",
            display_name="DAG Detector + Guide",
            category=CATEGORY,
            description="Finds a concept in the model's own cross-attention during sampling and "
            "guides away from it only there, more strongly where it is larger and more "
            "certain. Images in which nothing is found stay bit-identical and cost "
            "nothing extra. For SD 1.x, SD 2.x and SDXL.",
            search_aliases=[*ALIASES, "self regulation", "local negative prompt"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model to protect. It must be a UNet such as Stable Diffusion 1.x, 2.x or SDXL.",
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
                    tooltip="Which values are changed inside the detected regions. SEGA changes the "
                    "tenth that differs most from the safety text; SLD changes all values where "
                    "the prompt leans towards it, which is more. Start with SEGA.",
                ),
                _number(
                    "detection_threshold",
                    DEFAULTS.detection_threshold,
                    1.0,
                    "Certainty from which the concept counts as found. A higher value leaves "
                    "more images unchanged; a lower one catches more. Start with 0.5, for which "
                    "the tokens were calibrated.",
                    advanced=False,
                ),
                _number(
                    "hold_threshold",
                    DEFAULTS.hold_threshold,
                    1.0,
                    "Detection threshold after the concept was found once in an image. A lower "
                    "value keeps guiding while the subject fades. Start with 0.5, as in the "
                    "paper; use 0.3 to be thorough.",
                ),
                _number(
                    "edit_threshold",
                    DEFAULTS.edit_threshold,
                    1.0,
                    "Certainty from which positions around a detection may change. A lower "
                    "value changes more around it. 0 is the paper's 0.01, or the tokens' "
                    "background noise where that is higher.",
                    step=0.001,
                    hidden=True,
                ),
                _number(
                    "core",
                    DEFAULTS.core,
                    1.0,
                    "Positions count as the subject from this share of the highest certainty "
                    "on. A higher value takes only the most certain centre. Start with 0, as in "
                    "the paper; use 0.6 for subjects of which only the centre is certain.",
                ),
                _number(
                    "reach",
                    DEFAULTS.reach,
                    1.0,
                    "How far around the subject the image may change, as a share of its side. A "
                    "lower value protects what is next to the subject. Start with 0, as in the "
                    "paper (no limit), or 0.06.",
                ),
                _number(
                    "start_sigma",
                    DEFAULTS.window.high,
                    1000.0,
                    "Noise level (sigma) at which the method begins. A higher value begins "
                    "earlier, when the attention maps are less certain. Start with 7.56, the "
                    "paper's step 5 of 50.",
                ),
                _number(
                    "end_sigma",
                    0.0,
                    1000.0,
                    "Noise level (sigma) at which the method stops. A higher value leaves "
                    "details unchanged. Start with 0.",
                ),
                _number(
                    "base",
                    DEFAULTS.base,
                    1000.0,
                    "AreaScaler: guidance scale of a subject that fills the image; a smaller "
                    "subject gets its share. A higher value guides more strongly. Start with 5, "
                    "the paper's; small subjects need more, such as 50.",
                ),
                _number(
                    "coverage",
                    DEFAULTS.coverage,
                    1.01,
                    "When this share of the image is above the edit threshold, the map is too "
                    "vague and nothing is done. A higher value acts on vaguer maps.",
                    hidden=True,
                ),
                _number(
                    "magnitude",
                    DEFAULTS.magnitude,
                    100.0,
                    "MagnitudeScaler: largest ratio between the guidance of certain and "
                    "uncertain positions; 1 is off. A higher value favours certain positions.",
                    step=0.1,
                    least=1.0,
                    hidden=True,
                ),
                _number(
                    "cap",
                    DEFAULTS.cap,
                    1000.0,
                    "Upper limit of the guidance scale. A lower value is gentler. Start with 10.",
                    step=0.1,
                ),
                _number(
                    "quantile",
                    DEFAULTS.quantile,
                    1.0,
                    "SEGA: share of the positions of each channel that stay unchanged. A higher "
                    "value changes less. Start with 0.9.",
                ),
                _number(
                    "sld_threshold",
                    DEFAULTS.sld_threshold,
                    10.0,
                    "SLD: how far the prompt must be beyond the safety text to be left "
                    "unchanged. A higher value changes more.",
                    step=0.001,
                    least=-10.0,
                    hidden=True,
                ),
                io.Combo.Input(
                    "connectivity",
                    options=["8", "4"],
                    default=str(DEFAULTS.connectivity),
                    optional=True,
                    advanced=True,
                    extra_dict=HIDDEN,
                    tooltip="Whether positions that touch only at a corner are one object (8) or two (4).",
                ),
                io.Combo.Input(
                    "fill",
                    options=["nearest", "blur"],
                    default=DEFAULTS.fill,
                    optional=True,
                    advanced=True,
                    extra_dict=HIDDEN,
                    tooltip="How an object's scale extends to the less certain positions around it. "
                    "nearest takes the scale of the nearest object; blur fades it out.",
                ),
                io.Combo.Input(
                    "normalization",
                    options=list(NORMALIZATIONS),
                    default="joint",
                    optional=True,
                    advanced=True,
                    extra_dict=HIDDEN,
                    tooltip="How attention maps are normalised. joint keeps images without the concept "
                    "below the threshold. per map follows the paper's wording, and every image "
                    "then counts as detected.",
                ),
                io.Boolean.Input(
                    "stacked",
                    default=DEFAULTS.stacked,
                    optional=True,
                    advanced=True,
                    extra_dict=HIDDEN,
                    tooltip="Average the maps of all steps so far instead of using those of the current "
                    "step. The result is steadier and reacts more slowly.",
                ),
                io.Boolean.Input(
                    "bounded",
                    default=DEFAULTS.bounded,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the changed prediction within the range of values it had. This "
                    "prevents over-saturation and grain at large scales. Start with off, as in "
                    "the paper.",
                ),
                io.Boolean.Input(
                    "look_first",
                    default=DEFAULTS.look_first,
                    optional=True,
                    tooltip="Two-pass mode: sample once without guidance to locate the subject, then "
                    "again with guidance. Detection is more reliable and everything around the "
                    "subject stays unchanged; images with a detection take twice the time. "
                    "Start with off, as in the paper.",
                ),
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


class DAGDetectionMap(io.ComfyNode):
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
                io.Model.Input("model", tooltip="Model whose attention is read. It must be a UNet."),
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
        shown = torch.nn.functional.interpolate(
            maps, size=images.shape[1:3], mode="bilinear", align_corners=False
        )
        # A row per image: the image, then its map at every noise level.
        rows = [
            torch.cat([p, *(overlay_map(p, m) for m in of_image)], dim=1)
            for p, of_image in zip(images, shown)
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
