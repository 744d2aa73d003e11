"""How much latents resemble references: the correlation of their contents, free of brightness, contrast, size and scale.

The mean of every channel over the mask is taken off both sides, so neither brightness, nor contrast, nor the size of the
latent or of the VAE's scale matter. References are streamed; what depends on them alone is summed once per run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.references import References

CALIBRATION_SAMPLE = 1024
"""References that take part in the leave-one-out calibration, which costs the square of their number."""


def normalized_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over references and log of the mean of exp(logits): (B, N) -> (B, N), (B,). Safe from under- and overflow."""
    log_mean = torch.logsumexp(logits, dim=1) - math.log(logits.shape[1])
    return torch.softmax(logits, dim=1), log_mean


def soft_mean(similarity: Tensor, temperature: float) -> Tensor:
    """tau (logsumexp(s / tau) - log N): between the mean and the maximum over references, (B, N) -> (B,)."""
    return temperature * normalized_weights(similarity / temperature)[1]


def contrasts(latents: Tensor, mask: Tensor | None = None) -> Tensor:
    """Norm of latents minus their channel means, over the mask: (N, C, h, w) -> (M, N) for a mask (M, 1, h, w); M = 1 without."""
    pixels = latents.flatten(2)
    weights = torch.ones_like(pixels[:1, 0]) if mask is None else mask.flatten(1).to(pixels.dtype)
    area = weights.sum(1).clamp_min(1e-6)[:, None, None]
    mean = torch.einsum("mp,ncp->mnc", weights, pixels) / area
    square = weights @ pixels.square().sum(1).T
    return (square - area[..., 0] * mean.square().sum(-1)).clamp_min(0).sqrt()


def reference_contrasts(references: References, device: torch.device, mask: Tensor | None = None) -> Tensor:
    """`contrasts` of all references, (M, N), on the device."""
    return references.collect(device, 1 if mask is None else len(mask), lambda z: contrasts(z, mask))


def similarities(
    x: Tensor, references: References, reference_contrast: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Correlation of every sample with every reference: (B, C, h, w) -> (B, N) in [-1, 1].

    Args:
        x: in the references' space, in float32 or wider.
        references: (N, C, h, w).
        reference_contrast: (1 or B, N) of `reference_contrasts`, for the same mask.
        mask: (1 or B, 1, h, w) in [0, 1], where to look.
    """
    seen = torch.ones_like(x[:1, :1]) if mask is None else mask.to(x.dtype)
    mean = (seen * x).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True).clamp_min(1e-6)
    query = (seen * (x - mean)).flatten(1)
    contrast = (query * (x - mean).flatten(1)).sum(1, keepdim=True).sqrt()
    # The query's channels sum to zero over the mask, so the references' means drop out of the product.
    covariance = references.collect(x.device, len(x), lambda z: query @ z.flatten(1).T.to(query.dtype))
    return (covariance / (contrast * reference_contrast).clamp_min(1e-6)).clamp(-1, 1)


def leave_one_out(among: Tensor, temperature: float) -> Tensor:
    """S_ref, the median over references of their soft-mean similarity with all the others: (N, N) -> a scalar tensor.

    It calibrates the gate on the set itself. With fewer than three references there is nothing to compare, and it is 0.5.
    """
    count = len(among)
    if count < 3:
        return among.new_tensor(0.5)
    others = among.masked_fill(torch.eye(count, dtype=torch.bool, device=among.device), -math.inf)
    return (temperature * (torch.logsumexp(others / temperature, dim=1) - math.log(count - 1))).median()


@dataclass(frozen=True)
class Calibration:
    """What is known of a set before it is compared with anything.

    Attributes:
        contrast: (1 or B, N) of `reference_contrasts`.
        typical: scalar, S_ref: how similar the set's images are among themselves.
    """

    contrast: Tensor
    typical: Tensor


def calibrate(
    references: References, temperature: float, device: torch.device, mask: Tensor | None = None
) -> Calibration:
    """Contrasts of all references, and S_ref of at most CALIBRATION_SAMPLE of them, spread evenly over the set.

    A batch with one mask per sample shares S_ref, that of its first mask: its samples have the same inpainting mask in all
    but contrived workflows.
    """
    contrast = reference_contrasts(references, device, mask)
    count = len(references)
    sample = torch.linspace(0, count - 1, min(count, CALIBRATION_SAMPLE)).round().long()
    chosen = References(references.latents[sample.to(references.latents.device)], prepare=references.prepare)
    first = None if mask is None else mask[:1]
    own = contrast[:1, sample.to(device)]
    among = torch.cat([similarities(z, chosen, own, first) for _, z in chosen.chunks(device)])
    return Calibration(contrast, leave_one_out(among, temperature))


def closest(x: Tensor, references: References, count: int) -> tuple[Tensor, Tensor]:
    """The most similar references of every sample: similarities (B, k), best first, and their places in the set (B, k)."""
    among = similarities(x, references, reference_contrasts(references, x.device))
    best = among.topk(min(count, len(references)), dim=1)
    return best.values, best.indices
