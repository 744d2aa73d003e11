"""The space in which methods with absolute thresholds or momentum compare predictions.

A sampler's derivative for prediction k is d_k = (x_t - denoised_k) / sigma: exactly the noise prediction of epsilon models
(and what a v model's noise prediction would be), the velocity of rectified-flow models. It stays of unit size at every noise
level, while denoised predictions differ by sigma times as much.
"""

from __future__ import annotations

from torch import Tensor


def direction_difference(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """d_a - d_b of two denoised predictions at the same noisy latent, which cancels out of it: (B, ...) in their float type."""
    return (b - a) / sigma
