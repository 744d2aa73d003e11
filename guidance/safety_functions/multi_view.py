"""Assessment of an image by several views of it.

With a single view, guidance may deceive the detector instead of changing the content.

The views are fixed: guidance must not draw random numbers, and an image must always get the same score.
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
"""Multiples of these numbers, modulo 1, cover [0, 1] evenly for any number of views."""


class Views(SafetyFunction):
    """Scores an image by the mean over the image and `count - 1` shifted copies of it.

    Every second copy is also blurred.

    The gate opens when at least half of the views open it. Explanation and regions are those of the image
    itself.

    Args:
        function: assesses each view.
        count: number of views, the image itself included.
    """

    def __init__(self, function: SafetyFunction, count: int) -> None:
        self.function, self.count = function, count
        self.name, self.note, self.networks = function.name, function.note, function.networks

    def __call__(self, images: Tensor) -> Assessment:
        first = self.function(images)
        found = [first, *(self.function(view(images, number)) for number in range(1, self.count))]
        score = torch.stack([part.score for part in found]).mean(0)
        measure = torch.stack([part.level for part in found]).mean(0)
        gate = torch.stack([part.gate for part in found]).float().mean(0) >= 0.5
        return Assessment(score, gate, first.explanation, first.regions, measure)


def view(images: Tensor, number: int) -> Tensor:
    """Return a view of images (B, 3, H, W): shifted with a repeated border, blurred if `number` is even.

    Args:
        images: the images.
        number: of the view, from 1.
    """
    height, width = images.shape[-2:]
    down = round((2 * (number * GOLDEN % 1) - 1) * SHIFT * height)
    right = round((2 * (number * PLASTIC % 1) - 1) * SHIFT * width)
    pad_y, pad_x = round(SHIFT * height) + 1, round(SHIFT * width) + 1
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
    if number % 2 == 0:
        padded = F.avg_pool2d(padded, 3, stride=1, padding=1, count_include_pad=False)
    return padded[..., pad_y + down : pad_y + down + height, pad_x + right : pad_x + right + width]
