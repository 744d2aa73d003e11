"""Similarity of latents with references: the correlation of their contents.

Each channel's mean over the mask is subtracted on both sides, and both sides are compared at equal norm. So
the similarity does not depend on brightness, contrast, the size of the latent or the scale of the VAE.
References are streamed; what depends on them alone is computed once per set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.references import References, evenly_spread

STATISTICS_SAMPLE = 1024
"""References that are compared with each other for the leave-one-out similarity. Its cost is the square of
their number."""


def normalized_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax over references and the log of the mean of exp(logits): (B, N) -> (B, N), (B,).

    Neither underflows nor overflows.
    """
    log_mean = torch.logsumexp(logits, dim=1) - math.log(logits.shape[1])
    return torch.softmax(logits, dim=1), log_mean


def contrasts(latents: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the norm of latents (N, C, h, w) less their channel means, over the mask.

    Returns:
        (M, N) for a mask (M, 1, h, w); M = 1 without a mask.
    """
    pixels = latents.flatten(2)  # (N, C, P)
    weights = torch.ones_like(pixels[:1, 0]) if mask is None else mask.flatten(1).to(pixels.dtype)  # (M, P)
    area = weights.sum(1).clamp_min(1e-6)[:, None, None]
    mean = torch.einsum("mp,ncp->mnc", weights, pixels) / area
    square = weights @ pixels.square().sum(1).T  # (M, N)
    return (square - area[..., 0] * mean.square().sum(-1)).clamp_min(0).sqrt()


def reference_contrasts(references: References, device: torch.device, mask: Tensor | None = None) -> Tensor:
    """Return the `contrasts` of all references, (M, N), on the device."""
    return references.collect(device, 1 if mask is None else len(mask), lambda z: contrasts(z, mask))


def similarities(
    x: Tensor, references: References, reference_contrast: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the correlation of every sample with every reference: (B, C, h, w) -> (B, N) in [-1, 1].

    Args:
        x: in the references' space, in float32 or wider.
        references: (N, C, h, w).
        reference_contrast: (1 or B, N) of `reference_contrasts`, for the same mask.
        mask: (1 or B, 1, h, w) in [0, 1], where to compare.
    """
    seen = torch.ones_like(x[:1, :1]) if mask is None else mask.to(x.dtype)
    mean = (seen * x).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True).clamp_min(1e-6)
    query = (seen * (x - mean)).flatten(1)  # (B, C h w)
    contrast = (query * (x - mean).flatten(1)).sum(1, keepdim=True).sqrt()
    # The query's channels sum to zero over the mask, so the references' means drop out of the product.
    covariance = references.collect(x.device, len(x), lambda z: query @ z.flatten(1).T.to(query.dtype))
    return (covariance / (contrast * reference_contrast).clamp_min(1e-6)).clamp(-1, 1)


def leave_one_out(among: Tensor, temperature: float) -> Tensor:
    """Return S_ref, the median of the references' soft-mean similarity with all others: (N, N) -> scalar.

    The soft mean at temperature tau is tau log mean exp(s / tau), between the mean and the maximum. S_ref
    calibrates the gate on the set itself. It is 0.5 with fewer than three references, which are too few to
    compare.
    """
    count = len(among)
    if count < 3:
        return among.new_tensor(0.5)
    others = among.masked_fill(torch.eye(count, dtype=torch.bool, device=among.device), -math.inf)
    return (temperature * (torch.logsumexp(others / temperature, dim=1) - math.log(count - 1))).median()


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of a negation set that its comparison with predictions needs.

    Attributes:
        contrast: (1 or B, N) of `reference_contrasts`.
        typical: scalar, S_ref: how similar the set's images are to each other.
    """

    contrast: Tensor
    typical: Tensor


def reference_statistics(
    references: References, temperature: float, device: torch.device, mask: Tensor | None = None
) -> ReferenceStatistics:
    """Return the contrasts of all references, and S_ref of at most STATISTICS_SAMPLE of them, evenly spread.

    With one mask per sample the batch shares S_ref, that of its first mask: except in contrived workflows all
    samples have the same inpainting mask.
    """
    contrast = reference_contrasts(references, device, mask)
    sample = evenly_spread(len(references), STATISTICS_SAMPLE)
    chosen = References(references.latents[sample.to(references.latents.device)], prepare=references.prepare)
    first = None if mask is None else mask[:1]
    own = contrast[:1, sample.to(device)]
    among = torch.cat([similarities(z, chosen, own, first) for _, z in chosen.chunks(device)])
    return ReferenceStatistics(contrast, leave_one_out(among, temperature))


def closest(x: Tensor, references: References, count: int) -> tuple[Tensor, Tensor]:
    """Return similarities (B, k) and indices (B, k) of every sample's most similar references, best first."""
    among = similarities(x, references, reference_contrasts(references, x.device))
    best = among.topk(min(count, len(references)), dim=1)
    return best.values, best.indices
