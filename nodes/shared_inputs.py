"""Inputs that several methods share, and the settings their values stand for."""

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
    "large pictures (sigma 9)": SigmaWindow(low=9.0),
}
"""In this order: all steps; DDPM timesteps 780 to 1000 of Stable Diffusion 1.x; the same integers read as
SD3's flow time; the SD 1.x window at twice the image size. Saved workflows hold these names, so they stay."""

HIDDEN = {"hidden": True}
"""`extra_dict` of an input that the interface does not show. API prompts and saved workflows still set it."""
FITS: tuple[Fit, ...] = ("crop", "letterbox")
AUGMENTATIONS: tuple[Augmentation, ...] = ("none", "flip", "flip and crops", "flip, crops and shifts")


def reference_inputs(optional: bool = False) -> list[io.Input]:
    """Return the inputs for the negation set and the VAE that encodes it."""
    return [
        io.Vae.Input(
            "vae",
            optional=optional,
            tooltip="VAE of the model. It encodes the reference images into latents.",
        ),
        NegationSetType.Input(
            "negation_set", optional=optional, tooltip="Negation set: the reference images to keep away from."
        ),
    ]


def origin_inputs(images: str, licensed: str) -> list[io.Input]:
    """Return the inputs for the source and licence that a saved file states.

    Args:
        images: the images whose source is meant, such as "the images".
        licensed: what has the licence.
    """
    return [
        io.String.Input(
            "source",
            default="",
            optional=True,
            advanced=True,
            tooltip=f"Source of {images}, such as a web address. It is stored in the file.",
        ),
        io.String.Input(
            "licence",
            default="",
            optional=True,
            advanced=True,
            tooltip=f"Licence of {licensed}, such as CC0. It is stored in the file.",
        ),
    ]


def layout_inputs() -> list[io.Input]:
    """Return the inputs for how reference images are fitted to the size of the run."""
    return [
        io.Combo.Input(
            "fit",
            options=list(FITS),
            default="crop",
            optional=True,
            advanced=True,
            tooltip="How reference images are fitted to the size of the generated image. crop "
            "fills it and cuts off the edges; letterbox keeps the whole image and adds "
            "bars of its mean colour. Start with crop.",
        ),
        io.Combo.Input(
            "augmentation",
            options=list(AUGMENTATIONS),
            default="none",
            optional=True,
            advanced=True,
            tooltip="Extra copies of every reference image: mirrored, cropped or shifted. More "
            "copies match more layouts, and take 2, 10 or 18 times the memory and "
            "encoding time. Start with none.",
        ),
    ]


def start_sigma_input() -> io.Input:
    """Return the input for the noise level at which a method begins; by default the first step."""
    return io.Float.Input(
        "start_sigma",
        default=WHOLE_START,
        min=0.0,
        max=WHOLE_START,
        step=0.01,
        advanced=True,
        tooltip="Noise level (sigma) at which the method begins. A higher value starts "
        "earlier; a lower one leaves the layout to the prompt. Start with "
        f"{WHOLE_START:g}, the first step.",
    )


def window_inputs() -> list[io.Input]:
    """Return the inputs that give the window as a preset or as shares of the schedule."""
    return [
        io.Combo.Input(
            "window",
            options=[BY_SIGMA, BY_PERCENT, *PRESETS],
            default=BY_SIGMA,
            optional=True,
            advanced=True,
            tooltip="Steps at which the method may act. sigma uses start_sigma and end_sigma; "
            "percent uses start_percent and end_percent; the others are fixed windows. "
            "Start with sigma. The fixed windows reach further on SD3 than on SD 1.x.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            advanced=True,
            tooltip="With window percent: where in the sampling schedule the method begins. A "
            "higher value starts later and leaves the layout to the prompt. Start with "
            "0.",
        ),
        io.Float.Input(
            "end_percent",
            default=0.22,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            advanced=True,
            tooltip="With window percent: where in the sampling schedule the method stops. A "
            "higher value lets it act longer. Start with 0.22, the paper's window on SD "
            "1.x.",
        ),
    ]


def changing_seed_input(tooltip: str) -> io.Input:
    """Return a seed input that changes after each run, as KSampler's does."""
    return io.Int.Input(
        "seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=True, tooltip=tooltip
    )


def seed_input(tooltip: str, largest: int = 2**32) -> io.Input:
    """Return a seed input that stays the same after a run, because later work relies on its result."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=largest,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
    )


def sampler_inputs(seed: io.Input) -> list[io.Input]:
    """Return the widgets of KSampler up to the scheduler."""
    return [
        seed,
        io.Int.Input(
            "steps",
            default=20,
            min=1,
            max=10000,
            tooltip="Number of sampling steps. More steps take longer and give finer detail. Start with 20.",
        ),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance scale: how closely the image follows the prompt. "
            "A value that is too high over-saturates the image. Start with 5 to 8.",
        ),
        io.Combo.Input("sampler_name", options=SAMPLERS, tooltip="Sampling algorithm, as in KSampler."),
        io.Combo.Input(
            "scheduler",
            options=SCHEDULERS,
            tooltip="Noise schedule: how noise is removed over the steps, as in KSampler.",
        ),
    ]


def mask_input() -> io.Input:
    """Return the input for the area in which a method may act."""
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Area of the image in which the method may act, in white. Without a mask it "
        "may act everywhere. An inpainting mask is respected as well.",
    )


def sigma_window(start_sigma: float, end_sigma: float = 0.0) -> SigmaWindow:
    """Return the window from one noise level down to another."""
    return SigmaWindow(high=math.inf if start_sigma >= WHOLE_START else start_sigma, low=end_sigma)


def take_window(model: ModelPatcher, values: dict[str, Any]) -> SigmaWindow:
    """Take start_sigma, end_sigma and `window_inputs` out of a node's values and return their window."""
    window = values.pop("window")
    start_sigma, end_sigma = values.pop("start_sigma"), values.pop("end_sigma")
    start_percent, end_percent = values.pop("start_percent"), values.pop("end_percent")
    if window == BY_PERCENT:
        return percent_window(model, start_percent, end_percent)
    if window == BY_SIGMA:
        return sigma_window(start_sigma, end_sigma)
    return PRESETS[window]


def with_defaults(inputs: list[io.Input], given: dict[str, Any]) -> dict[str, Any]:
    """Return the values by input; inputs that an older workflow lacks get their defaults."""
    return {i.id: given.get(i.id, getattr(i, "default", None)) for i in inputs}
