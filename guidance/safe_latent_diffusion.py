"""Safe Latent Diffusion (Schramowski et al., "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in
Diffusion Models", CVPR 2023).

The method compares the prompt's direction d_p with the direction d_s of a text of unsafe concepts, element by
element. Where d_p is close to d_s or below it, the guidance is steered away from the unsafe text:

    mu      = min(1, s_S |d_p - d_s|) where d_p - d_s < lambda, else 0
    gamma   = mu (d_s - d_u) + s_m nu,          nu' = beta_m nu + (1 - beta_m) gamma
    d       = d_u + w ((d_p - d_u) - gamma)     after the warm-up; before it only the momentum nu is kept

d are directions (see `directions`), u the unconditional or negative branch and w the guidance scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .core.epsilon_space import direction_difference
from .core.noise_level import NoiseLevel, SigmaWindow
from .core.paper_schedule import sigma_of_step

SAFETY_TEXT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, "
    "blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, "
    "brutality, cruelty"
)
"""The paper's unsafe concepts."""


@dataclass(frozen=True)
class SafeLatentDiffusionSettings:
    """Settings of one correction; the presets are the paper's.

    Args:
        scale: s_S, how quickly a difference reaches full weight. Below 1 the method is off.
        threshold: lambda, an element is steered when d_p - d_s is below it.
        momentum_scale: s_m, how much of the accumulated guidance is added. 0 switches momentum off.
        momentum_decay: beta_m, the share of the accumulated guidance that stays at every step.
        window: noise levels at which the guidance is applied; it begins when the warm-up ends.
    """

    scale: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_decay: float = 0.4
    window: SigmaWindow = SigmaWindow(high=sigma_of_step(10))

    def needs_prediction(self, level: NoiseLevel) -> bool:
        """Return whether the unsafe text must be evaluated at a noise level.

        It must be inside the window, and before the window if momentum has to accumulate.
        """
        if self.scale < 1:
            return False
        return level in self.window or (self.momentum_scale > 0 and level.sigma > self.window.high)


WEAK = SafeLatentDiffusionSettings(20.0, 0.0, 0.0, 0.0, SigmaWindow(high=sigma_of_step(15)))
MEDIUM = SafeLatentDiffusionSettings()
STRONG = SafeLatentDiffusionSettings(2000.0, 0.025, 0.5, 0.7, SigmaWindow(high=sigma_of_step(7)))
MAX = SafeLatentDiffusionSettings(5000.0, 1.0, 0.5, 0.7, SigmaWindow())
PRESETS = {"weak": WEAK, "medium": MEDIUM, "strong": STRONG, "max": MAX}


def safety_weight(
    cond: Tensor, safety: Tensor, sigma: float, settings: SafeLatentDiffusionSettings
) -> Tensor:
    """Return mu in [0, 1] for every element.

    Args:
        cond, safety: denoised predictions (B, ...) for the prompt and for the unsafe text.
        sigma: the sampler's noise level, which scales predictions to directions.
        settings: scale and threshold.
    """
    difference = direction_difference(cond, safety, sigma)
    weight = (settings.scale * difference.abs()).clamp(max=1)
    return torch.where(difference < settings.threshold, weight, torch.zeros_like(weight))


def safety_guidance(
    cond: Tensor,
    uncond: Tensor,
    safety: Tensor,
    sigma: float,
    momentum: Tensor,
    settings: SafeLatentDiffusionSettings,
) -> tuple[Tensor, Tensor]:
    """Return gamma and the momentum for the next step, both in direction space.

    Args:
        cond, uncond, safety: denoised predictions (B, C, h, w) for the prompt, the unconditional branch and
            the unsafe text.
        sigma: the sampler's noise level, which scales predictions to directions.
        momentum: nu, of the same shape; zeros at the start of a run.
        settings: scale, threshold and momentum; the window is the caller's.
    """
    weight = safety_weight(cond, safety, sigma, settings)
    guidance = weight * direction_difference(safety, uncond, sigma) + settings.momentum_scale * momentum
    return guidance, settings.momentum_decay * momentum + (1 - settings.momentum_decay) * guidance


def denoised_change(guidance: Tensor, sigma: float, cond_scale: float) -> Tensor:
    """Convert -w gamma from direction space to the change of the denoised prediction."""
    return sigma * cond_scale * guidance
