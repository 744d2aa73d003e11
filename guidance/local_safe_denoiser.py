"""Safe Denoiser for a thing that may stand anywhere: the posterior over masked patches at every position.

Whole-layout similarity cannot see a small object that may stand anywhere. When the negation set says where in its pictures
the unwanted thing is, each masked patch is looked for at every position, by correlation at a coarse resolution: early
predictions, where layout is decided, hold no finer detail. The unsafe mean is then the mean over (patch, position) of the
part of the prediction that the patch explains, a translation-equivariant version of the paper's Eq. 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .composition import capped, per_sample
from .safe_denoiser import SafeDenoiserResult, SafeDenoiserSettings, gate_of
from .similarity import CALIBRATION_SAMPLE, leave_one_out, normalized_weights, soft_mean

COARSE_SIDE = 16
"""Matching reduces latents to about this many pixels on the shorter side."""

VISIBLE_SHARE = 0.85
"""A position counts when at least this share of the patch's region lies inside the picture and the mask."""


@dataclass(frozen=True)
class Patches:
    """Masked parts of the references, centred in equal windows.

    Attributes:
        content: (N, C, k f, k f) weighted latents minus their regional mean, at full resolution; f is `factor`.
        coarse: (N, C, k, k), the same at coarse resolution.
        regions: (N, 1, k, k) coarse region weights in [0, 1].
        latents: (N, C, h, w) the references they were cut from.
        factor: reduction from latent to coarse pixels.
    """

    content: Tensor
    coarse: Tensor
    regions: Tensor
    latents: Tensor
    factor: int

    def __len__(self) -> int:
        return len(self.coarse)

    def to(self, device: torch.device) -> Patches:
        """The same patches on another device."""
        content, coarse, regions, latents = (t.to(device) for t in (self.content, self.coarse, self.regions, self.latents))
        return Patches(content, coarse, regions, latents, self.factor)

    def first(self, count: int) -> Patches:
        """At most `count` patches, from the front of the set."""
        return Patches(self.content[:count], self.coarse[:count], self.regions[:count], self.latents[:count], self.factor)


def cut_patches(latents: Tensor, regions: Tensor) -> Patches:
    """Cut every reference's region out of it.

    Args:
        latents: (N, C, h, w) float32 or wider, in the model's latent space.
        regions: (N, 1, h, w) in [0, 1].
    """
    factor = max(1, round(min(latents.shape[-2:]) / COARSE_SIDE))
    side = max(_extent(region[0]) for region in regions)
    # One coarse pixel more than the region needs, because windows begin on coarse pixels; odd, so that it has a middle.
    k = math.ceil(side / factor + 1) | 1
    windows = [_window(z, r, k, factor) for z, r in zip(latents, regions)]
    content, weights = torch.stack([z for z, _ in windows]), torch.stack([r for _, r in windows])
    coarse_weights = F.avg_pool2d(weights, factor)
    coarse = F.avg_pool2d(content, factor)
    return Patches(_centred(content, weights), _centred(coarse, coarse_weights), coarse_weights, latents, factor)


def _extent(region: Tensor) -> int:
    """Longer side of the region's bounding box in pixels, at least 1."""
    inside = region > 0.5 * region.max()
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    return int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1


def _window(latent: Tensor, region: Tensor, k: int, factor: int) -> tuple[Tensor, Tensor]:
    """The window of k x k coarse pixels around the region's bounding box; outside the picture the region is zero."""
    inside = region[0] > 0.5 * region.max()
    side = k * factor
    starts = []
    for axis in (inside.any(1), inside.any(0)):
        occupied = axis.nonzero()
        middle = (int(occupied.min()) + int(occupied.max()) + 1) / 2
        starts.append(round((middle - side / 2) / factor) * factor + side)
    cut = (slice(None), slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side))
    return F.pad(latent, (side,) * 4)[cut], F.pad(region, (side,) * 4)[cut]


def _centred(content: Tensor, weights: Tensor) -> Tensor:
    mean = (weights * content).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True).clamp_min(1e-6)
    return weights * (content - mean)


