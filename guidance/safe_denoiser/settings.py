"""Settings and result of Safe Denoiser, the same for every way of comparing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.noise_level import SigmaWindow

Mode = Literal["calibrated", "exact", "tempered", "official"]
Anchor = Literal["prediction", "unconditional"]
Use = Literal["near-copies", "a subject anywhere", "a style"]
"""Uses of a negation set: copies of whole images, subjects that masks mark, or the style of images."""

AUTOMATIC = "automatic"
"""The use that the set's masks say."""

FEWEST_MASKED = 60
"""Masked images with which nearly all harmless images stayed correct on the demo model: 22 of 24 with 64."""

OFFICIAL_WINDOW = SigmaWindow(low=4.67)
"""DDPM timesteps 780 to 1000 of Stable Diffusion 1.x, the window of the paper's text-to-image experiments."""


@dataclass(frozen=True)
class SafeDenoiserSettings:
    """Settings of one Safe Denoiser correction.

    Args:
        mode: how predictions are compared with the set, see the package's description.
        strength: eta, the weight of the correction. 0 is the identity.
        window: noise levels at which the method acts.
        threshold: calibrated mode. For whole images, the gate opens when a prediction's similarity exceeds
            this share of the references' own leave-one-out similarity, and is fully open 25 % above it. For
            masked sets and style sets, a fraction of the set's own median log-odds.
        temperature: calibrated mode, the scale at which similarities are compared. With a smaller value fewer
            references, the nearest ones, decide.
        cap: largest correction, as a share of the prediction's norm.
        effective_dimensions: tempered mode, the assumed number of independent dimensions of a latent.
        kappa: official mode, how fast the kernel falls with the root mean square distance, see
            `published_delta`.
        anchor: the prediction that is compared and pushed away: the guider's own after CFG (the published
            code), or the unconditional one inside CFG (the paper's Eq. 8).
        use: calibrated mode, a `Use` or `AUTOMATIC`.
        automatic: names of the settings whose values were not set by hand, for messages.
    """

    mode: Mode = "calibrated"
    strength: float = 0.33
    window: SigmaWindow = OFFICIAL_WINDOW
    threshold: float = 0.4
    temperature: float = 0.1
    cap: float = 0.5
    effective_dimensions: int = 256
    kappa: float = 6.45
    anchor: Anchor = "prediction"
    use: Use | Literal["automatic"] = "automatic"
    automatic: tuple[str, ...] = ()


@dataclass(frozen=True)
class SafeDenoiserResult:
    """Outcome of one evaluation for a batch.

    Attributes:
        delta: (B, C, h, w), to be added to the predictions whose gate is above zero; the others must not be
            changed.
        gate: (B,), how far the gate is open. Calibrated mode has values in [0, 1], the likelihood ratios have
            beta.
        similarity: (B,), the score that opens the gate in calibrated mode; NaN in the other modes.
        threshold: (B,), the score from which the gate opens in calibrated mode; NaN in the other modes.
    """

    delta: Tensor
    gate: Tensor
    similarity: Tensor
    threshold: Tensor

    @classmethod
    def without_threshold(cls, delta: Tensor, gate: Tensor) -> SafeDenoiserResult:
        """Return the result of a mode that compares no score with a threshold."""
        unknown = torch.full_like(gate, math.nan)
        return cls(delta, gate, unknown, unknown)
