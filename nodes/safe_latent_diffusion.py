"""Safe Latent Diffusion: steer guidance away from a text of unsafe concepts."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..guidance.safe_latent_diffusion import MEDIUM, PRESETS, SAFETY_TEXT, SafeLatentDiffusionSettings
from .host.engine.conditioning import encode
from .host.engine.hooks import attach
from .host.methods.safe_latent_diffusion import SafeLatentDiffusionCorrection
from .model_inputs import clip_input, model_input
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
    """Return the settings of a preset; for `custom`, the given values."""
    if preset != CUSTOM:
        return PRESETS[preset]
    return SafeLatentDiffusionSettings(
        scale, threshold, momentum_scale, momentum_decay, sigma_window(start_sigma)
    )


class SafeLatentDiffusionNode(io.ComfyNode):
    """Attaches Safe Latent Diffusion to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeLatentDiffusion",
            display_name="Safe Latent Diffusion (SLD)",
            category="safe guidance/text",
            description="Steers guidance away from a text of unsafe concepts during sampling. Needs "
            "a sampler with a negative prompt. Costs one extra model evaluation per "
            "step.",
            search_aliases=[
                "sld",
                "safe stable diffusion",
                "safety text",
                "negative prompt",
                "nsfw",
                "concept erasing",
            ],
            inputs=[
                model_input(),
                clip_input("the safety text"),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default="medium",
                    tooltip="The paper's presets: weak changes little; max removes most and also "
                    "changes harmless images. custom uses the values below. Start with medium.",
                ),
                io.String.Input(
                    "safety_text",
                    default=SAFETY_TEXT,
                    multiline=True,
                    tooltip="Concepts to keep away from, separated by commas. Fewer and more exact "
                    "words act more precisely. Start with the default, which is the paper's "
                    "text.",
                ),
                io.Float.Input(
                    "scale",
                    default=MEDIUM.scale,
                    min=0.0,
                    max=100000.0,
                    step=10.0,
                    advanced=True,
                    tooltip="custom: guidance scale; below 1 is off. A higher value also steers strongly "
                    "where the prompt and the safety text differ little.",
                ),
                io.Float.Input(
                    "threshold",
                    default=MEDIUM.threshold,
                    min=-10.0,
                    max=10.0,
                    step=0.001,
                    round=0.0001,
                    advanced=True,
                    tooltip="custom: a value is steered unless the prompt exceeds the safety text by at least"
                    " this much. A higher value steers more of the image.",
                ),
                io.Float.Input(
                    "momentum_scale",
                    default=MEDIUM.momentum_scale,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="custom: weight of the accumulated guidance of earlier steps. A higher "
                    "value keeps the direction longer; 0 is off and saves the evaluations "
                    "before the start.",
                ),
                io.Float.Input(
                    "momentum_decay",
                    default=MEDIUM.momentum_decay,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="custom: share of the accumulated guidance that is kept at each step. A "
                    "higher value changes more slowly and smoothly.",
                ),
                io.Float.Input(
                    "start_sigma",
                    default=round(MEDIUM.window.high, 2),
                    min=0.0,
                    max=WHOLE_START,
                    step=0.01,
                    advanced=True,
                    tooltip=f"custom: noise level (sigma) at which guidance begins; {WHOLE_START:g} is "
                    "the first step. A lower value keeps more of the layout.",
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


NODES: list[type[io.ComfyNode]] = [SafeLatentDiffusionNode]
