"""Safe Text Embedding Guidance: move the prompt's embedding against a safety function's gradient."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..guidance.safe_text_guidance import SafeTextGuidanceSettings
from ..guidance.safety_functions.interface import SafetyFunction
from .host.autograd.decoders import DecoderName
from .host.engine.hooks import attach
from .host.methods.safe_text_guidance import SafeTextGuidanceCorrection
from .safety_gate_inputs import ALIASES, CATEGORY, common_inputs, gate_inputs
from .shared_inputs import HIDDEN, sigma_window

DEFAULTS = SafeTextGuidanceSettings()


class SafeTextEmbeddingGuidanceNode(io.ComfyNode):
    """Attaches Safe Text Embedding Guidance to a MODEL; works with every sampler and guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeTextEmbeddingGuidance",
            display_name="Safe Text Embedding Guidance",
            category=CATEGORY,
            description="A safety function checks the predicted image at each step. Where it finds "
            "something unsafe, the prompt's text embedding is moved so that the model "
            "generates something else. Images in which it finds nothing stay "
            "bit-identical.",
            search_aliases=ALIASES,
            inputs=[
                *common_inputs(),
                io.Float.Input(
                    "rho",
                    default=DEFAULTS.rho,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    round=0.00001,
                    tooltip="How far the text embedding moves per step, relative to its size; 0 is off. "
                    "A higher value removes more and changes more of the image. Start with "
                    "0.002, the paper's for nudity, or 0.008 for violence and styles.",
                ),
                *gate_inputs(DEFAULTS.tau, DEFAULTS.window),
                io.Float.Input(
                    "gamma",
                    default=DEFAULTS.gamma,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the steps inside the window at which the method checks and acts. "
                    "A lower value is faster and weaker. Start with 1; the paper uses 0.15 to "
                    "0.8 of all steps.",
                ),
                io.Boolean.Input(
                    "accumulate",
                    default=DEFAULTS.accumulate,
                    advanced=True,
                    tooltip="On: each move starts from the previous one, as in the published code. Off: "
                    "each step starts from the prompt again.",
                ),
                io.Float.Input(
                    "trust",
                    default=DEFAULTS.trust,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Largest distance of the embedding from the prompt's, relative to its size. "
                    "A lower value stays closer to the prompt.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=DEFAULTS.prior_weight,
                    min=0.0,
                    max=100000.0,
                    step=0.1,
                    advanced=True,
                    extra_dict=HIDDEN,
                    tooltip="How strongly the embedding is pulled back to the prompt's. A higher value "
                    "stays closer to the prompt. Start with 0, the published setting.",
                ),
                io.Float.Input(
                    "full_score",
                    default=DEFAULTS.full_score,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Unsafe score from which the full rho is used; below it, rho shrinks in "
                    "proportion. 0 always uses the full rho.",
                ),
                io.Combo.Input(
                    "unit",
                    options=["relative", "normalized", "raw"],
                    default=DEFAULTS.unit,
                    advanced=True,
                    tooltip="Unit of rho. relative is a share of the embedding's size and suits every "
                    "text encoder; normalized is a length, as in the published code (0.5 "
                    "there); raw is a factor of the gradient, as in the paper's formula.",
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
        chosen = SafeTextGuidanceSettings(window=sigma_window(start_sigma, end_sigma), **settings)
        return io.NodeOutput(
            attach(model, SafeTextGuidanceCorrection(vae, safety_function, chosen, decoder, save_memory))
        )


NODES: list[type[io.ComfyNode]] = [SafeTextEmbeddingGuidanceNode]
