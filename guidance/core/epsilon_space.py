"""Differences of denoised predictions in epsilon space, for methods with absolute thresholds or momentum.

A sampler's derivative for prediction k is d_k = (x_t - denoised_k) / sigma. For epsilon models it is the
noise prediction (and for v models, the noise prediction that v implies); for rectified-flow models it is the
velocity. It has unit size at every noise level, while the difference of two denoised predictions grows with
sigma.
"""

from __future__ import annotations

from torch import Tensor


def direction_difference(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """Return d_a - d_b for two denoised predictions (B, ...) at the same noisy latent, which cancels out."""
    return (b - a) / sigma
