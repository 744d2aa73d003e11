"""Safe Text Embedding Guidance, and Safe Data Guidance, which changes the latent instead of the text."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..guidance.core.noise_level import SigmaWindow
from ..guidance.safe_data_guidance import SafeDataGuidanceSettings
from ..guidance.safe_text_guidance import SafeTextGuidanceSettings
from ..guidance.safety_functions.interface import SafetyFunction
from .host.autograd.decoders import DECODERS, DecoderName
from .host.engine.hooks import attach
from .host.methods.safe_data_guidance import SafeDataGuidanceCorrection
from .host.methods.safe_text_guidance import SafeTextGuidanceCorrection
from .io_types import SafetyFunctionType
from .shared_inputs import HIDDEN, WHOLE_START, sigma_window

CATEGORY = "safe guidance/safety functions"
ALIASES = ["stg", "classifier guidance", "detector guidance", "nsfw", "concept erasing", "safety checker"]

TEXT, DATA = SafeTextGuidanceSettings(), SafeDataGuidanceSettings()


def common_inputs() -> list[io.Input]:
    """Return the model, VAE and safety function inputs of both methods."""
    return [
        io.Model.Input("model", tooltip="Model to protect. Connect it before any sampler."),
        io.Vae.Input(
            "vae",
            tooltip="VAE of the model. It decodes predictions for the safety function.",
        ),
        SafetyFunctionType.Input(
            "safety_function", tooltip="Safety function: the detector that decides what is unsafe."
        ),
    ]


def gate_inputs(tau: float, window: SigmaWindow) -> list[io.Input]:
    """Return the inputs for when both methods act and how predictions are decoded."""
    return [
        io.Float.Input(
            "tau",
            default=tau,
            min=-10.0,
            max=10.0,
            step=0.01,
            tooltip="Unsafe score above which the method acts, in addition to the safety "
            "function's own threshold. A higher value leaves more images unchanged. "
            "Start with 0.01, the paper's for nudity, or 0.16 for CLIP similarities.",
        ),
        io.Float.Input(
            "start_sigma",
            default=window.high,
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            tooltip=f"Noise level (sigma) at which the method begins; {WHOLE_START:g} is the "
            "first step. A higher value also changes layouts, but early predictions are "
            "blurred and detectors misread them. Start with 7.56.",
        ),
        io.Float.Input(
            "end_sigma",
            default=window.low,
            min=0.0,
            max=WHOLE_START,
            step=0.001,
            tooltip="Noise level (sigma) at which the method stops. A lower value acts on "
            "details for longer and may only fool the detector. Start with 0.346.",
        ),
        io.Combo.Input(
            "decoder",
            options=list(DECODERS),
            default="vae",
            tooltip="How predictions are decoded for the detector. vae is exact and slow; taesd "
            "is the fast preview decoder, if its file is in models/vae_approx; linear "
            "is fitted to the VAE once, and is the fastest and coarsest. Start with "
            "vae.",
        ),
        io.Boolean.Input(
            "save_memory",
            default=False,
            advanced=True,
            tooltip="Store less for the gradient and compute it again, which is about a third "
            "slower where the method acts. It switches on by itself, image by image, "
            "when memory runs out.",
        ),
    ]


class SafeTextEmbeddingGuidance(io.ComfyNode):
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
                    default=TEXT.rho,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    round=0.00001,
                    tooltip="How far the text embedding moves per step, relative to its size; 0 is off. "
                    "A higher value removes more and changes more of the image. Start with "
                    "0.002, the paper's for nudity, or 0.008 for violence and styles.",
                ),
                *gate_inputs(TEXT.tau, TEXT.window),
                io.Float.Input(
                    "gamma",
                    default=TEXT.gamma,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the steps inside the window at which the method checks and acts. "
                    "A lower value is faster and weaker. Start with 1; the paper uses 0.15 to "
                    "0.8 of all steps.",
                ),
                io.Boolean.Input(
                    "accumulate",
                    default=TEXT.accumulate,
                    advanced=True,
                    tooltip="On: each move starts from the previous one, as in the published code. Off: "
                    "each step starts from the prompt again.",
                ),
                io.Float.Input(
                    "trust",
                    default=TEXT.trust,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Largest distance of the embedding from the prompt's, relative to its size. "
                    "A lower value stays closer to the prompt.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=TEXT.prior_weight,
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
                    default=TEXT.full_score,
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
                    default=TEXT.unit,
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


class SafeDataGuidance(io.ComfyNode):
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
                    default=DATA.strength,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="How much the prediction changes per step, relative to its size; 0 is off. "
                    "A higher value removes more and leaves visible marks sooner. Start with 1.",
                ),
                *gate_inputs(DATA.tau, DATA.window),
                io.Boolean.Input(
                    "cheap",
                    default=DATA.cheap,
                    advanced=True,
                    tooltip="Differentiate only the decoder and the detector, not the model. This is "
                    "much faster, needs little memory and works with every model, but fools the "
                    "detector more easily.",
                ),
                io.Combo.Input(
                    "scale",
                    options=["relative", "raw"],
                    default=DATA.scale,
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


NODES: list[type[io.ComfyNode]] = [SafeTextEmbeddingGuidance, SafeDataGuidance]
