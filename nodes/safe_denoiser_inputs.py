"""Inputs for the settings of Safe Denoiser, and what their values stand for."""

from __future__ import annotations

from typing import Any, get_args

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..formats.layouts import Layout
from ..formats.negation_set import NegationSet
from ..guidance.safe_denoiser.settings import Anchor, Mode, SafeDenoiserSettings
from .host.engine.hooks import attach
from .host.methods.safe_denoiser import SafeDenoiserCorrection
from .shared_inputs import (
    WHOLE_START,
    layout_inputs,
    start_sigma_input,
    take_window,
    window_inputs,
    with_defaults,
)

DEFAULTS = SafeDenoiserSettings()


def settings_inputs() -> list[io.Input]:
    """Return the inputs for the method's settings, the same for both nodes."""
    return [
        io.Float.Input(
            "strength",
            default=DEFAULTS.strength,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="How strongly the image is pushed away from the negation set; 0 is off. A "
            "higher value pushes harder and may change the rest of the image. Start "
            "with 0.33; the paper uses up to 0.9 for a style. With masks, 1 replaces "
            "the subject fully; use 1.2 if the prompt names it explicitly.",
        ),
        io.Combo.Input(
            "mode",
            options=list(get_args(Mode)),
            default=DEFAULTS.mode,
            tooltip="How similarity to the set becomes a change. calibrated (recommended) acts once an image "
            "resembles the set about as much as the set's images resemble each other. exact is the "
            "paper's formula, which acts on near-copies only. tempered is a less strict form of "
            "exact. official changes every image, as the authors' code does, but without the noise "
            "that the code adds.",
        ),
        start_sigma_input(),
        io.Float.Input(
            "end_sigma",
            default=DEFAULTS.window.low,
            min=0.0,
            max=WHOLE_START,
            step=0.01,
            tooltip="Noise level (sigma) at which the method stops. A lower value lets it act "
            "longer and on smaller details; 0 is the last step. Start with 4.67, the "
            "paper's (timestep 780 of Stable Diffusion 1.x), or 0.15 with masks.",
        ),
        io.Float.Input(
            "threshold",
            default=DEFAULTS.threshold,
            min=0.0,
            max=2.0,
            step=0.01,
            advanced=True,
            tooltip="calibrated: how similar an image must be before the method acts, relative "
            "to how similar the set's images are to each other. A higher value leaves "
            "more images unchanged; a lower one catches more. Start with 0.4. For "
            "masked sets and style sets it is a fraction of the set's own median "
            "log-odds; start with 0.7 for a hundred masked images.",
        ),
        io.Float.Input(
            "temperature",
            default=DEFAULTS.temperature,
            min=0.005,
            max=1.0,
            step=0.005,
            advanced=True,
            tooltip="calibrated: how many references are averaged. A lower value lets the few "
            "nearest references decide; a higher one averages over the whole set. Start "
            "with 0.1. With masks it applies to the image patches that each position is "
            "compared with.",
        ),
        io.Float.Input(
            "cap",
            default=DEFAULTS.cap,
            min=0.0,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="Largest change in one step, relative to the size of the prediction. A "
            "lower value is gentler. Start with 0.5; use 2 with masks, otherwise a "
            "large subject is replaced only in part.",
        ),
        io.Int.Input(
            "effective_dimensions",
            default=DEFAULTS.effective_dimensions,
            min=1,
            max=65536,
            advanced=True,
            tooltip="tempered: assumed number of independent values in a latent. A higher value "
            "comes closer to exact.",
        ),
        io.Float.Input(
            "kappa",
            default=DEFAULTS.kappa,
            min=0.0,
            max=200.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="official: how sharply references are weighted. A higher value lets the "
            "nearest references decide. Published settings: 6.45 for nudity on SD 1.4 "
            "(strength 0.33), 0.37 for styles (0.9) and single images (0.69), 16.9 on "
            "SD3 (0.03).",
        ),
        io.Combo.Input(
            "anchor",
            options=list(get_args(Anchor)),
            default=DEFAULTS.anchor,
            optional=True,
            advanced=True,
            tooltip="Which prediction is compared with the set. prediction (the authors' code) is the one "
            "after CFG. unconditional (the paper) is the one without the prompt: CFG then works "
            "against the change, and at CFG 1 each step needs an extra model evaluation. Start with "
            "prediction.",
        ),
        *window_inputs(),
        *layout_inputs(),
    ]


def protect(
    model: ModelPatcher, vae: Any, negation_set: NegationSet, mask: torch.Tensor | None, given: dict[str, Any]
) -> ModelPatcher:
    """Attach the method to a clone of the model, from the values of `settings_inputs`."""
    values = with_defaults(settings_inputs(), given)
    layout = Layout(values.pop("fit"), values.pop("augmentation"))
    window = take_window(model, values)
    return attach(
        model,
        SafeDenoiserCorrection(
            negation_set, vae, SafeDenoiserSettings(window=window, **values), layout, mask
        ),
    )
