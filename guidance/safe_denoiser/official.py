"""What the published code of Safe Denoiser computes, for comparison.

It differs from the paper: the kernel's distance is not squared, its bandwidth is a constant instead of the noise level, the
query is the prediction after CFG, references are normalised per latent pixel while the query is not, the reference mean
is subtracted instead of weighted by beta, and the result is noised again before a step with the old noise prediction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.references import References

EPSILON = 1e-8
"""Added to the kernel sum by the published code; it decides the result whenever no reference is near."""


def normalize_channels(latents: Tensor) -> Tensor:
    """Every latent pixel as a unit vector over channels: (N, C, h, w) -> (N, C, h, w)."""
    return latents / torch.linalg.vector_norm(latents, dim=1, keepdim=True)


def kernel_sum_and_mean(denoised: Tensor, references: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Sum of exp(-||x0 - z_n|| / (2 bandwidth^2)) over references (B,), and the kernel-weighted mean (B, C, h, w)."""
    distance = torch.cdist(denoised.flatten(1), references.flatten(1))
    kernel = torch.exp(-distance / (2 * bandwidth**2))
    total = kernel.sum(1) + EPSILON
    return total, ((kernel / total[:, None]) @ references.flatten(1)).view_as(denoised)


def official_delta(denoised: Tensor, references: Tensor, bandwidth: float, scale: float) -> Tensor:
    """The published change of the denoised prediction, -scale * E_unsafe, without the noising that follows it."""
    return -scale * kernel_sum_and_mean(denoised, references, bandwidth)[1]


def published_delta(
    denoised: Tensor, references: References, kappa: float, scale: float, mask: Tensor | None = None
) -> Tensor:
    """`official_delta` for any number of references of `normalize_channels`, streamed, with the bandwidth free of the size.

    The kernel is exp(-kappa r_n) with r_n = ||x0 - z_n|| / sqrt(D), so kappa = sqrt(D) / (2 bandwidth^2): 6.45 for the
    published nudity setting of Stable Diffusion 1.4, 0.37 for its style and memorisation settings, 16.9 for SD3's.
    With a mask (1 or B, 1, h, w) distances and changes are taken inside it.
    """
    seen = torch.ones_like(denoised[:1, :1]) if mask is None else mask.to(denoised.dtype)
    root, size = seen.sqrt().expand(len(denoised), -1, -1, -1), denoised[0].numel()

    def distances(z: Tensor) -> Tensor:
        return torch.stack([(r * (x - z)).flatten(1).norm(dim=1) for r, x in zip(root, denoised)])

    logits = -kappa * references.collect(denoised.device, len(denoised), distances) / math.sqrt(size)
    # exp(logits) / (sum + EPSILON) without underflow; the weights sum to less than 1 when no reference is near.
    total = torch.logaddexp(torch.logsumexp(logits, 1), logits.new_tensor(math.log(EPSILON)))
    return -scale * seen * references.mean((logits - total[:, None]).exp())


def renoised_variance(abar: float, abar_previous: float) -> float:
    """Noise variance after the published DDPM step with fresh noise, relative to what the schedule asks for.

    The step uses the old noise prediction on newly noised latents, so two independent noises add up where one belongs.
    """
    alpha = abar / abar_previous
    c0 = abar_previous**0.5 * (1 - alpha) / (1 - abar)
    c1 = alpha**0.5 * (1 - abar_previous) / (1 - abar)
    posterior = (1 - alpha) * (1 - abar_previous) / (1 - abar)
    sigma = ((1 - abar) / abar) ** 0.5
    fresh, stale = c0 * sigma + c1 * (1 - abar) ** 0.5, c0 * sigma
    return (fresh**2 + stale**2 + posterior) / (1 - abar_previous)
