"""Inputs that several methods have in common, and what they mean."""

from __future__ import annotations

import math
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..formats.layouts import Augmentation, Fit
from ..guidance.core.noise_level import SigmaWindow
from .host.engine.ksampler import SAMPLERS, SCHEDULERS
from .host.engine.windows import percent_window
from .io_types import NegationSetType
from .parsing import LARGEST_SEED

WHOLE_START = 1000.0
"""A window that starts here starts with the first step: no schedule of the host begins at more noise."""

BY_SIGMA, BY_PERCENT = "sigma", "percent"
PRESETS = {
    "every step": SigmaWindow(),
    "SD 1.x paper (sigma 4.67)": SigmaWindow(low=4.67),
    "SD3 published code (sigma 3.545)": SigmaWindow(low=3.545),
    "large images (sigma 9)": SigmaWindow(low=9.0),
}
"""DDPM timesteps 780 to 1000 of Stable Diffusion 1.x; the same integers read as SD3's flow time; the first, at twice the size."""

HIDDEN = {"hidden": True}
"""`extra_dict` of an input that the interface does not show: API prompts and saved workflows keep setting it."""
FITS: tuple[Fit, ...] = ("crop", "letterbox")
AUGMENTATIONS: tuple[Augmentation, ...] = ("none", "flip", "flip and crops", "flip, crops and shifts")


def reference_inputs(optional: bool = False) -> list[io.Input]:
    """The set, and the VAE that encodes it."""
    return [
        io.Vae.Input(
            "vae",
            optional=optional,
            tooltip="The VAE that belongs to the model; it turns the set's images into latents.",
        ),
        NegationSetType.Input("negation_set", optional=optional, tooltip="What to stay away from."),
    ]


def layout_inputs() -> list[io.Input]:
    """How the set's images get to the size of the run."""
    return [
        io.Combo.Input(
            "fit",
            options=list(FITS),
            default="crop",
            optional=True,
            advanced=True,
            tooltip="How the set's images get the shape of the one that is made. crop: they fill it and lose what overhangs. "
            "letterbox: all of each is kept, with bars of its mean colour.",
        ),
        io.Combo.Input(
            "augmentation",
            options=list(AUGMENTATIONS),
            default="none",
            optional=True,
            advanced=True,
            tooltip="Further copies of every image, since whole images are compared place by place. More copies resemble more "
            "layouts, and take 2, 10 or 18 times the memory and the encoding time.",
        ),
    ]


def window_inputs() -> list[io.Input]:
    """Another way to give the window than in noise levels."""
    return [
        io.Combo.Input(
            "window",
            options=[BY_SIGMA, BY_PERCENT, *PRESETS],
            default=BY_SIGMA,
            optional=True,
            advanced=True,
            tooltip="Which steps the method may act at. sigma: from start_sigma down to end_sigma. percent: from start_percent to "
            "end_percent of the model's schedule. The others are fixed windows; SD3's code uses the same numbers as that of SD 1.x, "
            "which reach further there.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            advanced=True,
            tooltip="window percent: where in the schedule the method begins. More leaves the layout to the prompt.",
        ),
        io.Float.Input(
            "end_percent",
            default=0.22,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            advanced=True,
            tooltip="window percent: where the method stops. 0.22 is the paper's window on SD 1.x; more lets it act for longer.",
        ),
    ]


def changing_seed_input(tooltip: str) -> io.Input:
    """A seed that is another one after each run, as KSampler's is."""
    return io.Int.Input(
        "seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=True, tooltip=tooltip
    )


def seed_input(tooltip: str, largest: int = 2**32) -> io.Input:
    """A seed that stays after a run, because later work relies on what it made."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=largest,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
    )


def sampler_inputs(seed: io.Input) -> list[io.Input]:
    """What a node that samples asks for besides the host's sockets, as KSampler does."""
    return [
        seed,
        io.Int.Input(
            "steps", default=20, min=1, max=10000, tooltip="Sampling steps. More is slower and finer."
        ),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How closely the image follows the prompt. Too much burns it.",
        ),
        io.Combo.Input("sampler_name", options=SAMPLERS, tooltip="The sampling algorithm."),
        io.Combo.Input("scheduler", options=SCHEDULERS, tooltip="How the noise is taken off over the steps."),
    ]


def mask_input() -> io.Input:
    """Where in the image a method may look and act."""
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where in the image to look and to act, white for yes. Without it, everywhere. Inpainting's own mask counts too.",
    )


def sigma_window(start_sigma: float, end_sigma: float = 0.0) -> SigmaWindow:
    """The window from one noise level down to another."""
    return SigmaWindow(high=math.inf if start_sigma >= WHOLE_START else start_sigma, low=end_sigma)


def take_window(model: ModelPatcher, values: dict[str, Any]) -> SigmaWindow:
    """The window that start_sigma, end_sigma and `window_inputs` describe, taken out of a node's values."""
    of_window = ("window", "start_sigma", "end_sigma", "start_percent", "end_percent")
    window, start_sigma, end_sigma, start_percent, end_percent = (values.pop(name) for name in of_window)
    if window == BY_PERCENT:
        return percent_window(model, start_percent, end_percent)
    if window == BY_SIGMA:
        return sigma_window(start_sigma, end_sigma)
    return PRESETS[window]


def with_defaults(inputs: list[io.Input], given: dict[str, Any]) -> dict[str, Any]:
    """Values by input, with the defaults of those that a workflow from before they existed does not have."""
    return {i.id: given.get(i.id, getattr(i, "default", None)) for i in inputs}
