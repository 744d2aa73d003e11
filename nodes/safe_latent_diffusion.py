"""Safe Latent Diffusion: turn the guidance away from a text of unsafe concepts."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..guidance.safe_latent_diffusion import MEDIUM, PRESETS, SAFETY_TEXT, SafeLatentDiffusionSettings
from .host.engine.conditioning import encode
from .host.engine.hooks import attach
from .host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
from .shared_inputs import WHOLE_START, sigma_window

CUSTOM = "custom"


def settings_from(
    preset: str,
    scale: float,
    threshold: float,
    momentum_scale: float,
    momentum_decay: float,
    start_sigma: float,
) -> SafeLatentDiffusionSettings:
    """A preset, or for `custom` the given values."""
    if preset != CUSTOM:
        return PRESETS[preset]
    return SafeLatentDiffusionSettings(
        scale, threshold, momentum_scale, momentum_decay, sigma_window(start_sigma)
    )


class SafeLatentDiffusion(io.ComfyNode):
    """MODEL in, MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeLatentDiffusion",
            display_name="Safe Latent Diffusion (SLD)",
            category="safe guidance/text",
            description="Turns the guidance away from a text of unsafe concepts while an image is sampled. Needs a sampler with negative "
            "prompt. Costs one more model evaluation a step.",
            search_aliases=[
                "sld",
                "safe stable diffusion",
                "safety text",
                "negative prompt",
                "nsfw",
                "concept erasing",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to protect."),
                io.Clip.Input(
                    "clip", tooltip="The text encoder that belongs to the model; it encodes the text below."
                ),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default="medium",
                    tooltip="The paper's strengths: weak changes little, max removes most and also changes harmless images. "
                    "custom uses the numbers below.",
                ),
                io.String.Input(
                    "safety_text",
                    default=SAFETY_TEXT,
                    multiline=True,
                    tooltip="What images should not show, as words separated by commas. The default is the paper's text; fewer and more "
                    "exact words act more precisely.",
                ),
                io.Float.Input(
                    "scale",
                    default=MEDIUM.scale,
                    min=0.0,
                    max=100000.0,
                    step=10.0,
                    advanced=True,
                    tooltip="custom: how soon an element is steered with full weight. Below 1 is off; more steers on smaller differences.",
                ),
                io.Float.Input(
                    "threshold",
                    default=MEDIUM.threshold,
                    min=-10.0,
                    max=10.0,
                    step=0.001,
                    round=0.0001,
                    advanced=True,
                    tooltip="custom: how far the prompt must stay beyond the safety text to be left alone. More steers more of an image, "
                    "less spares more.",
                ),
                io.Float.Input(
                    "momentum_scale",
                    default=MEDIUM.momentum_scale,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="custom: how much of the guidance of earlier steps is added. 0 is off and saves the model evaluations "
                    "before the start; more keeps the direction longer.",
                ),
                io.Float.Input(
                    "momentum_decay",
                    default=MEDIUM.momentum_decay,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="custom: the share of the collected guidance that stays at each step. More is slower and smoother.",
                ),
                io.Float.Input(
                    "start_sigma",
                    default=round(MEDIUM.window.high, 2),
                    min=0.0,
                    max=WHOLE_START,
                    step=0.01,
                    advanced=True,
                    tooltip=f"custom: noise level at which the guidance begins; {WHOLE_START:g} begins with the first step. "
                    "Less keeps more of the layout.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: Any, preset: str, safety_text: str, **custom: float
    ) -> io.NodeOutput:
        settings = settings_from(preset, **custom)
        return io.NodeOutput(
            attach(model, SafeLatentDiffusionCorrection(encode(clip, safety_text), settings))
        )


NODES: list[type[io.ComfyNode]] = [SafeLatentDiffusion]
