"""Inputs that both methods guided by a safety function share."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.core.noise_level import SigmaWindow
from .host.autograd.decoders import DECODERS
from .io_types import SafetyFunctionType
from .model_inputs import model_input
from .shared_inputs import WHOLE_START

CATEGORY = "safe guidance/safety functions"
ALIASES = ["stg", "classifier guidance", "detector guidance", "nsfw", "concept erasing", "safety checker"]


def common_inputs() -> list[io.Input]:
    """Return the model, VAE and safety function inputs of both methods."""
    return [
        model_input(),
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
            tooltip="Use less memory: intermediate results of the gradient are computed again instead of "
            "stored. This is about a third slower where the method acts. It switches on by itself, "
            "image by image, when memory runs out.",
        ),
    ]
