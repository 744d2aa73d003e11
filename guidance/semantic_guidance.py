"""Semantic Guidance (Brack et al., "SEGA: Instructing Text-to-Image Models using Semantic Guidance",
NeurIPS 2023).

Every concept c gives a direction relative to the unconditional one. Only its largest elements are kept:

    psi_c = sign_c s_c (d_c - d_u) where |psi_c| is at least its quantile lambda_c per channel, else 0
    psi   = sum_c omega_c psi_c + s_m nu,        nu' = beta_m nu + (1 - beta_m) psi
    d     = d_cfg + psi                          (psi is not multiplied by the guidance scale)

Momentum accumulates from the first step. While only some concepts are past their warm-up, their mean,
weighted by omega, is added without momentum. After its cool-down a concept contributes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .core.epsilon_space import direction_difference
from .core.noise_level import WINDOW_TOLERANCE, NoiseLevel, SigmaWindow
from .core.paper_schedule import sigma_of_step

PAPER_WINDOW = SigmaWindow(high=sigma_of_step(10))
"""Warm-up of 10 of 50 steps and no cool-down."""


@dataclass(frozen=True)
class Concept:
    """One concept to remove or to add.

    Args:
        scale: s_c, strength of the guidance. 0 is off.
        remove: steer away from the concept instead of towards it.
        threshold: lambda_c, the quantile of elements that are left alone, in [0, 1].
        window: noise levels from the end of the warm-up to the cool-down.
        weight: omega_c, the share among several concepts.
    """

    scale: float = 5.0
    remove: bool = True
    threshold: float = 0.9
    window: SigmaWindow = PAPER_WINDOW
    weight: float = 1.0

    @property
    def is_on(self) -> bool:
        return self.scale != 0 and self.weight != 0

    def is_warm(self, level: NoiseLevel) -> bool:
        return level.sigma <= self.window.high * (1 + WINDOW_TOLERANCE)

    def is_cold(self, level: NoiseLevel) -> bool:
        return level.sigma < self.window.low * (1 - WINDOW_TOLERANCE)


@dataclass(frozen=True)
class SemanticGuidanceSettings:
    """The concepts with the momentum they share: s_m (0 switches it off) and beta_m."""

    concepts: tuple[Concept, ...]
    momentum_scale: float = 0.1
    momentum_decay: float = 0.4

    def needed(self, level: NoiseLevel) -> list[int]:
        """Return the indices of the concepts whose predictions are needed at a noise level."""
        momentum = self.momentum_scale > 0
        return [
            i
            for i, c in enumerate(self.concepts)
            if c.is_on and not c.is_cold(level) and (momentum or c.is_warm(level))
        ]

    def acts(self, level: NoiseLevel) -> bool:
        """Return whether there is guidance to compute at a noise level.

        There is when a concept's prediction is needed, or when concepts that have cooled down left momentum.
        """
        on = [concept for concept in self.concepts if concept.is_on]
        return bool(self.needed(level)) or (
            self.momentum_scale > 0 and bool(on) and all(c.is_warm(level) for c in on)
        )


def concept_guidance(prediction: Tensor, uncond: Tensor, sigma: float, concept: Concept) -> Tensor:
    """Return psi_c with its smaller elements set to zero, (B, C, ...) in direction space, float32 or wider.

    These are the elements whose magnitude is below the quantile `concept.threshold` of their channel.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    difference = direction_difference(prediction.to(wide), uncond.to(wide), sigma)
    guidance = (-concept.scale if concept.remove else concept.scale) * difference
    size = guidance.abs()
    limit = torch.quantile(size.flatten(2), concept.threshold, dim=2)
    return torch.where(
        size >= limit.view(*limit.shape, *[1] * (size.ndim - 2)), guidance, torch.zeros_like(guidance)
    )


def semantic_guidance(
    predictions: Sequence[Tensor | None],
    uncond: Tensor,
    sigma: float,
    level: NoiseLevel,
    momentum: Tensor,
    settings: SemanticGuidanceSettings,
) -> tuple[Tensor | None, Tensor]:
    """Return the guidance to add to the direction and the momentum for the next step.

    The guidance is None while no concept is past its warm-up.

    Args:
        predictions: per concept its denoised prediction (B, C, h, w), or None if it is not in
            `settings.needed(level)`.
        uncond: the unconditional or negative branch's denoised prediction.
        sigma: the sampler's noise level, which scales predictions to directions.
        level: the same noise level, for warm-up and cool-down.
        momentum: nu, zeros at the start of a run.
        settings: the concepts and the momentum.
    """
    on = [
        (concept, prediction) for concept, prediction in zip(settings.concepts, predictions) if concept.is_on
    ]
    edits = [
        torch.zeros_like(momentum)
        if prediction is None or concept.is_cold(level)
        else concept_guidance(prediction, uncond, sigma, concept)
        for concept, prediction in on
    ]
    total = sum((c.weight * edit for (c, _), edit in zip(on, edits)), settings.momentum_scale * momentum)
    assert isinstance(total, Tensor)
    advanced = settings.momentum_decay * momentum + (1 - settings.momentum_decay) * total
    warm = [c.is_warm(level) for c, _ in on]
    if all(warm):
        return total, advanced
    if not any(warm):
        return None, advanced
    weights = [c.weight * is_warm for (c, _), is_warm in zip(on, warm)]
    return sum(
        (w / sum(weights) * edit for w, edit in zip(weights, edits)), torch.zeros_like(momentum)
    ), advanced


def denoised_change(guidance: Tensor, sigma: float) -> Tensor:
    """Convert psi from direction space to the change of the denoised prediction."""
    return -sigma * guidance
