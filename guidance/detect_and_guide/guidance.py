"""Guidance away from a detected concept, at the concept's position only.

Li et al., Detect-and-Guide (CVPR 2025), section 3.2. The guidance term is that of the paper's Table 1, whose
weights of the three predictions sum to 1; Eq. 4 as printed drops a term.
"""

from __future__ import annotations

from torch import Tensor

from .settings import DetectAndGuideSettings


def host_mask(
    uncond: Tensor, cond: Tensor, safety: Tensor, sigma: float, settings: DetectAndGuideSettings
) -> Tensor:
    """Return the positions and channels (B, C, h, w) bool that SEGA or SLD would change.

    SEGA selects the largest differences of every channel, before any scaling (otherwise the zeros outside the
    objects would decide). SLD selects where the prompt's direction exceeds the safety text's by less than its
    threshold.

    Args:
        uncond, cond, safety: (B, C, h, w) denoised predictions.
        sigma: the sampler's noise level, which turns differences of predictions into differences of
            directions.
        settings: the rule and its threshold.
    """
    if settings.host_mask == "SLD":
        return (safety - cond) / sigma < settings.sld_threshold
    difference = (safety - uncond).abs().float()
    return difference >= difference.flatten(2).quantile(settings.quantile, dim=2)[..., None, None]


def guidance_term(
    uncond: Tensor,
    cond: Tensor,
    safety: Tensor,
    scale: Tensor,
    sigma: float,
    cond_scale: float,
    settings: DetectAndGuideSettings,
) -> Tensor:
    """Return the change of the guided prediction: cond_scale * scale * mask * (uncond - safety).

    In the paper's terms, eps_u + w [(eps_p - eps_u) - S M (eps_s - eps_u)]; see the module's docstring.

    Args:
        uncond, cond, safety: (B, C, h, w) denoised predictions.
        scale: (B, 1, h, w) from `regulate`.
        sigma: the sampler's noise level.
        cond_scale: the CFG scale.
    """
    mask = host_mask(uncond, cond, safety, sigma, settings)
    return cond_scale * scale * mask * (uncond - safety)


def bounded(delta: Tensor, denoised: Tensor) -> Tensor:
    """Return `delta`, cut so that every channel of `denoised` stays in its range; both (B, C, h, w)."""
    low, high = denoised.amin((2, 3), keepdim=True), denoised.amax((2, 3), keepdim=True)
    return (denoised + delta).clamp(low, high) - denoised
