"""Safe Text Embedding Guidance (Na et al., "Training-Free Safe Text Embedding Guidance for Text-to-Image
Diffusion Models", NeurIPS 2025).

The text embedding c moves against the gradient of the unsafe score U of the decoded prediction at every step:

    c <- c - rho grad_c U(Dec(x0(x_t, c)))

The image therefore changes only in ways that a text embedding can express. To first order the sampler then
follows the text-conditional score plus rho grad_x(v . grad_c log q_t(x | c)), where v = grad_c g with g = -U.
This is the paper's Theorem 1 with v held fixed while grad_x is taken. The whole gradient of the product has
another term, (grad_x v) . grad_c log q_t, which the sampler does not follow; it vanishes where v does not
depend on x. The paper starts from the prompt's own embedding c at every step (`accumulate` off). The
published code divides the gradient by its norm and keeps the moved embedding for all later steps. The default
settings do as that code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .core.composition import per_sample
from .core.noise_level import SigmaWindow

Unit = Literal["relative", "normalized", "raw"]

NUDITY_WINDOW = SigmaWindow(high=7.56, low=0.346)
"""Steps 5 to 44 of 50, as in the published nudity experiments.

Detectors misread the blurred predictions of earlier steps.
"""

NEGLIGIBLE_GRADIENT = 1e-12
"""Norm below which a gradient counts as zero and the embedding stays unchanged.

The gradient of a saturated detector is this small; its direction carries no information.
"""


@dataclass(frozen=True)
class SafeTextGuidanceSettings:
    """Settings of Safe Text Embedding Guidance.

    Args:
        rho: size of one move. 0 is the identity.
        unit: what rho multiplies. "relative": the gradient's direction, times the norm of the prompt's
            embedding (0.002 equals the published 0.5 for Stable Diffusion 1.x, and has the same effect with
            every text encoder); "normalized": the gradient's direction (published code); "raw": the gradient
            itself (paper's formula).
        tau: acts where the unsafe score exceeds this, besides the safety function's own gate.
        gamma: share of the steps inside the window at which it evaluates and acts, spread evenly.
        window: noise levels at which it acts.
        accumulate: keep the moved embedding for the later steps (published code). Off, every prediction, and
            the gradient of its score, starts from the prompt's own embedding (the paper's formula).
        prior_weight: weight of the mean squared distance from the prompt's embedding, added to U.
        trust: largest distance from the prompt's embedding, as a share of its norm.
        full_score: rho grows with the score up to this value, which avoids jumps when a gate opens whose
            function's score starts at 0 there. 0 always applies the full rho.
    """

    rho: float = 0.002
    unit: Unit = "relative"
    tau: float = 0.01
    gamma: float = 1.0
    window: SigmaWindow = NUDITY_WINDOW
    accumulate: bool = True
    prior_weight: float = 0.0
    trust: float = 0.15
    full_score: float = 0.0


def acts_at(step: int, gamma: float) -> bool:
    """Return whether a step belongs to the share gamma of steps that act.

    Steps are counted from 0 inside the window. For gamma above 0 the first step always acts; gamma 0.4 acts
    at steps 0, 2, 5, 7, 10, ...
    """
    return _due(step + 1, gamma) > _due(step, gamma)


def _due(steps: int, gamma: float) -> int:
    # Rounded first: 10 * 0.3 is 3.0000000000000004 in some orders of multiplication.
    return math.ceil(round(steps * gamma, 9))


def guided_embedding(
    current: Tensor, initial: Tensor, gradient: Tensor, score: Tensor, settings: SafeTextGuidanceSettings
) -> tuple[Tensor, Tensor]:
    """Move embeddings against the gradient of the unsafe score.

    Args:
        current: (B, tokens, width) embeddings that the prediction was made with. Without accumulation they
            are those of the prompt.
        initial: (B, tokens, width) embeddings of the prompt.
        gradient: (B, tokens, width) of sum(score) with respect to `current`.
        score: (B,) unsafe scores.

    Returns:
        The new embeddings and (B,) bool: the samples that moved. Samples with a vanishing or non-finite
        gradient keep `current` bit-identical.
    """
    current32, initial32, gradient = current.float(), initial.float(), gradient.float()
    usable = gradient.isfinite().flatten(1).all(1) & (
        _norm(gradient.nan_to_num(0, 0, 0)) > NEGLIGIBLE_GRADIENT
    )
    gradient = gradient.nan_to_num(0, 0, 0)
    # The prior alone must not move an embedding whose detector says nothing.
    gradient = gradient + settings.prior_weight * 2 * (current32 - initial32) / current32[0].numel()
    moved = current32 - _step(gradient, initial32, score, settings)
    moved = _within_trust(moved, initial32, settings.trust).to(current.dtype)
    return torch.where(per_sample(usable, current), moved, current), usable


def _step(gradient: Tensor, initial: Tensor, score: Tensor, settings: SafeTextGuidanceSettings) -> Tensor:
    rho = torch.full_like(score, settings.rho, dtype=torch.float32)
    if settings.full_score > 0:
        rho = rho * (score.float() / settings.full_score).clamp(0, 1)
    if settings.unit == "relative":
        rho = rho * _norm(initial)
    if settings.unit != "raw":
        rho = rho / _norm(gradient).clamp_min(NEGLIGIBLE_GRADIENT)
    return per_sample(rho, gradient) * gradient


def _within_trust(moved: Tensor, initial: Tensor, trust: float) -> Tensor:
    """Project onto the ball of radius `trust` times the norm of the initial embedding around it."""
    distance = moved - initial
    scale = (trust * _norm(initial) / _norm(distance).clamp_min(NEGLIGIBLE_GRADIENT)).clamp(max=1)
    return torch.where(per_sample(scale < 1, moved), initial + per_sample(scale, moved) * distance, moved)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
