"""Several views of an image judged together, so that guidance changes what is seen rather than fools one detector.

The views are fixed: guidance must not draw random numbers, and the same image must always get the same score.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import Assessment, SafetyFunction

SHIFT = 1 / 16
"""Largest shift of a view, as a share of the image's side."""

GOLDEN = 0.61803398875
PLASTIC = 0.7548776662
"""Multiples of these, modulo 1, fill the interval evenly for any number of views."""


class Views(SafetyFunction):
    """The mean score over the image and `count - 1` shifted copies, every other one of them softened too.

    The gate opens when at least half of the views open it.
    """

    def __init__(self, function: SafetyFunction, count: int) -> None:
        self.function, self.count = function, count
        self.name, self.networks = function.name, function.networks

    def __call__(self, images: Tensor) -> Assessment:
        first = self.function(images)
        found = [first, *(self.function(view(images, number)) for number in range(1, self.count))]
        score = torch.stack([part.score for part in found]).mean(0)
        gate = torch.stack([part.gate for part in found]).float().mean(0) >= 0.5
        return Assessment(score, gate, first.explanation, first.regions)


def view(images: Tensor, number: int) -> Tensor:
    """The view of images (B, 3, H, W) with that number: shifted, with borders repeated, and softened if it is even."""
    height, width = images.shape[-2:]
    down, right = (
        round((2 * (number * step % 1) - 1) * SHIFT * side)
        for step, side in ((GOLDEN, height), (PLASTIC, width))
    )
    pad_y, pad_x = round(SHIFT * height) + 1, round(SHIFT * width) + 1
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
    if number % 2 == 0:
        padded = F.avg_pool2d(padded, 3, stride=1, padding=1, count_include_pad=False)
    return padded[..., pad_y + down : pad_y + down + height, pad_x + right : pad_x + right + width]
