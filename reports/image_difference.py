"""Measures of the difference between two images that need no downloaded weights."""

from __future__ import annotations

from dataclasses import dataclass

import kornia.metrics
import torch.nn.functional as F
from torch import Tensor

VISIBLE = 8 / 255
"""A channel that differs by more than this counts as changed."""
SSIM_WINDOW = 11
"""Pixels, as in the measure's paper (Wang et al. 2004)."""
BLUR = 8
"""A blurred image keeps this many pixels along its shorter side."""


@dataclass(frozen=True)
class Difference:
    """Difference of two images.

    Attributes:
        mean_change: mean absolute change, in [0, 1].
        changed_area: share of pixels that visibly changed, in [0, 1].
        ssim: structural similarity, in [-1, 1].
    """

    mean_change: float
    changed_area: float
    ssim: float


def compare(a: Tensor, b: Tensor) -> list[Difference]:
    """Return one Difference per pair of images (B, H, W, 3) in [0, 1]."""
    change = (a - b).abs()
    similarity = kornia.metrics.ssim(a.movedim(-1, 1), b.movedim(-1, 1), SSIM_WINDOW)
    values = (
        change.flatten(1).mean(1),
        (change.amax(-1) > VISIBLE).flatten(1).float().mean(1),
        similarity.flatten(1).mean(1),
    )
    return [Difference(*row) for row in zip(*(value.tolist() for value in values))]


def amplified(a: Tensor, b: Tensor) -> Tensor:
    """Return the absolute change as an image in [0, 1], scaled so that its largest value is white."""
    change = (a - b).abs()
    return change / change.amax().clamp_min(1e-6)


def blurred(images: Tensor) -> Tensor:
    """Blur images (B, H, W, 3) to a few soft patches of colour. The size stays the same."""
    _, height, width, _ = images.shape
    scale = BLUR / min(height, width)
    small = F.interpolate(
        images.movedim(-1, 1), size=(round(height * scale), round(width * scale)), mode="area"
    )
    return F.interpolate(small, size=(height, width), mode="bilinear").movedim(1, -1)
