"""How much two images differ, with nothing to download."""

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
    """Two images against each other: mean absolute change and changed area in [0, 1], structural similarity in [-1, 1]."""

    mean_change: float
    changed_area: float
    ssim: float


def compare(a: Tensor, b: Tensor) -> list[Difference]:
    """One Difference per pair of images (B, H, W, 3) in [0, 1]."""
    change = (a - b).abs()
    similarity = kornia.metrics.ssim(a.movedim(-1, 1), b.movedim(-1, 1), SSIM_WINDOW)
    values = (
        change.flatten(1).mean(1),
        (change.amax(-1) > VISIBLE).flatten(1).float().mean(1),
        similarity.flatten(1).mean(1),
    )
    return [Difference(*row) for row in zip(*(value.tolist() for value in values))]


def amplified(a: Tensor, b: Tensor) -> Tensor:
    """The change as an image in [0, 1], its largest value white."""
    change = (a - b).abs()
    return change / change.amax().clamp_min(1e-6)


def blurred(images: Tensor) -> Tensor:
    """Images (B, H, W, 3) reduced to a few soft patches of colour of the same size."""
    _, height, width, _ = images.shape
    scale = BLUR / min(height, width)
    small = F.interpolate(
        images.movedim(-1, 1), size=(round(height * scale), round(width * scale)), mode="area"
    )
    return F.interpolate(small, size=(height, width), mode="bilinear").movedim(1, -1)
