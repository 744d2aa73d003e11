"""Safe Text Embedding Guidance, and the baseline that moves the latent instead of the text."""

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
from .shared_inputs import WHOLE_START, sigma_window

CATEGORY = "safe guidance/safety functions"
ALIASES = ["stg", "classifier guidance", "detector guidance", "nsfw", "concept erasing", "safety checker"]

TEXT, DATA = SafeTextGuidanceSettings(), SafeDataGuidanceSettings()


def common_inputs() -> list[io.Input]:
    """What both methods work with."""
    return [
        io.Model.Input("model", tooltip="The model to protect."),
        io.Vae.Input(
            "vae",
            tooltip="The VAE that belongs to the model; it shows the safety function what is being painted.",
        ),
        SafetyFunctionType.Input("safety_function", tooltip="What counts as unsafe."),
    ]


def gate_inputs(tau: float, window: SigmaWindow) -> list[io.Input]:
    """When both methods act, and how they see the image."""
    return [
        io.Float.Input(
            "tau",
            default=tau,
            min=-10.0,
            max=10.0,
            step=0.01,
            tooltip="Unsafe score above which it acts, besides the safety function's own threshold. More spares more images. "
            "0.01 is the paper's for nudity, 0.16 for CLIP similarities.",
        ),
        io.Float.Input(
            "start_sigma",
            default=window.high,
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            tooltip=f"Noise level at which it begins; {WHOLE_START:g} begins with the first step. More changes layouts too, but early "
            "predictions are a blur that detectors misread, which touches harmless images.",
        ),
        io.Float.Input(
            "end_sigma",
            default=window.low,
            min=0.0,
            max=WHOLE_START,
            step=0.001,
            tooltip="Noise level at which it stops. Less acts on details for longer, and tempts it to fool the detector with them.",
        ),
        io.Combo.Input(
            "decoder",
            options=list(DECODERS),
            default="vae",
            tooltip="How the detector gets to see a prediction. vae: the whole decoder, exact and slow. taesd: the fast preview decoder, "
            "if its file is in models/vae_approx. linear: fitted to the VAE once, fastest and coarse.",
        ),
        io.Boolean.Input(
            "save_memory",
            default=False,
            advanced=True,
            tooltip="Keeps less for the gradient and computes it again: about a third slower where it acts. Turned on by itself, image "
            "by image, when memory runs out.",
        ),
    ]


class SafeTextEmbeddingGuidance(io.ComfyNode):
    """MODEL in, MODEL out: works under every sampler and guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeTextEmbeddingGuidance",
            display_name="Safe Text Embedding Guidance",
            category=CATEGORY,
            description="While an image is sampled, a safety function looks at what it is going to be; where it objects, the prompt's "
            "embedding moves so that the model paints something else. Images that it does not object to come out bit-identical.",
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
                    tooltip="How far the embedding moves at a step, as a share of its size. 0 is off; 0.002 is the paper's for nudity, "
                    "0.008 for violence and styles. More removes more and changes more of the image.",
                ),
                *gate_inputs(TEXT.tau, TEXT.window),
                io.Float.Input(
                    "gamma",
                    default=TEXT.gamma,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the steps inside the window at which it looks and acts. Less is faster and weaker; the paper uses "
                    "0.15 to 0.8 of all steps.",
                ),
                io.Boolean.Input(
                    "accumulate",
                    default=TEXT.accumulate,
                    advanced=True,
                    tooltip="On: every move starts from the last one, as in the published code. Off: every step starts from the prompt.",
                ),
                io.Float.Input(
                    "trust",
                    default=TEXT.trust,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How far the embedding may get from the prompt's, as a share of its size. Less stays closer to the prompt.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=TEXT.prior_weight,
                    min=0.0,
                    max=100000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="How hard the embedding is pulled back to the prompt's. More stays closer; 0 is the published setting.",
                ),
                io.Float.Input(
                    "full_score",
                    default=TEXT.full_score,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Unsafe score at which it moves with full rho; below, proportionally less. 0 always moves fully.",
                ),
                io.Combo.Input(
                    "unit",
                    options=["relative", "normalized", "raw"],
                    default=TEXT.unit,
                    advanced=True,
                    tooltip="What rho means. relative: a share of the embedding's size, for every text encoder. normalized: a length, as "
                    "in the published code (0.5 there). raw: a factor of the gradient, as in the paper's formula.",
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
    """The data-space baseline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeGuidanceSafeDataGuidance",
            display_name="Safe Data Guidance",
            category=CATEGORY,
            description="Like Safe Text Embedding Guidance, but moves the image itself against the safety function's gradient instead "
            "of the prompt. The baseline of that paper, and a way for models whose text cannot be guided.",
            search_aliases=["sdg", "universal guidance", *ALIASES],
            inputs=[
                *common_inputs(),
                io.Float.Input(
                    "strength",
                    default=DATA.strength,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="How much the prediction changes at a step, as a share of its size. 0 is off; more removes more, and soon "
                    "leaves what the model can paint.",
                ),
                *gate_inputs(DATA.tau, DATA.window),
                io.Boolean.Input(
                    "cheap",
                    default=DATA.cheap,
                    advanced=True,
                    tooltip="Differentiates only the decoder and the detector, not the model: much faster, needs little memory, works with "
                    "every model, and fools the detector more easily.",
                ),
                io.Combo.Input(
                    "scale",
                    options=["relative", "raw"],
                    default=DATA.scale,
                    advanced=True,
                    tooltip="What strength means. relative: a share of the prediction's size. raw: the paper's lambda, a factor of the "
                    "gradient.",
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