def correlations(x: Tensor, patches: Patches, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Correlation of every patch with the prediction at every coarse position, and the patch's regression coefficient there.

    Args:
        x: (B, C, h, w) prediction.
        mask: (1 or B, 1, h, w) in [0, 1], where to look.

    Returns:
        (B, N, h', w') correlations in [-1, 1], and how much of the patch there is: x's part along the patch is coefficient
        times patch. Positions at which the patch is not visible have -1 and 0.
    """
    small = F.avg_pool2d(x, patches.factor)
    seen = torch.ones_like(small[:1, :1]) if mask is None else F.avg_pool2d(mask.to(x.dtype), patches.factor)
    (b, c, h, w), n, k = small.shape, len(patches), patches.coarse.shape[-1]
    visible = F.conv2d(seen, patches.regions, padding=k // 2)
    # Where a part of a patch is hidden, its own sum over the rest is not zero, and the prediction's mean must not count as
    # similarity: `rest` (1 or B, N, C, h', w') takes it off again.
    rest = F.conv2d(seen, patches.coarse.reshape(n * c, 1, k, k), padding=k // 2).view(-1, n, c, h, w)

    masked = small * seen
    moments = torch.cat([masked, (masked * small).sum(1, keepdim=True)], dim=1).view(b * (c + 1), 1, h, w)
    summed = F.conv2d(moments, patches.regions, padding=k // 2).view(b, c + 1, n, h, w).transpose(1, 2)
    mean = summed[:, :, :c] / visible.clamp_min(1e-6)[:, :, None]
    covariance = F.conv2d(masked, patches.coarse, padding=k // 2) - (mean * rest).sum(2)
    variance_x = (summed[:, :, c] - mean.square().sum(2) * visible).clamp_min(0)
    # `coarse` is weighted once; its weighted energy divides by the weight again where there is any.
    variance_z = (patches.coarse.square() / patches.regions.clamp_min(1e-3)).sum((1, 2, 3))[:, None, None].clamp_min(1e-12)
    correlation = covariance / (variance_x.sqrt() * variance_z.sqrt()).clamp_min(1e-6)
    inside = visible >= VISIBLE_SHARE * patches.regions.sum((1, 2, 3))[:, None, None]
    return torch.where(inside, correlation.clamp(-1, 1), -1.0), torch.where(inside, covariance / variance_z, 0.0)


def best_correlations(x: Tensor, patches: Patches, mask: Tensor | None = None) -> Tensor:
    """Every patch's highest correlation over positions: (B, N)."""
    return correlations(x, patches, mask)[0].amax((2, 3))


def typical_patch_similarity(patches: Patches, temperature: float) -> Tensor:
    """S_ref of masked pictures: each one's best correlations with the patches of all the others, a scalar tensor."""
    sample = patches.first(CALIBRATION_SAMPLE)
    return leave_one_out(torch.cat([best_correlations(z, sample) for z in sample.latents.split(32)]), temperature)


def local_correction(
    denoised: Tensor,
    patches: Patches,
    typical: Tensor,
    settings: SafeDenoiserSettings,
    opened: Tensor,
    mask: Tensor | None = None,
) -> SafeDenoiserResult:
    """Take the unwanted thing's part out of the prediction, where a patch matches and once it matches well enough.

    Arguments and result are those of `calibrated_correction`, with patches instead of references. `opened` (B,) bool marks
    samples whose gate was open before: it stays open. Otherwise the first push would close it, and the model, which
    still follows the prompt, would bring the thing back.
    """
    correlation, coefficient = correlations(denoised, patches, mask)
    score = soft_mean(correlation.amax((2, 3)), settings.temperature)
    gate, threshold = gate_of(score, typical, settings.threshold)
    gate = torch.where(opened, 1.0, gate)
    if not bool((gate > 0).any()):
        return SafeDenoiserResult(torch.zeros_like(denoised), gate, score, threshold)
    weights = normalized_weights(correlation.flatten(1) / settings.temperature)[0].view_as(correlation)
    unsafe = _paint(weights * coefficient.clamp_min(0), patches, denoised.shape[-2:])
    delta = capped(-settings.strength * per_sample(gate, denoised) * unsafe, denoised, settings.cap)
    return SafeDenoiserResult(delta, gate, score, threshold)


def _paint(amounts: Tensor, patches: Patches, size: tuple[int, int] | torch.Size) -> Tensor:
    """Sum of the patches at their positions, each in its amount: (B, N, h', w') -> (B, C, h, w)."""
    pad = patches.coarse.shape[-1] // 2 * patches.factor
    painted = F.conv_transpose2d(amounts, patches.content, stride=patches.factor, padding=pad)
    height, width = size
    return F.pad(painted, (0, max(0, width - painted.shape[-1]), 0, max(0, height - painted.shape[-2])))[..., :height, :width]
