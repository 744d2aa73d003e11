"""Safe Data Guidance, the baseline of Safe Text Embedding Guidance. It moves the latent instead of the text.

    score = s(x_t, c) + lambda grad_{x_t} g(x0(x_t))
    <=>  x0' = x0 - lambda (b^2 / a) grad_{x_t} U(Dec(x0(x_t)))

with g = -U and x_t = a x0 + b eps, for epsilon-, v- and flow models alike. A gradient can point away from the
images that the model has learnt, which degrades the result. Guiding the text embedding avoids this weakness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .core.composition import per_sample, sample_norm
from .core.noise_level import NoiseLevel, SigmaWindow
from .safe_text_guidance import NEGLIGIBLE_GRADIENT, NUDITY_WINDOW

Scale = Literal["relative", "raw"]

SMALLEST_SIGNAL = 0.02
"""Lower bound of a in the factor b^2 / a. At the first step of a flow model a is 0."""


@dataclass(frozen=True)
class SafeDataGuidanceSettings:
    """Settings of Safe Data Guidance.

    Args:
        strength: "relative": length of one change, as a share of the prediction's norm; "raw": lambda. 0 is
            the identity. No value is published. A sampler applies only part of each change, and 0.1 had no
            effect on the demo model.
        scale: what the strength multiplies.
        tau: acts where the unsafe score exceeds this, besides the safety function's own gate.
        window: noise levels at which it acts.
        cheap: differentiate the decoder and the detector only, not the sampled network.
    """

    strength: float = 1.0
    scale: Scale = "relative"
    tau: float = 0.01
    window: SigmaWindow = NUDITY_WINDOW
    cheap: bool = False


def latent_gradient_from_prediction(gradient: Tensor, level: NoiseLevel) -> Tensor:
    """Approximate grad_{x_t} U by the gradient with respect to the prediction, as if x0 = x_t / a."""
    return gradient / max(level.signal, SMALLEST_SIGNAL)


def data_guidance(
    denoised: Tensor, gradient: Tensor, level: NoiseLevel, settings: SafeDataGuidanceSettings
) -> tuple[Tensor, Tensor]:
    """Return the change of the prediction for a gradient of sum(U) with respect to x_t.

    Returns:
        (B, C, h, w) to add, and (B,) bool: samples with a usable gradient. The change of the others is 0.
    """
    gradient, denoised = gradient.float(), denoised.float()
    norm = torch.linalg.vector_norm(gradient.nan_to_num(0, 0, 0).flatten(1), dim=1)
    usable = gradient.isfinite().flatten(1).all(1) & (norm > NEGLIGIBLE_GRADIENT)
    gradient = gradient.nan_to_num(0, 0, 0)
    if settings.scale == "raw":
        delta = -settings.strength * level.noise**2 / max(level.signal, SMALLEST_SIGNAL) * gradient
    else:
        delta = (
            -settings.strength
            * sample_norm(denoised)
            * gradient
            / per_sample(norm.clamp_min(NEGLIGIBLE_GRADIENT), gradient)
        )
    return torch.where(per_sample(usable, delta), delta, torch.zeros_like(delta)), usable
