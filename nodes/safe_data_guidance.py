"""Safe Data Guidance: move the latent image against a safety function's gradient."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..guidance.safe_data_guidance import SafeDataGuidanceSettings
from ..guidance.safety_functions.interface import SafetyFunction
from .host.autograd.decoders import DecoderName
from .host.engine.hooks import attach
from .host.methods.safe_data_guidance import SafeDataGuidanceCorrection
from .safety_gate_inputs import ALIASES, CATEGORY, common_inputs, gate_inputs
from .shared_inputs import sigma_window

DEFAULTS = SafeDataGuidanceSettings()


class SafeDataGuidanceNode(io.ComfyNode):
    """Attaches Safe Data Guidance, the baseline that changes the latent, to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeDataGuidance",
            display_name="Safe Data Guidance",
            category=CATEGORY,
            description="Like Safe Text Embedding Guidance, but moves the latent image against the "
            "safety function's gradient instead of the prompt. It is the baseline in "
            "that paper, and works for models whose text cannot be guided.",
            search_aliases=["sdg", "universal guidance", *ALIASES],
            inputs=[
                *common_inputs(),
                io.Float.Input(
                    "strength",
                    default=DEFAULTS.strength,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="How much the prediction changes per step, relative to its size; 0 is off. "
                    "A higher value removes more and leaves visible marks sooner. Start with 1.",
                ),
                *gate_inputs(DEFAULTS.tau, DEFAULTS.window),
                io.Boolean.Input(
                    "cheap",
                    default=DEFAULTS.cheap,
                    advanced=True,
                    tooltip="Differentiate only the decoder and the detector, not the model. This is "
                    "much faster, needs little memory and works with every model, but fools the "
                    "detector more easily.",
                ),
                io.Combo.Input(
                    "scale",
                    options=["relative", "raw"],
                    default=DEFAULTS.scale,
                    advanced=True,
                    tooltip="Unit of strength. relative is a share of the prediction's size; raw is the "
                    "paper's lambda, a factor of the gradient.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: Any,
        safety_function: SafetyFunction,
        start_sigma: float,
        end_sigma: float,
        decoder: DecoderName,
        save_memory: bool,
        **settings: Any,
    ) -> io.NodeOutput:
        chosen = SafeDataGuidanceSettings(window=sigma_window(start_sigma, end_sigma), **settings)
        return io.NodeOutput(
            attach(model, SafeDataGuidanceCorrection(vae, safety_function, chosen, decoder, save_memory))
        )


NODES: list[type[io.ComfyNode]] = [SafeDataGuidanceNode]
