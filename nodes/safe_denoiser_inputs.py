"""Inputs for the settings of Safe Denoiser, and what their values stand for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..formats.layouts import Layout
from ..formats.negation_set import NegationSet
from ..guidance.safe_denoiser.settings import AUTOMATIC, Anchor, Mode, SafeDenoiserSettings, Use
from ..guidance.safe_denoiser.uses import NAMES, MaskCounts, automatic_in_words, automatic_values
from .host.engine.hooks import attach
from .host.engine.windows import percent_window
from .host.methods.safe_denoiser import SafeDenoiserCorrection
from .shared_inputs import (
    BY_SIGMA,
    WHOLE_START,
    layout_inputs,
    take_window,
    window_inputs,
    with_defaults,
)

DEFAULTS = SafeDenoiserSettings()
BY_USE = -1.0
"""A number below zero is automatic. Saved workflows hold numbers from zero up, so they keep them."""

LEAST_TEMPERATURE = 0.005
WINDOW_BOUNDS = ("start_sigma", "end_sigma")


def settings_inputs() -> list[io.Input]:
    """Return the inputs for the method's settings, the same for both nodes."""
    return [
        io.Float.Input(
            "strength",
            default=BY_USE,
            min=BY_USE,
            max=10.0,
            step=0.01,
            tooltip="How strongly the image is pushed away from the negation set; 0 is off. A "
            "higher value pushes harder and may change the rest of the image. Start with "
            "-1, automatic. By hand, 0.33 suits whole images, 4 near-copies and 1 a style; for a "
            "subject, 1 replaces it fully and 1.2 also if the prompt names it.",
        ),
        io.Combo.Input(
            "mode",
            options=list(get_args(Mode)),
            default=DEFAULTS.mode,
            tooltip="How similarity to the set becomes a change. calibrated (recommended) acts once an image "
            "resembles the set about as much as the set's images resemble each other. exact is the "
            "likelihood ratio of a reference against the prediction, which acts on near-copies only. "
            "tempered is a less strict form of exact. official changes every image, as the authors' code "
            "does, but without the noise that the code adds.",
        ),
        io.Float.Input(
            "start_sigma",
            default=BY_USE,
            min=BY_USE,
            max=WHOLE_START,
            step=0.01,
            advanced=True,
            tooltip="Noise level (sigma) at which the method begins. A higher value starts "
            "earlier; a lower one leaves the layout to the prompt. Start with -1, automatic: the "
            f"first step ({WHOLE_START:g}), or the middle of the schedule for a style.",
        ),
        io.Float.Input(
            "end_sigma",
            default=BY_USE,
            min=BY_USE,
            max=WHOLE_START,
            step=0.01,
            tooltip="Noise level (sigma) at which the method stops. A lower value lets it act "
            "longer and on smaller details; 0 is the last step. Start with -1, automatic: the "
            "share of the model's noise schedule that suits the use. The paper's is 4.67 "
            "(timestep 780 of Stable Diffusion 1.x).",
        ),
        io.Float.Input(
            "threshold",
            default=BY_USE,
            min=BY_USE,
            max=2.0,
            step=0.01,
            advanced=True,
            tooltip="calibrated: how similar an image must be before the method acts, relative "
            "to how similar the set's images are to each other. A higher value leaves "
            "more images unchanged; a lower one catches more. For masked sets and style sets "
            "it is a fraction of the set's own median log-odds. Start with -1, automatic.",
        ),
        io.Float.Input(
            "temperature",
            default=BY_USE,
            min=BY_USE,
            max=1.0,
            step=0.005,
            advanced=True,
            tooltip="calibrated: how many references are averaged. A lower value lets the few "
            "nearest references decide; a higher one averages over the whole set. Start "
            "with -1, automatic. With masks it applies to the image patches that each position is "
            "compared with.",
        ),
        io.Float.Input(
            "cap",
            default=BY_USE,
            min=BY_USE,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="Largest change in one step, relative to the size of the prediction. A "
            "lower value is gentler. Start with -1, automatic. By hand, use 2 with masks, "
            "otherwise a large subject is replaced only in part.",
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


def use_input() -> io.Input:
    """Return the input for what the negation set is used for."""
    return io.Combo.Input(
        "use",
        options=[AUTOMATIC, *get_args(Use)],
        default=AUTOMATIC,
        optional=True,
        tooltip="What to keep away from. automatic: a subject anywhere if masks mark one, a style if some "
        "images have empty masks (neutral images), otherwise near-copies of the images. Every setting at -1 "
        "gets the value for this use, and a number overrides it; the node's message tells the values. "
        "Start with automatic.",
    )


def protect(
    model: ModelPatcher, vae: Any, negation_set: NegationSet, mask: torch.Tensor | None, given: dict[str, Any]
) -> ModelPatcher:
    """Attach the method to a clone of the model, from the values of `settings_inputs` and `use_input`."""
    values = with_defaults([*settings_inputs(), use_input()], given)
    layout = Layout(values.pop("fit"), values.pop("augmentation"))
    counts = MaskCounts.of(None if m is None else m > 127 for m in negation_set.masks)
    found = _fill_in(model, values, counts)
    window = take_window(model, values)
    settings = SafeDenoiserSettings(window=window, automatic=found, **values)
    correction = SafeDenoiserCorrection(negation_set, vae, settings, layout, mask)
    correction.found = automatic_in_words(counts, settings)
    return attach(model, correction)


def _fill_in(model: ModelPatcher, values: dict[str, Any], counts: MaskCounts) -> tuple[str, ...]:
    """Replace the values that are automatic by those of the use, and return their names.

    Raises:
        ValueError: the set does not hold what the named use needs, or the temperature is too low.
    """
    if 0 <= values["temperature"] < LEAST_TEMPERATURE:
        raise ValueError(
            f"A temperature of {values['temperature']:g} lets no reference decide. "
            f"Set at least {LEAST_TEMPERATURE:g}, or -1 for automatic."
        )
    automatic = asdict(automatic_values(counts, values["use"], values["mode"]))
    window = percent_window(model, automatic["start_sigma"], automatic["end_sigma"])
    automatic |= {"start_sigma": window.high, "end_sigma": window.low}
    by_sigma = values["window"] == BY_SIGMA
    found = [name for name in NAMES if values[name] < 0 and (by_sigma or name not in WINDOW_BOUNDS)]
    values |= {name: automatic[name] for name in found}
    return tuple(found)
